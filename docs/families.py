"""The table of supported families, from the files in model/families: what each is, its counts, and what runs it."""

import importlib
from typing import Any

from model.backends.cpu.refusal import refusal
from model.options import Options
from model.shapes.decoder import DecoderConfig
from model.shapes.mixtures import TopK
from tests.families.examples import examples_of
from weights.config import decoder_config, families

# A config of real proportions; a family's example says what is its own.
SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "intermediate_size": 128,
}
# What of an example's own sizes the kernels want to be multiples of 16 or 32.
WIDTHS = {
    "head_dim": 64,
    "kv_lora_rank": 64,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
}
TINY = ("hidden_size", "n_embd", "n_head")  # of the examples


def table() -> str:
    """One line per family."""
    head = ["| `model_type` | | expert counts | runs on | prefix cache |", "|---|---|---|---|---|"]
    return "\n".join([*head, *(_line(name) for name in families())]) + "\n"


def _line(name: str) -> str:
    module = importlib.import_module(f"model.families.{name}")
    says = (module.__doc__ or "").strip().splitlines()[0].partition(":")[0].partition(" (")[0].partition(",")[0]
    examples = examples_of(name)
    if not examples:
        return f"| `{name}` | {says} | as the checkpoint says | kernels | yes |"
    config = decoder_config(_large(examples[0]) | {"model_type": name})
    reason = refusal(config, Options())
    runs_on, prefixes = "torch" if reason else "kernels", "yes" if config.prefix_reusable else "no"
    cells = (f"`{name}`", says, _counts(config), runs_on, prefixes)
    return f"| {' | '.join(cells)} |"


def _large(example: Any) -> dict[str, Any]:
    given = {key: WIDTHS.get(key, value) for key, value in example.items() if key not in TINY}
    if "d_model" in given:  # an encoder and a decoder, with names of their own for all sizes
        return given
    if "text_config" in given:
        return given | {"text_config": _large(given["text_config"])}
    return (
        SIZES | given | {name: _stretched(given[name]) for name in ("rope_parameters", "rope_scaling") if name in given}
    )


def _stretched(rope: Any) -> Any:
    """Rotary parameters with a factor for each pair of a wide head, where each pair has one."""
    if not isinstance(rope, dict):
        return rope
    pairs = WIDTHS["head_dim"] // 2
    factors = {name: rope[name] for name in ("short_factor", "long_factor") if name in rope}
    return rope | {name: values * (pairs // len(values)) for name, values in factors.items()}


def _counts(config: DecoderConfig) -> str:
    if not config.mixtures:
        return "none: dense"
    if any(kind.fixed for kind in config.mixtures):
        return "as trained; others by `--allow-extrapolated-experts`"
    routers = [kind.router for kind in config.mixtures if isinstance(kind, TopK)]
    return "1 to all of the kept groups" if any(router.groups > 1 for router in routers) else "1 to all"
