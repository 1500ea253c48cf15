"""Without a terminal: standard output has the answers and nothing else; the exit status says whether all went well."""

from starlette.responses import JSONResponse, Response

from tests.server.fakes import FakeEngine, says
from tests.server.harness import on_loopback
from tests.terminal.scripted_server import closed_port, delta, ending, moedial, scripted_server, stream

FULL = {"error": {"message": "it does not fit", "code": "context_length_exceeded"}}


def hello() -> Response:
    return stream(delta(content="hello"), ending())


def refused() -> Response:
    return JSONResponse(FULL, 400)


def test_a_chat_prints_answers_only() -> None:
    with on_loopback(FakeEngine()) as (url, _):
        result = moedial("chat", "--url", url, "--k", "2", lines="hi\n/k 4\nagain\n")
    assert (result.exit_code, result.stdout) == (0, "hello world\nhello world\n")
    assert result.stderr.splitlines() == ["K 4; tiny takes 1 to 8, default 4, trained 4"]  # what was asked for


def test_reasoning_are_no_answer_and_long_lines_stay_whole() -> None:
    story = "word " * 100
    with scripted_server(lambda: stream(delta(reasoning_content="hm"), delta(content=story), ending())) as met:
        for words, lines in ((("chat",), "hi\n"), (("run", "hi"), "")):
            assert moedial(*words, "--url", met.url, lines=lines).stdout == story + "\n"


def test_an_error_is_in_the_exit_status_of_a_chat() -> None:
    with scripted_server(refused, hello) as met:
        result = moedial("chat", "--url", met.url, lines="first\nsecond\n")
    assert (result.exit_code, result.stdout) == (1, "hello\n")
    assert result.stderr.splitlines() == ["it does not fit (HTTP 400, context_length_exceeded)"]
    assert moedial("chat", "--url", closed_port(), lines="hi\n").exit_code == 1


def test_a_person_is_told_of_a_full_context() -> None:
    with scripted_server(refused, hello, refused, hello) as met:
        words = ("chat", "--url", met.url)
        shown = moedial(*words, lines="long\none\ntwo\n/reset\nthree\n", interactive=True)
    hint = "the conversation no longer fits the context: /reset begins a new one. it does not fit"
    assert shown.output.count(hint) == 1 and shown.output.count("it does not fit") == 2 and shown.exit_code == 0
    assert [len(body["messages"]) for body in met.bodies] == [1, 1, 3, 1]


def test_the_servers_own_refusal_of_a_long_conversation_has_the_hint() -> None:
    with on_loopback(FakeEngine(says("a" * 150))) as (url, _):
        shown = moedial("chat", "--url", url, lines="hi\n" + "b" * 100 + "\n", interactive=True).output
    assert "/reset begins a new one" in shown


def test_run_prints_the_answer() -> None:
    engine = FakeEngine()
    with on_loopback(engine) as (url, _):
        options = ("--num-experts", "2", "--system", "Be kind.", "--max-tokens", "20", "--seed", "3", "--model", "tiny")
        result = moedial("run", "hi", "--url", url, *options)
    assert (result.exit_code, result.output) == (0, "hello world\n")
    (request,) = engine.seen
    assert bytes(request.prompt).decode() == "<system>Be kind.<user>hi<assistant>"
    assert request.budget.per_layer == (2, 2, 2) and request.sampling.max_tokens == 20 and request.sampling.seed == 3


def test_run_reads_standard_input() -> None:
    with scripted_server(hello) as met:
        assert moedial("run", "--url", met.url, lines="two\nlines\n").output == "hello\n"
        nothing = moedial("run", "--url", met.url, lines="\n")
    assert met.bodies[0]["messages"][0]["content"] == "two\nlines"
    assert nothing.exit_code == 2 and "PROMPT is missing" in nothing.stderr and len(met.bodies) == 1


def test_run_continues_a_text_where_there_is_no_template() -> None:
    engine = FakeEngine()
    with on_loopback(engine, with_chat=False) as (url, _):
        assert moedial("run", "Once", "--url", url).output == "hello world\n"
        refusals = [moedial("run", "Once", "--url", url, *o) for o in (("--system", "x"), ("--endpoint", "chat"))]
    assert [bytes(request.prompt) for request in engine.seen] == [b"Once"]
    assert [result.exit_code for result in refusals] == [2, 1] and "--system needs" in refusals[0].stderr
    assert "no_chat_template" in refusals[1].stderr


def test_run_ends_with_the_errors_status() -> None:
    with scripted_server(refused, lambda: stream(delta(content="par"))) as met:
        full, cut = (moedial("run", "hi", "--url", met.url) for _ in range(2))
        wrong = moedial("run", "hi", "--url", met.url, "--k", "9")
    assert (full.exit_code, full.stdout) == (1, "") and len(full.stderr.splitlines()) == 1
    assert (cut.exit_code, cut.stdout) == (1, "par\n") and "before the answer was complete" in cut.stderr
    assert wrong.exit_code == 2 and "K cannot be 9" in wrong.stderr


def test_the_key_comes_from_the_variable() -> None:
    with on_loopback(FakeEngine(), api_keys="right") as (url, _):
        assert moedial("run", "hi", "--url", url, env={"MOEDIAL_KEY": "right"}).exit_code == 0
        assert moedial("run", "hi", "--url", url, env={"MOEDIAL_KEY": "wrong"}).exit_code == 1
        # a variable that no setting of the server has is the server's business alone
        assert moedial("run", "hi", "--url", url, "--key", "right", env={"MOEDIAL_NO_SETTING": "1"}).exit_code == 0
