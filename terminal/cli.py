"""The command-line clients, which `server/cli.py` registers. What they need is imported when they run."""

import typer

from terminal.options import ChatOptions, LoadOptions, RunOptions, command

bench = typer.Typer(name="bench", no_args_is_help=True, help="Measure a running server.")


def _chat(options: ChatOptions) -> int:
    """Talk to a running server; /k changes the expert count between two messages."""
    from terminal.chat import run

    return run(options)


def _run(options: RunOptions) -> int:
    """Ask a running server once: prints the answer and nothing else."""
    from terminal.run import run

    return run(options)


def _serve(options: LoadOptions) -> int:
    """Load a server with a mix of expert counts; measure latencies and tokens per second by count."""
    from terminal.bench.serve import run

    return run(options)


chat = command(ChatOptions, _chat)
run_once = command(RunOptions, _run)
bench.command("serve")(command(LoadOptions, _serve))


@bench.callback()
def _bench() -> None:
    """Keep `serve` a sub-command while it is the only one."""
