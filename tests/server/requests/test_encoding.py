"""Long texts hold up nothing else: they are tokenised beside the event loop, or refused before."""

import asyncio
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from model.errors import EngineBusy
from server.app import create_app
from server.event_loop.thread_pools import BoundedThreadPool
from server.settings import Settings
from tests.server.fakes import FakeChat, FakeEngine, FakeTokenizer
from tests.server.harness import CHAT, COMPLETIONS, eventually, in_memory, service_of
from weights.token_count_bound import NO_BOUND
from weights.tokenizer import Tokenizer, TooManyTokens

BUNDLED = Path("weights/bundled/infinity-stories")
STORY = "Once upon a time there was a little girl who said hello to 3 dogs. "
LONG = STORY * 25_000  # 1.7 MB
NOTICED = 1.0  # seconds of standing still that are no scheduler's fault


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(BUNDLED)


def worst_gap(work: Callable[[], Any]) -> float:
    """The longest time for which another thread could not run beside `work`."""
    gaps, done = [0.0], threading.Event()

    def watch() -> None:
        last = time.monotonic()
        while not done.wait(0.005):
            gaps.append(time.monotonic() - last)
            last = time.monotonic()
        gaps.append(time.monotonic() - last)

    thread = threading.Thread(target=watch)
    thread.start()
    work()
    done.set()
    thread.join()
    return max(gaps)


def test_encoding_lets_other_threads_run(tokenizer: Tokenizer) -> None:
    assert worst_gap(lambda: tokenizer.encode(LONG)) < NOTICED


def test_a_prompt_that_cannot_fit_is_refused_before_it_is_tokenised(tokenizer: Tokenizer) -> None:
    app = create_app(Settings(model="tiny"), FakeEngine(), tokenizer, FakeChat(), {})
    with TestClient(app) as client:
        eventually(lambda: service_of(client).loaded is not None)
        bodies = {COMPLETIONS: {"prompt": LONG}, CHAT: {"messages": [{"role": "user", "content": LONG}]}}
        for path, body in bodies.items():
            began = time.process_time()
            answer = client.post(path, json=body)
            assert time.process_time() - began < 0.5  # tokenising it takes 1.0
            error = answer.json()["error"]
            assert answer.status_code == 400 and error["code"] == "context_length_exceeded"
            assert error["message"].startswith("This model's maximum context length is ")
            assert "256 tokens" in error["message"]
        assert service_of(client).admission.held == 0


def test_a_prompt_that_proves_too_long_is_refused_by_its_count(tokenizer: Tokenizer) -> None:
    app = create_app(Settings(model="tiny"), FakeEngine(), tokenizer, FakeChat(), {})
    with TestClient(app) as client:
        eventually(lambda: service_of(client).loaded is not None)
        count = client.post("/tokenize", json={"prompt": STORY * 20}).json()["count"]
        error = client.post(COMPLETIONS, json={"prompt": STORY * 20}).json()["error"]
        assert error["code"] == "context_length_exceeded"
        assert str(count) in error["message"] and "256 tokens" in error["message"]


def test_token_routes_bound_what_they_list(monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer) -> None:
    monkeypatch.setattr("server.http.routes.tokens.MAX_TOKENS", 100)
    app = create_app(Settings(model="tiny"), FakeEngine(), tokenizer, FakeChat(), {})
    with TestClient(app) as client:
        eventually(lambda: service_of(client).loaded is not None)
        for text in (STORY * 10, STORY * 10_000):
            said = [{"role": "user", "content": text}]
            for body, field in (({"prompt": text}, "prompt"), ({"messages": said}, "messages")):
                answer = client.post("/tokenize", json=body)
                error = answer.json()["error"]
                assert answer.status_code == 400 and error["param"] == field and "at most 100" in error["message"]


@pytest.mark.parametrize("typed", [LONG, "qzj9 #x~" * 200_000])
def test_a_text_far_too_long_is_refused_by_its_beginning(tokenizer: Tokenizer, typed: str) -> None:
    for encode in (tokenizer.encode, tokenizer.encode_chat):
        began = time.process_time()
        with pytest.raises(TooManyTokens, match="at least 1001 tokens; at most 1000"):
            encode(typed, most=1000)
        assert time.process_time() - began < 0.4  # all of it takes 0.8
    count = len(tokenizer.encode(typed))
    assert len(tokenizer.encode(typed, most=count)) == count, "no text that fits is refused"
    with pytest.raises(TooManyTokens, match=f"a text of {count} tokens"):
        tokenizer.encode(typed, most=count - 1)


