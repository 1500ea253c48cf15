"""Random checkpoints of published shapes, for speed only: their text means nothing. Written once a run, in bfloat16,
with a tokenizer that gives every byte an id and fills the rest with pairs, because peers want one. It measures
nothing."""

import json
from itertools import islice, product
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from model.decoder import Decoder
from training.step import initialise
from weights.config import read_config
from weights.save import save_model

OLMOE_900M: dict[str, Any] = {
    "model_type": "olmoe",
    "architectures": ["OlmoeForCausalLM"],
    "vocab_size": 16384,
    "hidden_size": 1024,
    "intermediate_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "norm_topk_prob": False,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "eos_token_id": None,
    "dtype": "bfloat16",
}

MIXTRAL_500M: dict[str, Any] = OLMOE_900M | {
    "intermediate_size": 2048,
    "num_key_value_heads": 4,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
}
"""The shape of Mixtral (few wide experts, two of them used, their weights normalised, grouped keys) with the norms of
OLMoE on queries and keys, so that the `olmoe` family runs it."""

QWEN3_900M: dict[str, Any] = OLMOE_900M | {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_key_value_heads": 4,
    "head_dim": 64,
    "moe_intermediate_size": 512,
    "norm_topk_prob": True,
}
DEEPSEEK_900M: dict[str, Any] = {name: value for name, value in OLMOE_900M.items() if name != "num_experts"} | {
    "model_type": "deepseek_v3",
    "architectures": ["DeepseekV3ForCausalLM"],
    "intermediate_size": 4096,
    "moe_intermediate_size": 512,
    "n_routed_experts": 64,
    "n_shared_experts": 1,
    "n_group": 8,
    "topk_group": 4,
    "first_k_dense_replace": 1,
    "q_lora_rank": 384,
    "kv_lora_rank": 256,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
}
QWEN2_800M: dict[str, Any] = QWEN3_900M | {
    "model_type": "qwen2_moe",
    "architectures": ["Qwen2MoeForCausalLM"],
    "num_key_value_heads": 16,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "shared_expert_intermediate_size": 2048,
    "norm_topk_prob": False,
}
GLM4_900M: dict[str, Any] = {name: value for name, value in QWEN3_900M.items() if name != "num_experts"} | {
    "model_type": "glm4_moe",
    "architectures": ["Glm4MoeForCausalLM"],
    "intermediate_size": 4096,
    "n_routed_experts": 64,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "partial_rotary_factor": 0.5,
    "use_qk_norm": True,
    "attention_bias": True,
    "routed_scaling_factor": 1.0,
}
GPT_OSS_800M: dict[str, Any] = {name: value for name, value in OLMOE_900M.items() if name != "num_experts"} | {
    "model_type": "gpt_oss",
    "architectures": ["GptOssForCausalLM"],
    "intermediate_size": 1024,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "num_local_experts": 32,
    "num_experts_per_tok": 4,
    "sliding_window": 128,
    "layer_types": ["sliding_attention", "full_attention"] * 4,
    "attention_bias": True,
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
    },
}
"""The shapes of Qwen1.5-MoE, GLM-4.5 and gpt-oss made narrow: their routers, shared experts, biases and windows."""

LOADED = {"olmoe-0.9b": OLMOE_900M, "qwen3-moe-0.9b": QWEN3_900M, "deepseek-v3-0.9b": DEEPSEEK_900M}

CHECKPOINTS = {"olmoe-0.9b-random": OLMOE_900M, "mixtral-0.5b-random": MIXTRAL_500M}
FAMILIES = {
    "gpt-oss-0.8b-random": GPT_OSS_800M,
    "deepseek-v3-0.9b-random": DEEPSEEK_900M,
    "qwen2-moe-0.8b-random": QWEN2_800M,
    "glm4-moe-0.9b-random": GLM4_900M,
}
RANDOM = CHECKPOINTS | FAMILIES

LONG = OLMOE_900M | {"num_hidden_layers": 2, "vocab_size": 4096, "max_position_embeddings": 65536}
"""A quarter of the 0.9 B shape in every part: layers as wide, two of eight, and a quarter of the vocabulary."""


def write_random(raw: dict[str, Any], folder: Path, seed: int = 0) -> None:
    """A checkpoint with random weights of the given config."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw))
    config, _ = read_config(folder)
    model = Decoder(config).to(torch.bfloat16)
    initialise(model, seed)
    save_model(model, raw, folder, torch.bfloat16)
    write_tokenizer(raw["vocab_size"], folder)


def write_tokenizer(vocabulary: int, folder: Path) -> None:
    """Byte-level BPE: 256 bytes, then merges of two of them in order until the vocabulary is full."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = list(islice(product(alphabet, alphabet), vocabulary - len(alphabet)))
    words = alphabet + [first + second for first, second in merges]
    ids = {word: id for id, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
