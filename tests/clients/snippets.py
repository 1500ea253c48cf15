"""The snippets of docs/clients.md: taken out as they stand, and run. It knows no client.

Each heading is in one of three sets, by where its client is installed: beside the tests, or in one of two other venvs.
"""

import os
import re
import subprocess
import sys
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "clients.md"
ADDRESS = "http://localhost:8000"  # of the server, as the page writes it
LIGHT = ("curl", "openai")
HEAVY = ("LangChain", "LiteLLM", "lm-evaluation-harness")
MORE = (
    "openai-agents",
    "instructor",
    "Vercel AI SDK",
    "pydantic-ai",
    "LlamaIndex",
    "smolagents",
    "llm",
    "anthropic",
    "Ollama",
)
SHELLS = {"python": [sys.executable, "-c"], "bash": ["bash", "-euo", "pipefail", "-c"]}


@dataclass(frozen=True, slots=True)
class Snippet:
    """One fenced block: the client it is of, its language, its text, and where on the page it starts."""

    title: str
    language: str
    code: str
    line: int

    def __str__(self) -> str:
        return f"{self.title}:{self.line}"


def snippets(titles: Collection[str] = LIGHT + HEAVY + MORE) -> list[Snippet]:
    """Every fenced block of the page, in order, under one of these headings."""
    text, found, title = PAGE.read_text(), [], ""
    for match in re.finditer(r"^## ([^\n]+)$|^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        title = match[1] or title
        if match[2] and title in titles:
            found.append(Snippet(title, match[2], match[3], text[: match.start()].count("\n") + 1))
    return found


def aimed(snippet: Snippet, address: str) -> str:
    """Its text, which asks the server at `address` instead."""
    code = snippet.code.replace(ADDRESS, address)
    assert address in code, "it asks another server"
    return code


def run(snippet: Snippet, address: str, folder: Path) -> str:
    """What it prints, asking the server at `address` instead; a snippet that fails fails the test."""
    shell = SHELLS[snippet.language]
    code = aimed(snippet, address)
    here = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        [*shell, code], cwd=folder, env=os.environ | {"PATH": here}, capture_output=True, text=True, timeout=150
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert '"error"' not in done.stdout, done.stdout
    return done.stdout
