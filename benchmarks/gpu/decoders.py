"""Decoders for a visit: published shapes with random weights made on the card, and toys; and the backend that runs one.
It measures nothing.
"""

import importlib.util
from typing import Any

import torch

from benchmarks.gpu.shapes import randomise
from model.backends.base import Runnable
from model.backends.torch.backend import TorchRunnable
from model.decoder import Decoder
from model.options import Options
from weights.config import decoder_config
from weights.load import empty_model

OLMOE_7B: dict[str, Any] = {
    "model_type": "olmoe",
    "architectures": ["OlmoeForCausalLM"],
    "vocab_size": 50304,
    "hidden_size": 2048,
    "intermediate_size": 1024,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "norm_topk_prob": False,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "eos_token_id": None,
    "dtype": "bfloat16",
}
QWEN3_30B: dict[str, Any] = OLMOE_7B | {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "vocab_size": 151936,
    "num_hidden_layers": 48,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "norm_topk_prob": True,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
}
MODELS = {"OLMoE-1B-7B": OLMOE_7B, "Qwen3-30B-A3B": QWEN3_30B}
SMALL = {  # what makes a toy of either
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 24,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 256,
    "dtype": "float32",
}


def toy(raw: dict[str, Any]) -> dict[str, Any]:
    """The same kind of decoder in sizes that an interpreter takes."""
    kept = SMALL if "head_dim" in raw else {name: size for name, size in SMALL.items() if name in raw}
    return raw | kept


def random_decoder(raw: dict[str, Any], device: torch.device, dtype: torch.dtype) -> Decoder:
    """A decoder of this config.json with random weights, made where it runs."""
    decoder = empty_model(decoder_config(raw), dtype).to_empty(device=device)
    randomise(decoder, device)
    return decoder.eval().requires_grad_(False)


def on_kernels(decoder: Decoder, length: int) -> Runnable:
    """The decoder on the CUDA backend, in the interpreter as well.

    Raises:
        RuntimeError: it has no kernels, and why.
    """
    if importlib.util.find_spec("triton") is None:
        raise RuntimeError("triton is not installed")
    from model.backends.cuda.backend import CudaBackend
    from model.backends.cuda.refusal import refusal

    options = Options(block_size=64, length=length, device=str(decoder.device))
    reason = refusal(decoder.config, options)
    if reason is not None:
        raise RuntimeError(reason)
    return CudaBackend().prepare(decoder, options)


def on_torch(decoder: Decoder) -> Runnable:
    """The decoder in plain torch."""
    return TorchRunnable(decoder)