def test_prompts_of_unknown_bound_are_refused_by_their_beginnings(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Tokenizer.load(BUNDLED)
    monkeypatch.setattr(tokenizer, "_bound", NO_BOUND)
    with TestClient(create_app(Settings(model="tiny"), FakeEngine(), tokenizer, FakeChat(), {})) as client:
        eventually(lambda: service_of(client).loaded is not None)
        error = client.post(COMPLETIONS, json={"prompt": LONG}).json()["error"]
        assert error["code"] == "context_length_exceeded" and "at least 257" in error["message"]


def test_tokenize_bounds_a_text_before_it_is_tokenised(tokenizer: Tokenizer) -> None:
    with TestClient(create_app(Settings(model="tiny"), FakeEngine(), tokenizer, FakeChat(), {})) as client:
        eventually(lambda: service_of(client).loaded is not None)
        for body in ({"prompt": LONG}, {"messages": [{"role": "user", "content": LONG}]}):
            began = time.process_time()
            answer = client.post("/tokenize", json=body)
            assert time.process_time() - began < 0.4
            error = answer.json()["error"]
            assert answer.status_code == 400 and error["param"] == next(iter(body))
            assert "characters; at most 1048576 are tokenised" in error["message"]
        assert client.post("/tokenize", json={"prompt": LONG[: 1 << 20]}).status_code == 200


def test_a_prompt_that_is_cut_is_bounded_before_it_is_tokenised(tokenizer: Tokenizer) -> None:
    with TestClient(create_app(Settings(model="tiny"), FakeEngine(), tokenizer, FakeChat(), {})) as client:
        eventually(lambda: service_of(client).loaded is not None)
        began = time.process_time()
        error = client.post(COMPLETIONS, json={"prompt": LONG, "truncate_prompt_tokens": 5}).json()["error"]
        assert time.process_time() - began < 0.4
        assert error["param"] == "truncate_prompt_tokens" and "at most 1048576 are read" in error["message"]


class Held(FakeTokenizer):
    """Encodes prompts when it is let go."""

    def __init__(self) -> None:
        self.go = threading.Event()

    def encode(self, text: str, framed: bool = True, most: int | None = None) -> list[int]:
        assert self.go.wait(20)
        return super().encode(text, framed, most)

    def encode_chat(self, text: str, framed: bool = False, most: int | None = None) -> list[int]:
        return FakeTokenizer.encode(self, text, framed, most)


def test_many_requests_at_tokenize_is_bounded_and_leaves_completions_untouched() -> None:
    held = Held()
    app = create_app(Settings(model="tiny"), FakeEngine(), held, FakeChat(), {})
    with TestClient(app) as client:
        eventually(lambda: service_of(client).loaded is not None)
        statuses: list[int] = []
        ask = lambda: statuses.append(client.post("/tokenize", json={"prompt": "x"}).status_code)  # noqa: E731
        threads = [threading.Thread(target=ask) for _ in range(40)]
        for thread in threads:
            thread.start()
        eventually(lambda: statuses.count(503) == 40 - 17)
        assert client.post(CHAT, json={"messages": [{"role": "user", "content": "x"}]}).status_code == 200
        busy = client.post("/detokenize", json={"tokens": [1]})
        assert busy.status_code == 503 and busy.headers["retry-after"] and "/detokenize" in busy.text
        held.go.set()
        for thread in threads:
            thread.join(20)
        assert sorted(statuses) == [200] * 17 + [503] * 23
        assert client.post("/detokenize", json={"tokens": [65]}).json() == {"prompt": "A"}


def test_a_lane_gives_its_places_back() -> None:
    async def check() -> None:
        lane, go = BoundedThreadPool("work", 1, 1), threading.Event()
        first = asyncio.ensure_future(lane.run(go.wait, 10))
        second = asyncio.ensure_future(lane.run(int, "2"))
        await asyncio.sleep(0.05)
        with pytest.raises(EngineBusy, match="work is full: 2"):
            await lane.run(int, "3")
        second.cancel()
        await asyncio.sleep(0.05)
        third = asyncio.ensure_future(lane.run(int, "4"))
        await asyncio.sleep(0.05)
        go.set()
        assert await first is True and await third == 4
        with pytest.raises(ValueError, match="x"):
            await lane.run(int, "x")
        assert await asyncio.gather(lane.run(int, "5"), lane.run(int, "6")) == [5, 6]

    asyncio.run(check())


def test_many_ids_are_checked_and_decoded_in_order() -> None:
    with in_memory() as client:
        assert client.post("/detokenize", json={"tokens": []}).json() == {"prompt": ""}
        error = client.post("/detokenize", json={"tokens": [1] * 100_000 + [257]}).json()["error"]
        assert error["param"] == "tokens" and "257" in error["message"] and "256" in error["message"]
