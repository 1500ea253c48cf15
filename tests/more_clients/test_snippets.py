"""The snippets of docs/clients.md that need these clients, as they stand."""

from pathlib import Path

import pytest

from tests.clients.snippets import MORE, Snippet, aimed, run, snippets
from tests.more_clients.node import needs_node, run_script


def of(scripts: bool) -> list[Snippet]:
    return [snippet for snippet in snippets(MORE) if (snippet.language == "js") == scripts]


@pytest.mark.parametrize("snippet", of(scripts=False), ids=str)
def test_it_runs(snippet: Snippet, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path))
    assert run(snippet, address, tmp_path).strip()


@needs_node
@pytest.mark.parametrize("snippet", of(scripts=True), ids=str)
def test_a_script_runs(snippet: Snippet, address: str) -> None:
    assert run_script(aimed(snippet, address)).strip()


def test_every_client_has_one() -> None:
    assert {snippet.title for snippet in snippets(MORE)} == set(MORE)
