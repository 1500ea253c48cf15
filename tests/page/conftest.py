"""One browser and one server of each kind for all tests. Without playwright no test is collected."""

from collections.abc import Iterator
from importlib.util import find_spec

import pytest

collect_ignore_glob = [] if find_spec("playwright") else ["test_*.py"]  # `make test-page` has it

if find_spec("playwright"):
    from playwright.sync_api import Browser, sync_playwright

    from tests.page.browser import CHROMIUM, FLAGS, Tab, tab
    from tests.page.running import Fake, bundled, fake

    @pytest.fixture(scope="session")
    def browser() -> Iterator[Browser]:
        with sync_playwright() as playwright:
            started = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
            yield started
            started.close()

    @pytest.fixture(scope="session")
    def fake_server() -> Iterator[Fake]:
        with fake() as server:
            yield server

    @pytest.fixture(scope="session")
    def stories() -> Iterator[str]:
        """The page's address of a server with the bundled top-k model."""
        with bundled("topk-stories", "--return-routed-experts") as url:
            yield url

    @pytest.fixture
    def page(browser: Browser, fake_server: Fake) -> Iterator[Tab]:
        """A tab on the fake server, ready."""
        with tab(browser, fake_server.url) as opened:
            yield opened.open().ready()
