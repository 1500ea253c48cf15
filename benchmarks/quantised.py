"""What do 8 and 4 bits cost in quality? `make bench-quantised ARGS=--text=STORIES.txt`.

Measures, by expert count, a model (default: the bundled ones) on the native kernels with weights as they are (float32
and bfloat16, also with keys and values in int8), in int8 (multiplied in 8 bits, or widened to bfloat16:
`int8-weights`) and in int4: experts only (int4: the rest int8) or every matrix. Each against float32: held-out
cross-entropy in nats per token, the mean divergence KL(float32 || quantised) of the next token's distribution, and how
often the most likely token is the same. The same windows of 512 tokens for all; noise keyed alike. Text: any file of
stories with `<|endoftext|>` between them that the model was not trained on.
"""

from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F

from benchmarks.machine import facts, use_threads
from benchmarks.results import Out, finish
from benchmarks.tables import grid
from model.backends.cpu.decoder import NativeDecoder
from model.backends.cpu.kernels.library import load
from model.backends.torch.attend import WholeAttend
from model.batch import Batch, Pages
from model.options import DType, KVCacheDType, Quantize
from training.export import windows
from training.step import make_batch
from weights.folder import compared_models, resolve_model
from weights.load import load_model

WINDOW, BLOCK = 512, 16
KINDS: tuple[Quantize, ...] = ("int8-weights", "int8", "int4")
WAYS: list[tuple[DType, Quantize, str, KVCacheDType]] = [
    ("float32", "none", "experts", "auto"),
    ("bfloat16", "none", "experts", "auto"),
    ("float32", "none", "experts", "int8"),
    ("bfloat16", "none", "experts", "int8"),
    *(("bfloat16", kind, part, "auto") for part, kind in product(("experts", "all"), KINDS)),
]
AT_ONCE = 4  # windows


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


@dataclass(slots=True)
class Quality:
    """Sums over tokens: loss and divergence in nats, and how often the most likely token is float32's."""

    loss: float = 0.0
    divergence: float = 0.0
    same: int = 0

    def add(self, logits_TV: Tensor, base_TV: Tensor, target_T: Tensor) -> None:
        logs_TV, base_logs_TV = logits_TV.float().log_softmax(-1), base_TV.float().log_softmax(-1)
        self.loss += float(F.nll_loss(logs_TV, target_T, reduction="sum"))
        self.divergence += float((base_logs_TV.exp() * (base_logs_TV - logs_TV)).sum())
        self.same += int((logits_TV.argmax(-1) == base_TV.argmax(-1)).sum())

    def per_token(self, tokens: int) -> dict[str, float]:
        return {"loss": self.loss / tokens, "kl": self.divergence / tokens, "same": self.same / tokens}


def native_ways(folder: Path) -> dict[str, Whole]:
    """The model in every way to store its weights, keys and values, float32 first."""
    found = {}
    for dtype, quantize, part, cache in WAYS:
        model, _ = load_model(folder, dtype)
        name = dtype if quantize == "none" else f"{quantize}, {part}"
        name += "" if cache == "auto" else f", cache in {cache}"
        found[name] = Whole(NativeDecoder(model, WINDOW, quantize, part == "experts", cache))
    return found


@torch.inference_mode()
def qualities(ways: dict[str, Whole], window_BS: Tensor, count: int) -> dict[str, dict[str, float]]:
    """Of every way at one count in every layer."""
    found = {way: Quality() for way in ways}
    for start in range(0, len(window_BS), AT_ONCE):
        part_BS = window_BS[start : start + AT_ONCE]
        ids_BS, target_T = part_BS[:, :-1], part_BS[:, 1:].flatten()
        attend = WholeAttend(ids_BS.shape[1], ids_BS.device)
        base_TV: Tensor | None = None
        for way, model in ways.items():
            logits_TV = model(make_batch(ids_BS, [count] * len(model.config.mixtures), start), attend)
            base_TV = logits_TV if base_TV is None else base_TV
            found[way].add(logits_TV, base_TV, target_T)
    tokens = window_BS[:, 1:].numel()
    return {way: quality.per_token(tokens) for way, quality in found.items()}


def show(name: str, found: list[dict[str, dict[str, float]]], counts: list[int]) -> None:
    print(f"\n**{name}**: loss (difference to float32), divergence, same most likely token\n")
    head = ["weights", *(f"K = {count}" for count in counts)]
    print(grid(head, [[way, *(_cell(at_count, way) for at_count in found)] for way in found[0]]))


def _cell(found: dict[str, dict[str, float]], way: str) -> str:
    base, own = next(iter(found.values())), found[way]
    return f"{own['loss']:.4f} ({own['loss'] - base['loss']:+.4f}), {own['kl']:.5f}, {own['same']:.1%}"


def main(
    text: Annotated[Path, typer.Option(exists=True, help="held-out text")],
    model: Annotated[list[str] | None, typer.Option()] = None,
    count: Annotated[list[int], typer.Option()] = [1, 2, 4, 8],  # noqa: B006
    limit: Annotated[int, typer.Option(help="windows to use; 0: all")] = 200,
    out: Out = None,
) -> None:
    """Print a table for people and one JSON line for machines."""
    use_threads(0)
    if not load().native:
        raise SystemExit(f"quantised weights need the native kernels: {load().reason}")
    values: dict[str, Any] = facts()
    rows = {}
    for name in model or compared_models():
        folder = resolve_model(name)
        tokenizer, ways = Tokenizer.from_file(str(folder / "tokenizer.json")), native_ways(folder)
        window_BS, _ = windows(tokenizer, text, WINDOW, limit)
        rows[name] = [qualities(ways, window_BS, number) for number in count]
        show(name, rows[name], count)
    finish(values | {"counts": count, "windows": limit, "rows": rows}, out)


if __name__ == "__main__":
    typer.run(main)
