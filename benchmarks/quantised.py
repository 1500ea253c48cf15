"""What do 8 bits cost in quality? `make bench-quantised ARGS=--text=STORIES.txt`.

Measures: held-out cross-entropy in nats per token of a model (default: the bundled ones) on the native kernels, by
expert count, with weights as they are (float32 and bfloat16) and in int8: experts only or every matrix, multiplied in
8 bits (`int8`) or widened to bfloat16 (`int8-weights`). The same windows of 512 tokens for all; noise keyed alike.
Text: any file of stories with `<|endoftext|>` between them that the model was not trained on.
"""

import json
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from tokenizers import Tokenizer

from benchmarks.machine import facts, use_threads
from benchmarks.tables import grid
from model.backends.cpu.decoder import NativeDecoder
from model.backends.cpu.kernels.library import load
from model.backends.torch.attend import WholeAttend
from model.batch import Batch, Pages
from model.options import DType, Quantize
from training.evaluate import held_out_loss
from training.export import windows
from weights.folder import compared_models, resolve_model
from weights.load import load_model

WINDOW, BLOCK = 512, 16
QUANTIZED: tuple[Quantize, ...] = ("int8-weights", "int8")
INT8 = [(kind, part) for part, kind in product(("experts", "all"), QUANTIZED)]
WAYS: list[tuple[DType, Quantize, str]] = [
    ("float32", "none", "experts"),
    ("bfloat16", "none", "experts"),
    *(("bfloat16", kind, part) for kind, part in INT8),
]


class Whole:
    """A native decoder that is called like a torch one over whole sequences side by side."""

    def __init__(self, model: NativeDecoder) -> None:
        self.model, self.config = model, model.config

    def __call__(self, batch: Batch, attend: WholeAttend) -> torch.Tensor:
        rows, length = len(batch.ids_T) // attend.length, attend.length
        blocks = -(-length // BLOCK)
        spans_B3 = torch.tensor([(row * length, length, length) for row in range(rows)])
        cache = self.model.cache(rows * blocks, BLOCK)
        pages = Pages(cache, torch.arange(rows * blocks).view(rows, blocks), spans_B3)
        budget = replace(batch.budget, counts_LT=batch.budget.counts_LT.contiguous())
        return self.model(replace(batch, budget=budget), pages)


def losses(folder: Path, text: Path, counts: list[int], limit: int) -> dict[str, list[float]]:
    """The loss by expert count for every way to store the weights."""
    window_BS, _ = windows(Tokenizer.from_file(str(folder / "tokenizer.json")), text, WINDOW, limit)
    found = {}
    for dtype, quantize, part in WAYS:
        model, _ = load_model(folder, dtype)
        native = Whole(NativeDecoder(model, WINDOW, quantize, part == "experts"))
        name = dtype if quantize == "none" else f"{quantize}, {part}"
        found[name] = [held_out_loss(native, window_BS, count) for count in counts]
    return found


def show(name: str, found: dict[str, list[float]], counts: list[int]) -> None:
    print(f"\n**{name}**\n")
    head = ["weights", *(f"K = {count}" for count in counts)]
    print(grid(head, [_row(way, found) for way in found]))


def _row(way: str, found: dict[str, list[float]]) -> list[str]:
    first = next(iter(found.values()))
    pairs = zip(found[way], first, strict=True)
    cells = [f"{loss:.4f} ({loss - base:+.4f})" for loss, base in pairs]
    return [way, *cells]


def main(
    text: Annotated[Path, typer.Option(exists=True, help="held-out text")],
    model: Annotated[list[str] | None, typer.Option()] = None,
    count: Annotated[list[int], typer.Option()] = [1, 2, 4, 8],  # noqa: B006
    limit: Annotated[int, typer.Option(help="windows to use; 0: all")] = 200,
    out: Annotated[Path | None, typer.Option(help="write the JSON line here as well")] = None,
) -> None:
    """Print a table for people and one JSON line for machines."""
    use_threads(0)
    if not load().native:
        raise SystemExit(f"int8 needs the native kernels: {load().reason}")
    values: dict[str, Any] = facts()
    rows = {}
    for name in model or compared_models():
        rows[name] = losses(resolve_model(name), text, count, limit)
        show(name, rows[name], count)
    line = json.dumps(values | {"counts": count, "windows": limit, "rows": rows})
    print(line)
    if out is not None:
        out.write_text(line + "\n")


if __name__ == "__main__":
    typer.run(main)
