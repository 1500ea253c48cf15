"""`moedial chat` as a person sees it: with the real server and a fake engine, and with servers that misbehave."""

from typing import Any

import pytest
from starlette.responses import JSONResponse, Response

from tests.server.fakes import FakeEngine, says
from tests.server.harness import on_loopback
from tests.terminal.scripted_server import closed_port, delta, ending, event, moedial, scripted_server, stream


def talk(url: str, *lines: str, options: tuple[str, ...] = ()) -> str:
    result = moedial("chat", "--url", url, *options, lines="\n".join(lines) + "\n", interactive=True)
    assert result.exit_code == 0, result.output
    return result.output


def hello() -> Response:
    return stream(delta(role="assistant", content=""), delta(content="hel"), delta(content="lo"), ending())


def test_a_conversation_with_the_server() -> None:
    engine = FakeEngine()
    with on_loopback(engine) as (url, _):
        shown = talk(url, "hi", "/k 2", "again", "/k default", "more", options=("--system", "Be kind.", "--seed", "3"))
    assert shown.count("hello world\n") == 3
    assert [request.budget.per_layer for request in engine.seen] == [(4, 4, 4), (2, 2, 2), (4, 4, 4)]
    prompts = [bytes(request.prompt).decode() for request in engine.seen]
    assert prompts[0] == "<system>Be kind.<user>hi<assistant>"
    assert prompts[1] == "<system>Be kind.<user>hi<assistant>hello world<user>again<assistant>"
    assert prompts[2].startswith(prompts[1].removesuffix("<assistant>"))
    figures = [line for line in shown.splitlines() if "tokens/s" in line]
    assert len(figures) == 3 and figures[1].endswith("· K 2") and figures[2].endswith("· K 4")
    assert figures[0].startswith("12 tokens · ") and "first after" in figures[0]
    assert {request.sampling.seed for request in engine.seen} == {3}


def test_a_count_for_the_prompt_and_another_for_the_answer() -> None:
    engine = FakeEngine()
    with on_loopback(engine) as (url, _):
        shown = talk(url, "/k 8:2", "hi", "/k 9:2", "/k 8:", "/k 8:2:1", "/k 2:2", "again")
    assert "K 8:2; tiny takes 1 to 8" in shown and "K cannot be 9:2: tiny takes 1 to 8" in shown
    assert "K cannot be 8:: tiny" in shown and "K cannot be 8:2:1: tiny" in shown
    assert [(request.budget.prefill, request.budget.per_layer) for request in engine.seen] == [
        ((8, 8, 8), (2, 2, 2)),
        ((), (2, 2, 2)),
    ]
    figures = [line for line in shown.splitlines() if "tokens/s" in line]
    prompt, answer = len(engine.seen[0].prompt), 12
    mean = (8 * prompt + 2 * answer) / (prompt + answer)
    assert figures[0].endswith(f"· K {round(mean, 4):g}") and figures[1].endswith("· K 2")


def test_k_without_a_count_shows_and_a_bad_one_changes_nothing() -> None:
    engine = FakeEngine()
    with on_loopback(engine) as (url, _):
        shown = talk(url, "/k", "/k 2", "/k 9", "/k two", "hi")
    assert "K default; tiny takes 1 to 8, default 4, trained 4" in shown
    assert "K cannot be 9: tiny takes 1 to 8" in shown and "K cannot be two: tiny takes 1 to 8" in shown
    assert [request.budget.per_layer for request in engine.seen] == [(2, 2, 2)]


def test_commands() -> None:
    with scripted_server(hello) as met:
        shown = talk(
            met.url, "one", "/system A", "/reset", "two", "/system", "/nope", "//path", "/help", "/quit", "never said"
        )
    assert [body["messages"] for body in met.bodies] == [
        [{"role": "user", "content": "one"}],
        [{"role": "system", "content": "A"}, {"role": "user", "content": "two"}],
        [
            {"role": "user", "content": "two"},
            {"role": "assistant", "content": "hello"},
            {"role": "user", "content": "/path"},
        ],
    ]
    assert "there is no command /nope" in shown and "/k [N|default]" in shown and "a new conversation" in shown
    assert all("num_experts" not in body for body in met.bodies)


def test_models() -> None:
    with scripted_server(hello) as met:
        shown = talk(met.url, "/model", "/k 2", "/model none", "one", "/model dense", "two", "/k 1")
    assert "odd; this server has: odd, dense" in shown
    assert "there is no model none; this server has: odd, dense" in shown
    assert "K cannot be 2: dense has no experts to choose from; K is back at its default" in shown
    assert [(body["model"], body.get("num_experts")) for body in met.bodies] == [("odd", 2), ("dense", None)]


def test_an_alias_has_its_count() -> None:
    engine = FakeEngine()
    with on_loopback(engine) as (url, _):
        shown = talk(url, "/k 2", "one", "/model tiny@k8", "two", "/k 4", "three", "/k 8", "four", "/model tiny", "/k")
    assert "tiny@k8 stands for K 8; K is back at its default" in shown
    assert "K cannot be 4: tiny@k8 stands for K 8" in shown and "must agree" not in shown
    assert [request.budget.per_layer[0] for request in engine.seen] == [2, 8, 8, 8]
    assert shown.count("hello world\n") == 4


