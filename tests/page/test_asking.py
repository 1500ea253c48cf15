"""The Ask view against a fake engine: streaming, stopping, errors in words, keys, links, and text that is no markup."""

import json
import re
from collections.abc import Iterator

import httpx
import pytest
from playwright.sync_api import Browser, expect

from tests.page.browser import Tab, tab
from tests.page.running import COMMON, Fake, fake


def test_an_answer_streams_and_keeps_its_figures(page: Tab) -> None:
    page.dial(2)
    page.ask("Hello")
    page.answered()
    assert page.text() == f"{COMMON}2 experts."
    assert page.figure("tokens") == "41" and float(page.figure("tokens/s").replace(",", "")) > 0
    assert page.figure("first token").endswith(("ms", "s")) and page.figure("expert pairs") == "60"
    page.ask("Hello again")
    page.answered(2)
    expect(page.page.locator(".turn")).to_have_count(2)
    expect(page.page.locator(".measured").first).to_contain_text("here, last time")


def test_two_counts_part_at_the_marked_token(page: Tab) -> None:
    page.compare(1, 8)
    page.ask("Hello")
    page.answered(2)
    assert page.text("A").replace("\n", "") == f"{COMMON}1 experts." and page.text("B").endswith("8 experts.")
    assert [page.page.locator(f".answer.{letter} .differs").inner_text() for letter in "AB"] == ["1", "8"]
    assert page.page.locator(".answer.A .common").count() == len(COMMON)
    verdict = page.page.locator(".verdict").inner_text()
    assert f"The same for {len(COMMON)} tokens. Then K 1 writes 1" in verdict and "K 8 writes 8" in verdict
    inspector = page.page.locator(".inspector")
    expect(inspector.locator(".candidates .chosen code")).to_have_text(["1", "8"])
    page.page.locator(".answer.A .token").nth(4).hover()
    expect(inspector.locator("output")).to_contain_text("token 5 of")
    page.page.locator(".answer.A .token").nth(len(COMMON) + 3).hover()
    expect(inspector).to_contain_text("another text by now")


def test_equal_answers_are_said_to_be_equal(page: Tab) -> None:
    page.compare(1, 8)
    page.ask("say:one")
    page.answered(2)
    assert "Both answers are the same, all 3 tokens." in page.page.locator(".verdict").inner_text()


def test_a_conversation_goes_on_in_each_column_from_its_own_answers(page: Tab) -> None:
    sent: list[dict[str, object]] = []
    page.page.on("request", lambda request: sent.append(request.post_data_json) if "chat/" in request.url else None)
    page.compare(1, 8)
    for count, prompt in ((2, "First"), (4, "Second")):
        page.ask(prompt, mode="chat")
        page.answered(count)
    first, second = ([message["content"] for message in body["messages"]] for body in sent[2:])  # type: ignore[attr-defined]
    assert first == ["First", f"{COMMON}1 experts.", "Second"] and second == ["First", f"{COMMON}8 experts.", "Second"]
    assert [body["num_experts"] for body in sent] == [1, 8, 1, 8], "the dial counts for each message"


def test_an_answer_is_stopped_and_the_rest_is_kept(page: Tab) -> None:
    page.compare(1, 8)
    page.ask("slow: say:" + "word " * 20, maximum=120)
    expect(page.page.locator(".answer.A .token").nth(5)).to_be_visible()
    page.page.keyboard.press("Escape")
    expect(page.page.locator(".state", has_text="stopped")).to_have_count(2)
    assert page.text().startswith("word") and page.figure("tokens") != "–"
    expect(page.page.locator(".composer button[type=submit]")).to_be_visible()


def test_text_is_never_markup(page: Tab) -> None:
    evil = "<img src=x onerror=\"document.title='owned'\"><script>1</script> **bold** `code`"
    for count, mode in enumerate(("text", "chat"), 1):
        page.ask(f"say:{evil}", mode=mode, maximum=100)
        page.answered(count)
    assert page.page.locator(".turn img, .turn script").count() == 0 and page.page.title() == "moedial"
    assert "<img src=x" in page.text()
    expect(page.page.locator(".prose strong")).to_have_text("bold")
    expect(page.page.locator(".prose code")).to_have_text("code")


def test_what_the_server_refuses_is_told_in_its_words(page: Tab) -> None:
    page.page.route("**/v1/completions", lambda route: route.continue_(post_data=_with(route.request.post_data, 99)))
    page.ask("Hello")
    expect(page.page.locator(".answer .error")).to_contain_text("99")
    expect(page.page.locator(".answer .error")).to_contain_text("between 1 and 8")
    page.page.unroute("**/v1/completions")
    page.ask("Hello", maximum=0)
    expect(page.page.locator(".composer .error")).to_have_text("Max tokens must be a number from 1 to 4096")
    page.ask("Hello", maximum=8, temperature=0)
    page.answered()


def _with(body: str | None, count: int) -> str:
    return json.dumps(json.loads(body or "{}") | {"num_experts": count})


def test_optional_fields_that_a_server_refuses_are_left_out(page: Tab) -> None:
    def refuse(route: object) -> None:
        body = route.request.post_data_json  # type: ignore[attr-defined]
        if "logprobs" in body:
            error = {"message": "logprobs must be at most 0", "type": "t", "param": "logprobs", "code": "c"}
            route.fulfill(status=400, json={"error": error})  # type: ignore[attr-defined]
        else:
            route.continue_()  # type: ignore[attr-defined]

    page.page.route("**/v1/completions", refuse)
    page.compare(1, 8)
    page.ask("Hello")
    page.answered(2)
    assert page.text() == f"{COMMON}1 experts."


