"""Chat templates as the server uses them: rendered in processes, each killed where it takes too long.

There are as many as there are threads that render. What a template is and what it may do, `weights/` knows.
"""

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import orjson
import structlog

from engine.environment import child_environment
from model.errors import CheckpointError, InvalidRequest
from server.requests.template_process import RENDERED, receive, send

log = structlog.get_logger("server")
SECONDS = 5.0  # of processor time, for one conversation
PATIENCE = 4  # times as long on the clock, beside other work
START_SECONDS = 60.0  # to begin, with the template compiled
SAMPLE = [{"role": "user", "content": "Hello"}]


class Lapse(Exception):
    """The process did not answer in time, or ended."""


class Templates:
    """One checkpoint's chat template; what it says of itself is as in `weights.chat.ChatTemplate`."""

    def __init__(self, folder: Path, source: str, knows_tools: bool, knows_thinking: bool) -> None:
        self._folder, self.source = folder, source
        self.knows_tools, self.knows_thinking = knows_tools, knows_thinking
        self._idle: list[Worker] = []

    @classmethod
    def load(cls, folder: Path) -> "Templates | None":
        """The template, tried on a sample; None where the checkpoint has none.

        Raises:
            CheckpointError: it cannot be read, or a sample takes it longer than any conversation may take.
        """
        try:
            worker, about = _start(folder)
        except Lapse as lapse:
            raise CheckpointError(f"{folder}: the chat template cannot be read: {lapse}") from None
        if about is None:
            worker.stop()
            return None
        made = cls(folder, about["source"], about["knows_tools"], about["knows_thinking"])
        made._idle.append(worker)
        made._try_out()
        return made

    def render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
        continue_final_message: bool = False,
    ) -> str:
        """The prompt text for `messages`. It blocks; the calling thread must live as long as the process does.

        Raises:
            InvalidRequest: the template refuses these messages, or they cost it more than its limits.
        """
        try:
            return self._render(messages, tools, add_generation_prompt, dict(variables or {}), continue_final_message)
        except Lapse as lapse:
            raise InvalidRequest(f"the chat template cannot render these messages: {lapse}", "messages") from None

    def _try_out(self) -> None:
        """What a template does not do to a sample, it may do to real messages: only too much time ends the start."""
        try:
            self._render(SAMPLE, None, True, {})
        except Lapse as lapse:
            raise CheckpointError(f"{self._folder}: the chat template cannot render one message: {lapse}") from None
        except InvalidRequest as error:
            log.warning("a sample of one user message was not rendered", reason=error.message)

    def _render(
        self,
        messages: Any,
        tools: Any,
        add_generation_prompt: bool,
        variables: dict[str, Any],
        continue_final_message: bool = False,
    ) -> str:
        given = {"messages": messages, "tools": tools, "add_generation_prompt": add_generation_prompt}
        given["continue_final_message"] = continue_final_message
        try:
            request = _written(given | {"variables": variables})
        except RecursionError:
            raise InvalidRequest("the messages are nested too deeply for the chat template", "messages") from None
        worker = self._worker()
        answer = worker.ask(request, SECONDS * PATIENCE)
        self._idle.append(worker)
        text = answer[1:].decode()
        if answer[:1] != RENDERED:
            raise InvalidRequest(text, "messages")
        return text

    def _worker(self) -> "Worker":
        """An idle one, or a new one."""
        while self._idle:
            if (worker := self._idle.pop()).runs:
                return worker
        return _start(self._folder)[0]


def _written(request: dict[str, Any]) -> bytes:
    """As JSON. `json` holds the interpreter's lock for a tenth of a second per eight megabytes, ten times as long as
    orjson, which cannot write integers beyond 64 bits and halves of surrogate pairs."""
    try:
        return orjson.dumps(request)
    except orjson.JSONEncodeError:
        return json.dumps(request).encode()


class Worker:
    """The parent's end of one process. It dies with the thread that made it."""

    def __init__(self, folder: Path) -> None:
        self._socket, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", "server.requests.template_process", str(folder), str(SECONDS)]
            self._process: subprocess.Popen[bytes] = subprocess.Popen(
                command, stdin=theirs.fileno(), stdout=subprocess.DEVNULL, env=child_environment()
            )

    @property
    def runs(self) -> bool:
        return self._process.poll() is None

    def ask(self, request: bytes | None, seconds: float) -> bytes:
        """What the process answers; to no request, what it says of itself.

        Raises:
            Lapse: it did not in time, or ended over it; it has been killed.
        """
        try:
            if request is not None:
                self._socket.settimeout(seconds)
                send(self._socket, request)
            return receive(self._socket, time.monotonic() + seconds)
        except TimeoutError:
            self.stop()
            raise Lapse(f"it took longer than {seconds:g} s") from None
        except (EOFError, OSError):
            timed_out = self.stop() == -signal.SIGPROF
            reason = f"it took longer than {SECONDS:g} s" if timed_out else "its process ended"
            raise Lapse(reason) from None

    def stop(self) -> int:
        """The exit status; one that was ending by itself has it from there."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(0.1)
        self._process.kill()
        self._socket.close()
        return self._process.wait()


def _start(folder: Path) -> tuple[Worker, Any]:
    """A process that has compiled the template, and what it says of it: null where there is none.

    Raises:
        CheckpointError: the template, or a file it needs, cannot be read or parsed.
        Lapse: it did not begin.
    """
    worker = Worker(folder)
    about = json.loads(worker.ask(None, START_SECONDS))
    if about is not None and "error" in about:
        worker.stop()
        raise CheckpointError(about["error"])
    return worker, about
