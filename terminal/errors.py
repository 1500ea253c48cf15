"""The errors of the command-line clients, each with a one-line message that a user can act on. It prints nothing.

`kind` is the short reason under which a benchmark counts a failure.
"""


class TerminalError(Exception):
    """The base class. `exit_code` is that of the command if nothing catches the error."""

    exit_code = 1

    def __init__(self, message: str, kind: str = "") -> None:
        super().__init__(message)
        self.kind = kind or message


class BadOption(TerminalError):
    """A flag or a command of the chat that cannot be carried out."""

    exit_code = 2


class Unreachable(TerminalError):
    """No connection, a broken one, or no answer in time."""


class Refused(TerminalError):
    """The server answered with an error status; `code` is from its error."""

    def __init__(self, message: str, kind: str = "", code: str = "") -> None:
        super().__init__(message, kind)
        self.code = code


class StreamFailed(TerminalError):
    """The answer failed after it had begun, or breaks the protocol."""
