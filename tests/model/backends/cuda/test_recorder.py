"""What `CudaRecorder` asks of torch, in order; with a torch.cuda that only notes it."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch

from model.backends.cuda.recorder import CudaRecorder

GPU = torch.device("cuda:1")


class Card:
    """Stands in for torch.cuda. `broken`: the end of a capture raises before it has changed the stream back."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.stream = "steps"
        self.broken = False

    @contextmanager
    def graph(self, graph: Any, pool: str, stream: str, capture_error_mode: str) -> Iterator[None]:
        self.calls.append(f"capture on {stream} into {pool}, {capture_error_mode}")
        before, self.stream = self.stream, stream
        yield
        if self.broken:
            raise torch.AcceleratorError("CUDA error: operation failed due to a previous error during capture")
        self.stream = before

    def set_stream(self, stream: str) -> None:
        self.stream = stream


class Graph:
    def __init__(self, card: Card) -> None:
        self._card = card

    def replay(self) -> None:
        self._card.calls.append(f"replay on {self._card.stream}")


class Event:
    def __init__(self, card: Card) -> None:
        self._card = card

    def record(self, stream: str) -> None:
        self._card.calls.append(f"event on {stream}")

    def synchronize(self) -> None:
        self._card.calls.append("wait")


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    made = Card()
    stands_in = {
        "graph": made.graph,
        "set_stream": made.set_stream,
        "current_stream": lambda device: made.stream,
        "Stream": lambda device: f"recordings of {device}",
        "CUDAGraph": lambda: Graph(made),
        "Event": lambda: Event(made),
        "graph_pool_handle": lambda: "pool",
        "device": lambda device: nullcontext(),
    }
    for name, function in stands_in.items():
        monkeypatch.setattr(torch.cuda, name, function)
    return made


def test_a_graph_is_captured_on_a_stream_of_its_own_and_replayed_on_that_of_the_steps(card: Card) -> None:
    recorder = CudaRecorder(GPU)
    recording = recorder.record(lambda: card.stream, recorder.pool())
    assert recording.outputs == "recordings of cuda:1"
    recording.replay()
    assert card.calls == ["capture on recordings of cuda:1 into pool, thread_local", "replay on steps"]


def test_after_a_capture_that_failed_steps_are_on_their_stream(card: Card) -> None:
    recorder = CudaRecorder(GPU)
    card.broken = True
    with pytest.raises(torch.AcceleratorError):
        recorder.record(lambda: None, recorder.pool())
    assert card.stream == "steps"


def test_a_mark_is_an_event_behind_what_is_queued(card: Card) -> None:
    CudaRecorder(GPU).record_event().wait()
    assert card.calls == ["event on steps", "wait"]


def test_a_copy_is_not_waited_for(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    copies: list[dict[str, Any]] = []
    monkeypatch.setattr(torch.Tensor, "copy_", lambda self, source, **options: copies.append(options))
    CudaRecorder(GPU).copy(torch.zeros(2), torch.ones(2))
    assert copies == [{"non_blocking": True}]
