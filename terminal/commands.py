"""What lines that begin with a slash do: each changes the session and returns what to say. It neither reads nor prints.

A new command is one function and one row of COMMANDS.
"""

from collections.abc import Callable
from contextlib import suppress

from terminal.counts import label
from terminal.errors import BadOption, TerminalError
from terminal.sanitize import one_line
from terminal.session import Session


def count(session: Session, word: str) -> str:
    if word == "default":
        session.count = None
    elif word:
        session.count = session.card().check(word)
    return f"K {label(session.count)}{_range(session)}"


def _range(session: Session) -> str:
    with suppress(TerminalError):  # the count is set whether or not the server can be asked
        return f"; {session.card().counts}"
    return ""


def reset(session: Session, _: str) -> str:
    session.turns.clear()
    return "a new conversation" + ("; the system message stays" if session.system else "")


def system(session: Session, text: str) -> str:
    session.system = text
    return "system message set" if text else "no system message"


def model(session: Session, name: str) -> str:
    if not name:
        return f"{session.card().id}; this server has: " + ", ".join(card.id for card in session.server.models())
    card = session.switch(name)
    if card.fixed is not None:  # the server refuses a count beside an alias that says another
        back = "" if session.count is None else "; K is back at its default"
        session.count = None
        return card.counts + back
    try:
        if session.count is not None:
            card.check(label(session.count))
    except BadOption as error:
        session.count = None
        return f"{error}; K is back at its default"
    return card.counts


def help(session: Session, _: str) -> str:
    return "\n".join(f"{usage:<14}{meaning}" for usage, meaning, _ in COMMANDS.values())


def leave(session: Session, _: str) -> str:
    session.over = True
    return ""


COMMANDS: dict[str, tuple[str, str, Callable[[Session, str], str]]] = {
    "k": ("/k [N|default]", "experts per token from now on; 8:2: 8 in prompts, 2 in answers; alone: which", count),
    "reset": ("/reset", "forget what was said", reset),
    "system": ("/system [TEXT]", "the system message from now on; alone: none", system),
    "model": ("/model [NAME]", "another model from now on; alone: which there are", model),
    "help": ("/help", "this; a message that begins with a slash is written with two", help),
    "quit": ("/quit", "leave, as Ctrl-D does; Ctrl-C stops an answer", leave),
}


def obey(session: Session, line: str) -> str:
    """Raises BadOption for an unknown command, and what the command raises."""
    name, _, argument = line.removeprefix("/").partition(" ")
    if name not in COMMANDS:
        raise BadOption(f"there is no command /{one_line(name)}; /help lists them")
    return COMMANDS[name][2](session, argument.strip())
