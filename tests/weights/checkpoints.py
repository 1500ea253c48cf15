"""Tiny checkpoint folders of both families, written to disk, and safetensors files damaged on purpose."""

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.decoder import Decoder
from tests.model.tiny import randomise
from weights.config import decoder_config
from weights.save import save_model

INFINITY: dict[str, Any] = {
    "model_type": "infinity_moe",
    "vocab_size": 37,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "norm": "layer",
    "positions": "learned",
    "attention_bias": True,
    "intermediate_size": 24,
    "gate_dim": 4,
    "kept_share": 0.25,
    "mask_block": 2,
    "activation": "gelu",
    "sigma_link": "exp",
    "sigma_min": 0.0,
    "draws": "independent",
    "num_experts_per_tok": 2,
    "max_experts_per_tok": 8,
    "tie_word_embeddings": False,
    "dtype": "float32",
}

OLMOE: dict[str, Any] = {
    "model_type": "olmoe",
    "architectures": ["OlmoeForCausalLM"],
    "vocab_size": 37,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "intermediate_size": 12,
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "norm_topk_prob": False,
    "tie_word_embeddings": False,
    "dtype": "float32",
}


def random_decoder(raw: Mapping[str, Any], seed: int = 0) -> Decoder:
    """A decoder with random weights, of the shape that config.json describes."""
    model = Decoder(decoder_config(raw))
    randomise(model, seed)
    return model.eval().requires_grad_(False)


def write(folder: Path, raw: Mapping[str, Any]) -> Decoder:
    """A checkpoint folder in the config's dtype; returns the model that it holds."""
    model = random_decoder(raw)
    save_model(model, raw, folder, getattr(torch, raw["dtype"]))
    return model


def write_config(folder: Path, raw: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw))


def raw_safetensors(path: Path, header: str, data: bytes = b"", size: int | None = None) -> None:
    """A file with exactly this header text, saying that it is `size` bytes long."""
    encoded = header.encode()
    path.write_bytes(struct.pack("<Q", len(encoded) if size is None else size) + encoded + data)


def same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    """Equal names, dtypes and bits."""
    return first.keys() == second.keys() and all(
        a.dtype == second[name].dtype and torch.equal(a, second[name]) for name, a in first.items()
    )
