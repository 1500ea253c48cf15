"""What a step gives the kernels: tensors of the device, and the few numbers that launches are sized by.

A graph is captured for one set of these numbers (`StepShape`) and replayed with other contents of the tensors, so
nothing else of a step may reach a launch. A step's inputs are made on the host from a batch and its pages, and reach
the device in one copy.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from model.backends.cuda.kernels.attend import QueryTiles
from model.backends.cuda.kernels.route import TokenRules
from model.backends.cuda.places import check_block_size, query_tiles, slots_of
from model.batch import Batch, Cache, LateIds, Pages

ALIGNMENT = 256  # bytes: where a tensor begins in the copy, as an allocation of its own would


@dataclass(frozen=True, slots=True)
class StepShape:
    """The numbers that size a step's launches; equal shapes are the same launches, if no token has a rule of its
    own: a rule's ranks size launches too."""

    tokens: int
    rows: int  # that get logits
    sequences: int
    tiles: int  # of queries
    tile_rows: int  # tokens of one tile
    blocks: int  # columns of the tables
    longest: int  # an upper bound of the contexts
    k_max: int  # the largest count, or any larger number
    has_rules: bool = False


@dataclass(frozen=True, slots=True)
class StepInputs:
    """One step's tensors, all on the device.

    A token may be padding: its counts are 0, its slot is -1, no tile names it, and its results mean nothing.
    """

    shape: StepShape
    cache: Cache
    ids_T: Tensor  # int64
    positions_T: Tensor  # int64
    seeds_T: Tensor  # int64
    counts_LT: Tensor  # int64
    rows_B: Tensor  # int64
    tables_BP: Tensor  # int64: block ids of each sequence
    spans_B3: Tensor  # int64: of each sequence its first row, new tokens, and context
    slots_T: Tensor  # int64: where each new token's keys and values go
    tiles: QueryTiles
    states_B: Tensor | None = None  # int64: of each sequence the slot of its states, where layers have some
    rules: TokenRules | None = None


def host_inputs(batch: Batch, pages: Pages, tile_rows: int, trained: int) -> StepInputs:
    """A step's inputs on the host, where its batch and pages are. A tile has `tile_rows` tokens at the most; `trained`
    is the count of the checkpoint's training.

    Raises:
        ValueError: the cache has blocks of another size than the kernels' pages.
    """
    check_block_size(pages.cache.block_size)
    budget, spans_B3 = batch.budget, pages.spans_B3
    rules = TokenRules.of(budget.layer(0), trained) if budget.rules else None
    tiles = query_tiles(spans_B3, tile_rows)
    shape = StepShape(
        tokens=len(batch.ids_T),
        rows=len(batch.rows_B),
        sequences=len(spans_B3),
        tiles=len(tiles.sequence_N),
        tile_rows=tiles.rows,
        blocks=pages.tables_BP.shape[1],
        longest=int(spans_B3[:, 2].max()),
        k_max=budget.k_max,
        has_rules=rules is not None,
    )
    return StepInputs(
        shape=shape,
        cache=pages.cache,
        ids_T=batch.ids_T,
        positions_T=batch.positions_T,
        seeds_T=batch.seeds_T,
        counts_LT=budget.counts_LT,
        rows_B=batch.rows_B,
        tables_BP=pages.tables_BP,
        spans_B3=spans_B3,
        slots_T=slots_of(pages.tables_BP, spans_B3),
        tiles=tiles,
        states_B=pages.slots_B,
        rules=rules,
    )


def on_device(inputs: StepInputs, device: torch.device, late: LateIds | None = None) -> StepInputs:
    """The same on a device, in one copy that is not waited for, with the ids that only the device knows.

    The host's values may be overwritten once it returns: they are collected in pageable memory, which is read before a
    copy returns.
    """
    tensors: list[Tensor] = []

    def collect(tensor: Tensor) -> Tensor:
        tensors.append(tensor)
        return tensor

    changed(inputs, collect)
    copies = iter(copied(tensors, device))
    moved: StepInputs = changed(inputs, lambda _: next(copies))
    return moved if late is None else replace(moved, ids_T=late.put(moved.ids_T))


def changed(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The value with every tensor of it, and of the values in it, changed, in the order of the fields; the cache is
    left alone."""
    if isinstance(value, Tensor):
        return change(value)
    if not is_dataclass(value) or isinstance(value, (Cache, type)):
        return value
    return replace(value, **{field.name: changed(getattr(value, field.name), change) for field in fields(value)})


def copied(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """The host's tensors on a device, side by side."""
    sizes = [tensor.nbytes for tensor in tensors]
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + -(-size // ALIGNMENT) * ALIGNMENT)
    together = torch.empty(starts[-1], dtype=torch.uint8)
    for start, size, tensor in zip(starts, sizes, tensors, strict=False):
        together[start : start + size].view(tensor.dtype).copy_(tensor.flatten())
    there = together.to(device, non_blocking=True)
    return [
        there[start : start + size].view(tensor.dtype).view(tensor.shape)
        for start, size, tensor in zip(starts, sizes, tensors, strict=False)
    ]
