"""What each demo model is: its config.json, and the figures of its training. `docs/training.md` has the results."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

VOCABULARY = 1024
LENGTH, ROWS = 192, 6  # tokens of a row, rows of a step
BALANCE = 0.01  # coefficient of balance losses
EXPERTS = 8

DENSE: dict[str, Any] = {
    "hidden_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "dtype": "float32",  # to run in; stored in bfloat16
}
DECODER: dict[str, Any] = DENSE | {"num_experts": EXPERTS, "intermediate_size": 64}
T5: dict[str, Any] = {
    "d_model": 96,
    "d_kv": 32,
    "num_heads": 3,
    "num_experts": EXPERTS,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "tie_word_embeddings": False,  # tied ones have a scale, with which a short training learns slowly
    "pad_token_id": 0,
    "eos_token_id": 0,
    "decoder_start_token_id": 0,
    "dtype": "float32",
}


@dataclass(frozen=True)
class Recipe:
    """A model and its training. Steps are of `ROWS` rows; learning rates rise, then fall to zero as a cosine."""

    config: Mapping[str, Any]
    counts: tuple[int, ...] = (1, 2, 4, 8)  # that are measured
    field: str = ""  # of a request, whose `values` are measured as well
    values: tuple[float, ...] = ()
    steps: int = 800
    muon: float = 0.02  # of matrices
    peak: float = 4e-3  # of the rest
    warm: int = 20
    falls: bool = True  # else the learning rates stay
    seed: int = 1

    @property
    def family(self) -> str:
        """The kind of mixture."""
        return str(self.config["model_type"])

    @property
    def restrictions(self) -> tuple[str, ...]:
        """What may be done to the weights of those experts that a count keeps, first what is the family's default."""
        if self.family == "soft_moe":
            return "drop", "renormalise"
        return ("renormalise", "drop") if self.family in ("soft_t5", "deep_moe", "mu_moe") else ()


# All decoders begin with the embeddings, attention and norms of this one, and with mixtures of their own.
BASE = "base"
BASE_RECIPE = Recipe(DENSE | {"model_type": "llama", "intermediate_size": 256}, (), steps=1500, warm=100, falls=False)
ALONE: dict[str, Any] = {"steps": 3000, "warm": 100}  # of encoder–decoders, which start untrained

_OFFSETS = (-0.5, -0.25, 0.25, 0.5)
RECIPES: dict[str, Recipe] = {
    "soft-stories": Recipe(
        DECODER | {"model_type": "soft_moe", "intermediate_size": 96, "segment_length": 16},
    ),
    "deep-stories": Recipe(
        DECODER | {"model_type": "deep_moe", "intermediate_size": 128, "gate_intermediate_size": 32},
    ),
    "switch-stories": Recipe(
        T5
        | {
            "model_type": "switch_transformers",
            "architectures": ["SwitchTransformersForConditionalGeneration"],
            "d_ff": 128,
            "num_layers": 2,
            "num_sparse_encoder_layers": 1,
            "num_decoder_layers": 2,
            "num_sparse_decoder_layers": 1,
        },
        **ALONE,
    ),
    "moe-plus-plus-stories": Recipe(
        DECODER | {"model_type": "moe_plus_plus", "num_experts_per_tok": 2},
        counts=(1, 2, 4, 8, 12),
        field="free_bias",
        values=(-2.0, -1.0, 1.0, 2.0),
    ),
    "remoe-stories": Recipe(DECODER | {"model_type": "remoe"}, field="gate_offset", values=_OFFSETS),
    "soft-t5-stories": Recipe(
        T5 | {"model_type": "soft_t5", "d_ff": 128, "num_layers": 2, "num_decoder_layers": 2},
        **ALONE,
    ),
    "dynmoe-stories": Recipe(DECODER | {"model_type": "dynmoe"}, field="gate_offset", values=_OFFSETS),
    "mu-stories": Recipe(
        DECODER
        | {"model_type": "mu_moe", "num_experts": 32, "intermediate_size": 192, "factorisation": "cp", "ranks": [128]},
        counts=(1, 2, 4, 8, 32),
    ),
    "st-moe-stories": Recipe(DECODER | {"model_type": "st_moe", "num_experts_per_tok": 2, "noisy_gating": False}),
}
