"""Export: a decoder's parameters back to a checkpoint's tensors, through the rules that load it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from model.decoder import Decoder
from weights.folder import SINGLE
from weights.names import rules_for


def tensors(model: Decoder, family: str) -> dict[str, Tensor]:
    """Every tensor under its published name; where a parameter has two layouts, the per-expert one."""
    stored: dict[str, Tensor] = {}
    done: set[str] = set()
    for rule in rules_for(family, model.config):
        if rule.target not in done:
            done.add(rule.target)
            parameter = model.get_parameter(rule.target).detach()
            stored |= {part.source: part.to_stored(parameter[part.index]) for part in rule.parts()}
    return stored


def save_model(model: Decoder, raw: Mapping[str, Any], folder: Path, dtype: torch.dtype) -> None:
    """Write config.json and model.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dict(raw), indent=2) + "\n")
    stored = tensors(model, raw["model_type"])
    converted = {name: tensor.to(dtype).clone() for name, tensor in stored.items()}
    save_file(converted, folder / SINGLE, metadata={"format": "pt"})
    (folder / SINGLE).chmod(0o644)  # the library writes for the owner alone
