"""python -m tests.page.pictures: the pictures of the docs, taken of the bundled model; `make page-pictures`."""

from playwright.sync_api import sync_playwright

from tests.page.browser import CHROMIUM, FLAGS, Tab, tab
from tests.page.running import ROOT, bundled

FOLDER = ROOT / "docs/pictures"
PROMPT = "Once upon a time, there was a little"
SIZE = (1200, 900)


def compare(opened: Tab) -> None:
    opened.open().ready()
    opened.compare(1, 32)
    opened.ask(PROMPT, seed=7, temperature=0.7, maximum=64)
    opened.answered(2)
    opened.page.evaluate("scrollTo(0, document.body.scrollHeight)")


def lens(opened: Tab) -> None:
    opened.page.locator(".answer.A .actions button", has_text="Lens").click()
    opened.page.locator("main.lens table").last.wait_for()
    opened.choose("K 1 against K 4")


def routing(opened: Tab) -> None:
    opened.view("Ask")
    opened.page.locator(".answer.A .actions button", has_text="Routing").click()
    opened.page.locator("canvas").first.wait_for()


def curve(opened: Tab) -> None:
    opened.view("Curve")
    opened.page.locator(".chart canvas").wait_for()


def main() -> None:
    """Take every picture, one after another in one tab; the comparison also in dark."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright, bundled("topk-stories", "--return-routed-experts") as url:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        with tab(browser, url, size=SIZE) as opened:
            for take in (compare, lens, routing, curve):
                take(opened)
                picture(opened, take.__name__)
        with tab(browser, url, size=SIZE, scheme="dark") as opened:
            compare(opened)
            picture(opened, "compare-dark")
        browser.close()


def picture(opened: Tab, name: str) -> None:
    opened.page.mouse.move(0, 0)
    opened.page.screenshot(path=FOLDER / f"page-{name}.png")


if __name__ == "__main__":
    main()
