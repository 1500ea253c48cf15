"""The snippets of docs/clients.md for curl and `openai`, as they stand; two other targets run the others."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clients.snippets import LIGHT, PAGE, Snippet, run, snippets
from tests.e2e.live import Live, serving

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with serving("--threads", "1") as server:
        yield server


@pytest.mark.parametrize("snippet", snippets(LIGHT), ids=str)
def test_it_runs(snippet: Snippet, live: Live, tmp_path: Path) -> None:
    before = live.metric("request_success_total")
    assert run(snippet, live.url, tmp_path).strip()
    assert live.metric("request_success_total") > before


def test_the_page_has_them() -> None:
    assert {snippet.title for snippet in snippets(LIGHT)} == set(LIGHT)


def test_every_block_of_the_page_is_run_somewhere() -> None:
    assert len(snippets()) == PAGE.read_text().count("```") // 2
