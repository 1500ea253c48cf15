"""The families that are read from GGUF files: for each of llama.cpp's architectures a table from config.json's keys to
its metadata. Torch-free, so that the HTTP process may use it.
"""

from collections.abc import Callable
from typing import Any

from model.errors import CheckpointError, shown
from weights.gguf.common import Config, common, decoder
from weights.gguf.config import Described, rope_scaling
from weights.gguf.reader import GgufFile

CHOSEN = {"num_experts_per_tok": "expert_used_count"}
LOCAL_EXPERTS = CHOSEN | {"num_local_experts": "expert_count", "intermediate_size": "feed_forward_length"}
QWEN = CHOSEN | {
    "num_experts": "expert_count",
    "moe_intermediate_size": "expert_feed_forward_length",
    "intermediate_size": "feed_forward_length",
    "norm_topk_prob": "expert_weights_norm",
}
DEEPSEEK = CHOSEN | {
    "n_routed_experts": "expert_count",
    "moe_intermediate_size": "expert_feed_forward_length",
    "intermediate_size": "feed_forward_length",
    "n_shared_experts": "expert_shared_count",
    "first_k_dense_replace": "leading_dense_block_count",
    "routed_scaling_factor": "expert_weights_scale",
    "norm_topk_prob": "expert_weights_norm",
    "n_group": "expert_group_count",
    "topk_group": "expert_group_used_count",
}
SOFTMAX, SIGMOID, SOFTMAX_OF_CHOSEN = 1, 2, 3  # llama.cpp's gating functions; 0 is unset
GATING = {"gpt-oss": (SOFTMAX_OF_CHOSEN,), "deepseek2": (SOFTMAX, SIGMOID)}  # of those that are not softmax alone
GATING |= dict.fromkeys(("dots1", "glm4moe", "llama4", "minimax-m2"), (SIGMOID,))
NORMALISE = ("ernie4_5-moe", "gpt-oss", "granitemoe", "llama", "minimax-m2")  # always the weights of chosen experts


