"""Vercel's AI SDK against a real server, unpatched: what one script of node got."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.more_clients.node import needs_node, run_script

pytestmark = needs_node
SCRIPT = Path(__file__).with_name("vercel.mjs")


@pytest.fixture(scope="module")
def found(address: str) -> Any:
    return json.loads(run_script(SCRIPT.read_text(), BASE=f"{address}/v1").splitlines()[-1])


def test_generate_and_stream(found: Any) -> None:
    whole = found["whole"]
    assert whole["text"] and whole["reason"] == "length"
    assert found["streamed"]["text"] == found["alias"]["text"] == whole["text"]
    for way in ("whole", "streamed", "alias", "completion"):
        assert found[way]["usage"]["num_experts"] == 2 and found[way]["usage"]["completion_tokens"] == 12


@pytest.mark.parametrize("way", ["called", "calledStreamed"])
def test_a_tool_is_called_and_run(found: Any, way: str) -> None:
    (call,), (result,) = found[way]["calls"], found[way]["results"]
    assert found[way]["reason"] == "tool-calls" and call["toolName"] == "draw"
    assert call["input"]["animal"] in {"cat", "dog", "bird"} and result == f"A {call['input']['animal']}."


def test_a_shape(found: Any) -> None:
    shape = found["object"]
    assert set(shape) == {"title", "animals", "happy"} and shape["happy"] in (True, False)
    assert found["objectStreamed"] == found["output"] == shape


def test_a_refusal(found: Any) -> None:
    assert "between 1 and 8" in found["refusal"]
