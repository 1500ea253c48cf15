"""Bodies that are small for a network and large for a parser: each is one 400 that names the field, costs little time
and memory, and does not keep others waiting.
"""

import threading
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import httpx
import pytest

from tests.server.fakes import FakeEngine
from tests.server.harness import CHAT, COMPLETIONS, on_loopback
from tests.server.test_messages import MESSAGES
from tests.server.test_responses import RESPONSES

BYTES = 7_800_000
pytestmark = pytest.mark.alone
WAIT, CPU, MEMORY = 1.0, 2.0, 400 << 20  # of a neighbour, of the process, of its resident set: far above what is needed
RESULT = b'{"type":"function_call_output","call_id":"a",'
FUNCTION = b'{"type":"function","function":{"name":"f","parameters":{'
USER = b'"messages":[{"role":"user","content":"x"}]'


def full(begin: bytes, item: bytes, end: bytes, count: int = 0) -> bytes:
    """`count` items, or as many as go into a body."""
    count = count or (BYTES - len(begin) - len(end)) // (len(item) + 1)
    return begin + (item + b",") * (count - 1) + item + end


def keys(begin: bytes, end: bytes, count: int = 600_000) -> bytes:
    return begin + members(count) + end


@cache
def members(count: int) -> bytes:
    return b",".join(b'"k%d":1' % i for i in range(count))


class Poller:
    """Asks for /health all the time and keeps the longest wait."""

    def __init__(self, url: str) -> None:
        self.longest, self._url, self._end = 0.0, url, threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> "Poller":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _run(self) -> None:
        with httpx.Client(base_url=self._url, timeout=120) as client:
            while not self._end.wait(0.01):
                begun = time.monotonic()
                assert client.get("/health").status_code == 200
                self.longest = max(self.longest, time.monotonic() - begun)


def peak() -> int:
    """The most memory that this process has held since the last reset, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with on_loopback(FakeEngine()) as (url, _):
        yield url


def cost(address: str, path: str, body: bytes) -> tuple[httpx.Response, float, float, int]:
    """The answer, a neighbour's longest wait, CPU seconds and growth of memory."""
    with httpx.Client(base_url=address, timeout=120) as client, Poller(address) as poller:
        client.get("/health")
        Path("/proc/self/clear_refs").write_text("5")
        before, begun = peak(), time.process_time()
        response = client.post(path, content=body, headers={"content-type": "application/json"})
        used = time.process_time() - begun
        time.sleep(0.02)
    return response, poller.longest, used, peak() - before


# what is around a list, and an item that is wrong in it
LISTS: dict[str, tuple[str, bytes, bytes, bytes]] = {
    "messages": (CHAT, b'{"messages":[', b"{}", b"]}"),
    "messages[0].content": (CHAT, b'{"messages":[{"role":"user","content":[', b"{}", b"]}]}"),
    "messages[0].tool_calls": (CHAT, b'{"messages":[{"role":"assistant","tool_calls":[', b"{}", b"]}]}"),
    "tools": (CHAT, b"{" + USER + b',"tools":[', b"{}", b"]}"),
    "input": (RESPONSES, b'{"input":[', b"{}", b"]}"),
    "input[0].content": (RESPONSES, b'{"input":[{"role":"user","content":[', b"{}", b"]}]}"),
    "input[0].output": (
        RESPONSES,
        b'{"input":[' + RESULT + b'"output":[',
        b"{}",
        b"]}]}",
    ),
    "messages[0].content[0].content": (
        MESSAGES,
        b'{"max_tokens":9,"messages":[{"role":"user","content":[{"type":"tool_result","tool_use_id":"a","content":[',
        b"{}",
        b"]}]}]}",
    ),
    "system": (MESSAGES, b'{"max_tokens":9,' + USER + b',"system":[', b"{}", b"]}"),
    "messages[0].images": ("/api/chat", b'{"messages":[{"role":"user","images":[', b"{}", b"]}]}"),
    "options.stop": ("/api/generate", b'{"prompt":"x","options":{"stop":[', b"{}", b"]}}"),
    "include": (RESPONSES, b'{"input":"x","include":[', b"1", b"]}"),
    "stop": (COMPLETIONS, b'{"prompt":"x","stop":[', b"{}", b"]}"),
    "stop_token_ids": (COMPLETIONS, b'{"prompt":"x","stop_token_ids":[', b'""', b"]}"),
    "guided_choice": (COMPLETIONS, b'{"prompt":"x","guided_choice":[', b"{}", b"]}"),
    "structured_outputs.choice": (COMPLETIONS, b'{"prompt":"x","structured_outputs":{"choice":[', b"{}", b"]}}"),
    "prompt": (COMPLETIONS, b'{"prompt":[', b"{}", b"]}"),
    "experts": (COMPLETIONS, b'{"prompt":"x","experts":{"count":[', b"1", b"]}}"),
    "tokens[0]": ("/detokenize", b'{"tokens":[', b"{}", b"]}"),
}
OBJECTS = {  # with keys without end
    "metadata": (RESPONSES, b'{"input":"x","metadata":{', b"}}"),
    "logit_bias": (COMPLETIONS, b'{"prompt":"x","logit_bias":{', b"}}"),
    "guided_json": (COMPLETIONS, b'{"prompt":"x","guided_json":{', b"}}"),
    "extra_body": (COMPLETIONS, b'{"prompt":"x","extra_body":{', b"}}"),
    "chat_template_kwargs": (CHAT, b"{" + USER + b',"chat_template_kwargs":{', b"}}"),
    "tools": (CHAT, b"{" + USER + b',"tool_choice":"required","tools":[' + FUNCTION, b"}}}]}"),
}


