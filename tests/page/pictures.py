"""python -m tests.page.pictures: the pictures of the docs, taken of the bundled model; `make page-pictures`."""

from io import BytesIO

from PIL import Image
from playwright.sync_api import expect, sync_playwright

from tests.page.browser import CHROMIUM, FLAGS, Tab, tab
from tests.page.running import ROOT, bundled

FOLDER = ROOT / "docs/pictures"
PROMPT = "Once upon a time, there was a little"
SIZE = (1200, 1000)


def compare(opened: Tab, first: int = 1, second: int = 32) -> None:
    opened.open().ready()
    opened.compare(first, second)
    opened.ask(PROMPT, seed=7, temperature=0.7, maximum=64)
    opened.answered(2)


def lens(opened: Tab) -> None:
    opened.page.locator(".answer.A .actions button", has_text="Lens").click()
    opened.page.locator("main.lens table").last.wait_for()
    opened.choose("K 1 against K 4")


def routing(opened: Tab) -> None:
    compare(opened, 1, 4)
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
    """Of 256 colours, which makes it a third as large, and as high as its content."""
    opened.page.mouse.move(0, 0)
    expect(opened.page.locator(".status")).to_contain_text("0 running")
    bottom = opened.page.evaluate("Math.min(innerHeight, document.querySelector('main > div > *').offsetHeight + 90)")
    taken = Image.open(BytesIO(opened.page.screenshot(clip={"x": 0, "y": 0, "width": SIZE[0], "height": bottom})))
    few = taken.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    few.save(FOLDER / f"page-{name}.png", optimize=True)


if __name__ == "__main__":
    main()
