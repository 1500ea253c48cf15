"""An engine whose steps overlap on the kernels gives the tokens of one that waits for plain torch."""

import pytest

from engine.assembly import assemble
from engine.engine import Engine
from engine.types import EngineSettings, Request, Sampling
from model.backends.base import Runnable
from model.backends.cuda import places
from model.backends.cuda.kernels import attend
from model.backends.cuda.runnable import CudaRunnable
from model.backends.torch.backend import TorchRunnable
from model.budget import ExpertBudget, RoutingRule
from tests.model.tiny import decoder, llama_like, topk

PAGE = 8
SETTINGS = EngineSettings("", block_size=PAGE, kv_cache_bytes=1 << 16, max_running=2, max_step_tokens=6, step_ms=0)


class Overlapping(CudaRunnable):
    """As on a GPU: the engine plans a step while the last one is computed."""

    @property
    def overlaps(self) -> bool:
        return True


def request(name: str, prompt: tuple[int, ...], count: int, rule: RoutingRule) -> Request:
    return Request(name, prompt, ExpertBudget((count,), rule=rule), Sampling(3, seed=0, temperature=0.0))


def generate(engine: Engine, requests: list[Request]) -> dict[str, list[int]]:
    """The tokens of requests that run side by side."""
    tokens: dict[str, list[int]] = {request.id: [] for request in requests}
    for request in requests:
        engine.add(request)
    while engine.has_work:
        for event in engine.step().events:
            assert event.error is None, event.error
            if event.token is not None:
                tokens[event.request_id].append(event.token)
    engine.scheduler.check()
    return tokens


def test_tokens_of_an_overlapping_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt in chunks that crosses a page, beside a short one with another count and an adaptive rule."""
    monkeypatch.setattr(attend, "PAGE", PAGE)
    monkeypatch.setattr(places, "PAGE", PAGE)
    model = decoder(llama_like(topk(experts=4), heads=2, kv_heads=1, head_width=8, context=24))
    requests = [
        request("long", (5, 1, 30, 8, 8, 2, 36, 11, 4), 4, RoutingRule()),
        request("short", (9, 2), 2, RoutingRule(threshold=0.5)),
    ]
    kinds: tuple[Runnable, ...] = (Overlapping(model, 24), TorchRunnable(model))
    found, wanted = (generate(assemble(kind, SETTINGS)[0], requests) for kind in kinds)
    assert found == wanted and [len(tokens) for tokens in found.values()] == [3, 3]
