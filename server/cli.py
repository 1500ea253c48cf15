"""The `moedial` command. The options of `serve` are derived from the settings class.

It parses arguments and prints errors; the work is done elsewhere. A sub-command is a function with `@app.command()`.
"""

import inspect
import os
import re
import sys
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from calibration.command import calibrate, expert_set, extract, pack  # only their options; torch is imported later
from engine.environment import PREFIX, child_environment
from engine.imports import uncollected
from model.errors import MoedialError
from server.configuration.help import GroupedCommand
from server.configuration.options import default_of, flag_of, group_of
from server.configuration.variables import BadSetting, forget_keys
from server.settings import Settings
from server.standard_streams import open_missing
from terminal.cli import bench, chat, run_once  # only their options; httpx and the rest are imported when they run

app = typer.Typer(name="moedial", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


def _print_version(wanted: bool) -> None:
    if wanted:
        from server.version import VERSION

        print(VERSION)
        raise typer.Exit


@app.callback()
def moedial(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Serve mixture-of-experts models; every request chooses its expert count."""


def _parameter(name: str, field: FieldInfo) -> inspect.Parameter:
    """A setting as a typer option. pydantic parses its text, so that a flag is read as its variable is."""
    flag, switch = flag_of(name), isinstance(field.default, bool)
    default = default_of(field)
    variable = PREFIX + name.upper() + (f"; default {default}" if default else "")
    names = f"{flag}/--no-{flag[2:]}" if switch else flag
    metavar = None if switch else name.rpartition("_")[2].upper()
    described = f"{field.description} [{variable}]"
    option = typer.Option(
        names,
        help=described,
        show_default=False,
        rich_help_panel=group_of(field),
        metavar=metavar,
    )
    kind: Any = str | None
    if switch:
        kind = bool | None
    elif isinstance(field.default, tuple) or name in ("model", "tokenizer"):
        kind = list[str] | None
    keyword = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, keyword, default=None, annotation=Annotated[kind, option])


def serve(folder: str | None = None, **flags: Any) -> None:
    """Serve one model over HTTP, or several."""
    flags |= _which(folder, flags.get("model") or [], flags.get("models"))
    flags |= _tokenizers(flags.get("tokenizer") or [], flags.get("tokenizers"), bool(flags.get("models")))
    given = {name: value for name, value in flags.items() if value not in (None, [])}
    settings = Settings(**{name: _joined(value) for name, value in given.items()})
    forget_keys(os.environ)
    with uncollected():
        from server.serve import run  # here, since neither --help nor the refusal of a setting needs a server
    run(settings)


def _which(folder: str | None, named: list[str], models: str | None) -> dict[str, Any]:
    """`model` or `models`, as MODEL, --model and --models say.

    Raises:
        BadSetting: two of them differ, or of several models one has no name.
    """
    if len(named) < 2:
        model = named[0] if named else None
        if folder is not None and model not in (None, folder):
            raise BadSetting(f"MODEL is {folder!r:.255} and --model is {model!r:.255}; give one of them")
        if models and (folder or model):
            raise BadSetting(f"there is one model, {folder or model!r:.255}, and --models is {models!r:.255}")
        return {"model": folder or model}
    if folder is not None or models:
        raise BadSetting(f"--model is there {len(named)} times, and there is {folder or models!r:.255}")
    if unnamed := [one for one in named if "=" not in one]:
        raise BadSetting(f"--model is there {len(named)} times, and {unnamed[0]!r:.255} has no name; say NAME=FOLDER")
    return {"model": None, "models": named}


def _tokenizers(named: list[str], tokenizers: str | None, several: bool) -> dict[str, Any]:
    """`tokenizer` or, where there are several models, `tokenizers`, as --tokenizer and --tokenizers say.

    Raises:
        BadSetting: one model has two, of several models one has no name, or both flags are there.
    """
    if not several:
        if len(named) > 1:
            raise BadSetting(f"--tokenizer is there {len(named)} times, and there is one model")
        return {"tokenizer": named[0] if named else None}
    if named and tokenizers:
        raise BadSetting(f"--tokenizer is {named[0]!r:.255} and --tokenizers is {tokenizers!r:.255}; give one of them")
    if unnamed := [one for one in named if "=" not in one]:
        raise BadSetting(f"there are several models, and --tokenizer {unnamed[0]!r:.255} has no name; say NAME=FOLDER")
    return {"tokenizer": None, "tokenizers": named or tokenizers}


def _joined(value: Any) -> Any:
    """The values of a repeated flag as one comma-separated text."""
    return ",".join(value) if isinstance(value, list) else value


_model = typer.Argument(metavar="MODEL", help="What to serve; --model says the same", show_default=False)
_positional = inspect.Parameter.POSITIONAL_OR_KEYWORD
_folder = inspect.Parameter("folder", _positional, default=None, annotation=Annotated[str | None, _model])
_settings = [_parameter(name, field) for name, field in Settings.model_fields.items()]
_parameters = [_folder, *_settings]
serve.__signature__ = inspect.Signature(_parameters)  # type: ignore[attr-defined]
serve.__annotations__ = {parameter.name: parameter.annotation for parameter in _parameters}
app.command(cls=GroupedCommand)(serve)
app.command("chat")(chat)
app.command("run")(run_once)
app.command("calibrate")(calibrate)
app.command("expert-set")(expert_set)
app.command("extract")(extract)
app.command("pack")(pack)
app.add_typer(bench)


@app.command()
def rank(
    model: Annotated[str | None, typer.Argument(help="This machine's copy; default: the path that rank 0 has")] = None,
    join: Annotated[
        str, typer.Option(help="Rank 0's --rank-address, HOST:PORT; default $MASTER_ADDR:$MASTER_PORT")
    ] = "",
    number: Annotated[int, typer.Option("--rank", envvar="RANK", help="Which rank this is, from 1 on")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda:n; default as rank 0, on a GPU cuda:$LOCAL_RANK")] = "",
) -> None:
    """Hold a part of the experts for a server on another machine (moedial serve --ranks)."""
    address = join or ":".join(os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
    if not re.fullmatch(r"[^:\s]+:[0-9]{1,5}", address):
        raise BadSetting(f"--join is {address!r:.255}, not HOST:PORT")
    if number < 1:
        raise BadSetting(f"--rank is {number}, must be at least 1; rank 0 is moedial serve --ranks")
    named = {"--model": model, "--device": device}
    options = [part for name, value in named.items() if value for part in (name, value)]
    command = [sys.executable, "-m", "engine.ranks.rank", address, str(number), *options]
    os.execve(sys.executable, command, child_environment())  # this process never loads torch


@app.command()
def version() -> None:
    """Print version, build, Python, torch and kernels: what an issue should say."""
    from server.version import report

    print(report())


def main() -> None:
    """The entry point of the command: one line and a non-zero exit code for errors that a user can fix."""
    open_missing()
    try:
        app()
    except ValidationError as error:
        for fault in error.errors():
            name = str(fault["loc"][0])
            option = f"{flag_of(name)} ({PREFIX}{name.upper()})"
            print(f"moedial: {option}: {fault['msg']}", file=sys.stderr)
        sys.exit(2)
    except BadSetting as error:
        print(f"moedial: {error}", file=sys.stderr)
        sys.exit(2)
    except MoedialError as error:
        print(f"moedial: {error}", file=sys.stderr)
        sys.exit(1)
