"""Routed pairs of a layer whose experts lie on several ranks: rank 0 asks, the others answer.

Rank 0 sends each rank that has pairs the rows of these, each row once, and gets back the output of every pair, not yet
added up. It adds them expert by expert in rising order, as one process does, and each rank multiplies the same rows by
the same matrices as one process would: the results are the same bits. A rank without pairs hears nothing.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from model.moe.base import RoutedPairs
from model.moe.topk import TopKMixture
from model.ranks.share import Share
from model.ranks.transport import CONTENT, RESULT, SILENCE_SECONDS, Transport

RUN = 1  # the first of a message's sizes: pairs of a layer come; 0: a sign of life


class Pairs(NamedTuple):
    """Pairs of one rank's experts: token or row of each, weights, and where the pairs of each expert end."""

    token_R: Tensor
    weight_R: Tensor
    ends: list[int]

    def run(self, mixture: TopKMixture, x_TD: Tensor, out_RD: Tensor) -> None:
        """Write weight · expert(x) of each pair, by a mixture that holds these experts alone."""
        start = 0
        for expert, end in enumerate(self.ends):
            if end > start:
                some = slice(start, end)
                out_RD[some] = mixture.expert(x_TD[self.token_R[some]], self.weight_R[some, None], expert)
                start = end


class RankedExperts:
    """What `TopKMixture.execute` is on rank 0: the pairs of one layer on all ranks."""

    def __init__(self, layer: int, mixture: TopKMixture, transport: Transport) -> None:
        self._layer, self._mixture, self._transport = layer, mixture, transport
        shares = (Share(rank, transport.ranks) for rank in range(transport.ranks))
        self._experts = [share.experts(mixture.config.experts) for share in shares]

    def __call__(self, x_TD: Tensor, pairs: RoutedPairs) -> Tensor:
        """Σ over a token's pairs of weight · expert(x), [T, D]. Raises EngineDown if a rank is lost."""
        ends = pairs.ends_E.tolist()
        out_RD = x_TD.new_empty(len(pairs.token_R), x_TD.shape[1])
        with self._transport.lock:
            answers = [self._ask(rank, x_TD, pairs, ends, out_RD) for rank in range(1, self._transport.ranks)]
            part, own = self._of(0, pairs, ends)
            own.run(self._mixture, x_TD, out_RD[part])
            for wait in filter(None, answers):
                wait()
            self._transport.finish()
        return added(out_RD, pairs.token_R, ends, x_TD)

    def _of(self, rank: int, pairs: RoutedPairs, ends: list[int]) -> tuple[slice, Pairs]:
        """Which of the pairs are a rank's, and these."""
        experts = self._experts[rank]
        first = ends[experts.start - 1] if experts.start else 0
        part = slice(first, ends[experts.stop - 1])
        own_ends = [ends[expert] - first for expert in experts]
        return part, Pairs(pairs.token_R[part], pairs.weight_R[part], own_ends)

    def _ask(
        self, rank: int, x_TD: Tensor, pairs: RoutedPairs, ends: list[int], out_RD: Tensor
    ) -> Callable[[], None] | None:
        """Send a rank its pairs, and have its answer written to `out_RD`; the result waits for that. None: it has no
        pairs."""
        part, own = self._of(rank, pairs, ends)
        if not len(own.token_R):
            return None
        token_r, row_R = own.token_R.unique(return_inverse=True)
        ends_E = torch.tensor(own.ends, device=x_TD.device)
        content = packed([row_R, ends_E, own.weight_R.float(), x_TD[token_r]])
        self._transport.send_sizes(rank, [RUN, self._layer, len(token_r), len(row_R)])
        self._transport.send(rank, content, CONTENT)
        return self._transport.receive(rank, out_RD[part], RESULT)


def added(out_RD: Tensor, token_R: Tensor, ends: list[int], x_TD: Tensor) -> Tensor:
    """The sum of each token's outputs, expert by expert in rising order."""
    y_TD, start = torch.zeros_like(x_TD), 0
    for end in ends:
        if end > start:
            y_TD.index_add_(0, token_R[start:end], out_RD[start:end])
            start = end
    return y_TD


@torch.inference_mode()
def answer(transport: Transport, mixtures: Sequence[TopKMixture]) -> None:
    """Run the pairs that rank 0 asks for, by mixtures that hold this rank's experts alone.

    Raises:
        EngineDown: rank 0 has ended, or has been silent for `SILENCE_SECONDS`.
    """
    while True:
        kind, layer, rows, pairs = transport.receive_sizes(0, SILENCE_SECONDS)
        if kind == RUN:
            _answer(transport, mixtures[layer], rows, pairs)


def _answer(transport: Transport, mixture: TopKMixture, rows: int, pairs: int) -> None:
    down = mixture.down
    experts, width, dtype = len(down), down.shape[1], down.dtype
    size = 8 * (pairs + experts) + 4 * pairs + rows * width * dtype.itemsize
    content = torch.empty(size, dtype=torch.uint8, device=down.device)
    transport.receive(0, content, CONTENT)()
    integers, weights, row_bytes = content.split([8 * (pairs + experts), 4 * pairs, rows * width * dtype.itemsize])
    row_R, ends_E = integers.view(torch.int64).split([pairs, experts])
    x_rD = row_bytes.view(dtype).view(rows, width)
    out_RD = x_rD.new_empty(pairs, width)
    Pairs(row_R, weights.view(torch.float32), ends_E.tolist()).run(mixture, x_rD, out_RD)
    transport.send(0, out_RD, RESULT)
    transport.finish()


def packed(parts: Sequence[Tensor]) -> Tensor:
    """The bytes of tensors, one after the other: those of wider types first, so that each begins where it may."""
    return torch.cat([part.contiguous().flatten().view(torch.uint8) for part in parts])
