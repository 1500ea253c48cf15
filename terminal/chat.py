"""`moedial chat`: reads a line, obeys it or sends it, shows the answer. It only sets the order of these."""

from contextlib import closing

from terminal.answer import Answer
from terminal.commands import obey
from terminal.connection import Server
from terminal.counts import label
from terminal.errors import Refused, TerminalError, Unreachable
from terminal.models import Card
from terminal.options import ChatOptions
from terminal.screen import Screen, at_terminal
from terminal.session import Session

FULL = "context_length_exceeded"  # the code of a refusal


def run(options: ChatOptions) -> int:
    """Until /quit or the end of input. The exit status: without a terminal, 1 after an error.

    Raises:
        KeyboardInterrupt: Ctrl-C, without a terminal.
        BadOption: --url, --model or --k cannot be done.
    """
    screen = Screen(at_terminal())
    with closing(Server(options.url, options.key)) as server:
        session = _session(server, options)
        _greet(session, options, screen)
        for line in screen.lines(lambda: f"K {label(session.count)} > "):
            _hear(session, screen, line)
            if session.over:
                break
    return int(screen.failed and not screen.attended)


def _session(server: Server, options: ChatOptions) -> Session:
    return Session(server, options.model, None, options.system, options.sampling)


def _greet(session: Session, options: ChatOptions, screen: Screen) -> None:
    """A server that is not there yet is no reason to leave; it will check the count itself."""
    if not screen.attended and not options.model and options.k is None:
        return  # a greeting that is not shown needs no request
    try:
        card = session.card()
        screen.note(f"{session.server.url}: {card.counts}. /help lists commands.")
    except (Unreachable, Refused) as error:
        screen.fault(error)
        card = Card(options.model or "the model", False, None)
    if options.k is not None:
        session.count = card.check(options.k)


def _hear(session: Session, screen: Screen, line: str) -> None:
    try:
        if line.startswith("/") and not line.startswith("//"):
            screen.say(obey(session, line))
        elif line:
            _ask(session, screen, line[1:] if line.startswith("//") else line)
    except Refused as error:
        screen.fault(_with_hint(error, session))
    except TerminalError as error:
        screen.fault(error)
    except KeyboardInterrupt:
        if not screen.attended:
            raise
        screen.note("stopped")


def _with_hint(error: Refused, session: Session) -> Refused:
    """A conversation that fills the context can be forgotten; a single message that does cannot."""
    if error.code != FULL or not session.turns:
        return error
    return Refused(f"the conversation no longer fits the context: /reset begins a new one. {error}", error.kind, FULL)


def _ask(session: Session, screen: Screen, question: str) -> None:
    """One turn. What an answer said before Ctrl-C is kept; of one that failed, nothing is."""
    answer, stopped = Answer(), False
    try:
        with closing(session.server.stream("chat", session.body(question))) as chunks:
            for chunk in chunks:
                for piece in answer.take(chunk):
                    screen.show(piece)
    except KeyboardInterrupt:
        if not screen.attended:
            raise
        stopped = True
    finally:
        screen.close_line()
    if answer.text:
        session.keep(question, answer.text)
    parts = ("stopped" if stopped else answer.figures(), "" if answer.text else "nothing was said: turn forgotten")
    screen.note(" · ".join(part for part in parts if part))
