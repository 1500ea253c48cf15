"""A browser tab on the page, as the tests use it: what it may not do, and the few things that every test does."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from playwright.sync_api import Browser, Page, expect

CHROMIUM = "/usr/bin/chromium"
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
WIDE, NARROW = (1280, 860), (360, 740)
STATUS = re.compile(r"Failed to load resource: the server responded with a status of (\d+)")
expect.set_options(timeout=20_000)


class Tab:
    """A tab, and everything that it asked for and complained of."""

    def __init__(self, page: Page, url: str) -> None:
        self.page, self.url = page, url
        self.requested: list[str] = []
        self.complaints: list[str] = []
        page.on("request", lambda request: self.requested.append(request.url))
        page.on("console", lambda message: self._note(message.type, message.text))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))

    def _note(self, kind: str, text: str) -> None:
        if kind in ("error", "warning") and not STATUS.match(text):
            self.complaints.append(text)

    def open(self, hash: str = "") -> "Tab":
        self.page.goto(self.url + hash)
        return self

    def ready(self) -> "Tab":
        expect(self.page.locator(".composer")).to_be_visible()
        return self

    def ask(self, prompt: str, mode: str = "text", **figures: float) -> None:
        """Fill the form and send it. `figures`: seed, temperature, maximum."""
        self.page.locator(f"input[name=mode][value={mode}]").check()
        for name, value in figures.items():
            self.page.locator(f"input[name={name}]").fill(str(value))
        self.page.fill("#prompt", prompt)
        self.page.locator(".composer button[type=submit]").click()

    def dial(self, count: int, letter: str = "A") -> None:
        self.page.locator(f"input[name=count-{letter}][value='{count}']").check()

    def compare(self, first: int, second: int) -> None:
        self.page.locator("input[name=compare]").check()
        self.dial(first)
        self.dial(second, "B")

    def answered(self, count: int = 1) -> None:
        """Wait until so many answers, of all turns, have their figures."""
        expect(self.page.locator(".answer .figures")).to_have_count(count)

    def text(self, letter: str = "A") -> str:
        """The text of the last answer in a column."""
        return str(self.page.locator(f".answer.{letter} .said").last.inner_text())

    def figure(self, name: str, letter: str = "A") -> str:
        found = self.page.locator(f".answer.{letter} .figures div", has=self.page.get_by_text(name, exact=True))
        return str(found.locator("dd").last.inner_text())

    def copied(self, button: str, letter: str = "A") -> str:
        """What a button copies."""
        self.page.locator(f".turn .answer.{letter} button, .turn .verdict button").get_by_text(
            button, exact=True
        ).last.click()
        expect(self.page.get_by_text("Copied").last).to_be_visible()
        return str(self.page.evaluate("navigator.clipboard.readText()"))

    def view(self, name: str) -> None:
        self.page.get_by_role("tab", name=name).click()

    def choose(self, name: str) -> None:
        """Choose one of several: their labels are under the radio buttons."""
        self.page.get_by_role("radio", name=name, exact=True).check()

    def check(self) -> None:
        """Nothing went to another origin, and the browser complained of nothing: no fault, no breach of the policy."""
        origin = re.match(r"https?://[^/]+/", self.url)
        assert origin is not None
        foreign = [url for url in self.requested if not url.startswith((origin[0], "blob:"))]
        assert foreign == [] and self.complaints == []


@contextmanager
def tab(
    browser: Browser, url: str, size: tuple[int, int] = WIDE, scheme: str = "light", **context: Any
) -> Iterator[Tab]:
    """A tab in a profile of its own; it is checked at the end."""
    width, height = size
    made = browser.new_context(
        viewport={"width": width, "height": height},
        color_scheme=scheme,
        permissions=["clipboard-read", "clipboard-write"],
        **context,
    )
    try:
        opened = Tab(made.new_page(), url)
        yield opened
        opened.check()
    finally:
        made.close()


Open = Callable[..., Tab]
