"""Random checkpoints of published shapes, for speed only: their text means nothing. Written once a run, in bfloat16."""

import json
from pathlib import Path
from typing import Any

import torch

from model.decoder import Decoder
from training.step import initialise
from weights.load import read_config
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


def write_random(raw: dict[str, Any], folder: Path, seed: int = 0) -> None:
    """A checkpoint with random weights of the given config."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw))
    config, _ = read_config(folder)
    model = Decoder(config).to(torch.bfloat16)
    initialise(model, seed)
    save_model(model, raw, folder, torch.bfloat16)