def raw_config(file: GgufFile) -> Config:
    """The file's config.json, as `weights/config.py` takes it.

    Raises:
        CheckpointError: the architecture is not known, a value is missing or of another type, or a key is not known.
    """
    said = Described(file)
    if said.architecture not in ARCHITECTURES:
        raise CheckpointError(
            f"{said.name}: architecture {shown(said.architecture)} is not supported; known are"
            f" {', '.join(sorted(ARCHITECTURES))}"
        )
    found = ARCHITECTURES[said.architecture](said)
    said.expect("expert_gating_func", 0, *GATING.get(said.architecture, (SOFTMAX,)))
    if said.architecture in NORMALISE:
        said.expect("expert_weights_norm", True)
    said.check()
    tokens = {f"{name}_token_id": file.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos")}
    found |= {name: value for name, value in tokens.items() if value is not None}
    return found | {"dtype": _dtype(file)}


def _dtype(file: GgufFile) -> str:
    """What the model runs in unless it is asked otherwise."""
    matrices = {entry.type.name for entry in file.tensors.values() if len(entry.shape) > 1}
    return "float32" if matrices <= {"F32"} else "bfloat16"


def _qwen(said: Described, model_type: str, norm_topk_prob: bool, **more: Any) -> Config:
    """`norm_topk_prob` is what llama.cpp takes where the file does not say."""
    found = decoder(said, model_type, QWEN | more.pop("keys", {}), **more)
    return {"norm_topk_prob": norm_topk_prob} | found


def _llama(said: Described) -> Config:
    if said.get("expert_count"):
        return decoder(said, "mixtral", LOCAL_EXPERTS)
    bias = said.has("blk.0.attn_q.bias")
    keys = {"intermediate_size": "feed_forward_length"}
    return decoder(said, "llama", keys, attention_bias=bias, mlp_bias=said.has("blk.0.ffn_up.bias"))


def _qwen3(said: Described) -> Config:
    bias = said.has("blk.0.attn_q.bias")
    return decoder(said, "qwen3", {"intermediate_size": "feed_forward_length"}, attention_bias=bias)


def _qwen2_moe(said: Described) -> Config:
    keys = {"shared_expert_intermediate_size": "expert_shared_feed_forward_length"}
    bias, plain = said.has("blk.0.attn_q.bias"), said.without_experts()
    return _qwen(said, "qwen2_moe", False, keys=keys, qkv_bias=bias, mlp_only_layers=plain)


def _qwen3_moe(said: Described) -> Config:
    bias, plain = said.has("blk.0.attn_q.bias"), said.without_experts()
    return _qwen(said, "qwen3_moe", True, attention_bias=bias, mlp_only_layers=plain)


def _qwen3_next(said: Described) -> Config:
    keys = {
        "shared_expert_intermediate_size": "expert_shared_feed_forward_length",
        "linear_conv_kernel_dim": "ssm.conv_kernel",
        "linear_key_head_dim": "ssm.state_size",
        "linear_num_key_heads": "ssm.group_count",
        "linear_num_value_heads": "ssm.time_step_rank",
    }
    said.mark_read("full_attention_interval", "attention.recurrent_layers")  # the tensors say it
    heads, inner = said.number("ssm.time_step_rank"), said.number("ssm.inner_size")
    for key in ("ssm.group_count", "ssm.state_size"):
        said.number(key)
    if heads < 1 or inner % heads:
        said.fail(f"ssm.inner_size is {inner}, no multiple of {heads} heads")
    delta = [said.has(f"blk.{layer}.ssm_a") for layer in range(said.layers)]
    kinds = ["linear_attention" if each else "full_attention" for each in delta]
    bias = any(name.endswith("attn_q.bias") for name in said.file.tensors)
    more = {"linear_value_head_dim": inner // heads, "layer_types": kinds, "attention_bias": bias}
    return _qwen(said, "qwen3_next", True, keys=keys, mlp_only_layers=said.without_experts(), **more)


def _llama4(said: Described) -> Config:
    """What Scout and Maverick share is not in the file: the period of layers without positions, their temperature."""
    keys = CHOSEN | {
        "num_local_experts": "expert_count",
        "intermediate_size": "expert_feed_forward_length",
        "intermediate_size_mlp": "feed_forward_length",
        "interleave_moe_layer_step": "interleave_moe_layer_step",
    }
    if said.get("attention.sliding_window") == 0:
        said.fail("attention.sliding_window is 0: a Llama 4 with positions in every layer is not supported")
    said.expect("attention.sliding_window", 8192)  # the published chunks
    maverick = said.get("expert_count") == 128
    return decoder(said, "llama4_text", keys, use_qk_norm=not maverick)


def _olmoe(said: Described) -> Config:
    keys = CHOSEN | {
        "num_experts": "expert_count",
        "intermediate_size": "feed_forward_length",
        "norm_topk_prob": "expert_weights_norm",
        "clip_qkv": "attention.clamp_kqv",
    }
    return decoder(said, "olmoe", keys, attention_bias=said.has("blk.0.attn_q.bias"))


def _granite(said: Described) -> Config:
    keys = LOCAL_EXPERTS | {
        "attention_multiplier": "attention.scale",
        "embedding_multiplier": "embedding_scale",
        "residual_multiplier": "residual_scale",
        "logits_scaling": "logit_scale",
        "shared_intermediate_size": "expert_shared_feed_forward_length",
    }
    said.expect("rope.scaling.finetuned", True)  # false: without positions
    shared = said.get("expert_shared_feed_forward_length")
    model_type = "granitemoeshared" if shared else "granitemoe"
    return decoder(said, model_type, keys, attention_bias=said.has("blk.0.attn_q.bias"))


def _glm4_moe(said: Described) -> Config:
    bias, norm = said.has("blk.0.attn_q.bias"), said.has("blk.0.attn_q_norm.weight")
    return decoder(said, "glm4_moe", DEEPSEEK, attention_bias=bias, use_qk_norm=norm)


def _dots1(said: Described) -> Config:
    return decoder(said, "dots1", DEEPSEEK, attention_bias=said.has("blk.0.attn_q.bias"), sliding_window=None)


def _minimax_m2(said: Described) -> Config:
    keys = CHOSEN | {"num_local_experts": "expert_count", "intermediate_size": "expert_feed_forward_length"}
    said.mark_read("feed_forward_length")  # of dense layers, which it has not
    return decoder(said, "minimax_m2", keys)


def _ernie(said: Described) -> Config:
    keys = {
        "moe_num_experts": "expert_count",
        "moe_k": "expert_used_count",
        "moe_intermediate_size": "expert_feed_forward_length",
        "intermediate_size": "feed_forward_length",
        "moe_num_shared_experts": "expert_shared_count",
        "moe_layer_start_index": "leading_dense_block_count",
        "moe_layer_interval": "interleave_moe_layer_step",
    }
    said.mark_read("expert_shared_feed_forward_length")  # the converter divides a dense layer's by the KV heads
    found = decoder(said, "ernie4_5_moe", keys, use_bias=said.has("blk.0.attn_q.bias"))
    return {"moe_num_shared_experts": 0} | found


def _gpt_oss(said: Described) -> Config:
    keys = CHOSEN | {
        "num_local_experts": "expert_count",
        "intermediate_size": "expert_feed_forward_length",
        "sliding_window": "attention.sliding_window",
    }
    said.mark_read("feed_forward_length")  # of dense layers, which it has not
    found = decoder(said, "gpt_oss", keys, attention_bias=said.has("blk.0.attn_q.bias"))
    if found["rope_scaling"] is not None:
        found["rope_scaling"]["truncate"] = False  # as published; the file does not say
    return found


PHIMOE_MSCALE = 1.243163121016122  # of every published PhiMoE; the file does not have it


def _phimoe(said: Described) -> Config:
    bias, head = said.has("blk.0.attn_q.bias"), said.has("output.bias")
    keys = LOCAL_EXPERTS | {"sliding_window": "attention.sliding_window"}  # 0 for none
    found = decoder(said, "phimoe", keys, attention_bias=bias, lm_head_bias=head)
    if found["rope_scaling"] is not None:
        found["rope_scaling"] |= {"long_mscale": PHIMOE_MSCALE, "short_mscale": PHIMOE_MSCALE}
    return found


GROUPS = {160: (8, 3), 256: (8, 4)}  # of DeepSeek-V2 and V3, by experts: files before October 2025 do not say


def _deepseek2(said: Described) -> Config:
    """V2, or V3 and Kimi K2, whose experts have biases; files that do not name the gating function tell by those."""
    third = said.get("expert_gating_func") == SIGMOID
    if not said.get("expert_gating_func"):
        third = any(".exp_probs_b" in name for name in said.file.tensors)
    keys = DEEPSEEK | {"q_lora_rank": "attention.q_lora_rank", "kv_lora_rank": "attention.kv_lora_rank"}
    found = common(said, "deepseek_v3" if third else "deepseek_v2", keys)
    found.setdefault("norm_topk_prob", False)
    turned = said.number("rope.dimension_count")
    latent = said.get("attention.key_length_mla") is not None
    if latent:
        said.mark_read("attention.key_length", "attention.value_length")  # of the latents, as llama.cpp caches them
    whole = said.number("attention.key_length_mla" if latent else "attention.key_length")
    found |= {
        "num_key_value_heads": said.number("attention.head_count"),
        "qk_rope_head_dim": turned,
        "qk_nope_head_dim": whole - turned,
        "v_head_dim": said.number("attention.value_length_mla" if latent else "attention.value_length"),
        "rope_scaling": _deepseek_rope(said),
    }
    if "n_group" not in found and said.get("expert_count") in GROUPS:
        found["n_group"], found["topk_group"] = GROUPS[said.number("expert_count")]
    if not third:
        found["topk_method"] = "group_limited_greedy"
    return found


def _deepseek_rope(said: Described) -> Config | None:
    """YaRN's factors are equal in all published files; the file has a tenth of them, or else they are 1."""
    found = rope_scaling(said)
    if found is not None and found["rope_type"] == "yarn":
        tenth = said.get("rope.scaling.yarn_log_multiplier")
        factor = round(float(tenth) * 10, 6) if tenth else 0.0
        found |= {"mscale": factor, "mscale_all_dim": factor}
    return found


def _gpt2(said: Described) -> Config:
    found = common(said, "gpt2", {"n_inner": "feed_forward_length"})
    eps = said.get("attention.layer_norm_epsilon")
    for name in ("num_key_value_heads", "rms_norm_eps", "rope_theta"):
        found.pop(name, None)
    return found | ({} if eps is None else {"layer_norm_epsilon": eps})


ARCHITECTURES: dict[str, Callable[[Described], Config]] = {
    "deepseek2": _deepseek2,
    "dots1": _dots1,
    "ernie4_5-moe": _ernie,
    "glm4moe": _glm4_moe,
    "gpt-oss": _gpt_oss,
    "gpt2": _gpt2,
    "granitemoe": _granite,
    "llama": _llama,
    "llama4": _llama4,
    "minimax-m2": _minimax_m2,
    "olmoe": _olmoe,
    "phimoe": _phimoe,
    "qwen2moe": _qwen2_moe,
    "qwen3": _qwen3,
    "qwen3moe": _qwen3_moe,
    "qwen3next": _qwen3_next,
}
