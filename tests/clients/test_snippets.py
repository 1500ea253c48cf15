"""The snippets of docs/clients.md that need these clients, as they stand."""

from pathlib import Path

import pytest

from tests.clients.running import ROOT
from tests.clients.snippets import HEAVY, Snippet, run, snippets
from tests.clients.tasks import write_tasks


@pytest.mark.parametrize("snippet", snippets(HEAVY), ids=str)
def test_it_runs(snippet: Snippet, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path),
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    }.items():
        monkeypatch.setenv(name, value)
    write_tasks(tmp_path / "tasks")
    (tmp_path / "weights").symlink_to(ROOT / "weights")
    assert run(snippet, address, tmp_path).strip()


def test_every_heavy_client_has_one() -> None:
    assert {snippet.title for snippet in snippets(HEAVY)} == set(HEAVY)
