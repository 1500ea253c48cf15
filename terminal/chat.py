"""`moedial chat`: reads a line, runs it as a command or sends it, shows the answer."""

from contextlib import closing

from terminal.answer import StreamedAnswer
from terminal.commands import run_command
from terminal.connection import Server
from terminal.counts import label
from terminal.errors import Refused, TerminalError, Unreachable
from terminal.models import ModelCard
from terminal.options import ChatOptions
from terminal.screen import Screen, at_terminal
from terminal.session import ChatSession

CONTEXT_EXCEEDED = "context_length_exceeded"  # the code of a refusal


def run(options: ChatOptions) -> int:
    """Chat until /quit or the end of input. Returns the exit status: without a terminal, 1 after an error.

    Raises:
        KeyboardInterrupt: Ctrl-C, without a terminal.
        BadOption: --url, --model or --k is invalid.
    """
    screen = Screen(at_terminal())
    with closing(Server(options.url, options.key)) as server:
        session = _session(server, options)
        _greet(session, options, screen)
        for line in screen.lines(lambda: f"K {label(session.count)} > "):
            _handle(session, screen, line)
            if session.ended:
                break
    return int(screen.failed and not screen.interactive)


def _session(server: Server, options: ChatOptions) -> ChatSession:
    return ChatSession(server, options.model, None, options.system, options.sampling)


def _greet(session: ChatSession, options: ChatOptions, screen: Screen) -> None:
    """Show the model and its counts. Without a connection the chat goes on: the server checks the count itself."""
    if not screen.interactive and not options.model and options.k is None:
        return  # a greeting that is not shown needs no request
    try:
        card = session.card()
        screen.note(f"{session.server.url}: {card.counts}. /help lists commands.")
    except (Unreachable, Refused) as error:
        screen.error(error)
        card = ModelCard(options.model or "the model", False, None)
    if options.k is not None:
        session.count = card.check(options.k)


def _handle(session: ChatSession, screen: Screen, line: str) -> None:
    try:
        if line.startswith("/") and not line.startswith("//"):
            screen.say(run_command(session, line))
        elif line:
            _ask(session, screen, line[1:] if line.startswith("//") else line)
    except Refused as error:
        screen.error(_with_hint(error, session))
    except TerminalError as error:
        screen.error(error)
    except KeyboardInterrupt:
        if not screen.interactive:
            raise
        screen.note("stopped")


def _with_hint(error: Refused, session: ChatSession) -> Refused:
    """The error, with a hint at /reset where it is the conversation that fills the context."""
    if error.code != CONTEXT_EXCEEDED or not session.messages:
        return error
    return Refused(
        f"the conversation no longer fits the context: /reset begins a new one. {error}", error.kind, CONTEXT_EXCEEDED
    )


def _ask(session: ChatSession, screen: Screen, question: str) -> None:
    """Send a question and show the answer. What arrived before Ctrl-C is kept; nothing of a failed answer is."""
    answer, stopped = StreamedAnswer(), False
    try:
        with closing(session.server.stream("chat", session.body(question))) as chunks:
            for chunk in chunks:
                for part in answer.add(chunk):
                    screen.show(part)
    except KeyboardInterrupt:
        if not screen.interactive:
            raise
        stopped = True
    finally:
        screen.close_line()
    if answer.text:
        session.keep(question, answer.text)
    parts = ("stopped" if stopped else answer.statistics(), "" if answer.text else "nothing was said: turn forgotten")
    screen.note(" · ".join(part for part in parts if part))
