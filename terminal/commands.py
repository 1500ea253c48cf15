"""The commands of a chat, lines that begin with a slash: each changes the session and returns a text to show.

They neither read nor print. A new command is one function and one row of COMMANDS.
"""

from collections.abc import Callable
from contextlib import suppress

from terminal.counts import label
from terminal.errors import BadOption, TerminalError
from terminal.sanitize import one_line
from terminal.session import ChatSession


def count(session: ChatSession, word: str) -> str:
    """Set or show the expert count."""
    if word == "default":
        session.count = None
    elif word:
        session.count = session.card().check(word)
    return f"K {label(session.count)}{_range(session)}"


def _range(session: ChatSession) -> str:
    with suppress(TerminalError):  # the count is set even where the server cannot be reached
        return f"; {session.card().counts}"
    return ""


def reset(session: ChatSession, _: str) -> str:
    """Clear the conversation."""
    session.messages.clear()
    return "a new conversation" + ("; the system message stays" if session.system else "")


def system(session: ChatSession, text: str) -> str:
    """Set or remove the system message."""
    session.system = text
    return "system message set" if text else "no system message"


def model(session: ChatSession, name: str) -> str:
    """Change the model or list all."""
    if not name:
        current = session.card().id
        names = ", ".join(card.id for card in session.server.models())
        return f"{current}; this server has: {names}"
    card = session.switch(name)
    if card.fixed is not None:  # the server refuses another count beside an alias
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


def help(session: ChatSession, _: str) -> str:
    """List the commands."""
    return "\n".join(f"{usage:<14}{meaning}" for usage, meaning, _ in COMMANDS.values())


def leave(session: ChatSession, _: str) -> str:
    """End the chat."""
    session.ended = True
    return ""


COMMANDS: dict[str, tuple[str, str, Callable[[ChatSession, str], str]]] = {
    "k": ("/k [N|default]", "experts per token from now on; 8:2: 8 in prompts, 2 in answers; alone: which", count),
    "reset": ("/reset", "forget what was said", reset),
    "system": ("/system [TEXT]", "the system message from now on; alone: none", system),
    "model": ("/model [NAME]", "another model from now on; alone: which there are", model),
    "help": ("/help", "this; a message that begins with a slash is written with two", help),
    "quit": ("/quit", "leave, as Ctrl-D does; Ctrl-C stops an answer", leave),
}


def run_command(session: ChatSession, line: str) -> str:
    """Run the command of a line and return its text.

    Raises:
        BadOption: the command is unknown; or what the command raises.
    """
    name, _, argument = line.removeprefix("/").partition(" ")
    if name not in COMMANDS:
        raise BadOption(f"there is no command /{one_line(name)}; /help lists them")
    return COMMANDS[name][2](session, argument.strip())
