"""The snippets of docs/clients.md: taken out as they stand, and run. It knows no client.

Those under a heading of HEAVY need the clients' own venv; the others run where the tests run.
"""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "clients.md"
ADDRESS = "http://localhost:8000"  # of the server, as the page writes it
HEAVY = ("LangChain", "LiteLLM", "lm-evaluation-harness")


@dataclass(frozen=True, slots=True)
class Snippet:
    """One fenced block: the client it is of, its language, its text, and where on the page it starts."""

    title: str
    language: str
    code: str
    line: int

    def __str__(self) -> str:
        return f"{self.title}:{self.line}"


def snippets(heavy: bool) -> list[Snippet]:
    """Every fenced block of the page, in order, of one of the two kinds."""
    text, found, title = PAGE.read_text(), [], ""
    for match in re.finditer(r"^## ([^\n]+)$|^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        title = match[1] or title
        if match[2] and (title in HEAVY) == heavy:
            found.append(Snippet(title, match[2], match[3], text[: match.start()].count("\n") + 1))
    return found


def run(snippet: Snippet, address: str, folder: Path) -> str:
    """What it prints, asking the server at `address` instead; a snippet that fails fails the test."""
    shell = {"python": [sys.executable, "-c"], "bash": ["bash", "-euo", "pipefail", "-c"]}[snippet.language]
    code = snippet.code.replace(ADDRESS, address)
    assert address in code, "it asks another server"
    here = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        [*shell, code], cwd=folder, env=os.environ | {"PATH": here}, capture_output=True, text=True, timeout=150
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert '"error"' not in done.stdout, done.stdout
    return done.stdout
