"""What parity cannot show of families with parts of their own: published configs, counts without consent, clamps that
tiny models never reach, positions beyond the first context, and tensors that nobody needs.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from model.activation import activate_gated
from model.attention.rope import rotary_tables
from model.batch import LayerBudget
from model.errors import CheckpointError
from model.moe.router import choose
from model.shapes.attention import Attention, GatedDeltaNet
from model.shapes.mixtures import Router
from tests.families import reference
from tests.families.examples.phimoe import LONGROPE
from tests.model.tiny import whole_logits
from weights.config import decoder_config
from weights.load import load_model

GPT_OSS: dict[str, Any] = {
    "model_type": "gpt_oss",
    "attention_bias": True,
    "experts_per_token": 4,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2880,
    "initial_context_length": 4096,
    "intermediate_size": 2880,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "max_position_embeddings": 131072,
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "quantization_config": {"quant_method": "mxfp4"},
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "vocab_size": 201088,
}
QWEN3_NEXT: dict[str, Any] = {
    "model_type": "qwen3_next",
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "full_attention_interval": 4,
    "head_dim": 256,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 5120,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_value_head_dim": 128,
    "max_position_embeddings": 262144,
    "mlp_only_layers": [],
    "moe_intermediate_size": 512,
    "norm_topk_prob": True,
    "num_attention_heads": 16,
    "num_experts": 512,
    "num_experts_per_tok": 10,
    "num_hidden_layers": 48,
    "num_key_value_heads": 2,
    "partial_rotary_factor": 0.25,
    "rope_scaling": None,
    "rope_theta": 10000000,
    "shared_expert_intermediate_size": 512,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
PHIMOE = reference.BASE | {"model_type": "phimoe", "num_local_experts": 4, "rope_parameters": LONGROPE}
LLAMA4 = reference.BASE | {"model_type": "llama4_text", "head_dim": 8, "num_local_experts": 4}


def test_gpt_oss_as_published() -> None:
    config = decoder_config(GPT_OSS)
    shapes = [shape for shape in config.attention if isinstance(shape, Attention)]
    assert [shape.window for shape in shapes] == [128, 0] * 12
    assert all(shape.rope is not None and not shape.rope.truncate and shape.sinks for shape in shapes)
    assert (config.experts.minimum, config.experts.trained, config.experts.maximum) == (1, 4, 32)


def test_qwen3_next_as_published() -> None:
    config = decoder_config(QWEN3_NEXT)
    assert [isinstance(shape, GatedDeltaNet) for shape in config.attention] == [True, True, True, False] * 12
    shape = config.attention[3]
    assert isinstance(shape, Attention) and shape.rope is not None
    assert (shape.rope.width, shape.rope.theta, shape.gated) == (64, 1e7, True)


@pytest.mark.parametrize(
    ("raw", "changes", "said"),
    [
        (GPT_OSS, {"rope_scaling": None}, "'rope_scaling' is missing"),
        (GPT_OSS, {"initial_context_length": 8192}, "initial_context_length"),
        (GPT_OSS, {"experts_per_token": 2}, "disagree"),
        (GPT_OSS, {"swiglu_limit": 5.0}, "swiglu_limit"),
        (QWEN3_NEXT, {"layer_types": ["sliding_attention"] * 48}, "layer_types must say"),
        (QWEN3_NEXT, {"hidden_act": "gelu"}, "hidden_act"),
        (PHIMOE, {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "rope_type"),
        (PHIMOE, {"num_experts_per_tok": 3}, "num_experts_per_tok"),
        (LLAMA4, {"attention_chunk_size": None}, "no attention_chunk_size"),
        (LLAMA4, {"no_rope_layers": [1]}, "layer_types must say"),
        ({"model_type": "llama4", "text_config": LLAMA4, "tie_word_embeddings": True}, {}, "tie_word_embeddings"),
    ],
)
def test_what_cannot_be_served_is_named(raw: dict[str, Any], changes: dict[str, Any], said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        decoder_config(raw | changes)


@pytest.mark.parametrize(("raw", "trained"), [(PHIMOE, 2), (LLAMA4, 1)])
def test_other_counts_need_consent(raw: dict[str, Any], trained: int) -> None:
    found = decoder_config(raw).experts
    assert (found.minimum, found.trained, found.maximum) == (trained, trained, trained)


def test_sigmoids_that_are_full_do_not_tie() -> None:
    """As in transformers' Llama 4, which ranks logits."""
    logits_TE, one = torch.tensor([[20.0, 25.0, -3.0]]), LayerBudget(torch.ones(1, dtype=torch.int64), 1)
    choice = choose(logits_TE, one, Router("sigmoid", weigh_input=True), None, trained=1)
    assert (choice.expert_TK.item(), choice.weight_TK.item()) == (1, 1.0)


def test_clamped_experts_beyond_the_clamp() -> None:
    both = torch.randn(50, 12, generator=torch.Generator().manual_seed(0)) * 10
    config = GptOssConfig(hidden_size=4, intermediate_size=6, num_local_experts=1)
    expected = GptOssExperts(config)._apply_gate(both)
    assert (both.abs() > config.swiglu_limit).any()
    torch.testing.assert_close(activate_gated(both[:, 0::2], both[:, 1::2], "swiglu_clamped"), expected)


def test_longrope_turns_to_its_long_factors_beyond_the_first_context() -> None:
    shape = decoder_config(PHIMOE).attention[0]
    assert isinstance(shape, Attention) and shape.rope is not None
    cos, sin = rotary_tables(torch.tensor([39, 40]), shape.rope)
    for row, position, name, scale in ((0, 39, "short_factor", 1.2), (1, 40, "long_factor", 1.3)):
        angles = [position / (factor * 10000.0 ** (pair / 4)) for pair, factor in enumerate(LONGROPE[name])]
        expected = torch.tensor(angles * 2)
        torch.testing.assert_close(cos[row, 0], expected.cos() * scale)
        torch.testing.assert_close(sin[row, 0], expected.sin() * scale)


def test_tensors_that_guess_ahead_are_skipped(tmp_path: Path) -> None:
    reference.save(reference.build("qwen3_next", 0), tmp_path)
    plain = whole_logits(load_model(tmp_path)[0], reference.PROMPT, [1, 1])
    (tmp_path / "model.safetensors.index.json").unlink()
    stored = {name: tensor for file in tmp_path.glob("*.safetensors") for name, tensor in load_file(file).items()}
    save_file(stored | {"mtp.fc.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    assert torch.equal(whole_logits(load_model(tmp_path)[0], reference.PROMPT, [1, 1]), plain)
