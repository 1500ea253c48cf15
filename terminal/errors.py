"""What can go wrong between this terminal and a server; each is one line that a person can act on. It prints nothing.

`kind` is the short reason under which a benchmark counts the failure.
"""


class TerminalError(Exception):
    """The root. `exit_code` is what the command ends with if nothing catches it."""

    exit_code = 1

    def __init__(self, message: str, kind: str = "") -> None:
        super().__init__(message)
        self.kind = kind or message


class BadOption(TerminalError):
    """What was typed cannot be done: a flag, or a command of the chat."""

    exit_code = 2


class Unreachable(TerminalError):
    """No connection, none any more, or no answer in time."""


class Refused(TerminalError):
    """The server answered with an error status, and `code` in its error."""

    def __init__(self, message: str, kind: str = "", code: str = "") -> None:
        super().__init__(message, kind)
        self.code = code


class StreamFailed(TerminalError):
    """The answer began and then failed, or is not what the protocol says."""
