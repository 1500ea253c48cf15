"""Tiny configs of every architecture that is read from GGUF files, and what llama.cpp's converter makes of such a
checkpoint: names, metadata and layouts, stated a second time (see `weights/gguf/names.py` and `families.py`).

`make test-gguf` compares the readers with the converter itself.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from model.decoder import Decoder
from tests.weights.gguf.writer import Blob
from weights.save import tensors

BASE: dict[str, Any] = {
    "vocab_size": 37,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "intermediate_size": 96,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5000.0,
    "head_dim": 16,
    "tie_word_embeddings": False,
    "dtype": "float32",
}
QWEN = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LOCAL = {"num_local_experts": 5, "num_experts_per_tok": 2}
DEEPSEEK = {
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 32,
    "n_routed_experts": 6,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "n_group": 3,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 8.0, "beta_slow": 2.0}
LATENT = {
    "head_dim": None,
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
}
RAW: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "llama, mixtral": LOCAL | {"model_type": "mixtral", "tie_word_embeddings": True},
    "llama, biased": {"model_type": "llama", "attention_bias": True, "head_dim": 20},
    "qwen2moe": QWEN | {"model_type": "qwen2_moe", "shared_expert_intermediate_size": 64},
    "qwen3": {"model_type": "qwen3", "head_dim": 24, "rope_scaling": YARN},
    "qwen3moe": QWEN | {"model_type": "qwen3_moe", "norm_topk_prob": True},
    "olmoe": {"model_type": "olmoe", "num_experts": 5, "num_experts_per_tok": 2, "head_dim": None},
    "granitemoe": LOCAL
    | {"model_type": "granitemoe", "attention_multiplier": 0.2, "embedding_multiplier": 12.0}
    | {"residual_multiplier": 0.22, "logits_scaling": 6.0},
    "granitemoe, shared": LOCAL | {"model_type": "granitemoeshared", "shared_intermediate_size": 64},
    "glm4moe": DEEPSEEK | {"model_type": "glm4_moe", "use_qk_norm": True, "attention_bias": True},
    "gpt-oss": LOCAL
    | {"model_type": "gpt_oss", "sliding_window": 5, "attention_bias": True, "rms_norm_eps": 1e-5}
    | {"rope_scaling": YARN | {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}},
    "deepseek2, second": DEEPSEEK
    | LATENT
    | {"model_type": "deepseek_v2", "topk_method": "group_limited_greedy", "norm_topk_prob": False}
    | {"rope_scaling": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}},
    "deepseek2": DEEPSEEK | LATENT | {"model_type": "deepseek_v3"},
    "deepseek2, plain queries": DEEPSEEK | LATENT | {"model_type": "deepseek_v3", "q_lora_rank": None},
    "ernie4_5-moe": {
        "model_type": "ernie4_5_moe",
        "moe_num_experts": 5,
        "moe_k": 2,
        "moe_intermediate_size": 32,
        "moe_num_shared_experts": 2,
        "moe_layer_start_index": 1,
        "moe_layer_interval": 1,
        "use_bias": False,
    },
    "minimax-m2": LOCAL | {"model_type": "minimax_m2", "rotary_dim": 8},
    "dots1": DEEPSEEK | {"model_type": "dots1", "sliding_window": None},
    "phimoe": LOCAL
    | {"model_type": "phimoe", "attention_bias": True, "lm_head_bias": True, "original_max_position_embeddings": 64}
    | {"sliding_window": 20},
    "llama4": LOCAL
    | {"model_type": "llama4_text", "num_experts_per_tok": 1, "intermediate_size_mlp": 48, "num_hidden_layers": 4}
    | {"interleave_moe_layer_step": 2, "attention_chunk_size": 8192},
    "qwen3next": QWEN
    | {"model_type": "qwen3_next", "shared_expert_intermediate_size": 64, "partial_rotary_factor": 0.25}
    | {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 16}
    | {"linear_conv_kernel_dim": 4, "norm_topk_prob": True, "num_hidden_layers": 4},
    "gpt2": {"model_type": "gpt2", "tie_word_embeddings": True, "num_key_value_heads": None, "n_ctx": 64}
    | dict.fromkeys(("intermediate_size", "rope_theta", "rms_norm_eps", "head_dim")),
}
METADATA = {
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "max_position_embeddings": "context_length",
    "intermediate_size": "feed_forward_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
    "num_experts": "expert_count",
    "num_local_experts": "expert_count",
    "n_routed_experts": "expert_count",
    "moe_num_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "moe_k": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
    "shared_expert_intermediate_size": "expert_shared_feed_forward_length",
    "shared_intermediate_size": "expert_shared_feed_forward_length",
    "n_shared_experts": "expert_shared_count",
    "moe_num_shared_experts": "expert_shared_count",
    "first_k_dense_replace": "leading_dense_block_count",
    "moe_layer_start_index": "leading_dense_block_count",
    "moe_layer_interval": "interleave_moe_layer_step",
    "routed_scaling_factor": "expert_weights_scale",
    "n_group": "expert_group_count",
    "topk_group": "expert_group_used_count",
    "sliding_window": "attention.sliding_window",
    "q_lora_rank": "attention.q_lora_rank",
    "kv_lora_rank": "attention.kv_lora_rank",
    "attention_multiplier": "attention.scale",
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "logits_scaling": "logit_scale",
    "interleave_moe_layer_step": "interleave_moe_layer_step",
    "linear_conv_kernel_dim": "ssm.conv_kernel",
    "linear_key_head_dim": "ssm.state_size",
    "linear_num_key_heads": "ssm.group_count",
    "linear_num_value_heads": "ssm.time_step_rank",
}
SCALING = {
    "rope_type": "rope.scaling.type",
    "factor": "rope.scaling.factor",
    "original_max_position_embeddings": "rope.scaling.original_context_length",
    "beta_fast": "rope.scaling.yarn_beta_fast",
    "beta_slow": "rope.scaling.yarn_beta_slow",
}
NAMES = [
    (r"^language_model\.", ""),
    (r"feed_forward\.", "mlp."),
    (r"model\.embed_tokens|transformer\.wte", "token_embd"),
    (r"model\.norm|transformer\.ln_f", "output_norm"),
    (r"transformer\.wpe", "position_embd"),
    (r"lm_head", "output"),
    (r"(model\.layers|transformer\.h)\.", "blk."),
    (r"input_layernorm|ln_1", "attn_norm"),
    (r"post_attention_layernorm|ln_2", "ffn_norm"),
    (r"self_attn\.([qkv])_proj", r"attn_\1"),
    (r"self_attn\.([qk])_norm", r"attn_\1_norm"),
    (r"self_attn\.o_proj|attn\.c_proj", "attn_output"),
    (r"linear_attn\.in_proj_ba", "ssm_ba"),
    (r"linear_attn\.conv1d", "ssm_conv1d"),
    (r"linear_attn\.dt_bias", "ssm_dt.bias"),
    (r"linear_attn\.A_log", "ssm_a"),
    (r"linear_attn\.norm", "ssm_norm"),
    (r"linear_attn\.out_proj", "ssm_out"),
    (r"attn\.c_attn", "attn_qkv"),
    (r"self_attn\.sinks", "attn_sinks.weight"),
    (r"self_attn\.q_a_proj", "attn_q_a"),
    (r"self_attn\.q_a_layernorm", "attn_q_a_norm"),
    (r"self_attn\.q_b_proj", "attn_q_b"),
    (r"self_attn\.kv_a_proj_with_mqa", "attn_kv_a_mqa"),
    (r"self_attn\.kv_a_layernorm", "attn_kv_a_norm"),
    (r"self_attn\.kv_b_proj", "attn_kv_b"),
    (r"\.\w+\.(gate\.|moe_statics\.)?e_score_correction_bias", ".exp_probs_b.bias"),
    (r"(mlp|block_sparse_moe)\.experts\.", "experts."),
    (r"\.(w1|gate_proj)\b", ".ffn_gate"),
    (r"\.(w2|down_proj)\b", ".ffn_down"),
    (r"\.(w3|up_proj)\b", ".ffn_up"),
    (r"(mlp|block_sparse_moe)\.(gate|router\.layer|router)\.", "ffn_gate_inp."),
    (r"mlp\.shared_expert_gate", "ffn_gate_inp_shexp"),
    (r"mlp\.shared_experts?\.(ffn_\w+)", r"\1_shexp"),
    (r"mlp\.c_fc", "ffn_up"),
    (r"mlp\.c_proj", "ffn_down"),
    (r"mlp\.(ffn_)", r"\1"),
]
Encode = Callable[[str, Tensor], Blob]


STATED = ("sliding_window", "q_lora_rank")  # which null does not leave out


def raw_of(name: str) -> dict[str, Any]:
    """The config.json of one of `RAW`."""
    return {key: value for key, value in (BASE | RAW[name]).items() if value is not None or key in STATED}


def metadata_of(name: str) -> dict[str, Any]:
    """What the converter writes of it."""
    raw, arch = raw_of(name), name.partition(",")[0]
    found: dict[str, Any] = {"general.architecture": arch}
    stated = {METADATA[key]: value for key, value in raw.items() if key in METADATA and value is not None}
    scaling = raw.get("rope_scaling") or {}
    stated |= {SCALING[key]: value for key, value in scaling.items() if key in SCALING}
    if "mscale_all_dim" in scaling:
        stated["rope.scaling.yarn_log_multiplier"] = 0.1 * scaling["mscale_all_dim"]
    if raw.get("norm_topk_prob") and arch in ("glm4moe", "dots1", "deepseek2"):
        stated["expert_weights_norm"] = True
    if "head_dim" in raw:
        stated |= {"attention.key_length": raw["head_dim"], "attention.value_length": raw["head_dim"]}
        share = raw.get("partial_rotary_factor", 0.5 if arch == "glm4moe" else 1.0)
        stated["rope.dimension_count"] = raw.get("rotary_dim", int(raw["head_dim"] * share))
    if arch == "deepseek2":
        stated |= {
            "attention.head_count_kv": 1,
            "attention.key_length": raw["kv_lora_rank"] + raw["qk_rope_head_dim"],
            "attention.value_length": raw["kv_lora_rank"],
            "attention.key_length_mla": raw["qk_nope_head_dim"] + raw["qk_rope_head_dim"],
            "attention.value_length_mla": raw["v_head_dim"],
            "rope.dimension_count": raw["qk_rope_head_dim"],
        }
    if raw["model_type"] in ("deepseek_v3", "glm4_moe", "dots1"):
        stated["expert_gating_func"] = 2
    if arch == "llama4":
        stated["expert_feed_forward_length"] = raw["intermediate_size"]
        stated["feed_forward_length"] = raw["intermediate_size_mlp"]
    if arch == "qwen3next":
        stated["ssm.inner_size"] = raw["linear_num_value_heads"] * raw["linear_value_head_dim"]
    if arch == "gpt-oss":
        stated["expert_feed_forward_length"] = raw["intermediate_size"]
    if arch == "minimax-m2":
        stated["expert_feed_forward_length"] = raw["intermediate_size"]
    if arch == "gpt2":
        stated = {
            key: stated[key] for key in stated if not key.startswith(("rope", "attention.key", "attention.value"))
        }
        stated["feed_forward_length"], stated["attention.layer_norm_epsilon"] = 256, 1e-5
    return found | {f"{arch}.{key}": value for key, value in stated.items()}


def converted(name: str, model: Decoder, encode: Encode) -> dict[str, Blob]:
    """The tensors that the converter writes of a model's checkpoint; `encode` chooses a tensor's type."""
    raw = raw_of(name)
    stored = tensors(model, raw["model_type"])
    named: dict[str, Tensor] = {}
    for theirs, tensor in stored.items():
        named |= _as_converted(raw, theirs, tensor)
    return {own: encode(own, tensor) for own, tensor in _experts_joined(named).items()}


def _as_converted(raw: Mapping[str, Any], theirs: str, tensor: Tensor) -> dict[str, Tensor]:
    own = theirs
    for pattern, new in NAMES:
        own = re.sub(pattern, new, own)
    if raw["model_type"] == "qwen3_next" and (changed := _qwen3_next(raw, own, tensor)) is not None:
        return changed
    if raw["model_type"] in ("gpt_oss", "glm4_moe"):
        own = own.replace("ffn_norm", "post_attention_norm")
    layer = own.rpartition("experts.")[0]
    if raw["model_type"] == "gpt2" and own.endswith(("qkv.weight", "output.weight", "up.weight", "down.weight")):
        return {own: tensor.T if "blk" in own else tensor}
    if raw["model_type"] in ("llama", "mixtral", "granitemoe", "granitemoeshared"):
        for part, heads in [("attn_q.", "num_attention_heads"), ("attn_k.", "num_key_value_heads")]:
            if part in own:  # (head, half, pair) to (head, pair, half)
                tensor = tensor.unflatten(0, (raw[heads], 2, -1)).swapaxes(1, 2).flatten(0, 2)
    if "input_linear" in own or "output_linear" in own:
        return _granite(own, tensor)
    if own.endswith("attn_kv_b.weight"):
        per_head = tensor.view(raw["num_attention_heads"], -1, tensor.shape[-1])
        keys, values = per_head.split([raw["qk_nope_head_dim"], raw["v_head_dim"]], dim=1)
        return {own.replace("kv_b", "k_b"): keys.transpose(1, 2), own.replace("kv_b", "v_b"): values}
    if "experts.gate_up_proj" in theirs:
        ending = "bias" if theirs.endswith("_bias") else "weight"
        rows = tensor if ending == "bias" else tensor.transpose(-1, -2)
        parts = (rows[:, ::2], rows[:, 1::2]) if raw["model_type"] == "gpt_oss" else rows.chunk(2, dim=1)
        return {f"{layer}ffn_{part}_exps.{ending}": each for part, each in zip(("gate", "up"), parts, strict=True)}
    if theirs.endswith("experts.down_proj"):
        return {f"{layer}ffn_down_exps.weight": tensor.transpose(-1, -2)}
    if theirs.endswith("experts.down_proj_bias"):
        return {f"{layer}ffn_down_exps.bias": tensor}
    return {own: tensor.flatten() if "inp_shexp" in own else tensor}


def _qwen3_next(raw: Mapping[str, Any], own: str, tensor: Tensor) -> dict[str, Tensor] | None:
    if own.endswith("ssm_a"):
        return {own: -tensor.exp()}
    if own.endswith("conv1d.weight"):
        return {own: tensor.squeeze()}
    if own.endswith("norm.weight") and "ssm" not in own:
        return {own.replace("ffn_norm", "post_attention_norm"): tensor + 1}
    if "in_proj_qkvz" in own:
        width, heads = raw["linear_key_head_dim"], raw["linear_num_key_heads"]
        values = raw["linear_num_value_heads"] // heads * raw["linear_value_head_dim"]
        parts = tensor.unflatten(0, (heads, -1)).split([width, width, values, values], dim=1)
        queries, keys, others, gates = (part.flatten(0, 1) for part in parts)
        layer = own.partition("linear_attn")[0]
        return {f"{layer}attn_qkv.weight": torch.cat([queries, keys, others]), f"{layer}attn_gate.weight": gates}
    return None


def _granite(own: str, tensor: Tensor) -> dict[str, Tensor]:
    layer = own.partition("block_sparse_moe")[0].partition("shared_mlp")[0]
    ending = "shexp" if "shared_mlp" in own else "exps"
    if "output_linear" in own:
        return {f"{layer}ffn_down_{ending}.weight": tensor}
    gate, up = tensor.chunk(2, dim=-2)
    return {f"{layer}ffn_gate_{ending}.weight": gate, f"{layer}ffn_up_{ending}.weight": up}


def _experts_joined(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """With all experts of a layer in one piece."""
    found: dict[str, Tensor] = {}
    for own, tensor in named.items():
        match = re.fullmatch(r"(blk\.\d+\.)experts\.(\d+)\.(\w+)\.weight", own)
        if match is None:
            found[own] = tensor
        elif match[2] == "0":
            count = sum(
                re.fullmatch(rf"{re.escape(match[1])}experts\.\d+\.{match[3]}\.weight", n) is not None for n in named
            )
            pieces = [named[f"{match[1]}experts.{expert}.{match[3]}.weight"] for expert in range(count)]
            found[f"{match[1]}{match[3]}_exps.weight"] = torch.stack(pieces)
    return found
