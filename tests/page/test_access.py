"""The page by keyboard, by rules of accessibility, on a narrow screen, and how much of it travels."""

from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect

from tests.page.browser import NARROW, Tab, tab
from tests.page.running import ROOT, Fake

AXE = ROOT / ".page-tests/node_modules/axe-core/axe.min.js"
RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]
MAX_BYTES = 130_000
VIEWS = ("Ask", "Lens", "Routing", "Curve", "Live")


def violations(opened: Tab) -> list[str]:
    """What axe finds, one line per rule and element. Its script runs outside of the page's policy."""
    opened.page.evaluate(AXE.read_text())
    found = opened.page.evaluate("rules => axe.run(document, {runOnly: rules})", RULES)
    return [f"{one['id']}: {node['html'][:120]}" for one in found["violations"] for node in one["nodes"]]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_in_any_view(browser: Browser, fake_server: Fake, scheme: str) -> None:
    with tab(browser, fake_server.url, scheme=scheme) as opened:
        opened.open().ready()
        found = {"start": violations(opened)}
        opened.compare(1, 8)
        opened.ask("say:**One** `two`", mode="chat")
        opened.answered(2)
        for view in VIEWS:
            opened.view(view)
            if view == "Lens":
                opened.page.get_by_role("button", name="Take the last answer").click()
                expect(opened.page.get_by_role("table").last).to_be_visible()
            found[view] = violations(opened)
        opened.page.get_by_role("button", name="Help and keys").click()
        found["help"] = violations(opened)
        assert {name: lines for name, lines in found.items() if lines} == {}


def test_everything_can_be_done_by_keyboard(page: Tab) -> None:
    keys = page.page.keyboard
    page.page.locator("#prompt").focus()
    keys.type("say:[c]? is typed")
    keys.press("Control+Enter")
    page.answered()
    assert page.text() == "[c]? is typed"
    page.page.evaluate("document.activeElement.blur()")
    keys.press("]")
    keys.press("]")
    expect(page.page.locator("input[name=count-A]:checked")).to_have_value("6")
    keys.press("[")
    expect(page.page.locator("input[name=count-A]:checked")).to_have_value("5")
    keys.press("c")
    expect(page.page.locator("input[name=compare]")).to_be_checked()
    page.page.locator("input[name=count-A]:checked").focus()
    keys.press("ArrowLeft")
    expect(page.page.locator("input[name=count-A]:checked")).to_have_value("4")
    page.page.locator("#tab-ask").focus()
    keys.press("ArrowRight")
    expect(page.page.get_by_role("tab", name="Lens")).to_be_focused()
    expect(page.page.locator("main.lens")).to_be_visible()
    keys.press("?")
    expect(page.page.locator("dialog")).to_be_visible()
    page.page.get_by_label("Keys of one character").uncheck()
    keys.press("Escape")
    expect(page.page.locator("dialog")).to_have_count(0)
    page.page.evaluate("document.activeElement.blur()")
    keys.press("?")
    expect(page.page.locator("dialog")).to_have_count(0)


def test_the_token_slider_says_what_it_points_at(page: Tab) -> None:
    page.compare(1, 8)
    page.ask("Hello")
    page.answered(2)
    slider = page.page.locator(".inspector input[type=range]")
    slider.focus()
    page.page.keyboard.press("Home")
    assert str(slider.get_attribute("aria-valuetext")).startswith("token 1 of ")
    page.page.keyboard.press("ArrowRight")
    assert "token 2 of" in str(slider.get_attribute("aria-valuetext"))
    dial = page.page.get_by_role("group", name="Experts per token")
    expect(dial.get_by_role("radio", name="4 experts, as trained")).to_have_count(1)
    assert page.page.get_by_role("log").get_attribute("aria-busy") == "false"


def test_a_narrow_screen_needs_no_scrolling_sideways(browser: Browser, fake_server: Fake) -> None:
    with tab(browser, fake_server.url, size=NARROW) as opened:
        opened.open().ready()
        opened.compare(1, 8)
        opened.ask("say:" + "w" * 60)
        opened.answered(2)
        tops = [opened.page.locator(f".answer.{letter}").bounding_box() for letter in "AB"]
        assert tops[0] and tops[1] and tops[1]["y"] > tops[0]["y"] + tops[0]["height"], "one column"
        for view in VIEWS:
            opened.view(view)
            if view == "Lens":
                opened.page.get_by_role("button", name="Take the last answer").click()
                expect(opened.page.get_by_role("table").last).to_be_visible()
            width = opened.page.evaluate("document.documentElement.scrollWidth")
            assert width <= NARROW[0], view


def test_colours_are_the_systems_until_others_are_chosen(browser: Browser, fake_server: Fake) -> None:
    ground = "getComputedStyle(document.body).backgroundColor"
    with tab(browser, fake_server.url, scheme="dark") as opened:
        opened.open().ready()
        dark = opened.page.evaluate(ground)
        opened.page.locator(".theme select").select_option("light")
        light = opened.page.evaluate(ground)
        opened.open().ready()
        assert opened.page.evaluate(ground) == light != dark, "it is remembered"


def test_little_travels_and_nothing_a_second_time(browser: Browser, fake_server: Fake) -> None:
    sizes = (
        "performance.getEntries()"
        ".filter(one => one.transferSize !== undefined && !/v1|metrics|tokenizer/.test(one.name))"
        ".reduce((sum, one) => sum + one.transferSize, 0)"
    )
    with tab(browser, fake_server.url) as opened:
        opened.open().ready()
        opened.view("Curve")
        expect(opened.page.locator(".chart canvas")).to_be_visible()
        first = opened.page.evaluate(sizes)
        assert 20_000 < first < MAX_BYTES
        opened.open().ready()
        assert opened.page.evaluate(sizes) < 15_000, "only answers that nothing has changed"


def test_axe_is_the_version_that_is_named() -> None:
    assert "axe v4.14" in Path(AXE).read_text()[:400]
