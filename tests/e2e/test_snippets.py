"""The snippets of docs/clients.md for curl and `openai`, as they stand; `make test-clients` runs the others."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clients.snippets import Snippet, run, snippets
from tests.e2e.live import Live, serving

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with serving("--threads", "1") as server:
        yield server


@pytest.mark.parametrize("snippet", snippets(heavy=False), ids=str)
def test_it_runs(snippet: Snippet, live: Live, tmp_path: Path) -> None:
    before = live.metric("request_success_total")
    assert run(snippet, live.url, tmp_path).strip()
    assert live.metric("request_success_total") > before


def test_the_page_has_them() -> None:
    assert {snippet.title for snippet in snippets(heavy=False)} == {"curl", "openai"}
