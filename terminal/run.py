"""`moedial run`: one question, its answer on standard output. Chat where the model has a template, else completion."""

import sys
from contextlib import closing
from typing import Any

from terminal.answer import StreamedAnswer
from terminal.connection import Server
from terminal.errors import BadOption, Refused
from terminal.options import RunOptions
from terminal.screen import Screen
from terminal.session import ChatSession

NO_TEMPLATE = "no_chat_template"  # the code of a refusal


def run(options: RunOptions) -> int:
    """Print one answer and return the exit status. What arrived of a failed answer stays on the screen.

    Raises:
        BadOption: an option is invalid.
        TerminalError: no server, a refusal, or an incomplete answer.
    """
    screen = Screen(sys.stdout.isatty())
    prompt = _prompt(options)
    with closing(Server(options.url, options.key)) as server:
        session = ChatSession(server, options.model, None, options.system, options.sampling)
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


def _answer(session: ChatSession, screen: Screen, endpoint: str, prompt: str) -> None:
    if endpoint != "completions":
        try:
            return _show(session, screen, "chat", session.body(prompt))
        except Refused as error:
            if endpoint == "chat" or error.code != NO_TEMPLATE:
                raise
    if session.system:
        raise BadOption("--system needs a model with a chat template, and --endpoint chat or auto")
    _show(session, screen, "completions", session.completion(prompt))


def _show(session: ChatSession, screen: Screen, endpoint: str, body: dict[str, Any]) -> None:
    answer = StreamedAnswer()
    with closing(session.server.stream(endpoint, body)) as chunks:
        for chunk in chunks:
            for part in answer.add(chunk):
                screen.show(part)
