"""Answers of millions of figures are made, written and sent in slices: others do not wait for them."""

import asyncio
import gc
import json
import time
from dataclasses import replace
from typing import Any

import httpx
import orjson
import pytest

from engine.process.messages import Events, payload_of, read_from_engine
from engine.types import Logprob, Request, TokenEvent
from server.dialects.base import Content
from server.event_loop.slices import ENTRIES, LongList, Steps, at_once, in_slices, long_list
from server.generation.output_processor import Delta, token_logprob
from tests.freezes import SLOWNESS
from tests.server import fakes
from tests.server.fakes import INFO, FakeEngine
from tests.server.harness import CHAT, COMPLETIONS, frames, in_memory, on_loopback
from tests.server.test_hostile_bodies import Poller
from tests.server.test_responses import RESPONSES

WAIT = 1.0 * SLOWNESS  # seconds of a neighbour: several times what is needed, a fraction of what one part took
TOKENS, LISTED = 700, 20


def counted(steps: int) -> Steps[int]:
    for _ in range(steps):
        time.sleep(0.001)
        yield
    return steps


def test_slices_let_others_run() -> None:
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async def both() -> int:
        task = asyncio.create_task(others())
        result = await in_slices(counted(50))
        task.cancel()
        return result

    assert asyncio.run(both()) == at_once(counted(50)) == 50
    assert turns > 10


@pytest.mark.parametrize("length", [0, 1, ENTRIES, ENTRIES + 1, 5 * ENTRIES + 3])
def test_a_long_list_is_written_as_a_list(length: int) -> None:
    entries = [{"a": [index, None], "b": "é" * (index % 3)} for index in range(length)]
    assert orjson.dumps({"list": at_once(long_list(entries))}) == orjson.dumps({"list": entries})
    empty = LongList()
    empty.flush()
    assert empty.value == []


PLACE = Logprob(-0.25, tuple((id, -1.0 - id) for id in range(LISTED)))


def scores(request: Request) -> tuple[Logprob, ...] | None:
    return None if request.sampling.prompt_logprobs is None else (PLACE,) * (len(request.prompt) - 1)


def engine_of(length: int) -> FakeEngine:
    engine = FakeEngine()
    engine.info = replace(INFO, max_model_len=length)
    return engine


SCORED: dict[str, Any] = {"prompt": [[65] * TOKENS] * 64, "echo": True, "logprobs": LISTED, "max_tokens": 0}


@pytest.mark.alone
@pytest.mark.parametrize("stream", [False, True])
def test_scores_of_many_prompts(monkeypatch: pytest.MonkeyPatch, stream: bool) -> None:
    """What comes is parsed when the server has gone: in one process, that would hold it up."""
    monkeypatch.setattr(fakes, "_prompt_logprobs", scores)
    with on_loopback(engine_of(2_000)) as (url, _), httpx.Client(base_url=url, timeout=120) as client:
        begun = time.process_time()
        with Poller(url) as poller:
            response = client.post(COMPLETIONS, json=SCORED | {"stream": stream})
        used = time.process_time() - begun
    print(f"{len(response.content)} bytes, {used:.2f} CPU s, a neighbour waited {poller.longest:.3f} s")
    if stream:
        chunks = [json.loads(frame) for frame in frames(response.text)[:-1]]
        choices = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["logprobs"]]
    else:
        assert int(response.headers["content-length"]) == len(response.content)
        choices = response.json()["choices"]
    assert sorted(choice["index"] for choice in choices) == list(range(64))
    best = {chr(id): -1.0 - id for id in range(LISTED)} | {"A": -0.25}
    for choice in (choices[0], choices[63]):
        found = choice["logprobs"]
        assert choice["text"] == "A" * TOKENS == "".join(found["tokens"])
        assert found["token_logprobs"] == [None] + [-0.25] * (TOKENS - 1)
        assert found["top_logprobs"] == [None] + [best] * (TOKENS - 1)
        assert found["text_offset"] == list(range(TOKENS))
    assert poller.longest < WAIT


def test_scores_are_bounded_together() -> None:
    with in_memory(engine_of(2_000)) as client:
        error = client.post(COMPLETIONS, json=SCORED | {"prompt": [[65] * 1000] * 64}).json()["error"]
    assert error["param"] == "logprobs"
    assert "64000 prompt tokens with 20 alternatives are 1344000 entries; at most 1000000" in error["message"]


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, RESPONSES])
def test_many_generated_tokens_are_listed_as_few_are(path: str) -> None:
    """A stream's chunks are short; a whole answer's lists are longer than a slice."""
    asked: dict[str, Any] = {
        CHAT: {"messages": [{"role": "user", "content": "x"}], "logprobs": True, "top_logprobs": 2},
        COMPLETIONS: {"prompt": "x", "logprobs": 2, "max_tokens": 300},
        RESPONSES: {"input": "x", "include": ["message.output_text.logprobs"], "top_logprobs": 2},
    }[path]
    engine = engine_of(1000)
    engine.script = lambda _: [*b"abc" * 100, 256]
    with in_memory(engine) as client:
        whole = client.post(path, json=asked).json()
        streamed = [
            json.loads(frame)
            for frame in frames(client.post(path, json=asked | {"stream": True}).text)
            if frame != "[DONE]"
        ]
    if path == RESPONSES:
        entries = whole["output"][0]["content"][0]["logprobs"]
        assert entries == [
            entry for event in streamed for entry in event.get("logprobs", []) if "delta" in event["type"]
        ]
    else:
        parts = [chunk["choices"][0]["logprobs"] for chunk in streamed]
        name = "content" if path == CHAT else "top_logprobs"
        entries = whole["choices"][0]["logprobs"][name]
        assert entries == [entry for part in parts if part for entry in part[name]]
    assert len(entries) == 300


def test_what_tokens_leave_is_no_work_for_the_garbage_collector() -> None:
    """A large call holds hundreds of thousands of such values, and looking through them stops the event loop."""
    logprob = Logprob(-1.0, tuple((id, -2.0) for id in range(20)))
    events = tuple(TokenEvent("a", token, logprob, prompt_logprobs=(logprob,) * 3) for token in range(1000))
    payload = payload_of(Events(events, 0.0))
    gc.collect()
    before = len(gc.get_objects())
    message = read_from_engine(payload)
    assert isinstance(message, Events)
    deltas = []
    for event in message.events:
        assert event.token is not None and event.logprob is not None
        entries = (token_logprob(event.token, event.logprob, 0),)
        deltas.append(Delta(0, (Content("a"),), entries, prompt=event.prompt_logprobs))
    gc.collect()
    assert len(gc.get_objects()) - before < 100, "of 1000 tokens with 23 log-probabilities each"
    assert len(deltas) == 1000
