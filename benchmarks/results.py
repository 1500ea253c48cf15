"""Where a benchmark's result goes: one JSON line on standard output, and in a file where one is asked for."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

Out = Annotated[Path | None, typer.Option(help="write the JSON line here as well")]


def write(result: Mapping[str, Any], out: Path | None) -> str:
    """The result as one line of JSON, written to the file if there is one."""
    line = json.dumps(result)
    if out is not None:
        out.write_text(line + "\n")
    return line


def finish(result: Mapping[str, Any], out: Path | None) -> None:
    """Print the result as one line of JSON, and write it to the file if there is one."""
    print(write(result, out))
