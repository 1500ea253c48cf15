"""The `moedial calibrate` command: reads its options, sets its exit status. What measures is imported when it runs."""

import inspect
import logging
import os
from dataclasses import MISSING, fields
from typing import Any, get_type_hints

import typer

from calibration.options import Options

INTERRUPTED = 130  # exit status after Ctrl-C


def calibrate(**flags: Any) -> None:
    """Measure what each expert count keeps and costs; writes calibration.json beside the weights.

    Ctrl-C leaves what is done; the same command goes on from there.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # read when torch is imported, whose waiting threads spin
    logging.basicConfig(level=logging.WARNING, format="moedial: %(message)s")
    from calibration.calibrate import run

    try:
        run(Options(**flags))
    except KeyboardInterrupt:
        typer.echo("\nmoedial: stopped; the same command goes on from here", err=True)
        raise typer.Exit(INTERRUPTED) from None


def _parameters() -> list[inspect.Parameter]:
    """The options as parameters that typer understands."""
    kinds = get_type_hints(Options, include_extras=True)
    found = []
    for field in fields(Options):
        default = inspect.Parameter.empty if field.default is MISSING else field.default
        keyword = inspect.Parameter.KEYWORD_ONLY
        found.append(inspect.Parameter(field.name, keyword, default=default, annotation=kinds[field.name]))
    return found


calibrate.__signature__ = inspect.Signature(_parameters())  # type: ignore[attr-defined]
calibrate.__annotations__ = {parameter.name: parameter.annotation for parameter in _parameters()}
