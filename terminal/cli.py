"""The terminal's commands, for `server/cli.py` to register. What they need is imported when they run."""

import typer

from terminal.options import ChatOptions, LoadOptions, command

bench = typer.Typer(name="bench", no_args_is_help=True, help="Measure a running server.")


def _chat(options: ChatOptions) -> None:
    """Talk to a running server; /k changes the expert count between two messages."""
    from terminal.chat import run

    run(options)


def _serve(options: LoadOptions) -> None:
    """Load a server with a mix of expert counts; measure latencies and tokens per second by count."""
    from terminal.bench.serve import run

    run(options)


chat = command(ChatOptions, _chat)
bench.command("serve")(command(LoadOptions, _serve))


@bench.callback()
def _bench() -> None:
    """Keeps `serve` a sub-command while it is the only one."""
