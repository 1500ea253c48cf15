"""The files of examples/ as people run them, and the snippets of docs/clients.md for curl and `openai` as they stand.

Other targets run the other snippets; the example for lm-evaluation-harness is in tests/clients/test_examples.py.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clients.snippets import LIGHT, PAGE, Snippet, snippets
from tests.clients.snippets import run as run_snippet
from tests.e2e.live import Live, serving

pytestmark = pytest.mark.slow
EXAMPLES = Path(__file__).parent.parent / "examples"
CLIENTS = {"quality_sweep.py"}  # their packages are in a venv of their own


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with serving("--threads", "1") as server:
        yield server


def run(name: str, *arguments: str) -> str:
    """What it prints; an example that fails fails the test."""
    shell = "bash" if name.endswith(".sh") else sys.executable
    here = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = [shell, str(EXAMPLES / name), *arguments]
    done = subprocess.run(command, env=os.environ | {"PATH": here}, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_curl_at_three_counts_and_a_refusal(live: Live) -> None:
    printed = run("counts.sh", live.url)
    assert re.findall(r'"usage":.*?"num_experts":(\d+)', printed) == ["1", "4", "8"]
    assert "num_experts must be between 1 and 8 for this model, got 1000" in printed


def test_the_openai_client_at_three_counts(live: Live) -> None:
    assert re.findall(r"^K = (\d) .*: Once upon a time\S", run("openai_counts.py", live.url), re.MULTILINE) == [
        "1",
        "4",
        "8",
    ]


def test_a_load_of_mixed_counts(live: Live) -> None:
    printed = run("load_test.sh", live.url, "6")
    assert re.findall(r"^## (\d+) at once", printed, re.MULTILINE) == ["1", "4", "16"]
    assert printed.count('"failed": 6') == 0 and printed.count("tok/s") >= 3


def test_the_engine_without_http() -> None:
    answers = re.findall(r"^(K = \d): (.*?) \[\w+\]$", run("embed_engine.py"), re.MULTILINE | re.DOTALL)
    assert sorted(name for name, _ in answers) == ["K = 1", "K = 4", "K = 8"]
    assert len({text for _, text in answers}) > 1


def test_a_family_in_one_file() -> None:
    first, *rest = run("adding_a_family.py").splitlines()
    assert first.startswith("adding_a_family on ") and first.endswith(": 1 to 6 experts")
    assert [line.partition(" [")[0] for line in rest] == [f"K = {count}" for count in range(1, 7)]


def test_every_example_is_run_and_listed() -> None:
    files = {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".sh")}
    source = Path(__file__).read_text()
    assert {name for name in files if f'run("{name}"' not in source} == CLIENTS
    assert files == set(re.findall(r"\]\(([\w.]+)\)", (EXAMPLES / "README.md").read_text()))


@pytest.mark.parametrize("snippet", snippets(LIGHT), ids=str)
def test_a_snippet_runs(snippet: Snippet, live: Live, tmp_path: Path) -> None:
    before = live.metric("request_success_total")
    assert run_snippet(snippet, live.url, tmp_path).strip()
    assert live.metric("request_success_total") > before


def test_the_page_has_them() -> None:
    assert {snippet.title for snippet in snippets(LIGHT)} == set(LIGHT)


def test_every_block_of_the_page_is_run_somewhere() -> None:
    assert len(snippets()) == PAGE.read_text().count("```") // 2
