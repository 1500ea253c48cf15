"""What parity cannot show of DeepSeek's kin: configs as published, biases that matter, layers beyond the last, and what
is refused.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.errors import CheckpointError
from model.shapes.attention import MLA, Attention
from model.shapes.decoder import DecoderConfig
from model.shapes.mixtures import Dense, TopK
from tests.families import reference
from tests.families.test_parity import loaded
from tests.model.tiny import whole_logits
from weights.config import decoder_config
from weights.folder import read_json
from weights.load import load_model

BIASED = ["deepseek_v3", "kimi_k2", "glm4_moe", "ernie4_5_moe", "minimax_m2"]
DEEPSEEK_V3: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "attention_bias": False,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "v_head_dim": 128,
    "vocab_size": 129280,
}
KIMI_K2 = DEEPSEEK_V3 | {
    "model_type": "kimi_k2",
    "aux_loss_alpha": 0.001,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 131072,
    "n_group": 1,
    "n_routed_experts": 384,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.827,
    "seq_aux": True,
    "topk_group": 1,
    "vocab_size": 163840,
}
DEEPSEEK_V2 = DEEPSEEK_V3 | {
    "model_type": "deepseek_v2",
    "first_k_dense_replace": 1,
    "hidden_size": 5120,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "n_routed_experts": 160,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 60,
    "routed_scaling_factor": 16.0,
    "scoring_func": "softmax",
    "topk_group": 3,
    "topk_method": "group_limited_greedy",
    "vocab_size": 102400,
}
GLM: dict[str, Any] = {
    "model_type": "glm4_moe",
    "attention_bias": True,
    "first_k_dense_replace": 3,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 5120,
    "intermediate_size": 12288,
    "max_position_embeddings": 131072,
    "moe_intermediate_size": 1536,
    "n_group": 1,
    "n_routed_experts": 160,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 96,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 92,
    "num_key_value_heads": 8,
    "num_nextn_predict_layers": 1,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "routed_scaling_factor": 2.5,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "use_qk_norm": True,
    "vocab_size": 151552,
}
ERNIE: dict[str, Any] = {
    "model_type": "ernie4_5_moe",
    "hidden_act": "silu",
    "hidden_size": 2560,
    "intermediate_size": 12288,
    "max_position_embeddings": 131072,
    "moe_capacity": [64, 64, 64],
    "moe_gate": "topk",
    "moe_intermediate_size": 1536,
    "moe_k": 6,
    "moe_layer_interval": 1,
    "moe_layer_start_index": 1,
    "moe_num_experts": 64,
    "moe_num_shared_experts": 2,
    "moe_use_aux_free": True,
    "num_attention_heads": 20,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "num_nextn_predict_layers": 1,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000,
    "tie_word_embeddings": True,
    "use_bias": False,
    "use_rmsnorm": True,
    "vocab_size": 103424,
}
MINIMAX: dict[str, Any] = {
    "model_type": "minimax_m2",
    "attn_type_list": [1] * 62,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 3072,
    "intermediate_size": 1536,
    "layernorm_full_attention_beta": 1.0,
    "layernorm_linear_attention_beta": 1.0,
    "layernorm_mlp_beta": 1.0,
    "max_position_embeddings": 196608,
    "mlp_intermediate_size": 8192,
    "mtp_transformer_layers": 1,
    "num_attention_heads": 48,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 62,
    "num_key_value_heads": 8,
    "num_local_experts": 256,
    "num_mtp_modules": 3,
    "qk_norm_type": "per_layer",
    "rms_norm_eps": 1e-06,
    "rope_theta": 5000000,
    "rotary_dim": 64,
    "scoring_func": "sigmoid",
    "shared_intermediate_size": 0,
    "shared_moe_mode": "sigmoid",
    "sliding_window": None,
    "use_mtp": True,
    "use_qk_norm": True,
    "use_routing_bias": True,
    "vocab_size": 200064,
}


def halves(raw: dict[str, Any]) -> tuple[DecoderConfig, Any, TopK]:
    """The decoder, its first attention layer and its first mixture."""
    config = decoder_config(raw)
    mixture = config.mixtures[0]
    assert isinstance(mixture, TopK)
    return config, config.attention[0], mixture


@pytest.mark.parametrize(
    ("raw", "layers", "trained", "most"),
    [
        (DEEPSEEK_V3, 58, 8, 128),
        (KIMI_K2, 60, 8, 384),
        (DEEPSEEK_V2, 59, 6, 60),
        (DEEPSEEK_V2 | {"topk_method": "greedy", "q_lora_rank": None, "n_group": 1, "topk_group": 1}, 59, 6, 160),
        (GLM, 89, 8, 160),
        (ERNIE, 27, 6, 64),
        (MINIMAX, 62, 8, 256),
    ],
)
def test_the_counts_of_published_configs(raw: dict[str, Any], layers: int, trained: int, most: int) -> None:
    experts = decoder_config(raw).experts
    assert (experts.layers, experts.trained, experts.minimum, experts.maximum) == (layers, trained, 1, most)


def test_deepseek_v3_as_published() -> None:
    config, attention, mixture = halves(DEEPSEEK_V3)
    assert isinstance(attention, MLA) and attention.memory.key_width == 576 and attention.rope.interleaved
    assert attention.scale == pytest.approx(192**-0.5 * 1.3688879**2)
    assert mixture.shared == Dense(2048, "silu") and config.feed_forward[2] == Dense(18432, "silu")


def test_the_others_as_published() -> None:
    attention = halves(GLM)[1]
    assert isinstance(attention, Attention) and attention.rope is not None
    assert (attention.rope.width, attention.qk_norm, attention.bias, attention.out_bias) == (64, "head", True, False)
    attention = halves(MINIMAX)[1]
    assert (attention.rope.width, attention.rope.theta, attention.qk_norm) == (64, 5e6, "full")
    config, attention, mixture = halves(ERNIE)
    assert attention.rope.interleaved and config.tied and mixture.shared == Dense(3072, "silu")
    assert halves(ERNIE | {"moe_num_shared_experts": 0})[2].shared is None


def test_mixtures_in_every_so_many_layers() -> None:
    layers = decoder_config(DEEPSEEK_V3 | {"num_hidden_layers": 7, "moe_layer_freq": 2}).feed_forward
    assert [isinstance(layer, TopK) for layer in layers] == [False, False, False, False, True, False, True]


@pytest.mark.parametrize("family", BIASED)
@pytest.mark.parametrize("number", [0, 1])
def test_the_bias_chooses(family: str, number: int, tmp_path: Path) -> None:
    model = loaded(family, number, tmp_path)
    counts = [1] * len(model.config.mixtures)
    before = whole_logits(model, reference.PROMPT, counts)
    for name, parameter in model.named_parameters():
        if name.endswith("selection_bias"):
            assert parameter.abs().min() > 0
            parameter.zero_()
    assert (whole_logits(model, reference.PROMPT, counts) - before).abs().max() > 1e-2


def test_the_bias_keeps_its_precision(tmp_path: Path) -> None:
    """A bias of 7 and differences of 0.001 are one number in bfloat16."""
    loaded("deepseek_v3", 0, tmp_path)
    model, _ = load_model(tmp_path, "bfloat16")
    bias = dict(model.named_parameters())["layers.1.ffn.selection_bias"]
    assert bias.dtype is torch.float32 and model.dtype is torch.bfloat16


@pytest.mark.parametrize("family", ["deepseek_v3", "ernie4_5_moe"])
def test_layers_that_guess_further_tokens_are_not_needed(family: str, tmp_path: Path) -> None:
    loaded(family, 1, tmp_path)
    raw = read_json(tmp_path / "config.json") | {"num_nextn_predict_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    layers = raw["num_hidden_layers"]
    names = [f"model.layers.{layers}.eh_proj.weight", "model.mtp_block.0.mlp.up_proj.weight"]
    add(tmp_path, {name: torch.ones(2) for name in names})
    load_model(tmp_path)
    add(tmp_path, {f"model.layers.{layers + 1}.eh_proj.weight": torch.ones(2)})
    with pytest.raises(CheckpointError, match=rf"extra model\.layers\.{layers + 1}\.eh_proj"):
        load_model(tmp_path)


def add(folder: Path, more: dict[str, torch.Tensor]) -> None:
    """All tensors of a folder and these, in one file."""
    state = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    for file in [*folder.glob("*.safetensors"), *folder.glob("*.index.json")]:
        file.unlink()
    save_file(state | more, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (DEEPSEEK_V3 | {"scoring_func": "softmax"}, "scoring_func"),
        (DEEPSEEK_V3 | {"topk_method": "greedy"}, "topk_method"),
        (DEEPSEEK_V3 | {"num_key_value_heads": 8}, "num_key_value_heads"),
        (DEEPSEEK_V3 | {"n_group": 256, "topk_group": 8}, "two best"),
        (DEEPSEEK_V3 | {"topk_group": 9}, "9 groups cannot be kept of 8"),
        (DEEPSEEK_V2 | {"norm_topk_prob": True}, "norm_topk_prob"),
        (DEEPSEEK_V2 | {"topk_method": "noaux_tc"}, "topk_method"),
        (ERNIE | {"use_bias": True}, "a tied head"),
        (ERNIE | {"moe_gate": "top2_fused"}, "moe_gate"),
        (MINIMAX | {"attn_type_list": [0] * 62}, "attn_type_list"),
        (MINIMAX | {"qk_norm_type": "per_head"}, "qk_norm_type"),
        (MINIMAX | {"shared_intermediate_size": 64}, "shared_intermediate_size"),
    ],
)
def test_what_cannot_be_served_is_named(raw: dict[str, Any], said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        decoder_config(raw)
