"""The page on bundled models: what it shows is what the API says, links and commands repeat it, views have figures."""

import json
import subprocess
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, expect

from tests.page.browser import Tab, tab
from tests.page.running import bundled

PROMPT = "Once upon a time, there was a little"
FIGURES: dict[str, Any] = {"seed": 7, "temperature": 0.7, "maximum": 24}


@pytest.fixture(scope="module")
def compared(browser: Browser, stories: str) -> Iterator[Tab]:
    """A tab in which counts 1 and 32 have been compared."""
    with tab(browser, stories) as opened:
        opened.open().ready()
        opened.compare(1, 32)
        opened.ask(PROMPT, **FIGURES)
        opened.answered(2)
        yield opened


def test_a_newcomer_compares_with_one_click(browser: Browser, stories: str) -> None:
    with tab(browser, stories) as opened:
        opened.open().ready()
        opened.page.get_by_role("button", name="Compare K 1 and K 32").first.click()
        opened.answered(2)
        expect(opened.page.locator(".verdict")).to_contain_text("K 32 writes")
        expect(opened.page.locator(".verdict")).to_contain_text("as fast as K 32")
        expect(opened.page.locator(".verdict")).to_be_in_viewport()


def said_by(url: str, count: int) -> dict[str, Any]:
    body = {"prompt": PROMPT, "max_tokens": 24, "temperature": 0.7, "seed": 7, "num_experts": count, "logprobs": 1}
    answer: dict[str, Any] = httpx.post(f"{url}v1/completions", json=body, timeout=60).raise_for_status().json()
    return answer


def test_the_marked_token_is_the_first_that_differs(compared: Tab, stories: str) -> None:
    answers = [said_by(stories, count) for count in (1, 32)]
    one, other = (answer["choices"][0]["logprobs"]["tokens"] for answer in answers)
    first = next(index for index, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    assert compared.page.locator(".answer.A .common").count() == first > 0
    marked = [compared.page.locator(f".answer.{letter} .differs").text_content() for letter in "AB"]
    assert marked == [one[first], other[first]]
    texts = [compared.page.locator(f".answer.{letter} .tokens").text_content() for letter in "AB"]
    assert texts == [answer["choices"][0]["text"] for answer in answers]
    pairs = answers[0]["usage"]["routed_pairs"]
    assert compared.figure("expert pairs") == f"{pairs:,}" and compared.figure("fewer than trained") == "75%"
    assert compared.figure("more than trained", "B") == "700%"


def test_a_link_gives_the_same_bytes(compared: Tab, browser: Browser, stories: str) -> None:
    link = compared.copied("Copy link")
    with tab(browser, stories) as other:
        other.page.goto(link)
        other.page.click("#run-link")
        other.answered(2)
        for letter in "AB":
            ours, theirs = (one.page.locator(f".answer.{letter} .tokens").text_content() for one in (compared, other))
            assert ours == theirs


def test_the_copied_command_says_the_same(compared: Tab) -> None:
    done = subprocess.run(["bash", "-c", compared.copied("Copy curl", "B")], capture_output=True, text=True, check=True)
    text = json.loads(done.stdout)["choices"][0]["text"]
    assert text == compared.page.locator(".answer.B .tokens").text_content()


def test_the_lens_shows_where_counts_differ(compared: Tab) -> None:
    compared.view("Ask")
    compared.page.locator(".answer.A .actions button", has_text="Lens").click()
    view = compared.page.locator("main.lens")
    expect(view.get_by_role("table").last).to_contain_text("K 8")
    assert view.locator(".tokens .spread").count() > 2
    text = str(view.locator(".tokens").text_content())
    assert PROMPT in text
    view.locator(".tokens .token").nth(6).hover()
    rows = view.locator("tr", has_text="K 1")
    expect(rows.first.locator("code")).to_have_count(5)
    compared.choose("K 1 against K 4")
    assert view.locator(".tokens .less").count() + view.locator(".tokens .more").count() > 0
    totals = view.get_by_role("table").last.locator("tr", has_text="K 4")
    assert totals.locator("td").last.inner_text() == "–", "the reference does not differ from itself"


def test_the_map_has_the_experts_of_every_layer(compared: Tab) -> None:
    compared.view("Ask")
    compared.page.locator(".answer.A .actions button", has_text="Routing").click()
    view = compared.page.locator("main.routing")
    expect(view.locator("canvas")).to_have_count(2)
    view.locator("canvas").first.hover(position={"x": 5, "y": 5})
    expect(view.locator(".told").first).to_contain_text("layer 1, expert 0:")
    compared.choose("One token")
    expect(view.locator("output")).to_contain_text("prompt 1")
    view.locator("summary").first.click()
    rows = view.get_by_role("table").first.locator("tbody tr")
    expect(rows).to_have_count(6)
    assert all(row.locator("code").count() == 1 for row in rows.all()), "one expert per layer at K 1"


def test_the_curve_and_the_live_view_have_every_count(compared: Tab) -> None:
    compared.view("Curve")
    view = compared.page.locator("main.curve")
    expect(view.locator(".chart canvas")).to_be_visible()
    expect(view.locator("tbody tr")).to_have_count(10)
    view.get_by_role("button", name="Measure speed here").click()
    expect(view.get_by_role("button", name="Measuring")).to_be_visible()
    expect(view.get_by_role("button", name="Measure speed here")).to_be_enabled(timeout=90_000)
    measured = [row.locator("td").last.inner_text() for row in view.locator("tbody tr").all()]
    assert sum(figure != "–" for figure in measured) == 6, "each count with a button"
    compared.view("Live")
    live = compared.page.locator("main.live")
    expect(live.locator(".chart canvas")).to_have_count(2)
    expect(live.locator("tbody")).to_contain_text("K 16")


def test_an_infinity_model_shows_groups_of_its_mask(browser: Browser) -> None:
    with bundled("infinity-stories", "--return-routed-experts") as url, tab(browser, url) as opened:
        opened.open().ready()
        opened.ask(PROMPT, **FIGURES)
        opened.answered()
        opened.page.locator(".actions button", has_text="Routing").click()
        view = opened.page.locator("main.routing")
        expect(view).to_contain_text("groups of units of the ∞-MoE's mask")
        opened.choose("One token")
        view.locator("canvas").hover(position={"x": 5, "y": 5})
        expect(view.locator(".told")).to_contain_text("kept")


def test_without_routes_the_view_says_how_to_have_them(browser: Browser) -> None:
    with bundled("topk-stories") as url, tab(browser, url) as opened:
        opened.open().ready()
        opened.ask(PROMPT, **FIGURES)
        opened.answered()
        opened.view("Routing")
        expect(opened.page.locator("main")).to_contain_text("moedial serve --return-routed-experts")