def test_a_link_asks_the_same_again_when_it_is_told_to(page: Tab, browser: Browser) -> None:
    page.compare(2, 8)
    page.ask("say:Zoë & <b>", mode="chat", seed=12345, temperature=0.3, maximum=33)
    page.answered(2)
    link = page.copied("Copy link")
    with tab(browser, page.url) as other:
        bodies: list[dict[str, object]] = []
        other.page.on("request", lambda request: bodies.append(request.post_data_json) if "chat/" in request.url else 0)
        other.page.goto(link)
        other.ready()
        expect(other.page.locator(".notice.link")).to_contain_text("Zoë & <b>")
        assert bodies == [], "a link alone asks nothing"
        other.page.click("#run-link")
        other.answered(2)
        assert [other.text(letter) for letter in "AB"] == [page.text(letter) for letter in "AB"]
        expect(other.page.locator(".notice")).to_contain_text("Same model, version and settings")
        assert [(b["num_experts"], b["seed"], b["temperature"], b["max_tokens"]) for b in bodies] == [
            (2, 12345, 0.3, 33),
            (8, 12345, 0.3, 33),
        ]
        other.page.goto(re.sub(r"fp=\w+", "fp=fp_other", link))
        other.page.reload()
        other.page.click("#run-link")
        expect(other.page.locator(".notice.warns")).to_contain_text("another model, version or machine")


@pytest.mark.parametrize("hash", ["#m=text", "#m=text&p=x&seed=1e999&t=0&max=5", "#m=chat&p=x&seed=1&t=0&max=5&h=[1]"])
def test_a_link_that_cannot_be_read_is_told(browser: Browser, fake_server: Fake, hash: str) -> None:
    with tab(browser, fake_server.url) as opened:
        opened.open(hash).ready()
        expect(opened.page.locator(".notice.warns")).to_contain_text("cannot be read")


def test_what_is_copied_repeats_the_answer(page: Tab) -> None:
    page.dial(2)
    page.ask('it\'s "quoted"\n$HOME', mode="chat", seed=3, temperature=0.5)
    page.answered()
    curl = page.copied("Copy curl")
    body = json.loads(curl.partition(" -d '")[2][:-1].replace("'\\''", "'"))
    assert curl.startswith(f"curl '{page.url}v1/chat/completions' -H") and body["num_experts"] == 2
    said = httpx.post(f"{page.url}v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]
    assert said == page.text()
    compile(page.copied("Copy Python"), "snippet", "exec")
    link = page.copied("Copy link")
    assert "seed=3" in link and "k=2" in link and "vs=" not in link


def test_the_conversation_is_exported(page: Tab) -> None:
    page.ask("Hello")
    page.answered()
    with page.page.expect_download() as waiting:
        page.page.get_by_role("button", name="Export").click()
    (turn,) = json.loads(waiting.value.path().read_text())
    assert turn["prompt"] == "Hello" and turn["answers"][0]["usage"]["completion_tokens"] == 41
    page.page.get_by_role("button", name="Clear").click()
    expect(page.page.locator(".turn")).to_have_count(0)


def test_the_engine_is_down_and_comes_back(page: Tab, fake_server: Fake) -> None:
    fake_server.set_engine("down")
    try:
        expect(page.page.locator(".banner")).to_contain_text("The engine is down.")
        expect(page.page.locator(".banner")).to_have_count(1)
        page.ask("Hello")
        expect(page.page.locator(".answer .error")).to_contain_text("engine")
    finally:
        fake_server.set_engine("up")
    expect(page.page.locator(".banner")).to_have_count(0)
    page.ask("Hello")
    page.answered()


def test_without_the_server_one_line_says_so(browser: Browser) -> None:
    with fake() as server, tab(browser, server.url) as opened:
        opened.open().ready()
        opened.page.route("**/metrics", lambda route: route.abort())
        opened.page.route("**/v1/**", lambda route: route.abort())
        opened.ask("Hello")
        expect(opened.page.locator(".answer .error")).to_contain_text("The server does not answer")
        expect(opened.page.locator(".banner")).to_contain_text("The server does not answer")
        opened.complaints.clear()  # aborted requests


@pytest.fixture(scope="module")
def guarded() -> Iterator[Fake]:
    with fake("--key", "sk-é", "--prefix", "/models/one") as server:
        yield server


def test_a_key_is_asked_for_once_and_kept_in_the_tab(browser: Browser, guarded: Fake) -> None:
    """Behind a path prefix, too."""
    with tab(browser, guarded.url) as opened:
        opened.open()
        expect(opened.page.locator("dialog")).to_contain_text("This server has keys")
        for key in ("wrong", "sk-é"):
            opened.page.fill("#api-key", key)
            opened.page.keyboard.press("Enter")
            if key == "wrong":
                expect(opened.page.locator("dialog .error")).to_contain_text("not accepted")
        opened.ready().ask("Hello")
        opened.answered()
        assert "$KEY" in opened.copied("Copy curl") and "sk-" not in opened.copied("Copy Python")
        opened.open().ready()
        opened.ask("Hello")
        opened.answered()
        assert opened.page.evaluate("JSON.stringify({...localStorage})").count("sk-") == 0
        assert all(url.startswith(guarded.url) for url in opened.requested)
    with tab(browser, guarded.url) as other:
        other.open()
        expect(other.page.locator("dialog")).to_be_visible()
        other.page.keyboard.press("Escape")
        expect(other.page.locator(".banner")).to_contain_text("A key is needed")


def test_a_model_without_a_chat_template_has_text_mode_only(browser: Browser) -> None:
    with fake("--no-chat") as server, tab(browser, server.url) as opened:
        opened.open().ready()
        expect(opened.page.locator("input[name=mode][value=chat]")).to_be_disabled()
        opened.ask("Hello")
        opened.answered()
