"""Tiny checkpoints of three mixtures, opened for a calibration."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from calibration.opening import opened
from calibration.options import Options
from calibration.run import Run
from tests.calibration.checkpoints import write_text, write_tokenizer
from tests.weights.checkpoints import OLMOE, random_decoder
from weights.save import save_model

THREE: dict[str, Any] = OLMOE | {
    "num_hidden_layers": 3,
    "num_experts": 8,
    "num_experts_per_tok": 4,
    "hidden_size": 32,
    "intermediate_size": 16,
}


def idle_middle(folder: Path, **changes: Any) -> Path:
    """A checkpoint whose second mixture gives nothing, whatever runs in it, and whose others matter."""
    raw = THREE | changes
    model: Any = random_decoder(raw)
    with torch.no_grad():
        for layer in model.layers:
            layer.ffn.down *= 6.0
            layer.ffn.router *= 2.0
        model.layers[1].ffn.down.zero_()
    save_model(model, raw, folder, torch.float32)
    write_tokenizer(folder)
    return folder


@contextmanager
def run_of(folder: Path, counts: str, minutes: float = 0.05) -> Iterator[Run]:
    """A calibration of a folder on a short text."""
    text = write_text(folder / "text.txt")
    with opened(Options(model=str(folder), text=[text], counts=counts, minutes=minutes, output=folder)) as found:
        yield found.run


def equal_experts(folder: Path) -> Path:
    """A checkpoint of two mixtures with four equal experts each, of which two run and weigh a quarter each: one expert
    gives half of what two do."""
    raw = OLMOE | {"num_experts": 4, "num_experts_per_tok": 2, "hidden_size": 32, "intermediate_size": 16}
    model: Any = random_decoder(raw)
    with torch.no_grad():
        for layer in model.layers:
            layer.ffn.router.zero_()
            layer.ffn.gate_up[1:], layer.ffn.down[:] = layer.ffn.gate_up[0], layer.ffn.down[0] * 6.0
    save_model(model, raw, folder, torch.float32)
    write_tokenizer(folder)
    return folder
