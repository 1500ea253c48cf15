"""The options of the command-line clients. Flags, help and typed values are derived from these dataclasses.

It reads nothing and starts nothing.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_type_hints

import typer

from terminal.errors import TerminalError

Options = TypeVar("Options")
INTERRUPTED = 130  # exit status after Ctrl-C


def _help(text: str, *names: str, **limits: Any) -> Any:
    return typer.Option(*names, help=text, **limits)


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Server, model and key."""

    url: Annotated[str, _help("The server", envvar="MOEDIAL_URL")] = "http://127.0.0.1:8000"
    model: Annotated[str, _help("A name from /v1/models", show_default="the first")] = ""
    key: Annotated[str, _help("Bearer key; the variable keeps it out of process lists", envvar="MOEDIAL_KEY")] = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatOptions(Target):
    k: Annotated[
        str | None,
        _help(
            "Experts per token; 8:2 is 8 in the prompt and 2 in the answer",
            "--k",
            "--num-experts",
            metavar="N",
            show_default="the server's",
        ),
    ] = None
    system: Annotated[str, _help("A system message", show_default=False)] = ""
    temperature: Annotated[float | None, _help("0: greedy", min=0)] = None
    max_tokens: Annotated[int | None, _help("Longest answer, in tokens", min=1)] = None
    seed: Annotated[int | None, _help("Same seed and conversation, same answer")] = None

    @property
    def sampling(self) -> dict[str, Any]:
        """The sampling fields that were set; the server has defaults for the others."""
        given = {name: getattr(self, name) for name in ("temperature", "max_tokens", "seed")}
        return {name: value for name, value in given.items() if value is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions(ChatOptions):
    prompt: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="What to ask; without it, standard input", show_default=False)
    ] = None
    endpoint: Annotated[
        Literal["auto", "chat", "completions"],
        _help("Which route; auto: chat where the model has a chat template, else completions"),
    ] = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions(Target):
    endpoint: Annotated[Literal["completions", "chat"], _help("Which route")] = "completions"
    requests: Annotated[int, _help("How many are measured", min=1)] = 100
    concurrency: Annotated[
        int | None, _help("So many at a time, the next as one ends", min=1, show_default="8, without --rate")
    ] = None
    rate: Annotated[float | None, _help("Instead: arrivals per second, Poisson, however many are open")] = None
    mix: Annotated[
        str, _help("Shares of expert counts, count:share; a count is N, N:M or 'default'; shares are relative")
    ] = "default:1"
    prompt_tokens: Annotated[
        str | None, _help("Length of prompts: N, or LOW-HIGH uniformly; needs the server's /tokenize")
    ] = None
    prompts: Annotated[
        Path | None,
        _help("A file of prompts, one a line", show_default="built-in text", exists=True, dir_okay=False),
    ] = None
    max_tokens: Annotated[int, _help("Length of answers", min=1)] = 64
    ignore_eos: Annotated[bool, _help("Answers run to their full length")] = True
    temperature: Annotated[float, _help("0: greedy", min=0)] = 0.0
    seed: Annotated[int, _help("Of mix, lengths, prompts, arrivals, and of each request's own seed")] = 0
    warmup: Annotated[int, _help("Requests before those that are measured", min=0)] = 0
    timeout: Annotated[float, _help("Seconds that one request may take")] = 600.0
    json: Annotated[Path | None, _help("Also write the JSON line to this file", dir_okay=False)] = None
    plot: Annotated[Path | None, _help("Draw the distributions into this file, such as a.png", dir_okay=False)] = None


def command(kind: type[Options], run: Callable[[Options], int]) -> Callable[..., None]:
    """A typer command that fills `kind` from flags and exits with the status that `run` returns.

    A TerminalError is printed in one line and sets the exit code; Ctrl-C exits with the status that shells give it.
    """

    def call(**flags: Any) -> None:
        try:
            status = run(kind(**flags))
        except TerminalError as error:
            typer.echo(f"moedial: {error}", err=True)
            status = error.exit_code
        except KeyboardInterrupt:
            status = INTERRUPTED
        raise typer.Exit(status)

    hints = get_type_hints(kind, include_extras=True)
    parameters = []
    for field in fields(kind):  # type: ignore[arg-type]
        name, keyword = field.name, inspect.Parameter.KEYWORD_ONLY
        parameters.append(inspect.Parameter(name, keyword, default=field.default, annotation=hints[name]))
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__, call.__doc__ = hints, run.__doc__
    return call