def test_options_reach_the_body() -> None:
    with scripted_server(hello) as met:
        given = ("--model", "odd", "--k", "3", "--temperature", "0.5", "--max-tokens", "9", "--seed", "1")
        talk(met.url, "hi", options=given)
    expected = {"model": "odd", "num_experts": 3, "temperature": 0.5, "max_tokens": 9, "seed": 1, "stream": True}
    assert expected.items() <= met.bodies[0].items()
    assert met.bodies[0]["stream_options"] == {"include_usage": True}


@pytest.mark.parametrize(("option", "message"), [(("--k", "9"), "1 to 8"), (("--model", "x"), "no model x")])
def test_options_that_cannot_be_done_end_it(option: tuple[str, str], message: str) -> None:
    with scripted_server(hello) as met:
        result = moedial("chat", "--url", met.url, *option, lines="hi\n")
    assert result.exit_code == 2 and message in result.stderr and not met.bodies


def test_reasoning_and_calls_are_shown() -> None:
    call = {"index": 0, "id": "c", "function": {"name": "weather", "arguments": ""}}
    more = {"index": 0, "function": {"arguments": '{"city": "Bern"}'}}
    parts = (delta(reasoning_content="hm"), delta(content="So:"), delta(tool_calls=[call]), delta(tool_calls=[more]))
    with scripted_server(lambda: stream(*parts, ending()), hello) as met:
        shown = talk(met.url, "hi", "and?")
    assert 'hm\nSo:\n\n[call of weather] {"city": "Bern"}\n' in shown
    assert "hm" not in met.bodies[1]["messages"][1]["content"]


def test_what_a_model_says_cannot_steer_the_terminal() -> None:
    evil = "[bold red]x[/] \x1b]0;owned\x07\x1b[2J \x9bm :smile:"
    with scripted_server(lambda: stream(delta(content=evil[:20]), delta(content=evil[20:]), ending())) as met:
        shown = talk(met.url, "hi")
    assert "[bold red]x[/] ␛]0;owned␇␛[2J <9b>m :smile:" in shown
    assert not set("\x1b\x07\x9b") & set(shown)


FAILED = {"error": {"message": "it was\nfull", "type": "overloaded_error", "code": "queue_full"}}
FAILURES: list[tuple[Any, str]] = [
    (lambda: JSONResponse(FAILED, 503, {"retry-after": "2"}), "it was full (HTTP 503, queue_full); try again in 2 s"),
    (lambda: Response("<html>Bad Gateway</html>", 502), "no OpenAI error in the answer (HTTP 502, Bad Gateway)"),
    (lambda: stream(delta(content="par"), b"event: error\n" + event(FAILED)), "the answer failed: it was full"),
    (lambda: stream(delta(content="par")), "the stream ended before the answer was complete"),
    (lambda: stream(b"data: nonsense\n\n"), "no JSON object"),
    (lambda: stream(event({"choices": ["text"]})), "unknown shape"),
    (lambda: stream(event({"choices": 1})), "unknown shape"),
    (lambda: Response("hello"), "the stream ended before the answer was complete"),
]


@pytest.mark.parametrize(("failure", "line"), FAILURES, ids=[line for _, line in FAILURES])
def test_failures_are_one_line_and_the_conversation_goes_on(failure: Any, line: str) -> None:
    with scripted_server(failure, hello) as met:
        shown = talk(met.url, "first", "second")
    assert [shown_line for shown_line in shown.splitlines() if line in shown_line]
    assert "hello\n" in shown and "Traceback" not in shown
    assert met.bodies[1]["messages"] == [{"role": "user", "content": "second"}]  # the failed turn is gone


def test_refusals_of_the_real_server() -> None:
    with on_loopback(FakeEngine(), api_keys="right") as (url, _):
        shown = talk(url, "hi", options=("--key", "wrong"))
        assert shown.count("HTTP 401, invalid_api_key") == 2  # the greeting's and the message's
        assert "hello world" in talk(url, "hi", options=("--key", "right"))


def test_no_server_is_no_end() -> None:
    shown = talk(closed_port(), "hi", "/k 2", "/k", "/reset")
    assert shown.count("cannot connect to http://127.0.0.1") == 3 and "a new conversation" in shown
    assert "K default\n" in shown  # a count that could not be checked was not set


def test_odd_figures_are_left_out() -> None:
    odd = event({"choices": [], "usage": {"completion_tokens": "many"}, "metrics": [1]}) + b"data: [DONE]\n\n"
    with scripted_server(lambda: stream(delta(content="x"), odd), lambda: stream(odd)) as met:
        shown = talk(met.url, "hi", "ho", "he")
    assert "many" not in shown and "first after" in shown
    assert "nothing was said: turn forgotten" in shown
    assert [len(body["messages"]) for body in met.bodies] == [1, 3, 3]


def test_a_cut_answer_says_so() -> None:
    with on_loopback(FakeEngine(says("a long story"))) as (url, _):
        shown = talk(url, "hi", options=("--max-tokens", "1"))
    assert "1 token · " in shown and "cut at the longest answer allowed" in shown


def test_input_that_is_no_text() -> None:
    with scripted_server(hello) as met:
        result = moedial("chat", "--url", met.url, lines=b"\xff\xfe?\n")
    assert result.exit_code == 0 and met.bodies[0]["messages"][0]["content"] == "��?"
