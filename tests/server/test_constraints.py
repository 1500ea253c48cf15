"""What an answer must match, and which calls it may make, under every name that clients send.

The engine is a fake: the grammar that reaches it is looked at, and asked which texts it allows.
"""

from typing import Any

import pytest

from tests.server.fakes import FakeEngine
from tests.server.harness import CHAT, in_memory

RESPONSES = "/v1/responses"
USER: Any = [{"role": "user", "content": "hi"}]
PARAMETERS = {"type": "object", "properties": {"a": {"type": "integer"}}}
ADD: Any = {"type": "function", "function": {"name": "add", "parameters": PARAMETERS}}
SUB: Any = {"type": "function", "function": {"name": "sub", "parameters": PARAMETERS}}
FLAT_ADD, FLAT_SUB = ({"type": "function"} | tool["function"] for tool in (ADD, SUB))
NAMED = {"type": "function", "function": {"name": "add"}}


@pytest.mark.parametrize("choice", ["required", NAMED])
@pytest.mark.parametrize("format", ["json_object", "json_schema"])
def test_a_forced_call_wins_over_a_format(choice: Any, format: str) -> None:
    schema = {"json_schema": {"name": "n", "schema": {"enum": [7]}}} if format == "json_schema" else {}
    body = {"messages": USER, "tools": [ADD], "tool_choice": choice, "response_format": {"type": format, **schema}}
    flat = {"type": format, **schema.get("json_schema", {})}
    chosen = choice if isinstance(choice, str) else {"type": "function", "name": "add"}
    same = {"input": "hi", "tools": [FLAT_ADD], "tool_choice": chosen, "text": {"format": flat}}
    engine = FakeEngine()
    with in_memory(engine) as client:
        assert client.post(CHAT, json=body).status_code == 200
        assert client.post(RESPONSES, json=same).status_code == 200
        del body["response_format"], same["text"]
        client.post(CHAT, json=body)
        client.post(RESPONSES, json=same)
    assert len({request.sampling.grammar for request in engine.seen}) == 1, "as if there were no format"
    assert "add" in engine.seen[0].sampling.grammar


def test_a_format_that_cannot_be_used_is_refused_where_it_waits() -> None:
    with in_memory() as client:
        body = {"messages": USER, "tools": [ADD], "tool_choice": "required"}
        for fields in ({"response_format": {"type": "json_schema"}}, {"guided_regex": "a"}):
            refused = client.post(CHAT, json=body | fields)
            assert refused.status_code == 400 and next(iter(fields)) in refused.json()["error"]["message"]
