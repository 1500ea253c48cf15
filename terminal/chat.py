"""`moedial chat`: reads a line, obeys it or sends it, shows the answer. It only sets the order of these."""

from contextlib import closing
from dataclasses import fields

from terminal.answer import Answer
from terminal.commands import obey
from terminal.connection import Server
from terminal.errors import Refused, TerminalError, Unreachable
from terminal.models import Card
from terminal.options import ChatOptions
from terminal.screen import Screen
from terminal.session import Session

SAMPLING = ("temperature", "max_tokens", "seed")


def run(options: ChatOptions) -> None:
    """Until /quit or the end of input.

    Raises:
        BadOption: --url, --model or --k cannot be done.
    """
    screen = Screen()
    with closing(Server(options.url, options.key)) as server:
        session = _session(server, options)
        _greet(session, options, screen)
        for line in screen.lines(lambda: f"K {session.count or 'default'} > "):
            _hear(session, screen, line)
            if session.over:
                break


def _session(server: Server, options: ChatOptions) -> Session:
    given = {f.name: getattr(options, f.name) for f in fields(options) if f.name in SAMPLING}
    sampling = {name: value for name, value in given.items() if value is not None}
    return Session(server, options.model, None, options.system, sampling)


def _greet(session: Session, options: ChatOptions, screen: Screen) -> None:
    """A server that is not there yet is no reason to leave; it will check the count itself."""
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
            screen.note(obey(session, line))
        elif line:
            _ask(session, screen, line[1:] if line.startswith("//") else line)
    except TerminalError as error:
        screen.fault(error)
    except KeyboardInterrupt:
        screen.note("stopped")


def _ask(session: Session, screen: Screen, question: str) -> None:
    """One turn. What an answer said before Ctrl-C is kept; of one that failed, nothing is."""
    answer, stopped = Answer(), False
    try:
        with closing(session.server.stream("chat", session.body(question))) as chunks:
            for chunk in chunks:
                for piece in answer.take(chunk):
                    screen.show(piece)
    except KeyboardInterrupt:
        stopped = True
    if answer.text:
        session.keep(question, answer.text)
    parts = ("stopped" if stopped else answer.figures(), "" if answer.text else "nothing was said: turn forgotten")
    screen.note(" · ".join(part for part in parts if part))