def refused_cheaply(address: str, path: str, body: bytes) -> dict[str, str]:
    response, wait, used, memory = cost(address, path, body)
    print(f"{len(body)} bytes: a neighbour waited {wait:.3f} s, {used:.3f} CPU s, {memory >> 20} MiB; {response.text}")
    assert response.status_code == 400 and len(response.content) < 1000, response.text[:1000]
    assert wait < WAIT and used < CPU and memory < MEMORY
    error: dict[str, str] | str = response.json()["error"]
    return {"message": error, "param": error.split()[0]} if isinstance(error, str) else error  # Ollama's is a text


@pytest.mark.parametrize("field", ["messages", "input", "stop", "stop_token_ids", "tokens[0]"])
def test_a_body_full_of_wrong_items(address: str, field: str) -> None:
    path, begin, item, end = LISTS[field]
    assert "the body may have at most" in refused_cheaply(address, path, full(begin, item, end))["message"]


@pytest.mark.parametrize("field", LISTS)
def test_a_list_as_long_as_json_may_be(address: str, field: str) -> None:
    path, begin, item, end = LISTS[field]
    error = refused_cheaply(address, path, full(begin, item, end, 60_000 if item == b"{}" else 1_000_000))
    assert error["param"] == field and ("got" in error["message"] or "has 1000000" in error["message"])


@pytest.mark.parametrize("field", OBJECTS)
def test_an_object_with_as_many_keys_as_json_may_have(address: str, field: str) -> None:
    path, begin, end = OBJECTS[field]
    error = refused_cheaply(address, path, keys(begin, end, 60_000))
    assert error["param"] == field and "at most" in error["message"]


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, RESPONSES, "/tokenize", "/detokenize"])
def test_unknown_fields_without_end(address: str, path: str) -> None:
    message = refused_cheaply(address, path, keys(b"{", b"}", 60_000))["message"]
    assert message == "the body may have at most 256 fields, got 60000"


def test_a_body_full_of_unknown_fields(address: str) -> None:
    assert "at most 65536 objects, lists and keys" in refused_cheaply(address, CHAT, keys(b"{", b"}"))["message"]


@pytest.mark.parametrize("item", [b'""', b"[]", b'"\\\\","\\""', b'{"":0}', b"1.5", b'"ab"'])
def test_many_values_in_a_field_that_nothing_reads(address: str, item: bytes) -> None:
    assert "at most" in refused_cheaply(address, COMPLETIONS, full(b'{"prompt":"x","what":[', item, b"]}"))["message"]


def test_many_valid_items(address: str) -> None:
    message = b'{"role":"user","content":""}'
    error = refused_cheaply(address, CHAT, full(b'{"messages":[', message, b"]}", 20_000))
    assert error["message"] == "messages must be at most 4096 messages, got 20000"
    error = refused_cheaply(address, COMPLETIONS, full(b'{"prompt":[', b"1", b"]}", 1_000_000))
    assert error["param"] == "prompt" and "1000000" in error["message"] and "256" in error["message"]
    ids = b"[" + b"1," * 200 + b"-1]"
    error = refused_cheaply(address, COMPLETIONS, full(b'{"prompt":[', ids, b"]}", 60))
    assert error["message"] == "prompt: token id -1 is not between 0 and 256"


def test_a_long_text_is_not_taken_for_many_values(address: str) -> None:
    """Commas and braces within texts are not counted."""
    text = rb"{\"a\": [1, 2, \"\\\"]}, " * 300_000
    error = refused_cheaply(address, "/tokenize", b'{"prompt": 1, "what": "' + text + b'"}')
    assert error["param"] == "prompt"
