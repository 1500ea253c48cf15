"""The `moedial` command. Options of `serve` derive from the settings class; none is typed twice.

It parses and prints; the work is elsewhere. A new sub-command is one function with `@app.command()`.
"""

import inspect
import os
import sys
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from engine.environment import PREFIX
from model.errors import MoedialError
from server.configuration.help import GroupedCommand
from server.configuration.options import default_of, flag_of, group_of
from server.configuration.variables import BadSetting, forget_keys
from server.settings import Settings
from server.standard_streams import open_missing
from terminal.cli import bench, chat, run_once  # their options only; httpx and the rest are loaded when they run

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
    """A setting as a typer option. Its text goes to pydantic unparsed, so flag and variable are read alike."""
    flag, switch = flag_of(name), isinstance(field.default, bool)
    default = default_of(field)
    option = typer.Option(
        *([f"{flag}/--no-{flag[2:]}"] if switch else [flag]),
        help=f"{field.description} [{PREFIX}{name.upper()}{default and '; default ' + default}]",
        show_default=False,
        rich_help_panel=group_of(field),
        metavar=None if switch else name.rpartition("_")[2].upper(),
    )
    kind = bool | None if switch else list[str] | None if isinstance(field.default, tuple) else str | None
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind, option])


def serve(folder: str | None = None, **flags: Any) -> None:
    """Serve one model over HTTP."""
    from server.serve import run  # late: --help and version need no server

    if folder is not None and flags.get("model") not in (None, folder):
        raise BadSetting(f"MODEL is {folder!r:.255} and --model is {flags['model']!r:.255}; give one of them")
    flags["model"] = folder or flags.get("model")
    settings = Settings(**{name: _joined(value) for name, value in flags.items() if value not in (None, [])})
    forget_keys(os.environ)
    run(settings)


def _joined(value: Any) -> Any:
    """A flag that may be repeated, as if its words had been given at once."""
    return ",".join(value) if isinstance(value, list) else value


_model = typer.Argument(metavar="MODEL", help="What to serve; --model says the same", show_default=False)
_parameters = [
    inspect.Parameter(
        "folder",
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        default=None,
        annotation=Annotated[str | None, _model],
    ),
    *(_parameter(name, field) for name, field in Settings.model_fields.items()),
]
serve.__signature__ = inspect.Signature(_parameters)  # type: ignore[attr-defined]
serve.__annotations__ = {parameter.name: parameter.annotation for parameter in _parameters}
app.command(cls=GroupedCommand)(serve)
app.command("chat")(chat)
app.command("run")(run_once)
app.add_typer(bench)


@app.command()
def version() -> None:
    """Print version, build, Python, torch and kernels: what an issue should say."""
    from server.version import report

    print(report())


def main() -> None:
    """The console entry. One clear line and a non-zero code for what a person can mend."""
    open_missing()
    try:
        app()
    except ValidationError as error:
        for fault in error.errors():
            name = str(fault["loc"][0])
            print(f"moedial: {flag_of(name)} ({PREFIX}{name.upper()}): {fault['msg']}", file=sys.stderr)
        sys.exit(2)
    except BadSetting as error:
        print(f"moedial: {error}", file=sys.stderr)
        sys.exit(2)
    except MoedialError as error:
        print(f"moedial: {error}", file=sys.stderr)
        sys.exit(1)
