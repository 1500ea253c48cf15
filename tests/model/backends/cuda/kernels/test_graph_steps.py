"""Decoding steps of the kernels, padded to their buckets: the bits of the same steps as they are."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from model.backends.cuda import buckets, places
from model.backends.cuda.graphs import GraphSet
from model.backends.cuda.kernels import attend
from model.backends.cuda.outputs import StepOutputs
from model.backends.cuda.recorder import Pool
from model.backends.cuda.runnable import CudaRunnable, buckets_of
from model.batch import Batch, Pages
from model.shapes.attention import MLA
from model.shapes.decoder import DecoderConfig
from model.shapes.mixtures import Router
from model.shapes.rope import Rope
from model.step import Observer
from tests.model.tiny import PagedRun, decoder, llama_like, topk

pytestmark = pytest.mark.filterwarnings("ignore:All-NaN")  # the router of what is padding, in the interpreter
PAGE = 16
HEADS = {"heads": 2, "kv_heads": 1, "head_width": 12}
SPARSE = topk(experts=4, router=Router(normalise=True))
LATENT = MLA(2, rank=8, plain_width=6, rope=Rope(4), value_width=6, query_rank=None)
DECODERS = {
    "sparse": llama_like(SPARSE, qk_norm="head", window=20, **HEADS),
    "latent": llama_like(SPARSE, attention=(LATENT,)),
}


@pytest.fixture(autouse=True)
def small_pages(poison: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A page is a segment; nothing may be read that was not written."""
    for module in (attend, places, buckets):
        monkeypatch.setattr(module, "PAGE", PAGE)
    for module in (attend, buckets):
        monkeypatch.setattr(module, "SEGMENT", PAGE)
    with torch.inference_mode():
        yield


@dataclass
class Replayed:
    """Runs its function for each replay; what it returns goes to where the first outputs are."""

    function: Callable[[], StepOutputs]
    outputs: Any = None

    def replay(self) -> None:
        again = self.function()
        if self.outputs is None:
            self.outputs = again
            return
        self.outputs.normed_BD.copy_(again.normed_BD)
        for load_E, new_E in zip(self.outputs.loads, again.loads, strict=True):
            load_E.copy_(new_E)


@dataclass
class Here:
    """A recorder on the CPU, which copies at once."""

    recorded: list[Replayed] = field(default_factory=list)

    def pinned(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8)

    memory = pinned

    def copy(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source)

    def record_event(self) -> "Here":
        return self

    def wait(self) -> None:
        pass

    def pool(self) -> Pool:
        return None

    def record(self, function: Callable[[], Any], pool: Pool) -> Any:
        self.recorded.append(Replayed(function))
        return self.recorded[-1]


class Loads(Observer):
    def __init__(self) -> None:
        self.loads: list[Tensor] = []

    def routed(self, layer: int, pairs: int, load_E: Tensor, scores_TE: Tensor | None) -> None:
        self.loads.append(load_E)


class Told(CudaRunnable):
    """Keeps what its observer hears."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(decoder(config), config.context)
        self.told = Loads()

    def __call__(self, batch: Batch, pages: Pages, observer: Observer | None = None) -> Tensor:
        return super().__call__(batch, pages, self.told)


def run(config: DecoderConfig, recorder: Here | None) -> tuple[list[Tensor], list[Tensor]]:
    """Logits and loads of three sequences: their prompts, then two steps with one token of each."""
    model = Told(config)
    if recorder is not None:
        buckets_ = buckets_of(config, config.context)
        model.graphs = GraphSet(model.program.compute, buckets_, recorder, torch.device("cpu"))
    rows = [[(7 * at + row) % 61 for at in range(40)] for row in range(3)]
    most = config.experts.trained
    counts = [
        torch.tensor([1 + (at + row) % most for at in range(40)])[None].expand(len(config.mixtures), -1)
        for row in range(3)
    ]
    paged = PagedRun(model, rows, counts, PAGE)
    logits = list(paged.step({0: 15, 1: 1, 2: 1}).values())
    for _ in range(2):
        logits += [row_V.clone() for row_V in paged.step({0: 1, 1: 1, 2: 1}).values()]
    return logits, model.told.loads


@pytest.mark.parametrize("kind", DECODERS)
def test_steps_under_graphs_have_the_bits_of_steps_as_they_are(kind: str, chains: None) -> None:
    """Contexts grow from one segment to two, where the bucket has four. What an observer heard of a step is the same
    after later steps."""
    recorder = Here()
    found, loads = run(DECODERS[kind], recorder)
    expected, expected_loads = run(DECODERS[kind], None)
    assert len(recorder.recorded) == 1
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    assert all(torch.equal(*pair) for pair in zip(loads, expected_loads, strict=True))
