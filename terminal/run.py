"""`moedial run`: one question, one answer on standard output. Chat where the model has a template, else completion."""

import sys
from contextlib import closing
from typing import Any

from terminal.answer import Answer
from terminal.connection import Server
from terminal.errors import BadOption, Refused
from terminal.options import RunOptions
from terminal.screen import Screen
from terminal.session import Session

NO_TEMPLATE = "no_chat_template"  # the code of a refusal


def run(options: RunOptions) -> int:
    """The exit status; what can be read of an answer that fails stays.

    Raises:
        BadOption: an option that cannot be done.
        TerminalError: no server, a refusal, or an answer that broke off.
    """
    screen = Screen(sys.stdout.isatty())
    prompt = _prompt(options)
    with closing(Server(options.url, options.key)) as server:
        session = Session(server, options.model, None, options.system, options.sampling)
        if options.k is not None:
            session.count = session.card().check(options.k)
        try:
            _answer(session, screen, options.endpoint, prompt)
        finally:
            screen.close_line()
    return 0


def _prompt(options: RunOptions) -> str:
    text = options.prompt
    if text is None and not sys.stdin.isatty():
        text = sys.stdin.read().strip()
    if not text:
        raise BadOption("PROMPT is missing: give it as a word, or on standard input")
    return text


def _answer(session: Session, screen: Screen, endpoint: str, prompt: str) -> None:
    if endpoint != "completions":
        try:
            return _show(session, screen, "chat", session.body(prompt))
        except Refused as error:
            if endpoint == "chat" or error.code != NO_TEMPLATE:
                raise
    if session.system:
        raise BadOption("--system needs a model with a chat template, and --endpoint chat or auto")
    _show(session, screen, "completions", session.completion(prompt))


def _show(session: Session, screen: Screen, endpoint: str, body: dict[str, Any]) -> None:
    answer = Answer()
    with closing(session.server.stream(endpoint, body)) as chunks:
        for chunk in chunks:
            for piece in answer.take(chunk):
                screen.show(piece)
