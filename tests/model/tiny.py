"""Tiny random decoders, and what drives them without an engine: whole sequences, or chunks over a paged cache."""

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from model.backends.base import Runnable
from model.backends.torch.attend import WholeAttend
from model.backends.torch.backend import TorchRunnable
from model.batch import Batch, BudgetRows, LayerBudget, Pages, Span
from model.decoder import Decoder
from model.shapes.attention import Attention
from model.shapes.decoder import DecoderConfig
from model.shapes.feed_forward import FeedForward
from model.shapes.mixtures import Infinity, Router, TopK
from model.shapes.rope import Rope
from model.step import LayerStep, Observer

VOCABULARY = 61


def infinity(**changes: Any) -> Infinity:
    fields: dict[str, Any] = {"units": 48, "latent_dim": 6, "keep_ratio": 0.25, "trained": 2, "maximum": 8, "block": 4}
    return Infinity(**fields | changes)


def topk(**changes: Any) -> TopK:
    """`normalise` is short for a router that does."""
    router = Router(normalise=changes.pop("normalise", False))
    fields: dict[str, Any] = {"experts": 6, "width": 12, "trained": 2, "router": router}
    return TopK(**fields | changes)


def llama_like(*layers: FeedForward, **changes: Any) -> DecoderConfig:
    """RMS norms, rotary positions, grouped-query attention, an untied head. `changes` are of the decoder or, by the
    names of `Attention`, of every layer's attention."""
    shape: dict[str, Any] = {"heads": 4, "kv_heads": 2, "head_width": 6}
    shape |= {name: changes.pop(name) for name in [*changes] if name in Attention.__dataclass_fields__}
    shape["out_bias"] = shape.get("bias", False)
    if changes.get("positions", "rotary") == "rotary":
        shape.setdefault("rope", Rope(shape["head_width"]))
    fields: dict[str, Any] = {"vocabulary": VOCABULARY, "width": 24, "context": 64, "feed_forward": layers}
    return DecoderConfig(**fields | {"attention": (Attention(**shape),) * len(layers)} | changes)


def gpt2_like(*layers: FeedForward, **changes: Any) -> DecoderConfig:
    """Layer norms, learned positions, biases, a tied head."""
    fields: dict[str, Any] = {"norm": "layer", "positions": "learned", "bias": True, "tied": True}
    return llama_like(*layers, **fields | {"kv_heads": 4} | changes)


@torch.no_grad()
def randomise(module: torch.nn.Module, seed: int = 0) -> None:
    """Matrices keep the size of what they multiply, norms are near one, biases are small: logits are about 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            parameter.copy_(values * (0.3 if "embed" in name else parameter.shape[-1] ** -0.5))
        else:
            parameter.copy_(values * 0.1 + (1.0 if "norm" in name and name.endswith("weight") else 0.0))


def decoder(config: DecoderConfig, seed: int = 0) -> Decoder:
    """A random float32 decoder, ready to serve."""
    model = Decoder(config)
    randomise(model, seed)
    return model.eval().requires_grad_(False)


def use(counts: Sequence[int], seed: int = 5, layer: int = 0, observer: Observer | None = None) -> LayerStep:
    """One sequence's tokens at positions 0, 1, 2, … of one request."""
    tokens = len(counts)
    return LayerStep(
        LayerBudget(torch.tensor(counts), max(counts)),
        torch.full((tokens,), seed),
        torch.arange(tokens),
        layer,
        observer,
    )


def whole_logits(model: Decoder, ids: Sequence[int], counts: Sequence[int], seed: int = 0) -> Tensor:
    """Logits [T, V] of one sequence computed in one go; `counts` per MoE layer."""
    return model(whole_batch(ids, counts, seed), WholeAttend(len(ids)))


def whole_batch(ids: Sequence[int], counts: Sequence[int], seed: int = 0) -> Batch:
    """One sequence from its first token, with logits for every token."""
    tokens = len(ids)
    return Batch(
        ids_T=torch.tensor(ids),
        positions_T=torch.arange(tokens),
        seeds_T=torch.full((tokens,), seed),
        budget=budget_rows(torch.tensor(counts, dtype=torch.int64)[:, None].expand(-1, tokens)),
        rows_B=torch.arange(tokens),
    )


def budget_rows(counts_LT: Tensor) -> BudgetRows:
    """These counts, with what the host knows of them."""
    return BudgetRows(counts_LT, int(counts_LT.amax()) if counts_LT.numel() else 0, tuple(counts_LT.sum(1).tolist()))


def per_token(counts: list[int] | Tensor, tokens: int) -> Tensor:
    """Counts [L, T]."""
    counts = torch.as_tensor(counts, dtype=torch.int64)
    return counts if counts.ndim == 2 else counts[:, None].repeat(1, tokens)


class PagedRun:
    """Several sequences computed chunk by chunk over one paged cache whose blocks are handed out in random order.

    `counts` of each sequence: one per MoE layer, or of every layer one per token.
    """

    def __init__(
        self,
        model: Decoder | Runnable,
        rows: list[list[int]],
        counts: list[list[int]] | list[Tensor],
        block_size: int = 4,
    ) -> None:
        self.model = TorchRunnable(model) if isinstance(model, Decoder) else model
        self.rows, self.size = rows, block_size
        self.counts = [per_token(count, len(row)) for count, row in zip(counts, rows, strict=True)]
        needed = [-(-len(row) // block_size) for row in rows]
        blocks = sum(needed) + 1
        self.cache = self.model.cache(blocks, block_size, slots=len(rows))
        for layer in self.cache.layers:
            layer.fill_(9.0)  # what an earlier sequence left behind
        free = random.Random(1).sample(range(blocks), blocks)
        self.blocks = [[free.pop() for _ in range(count)] for count in needed]
        self.done = [0] * len(rows)

    def step(self, lengths: dict[int, int]) -> dict[int, Tensor]:
        """Compute so many further tokens of each named sequence; logits [length, V] for each."""
        spans, parts, first = [], [], 0
        for row, length in lengths.items():
            parts.append((row, torch.arange(self.done[row], self.done[row] + length)))
            self.done[row] += length
            spans.append(Span(first, length, self.done[row]))
            first += length
        logits = self.model(self._batch(parts), self._pages(parts, tuple(spans)))
        return {row: part for (row, _), part in zip(parts, logits.split(list(lengths.values())), strict=True)}

    def _batch(self, parts: list[tuple[int, Tensor]]) -> Batch:
        counts_LT = torch.cat([self.counts[row][:, at] for row, at in parts], dim=1)
        tokens = sum(len(at) for _, at in parts)
        return Batch(
            ids_T=torch.cat([torch.tensor(self.rows[row])[at] for row, at in parts]),
            positions_T=torch.cat([at for _, at in parts]),
            seeds_T=torch.cat([torch.full((len(at),), row) for row, at in parts]),
            budget=budget_rows(counts_LT),
            rows_B=torch.arange(tokens),
        )

    def _pages(self, parts: list[tuple[int, Tensor]], spans: tuple[Span, ...]) -> Pages:
        longest = max(len(self.blocks[row]) for row, _ in parts)
        tables = [(self.blocks[row] + [0] * longest)[:longest] for row, _ in parts]
        spans_B3 = torch.tensor([(s.first, s.rows, s.context) for s in spans])
        return Pages(self.cache, torch.tensor(tables), spans_B3, torch.tensor([row for row, _ in parts]))
