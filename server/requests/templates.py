"""Renders chat templates in worker processes, each of which is killed where a conversation takes too long.

There are as many workers as threads that render. What a template is and may do: `weights/chat.py`.
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
CPU_SECONDS = 5.0  # for one conversation
WALL_FACTOR = 4  # times the processor time that may pass on the clock, beside other work
START_SECONDS = 60.0  # for a worker to start and compile the template
SAMPLE = [{"role": "user", "content": "Hello"}]


class TemplateWorkerFailed(Exception):
    """A worker did not answer in time, or ended."""


class SandboxedTemplate:
    """One checkpoint's chat template, with the properties of `weights.chat.ChatTemplate`."""

    def __init__(self, model: Path, source: str, knows_tools: bool, knows_thinking: bool) -> None:
        self._model, self.source = model, source
        self.knows_tools, self.knows_thinking = knows_tools, knows_thinking
        self._idle: list[TemplateWorker] = []

    @classmethod
    def load(cls, model: Path) -> "SandboxedTemplate | None":
        """The template, after it has rendered a sample; None where the checkpoint has none.

        Raises:
            CheckpointError: it cannot be read, or the sample takes longer than a conversation may.
        """
        try:
            worker, about = _start(model)
        except TemplateWorkerFailed as failure:
            raise CheckpointError(f"{model}: the chat template cannot be read: {failure}") from None
        if about is None:
            worker.stop()
            return None
        made = cls(model, about["source"], about["knows_tools"], about["knows_thinking"])
        made._idle.append(worker)
        made._render_sample()
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
            InvalidRequest: the template refuses these messages, or exceeds its limits on them.
        """
        try:
            return self._render(messages, tools, add_generation_prompt, dict(variables or {}), continue_final_message)
        except TemplateWorkerFailed as failure:
            raise InvalidRequest(f"the chat template cannot render these messages: {failure}", "messages") from None

    def _render_sample(self) -> None:
        """Render a sample message. An error is only logged, since real messages may pass; taking too long is fatal."""
        try:
            self._render(SAMPLE, None, True, {})
        except TemplateWorkerFailed as failure:
            raise CheckpointError(f"{self._model}: the chat template cannot render one message: {failure}") from None
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
        answer = worker.exchange(request, CPU_SECONDS * WALL_FACTOR)
        self._idle.append(worker)
        text = answer[1:].decode()
        if answer[:1] != RENDERED:
            raise InvalidRequest(text, "messages")
        return text

    def _worker(self) -> "TemplateWorker":
        """An idle worker, or a new one."""
        while self._idle:
            if (worker := self._idle.pop()).runs:
                return worker
        return _start(self._model)[0]


def _written(request: dict[str, Any]) -> bytes:
    """A request as JSON.

    `json` is the fallback for integers beyond 64 bits and halves of surrogate pairs: it holds the interpreter's lock
    for a tenth of a second per eight megabytes, ten times as long as orjson.
    """
    try:
        return orjson.dumps(request)
    except orjson.JSONEncodeError:
        return json.dumps(request).encode()


class TemplateWorker:
    """The parent's end of one worker process, which ends with the thread that started it."""

    def __init__(self, model: Path) -> None:
        self._socket, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", "server.requests.template_process", str(model), str(CPU_SECONDS)]
            self._process = subprocess.Popen(
                command, stdin=theirs.fileno(), stdout=subprocess.DEVNULL, env=child_environment()
            )

    @property
    def runs(self) -> bool:
        return self._process.poll() is None

    def exchange(self, request: bytes | None, seconds: float) -> bytes:
        """The worker's answer to `request`; without one, its description of the template.

        Raises:
            TemplateWorkerFailed: it did not answer in time, or ended; it has been killed.
        """
        try:
            if request is not None:
                self._socket.settimeout(seconds)
                send(self._socket, request)
            return receive(self._socket, time.monotonic() + seconds)
        except TimeoutError:
            self.stop()
            raise TemplateWorkerFailed(f"it took longer than {seconds:g} s") from None
        except (EOFError, OSError):
            timed_out = self.stop() == -signal.SIGPROF
            reason = f"it took longer than {CPU_SECONDS:g} s" if timed_out else "its process ended"
            raise TemplateWorkerFailed(reason) from None

    def stop(self) -> int:
        """End the process and return its exit status."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(0.1)
        self._process.kill()
        self._socket.close()
        return self._process.wait()


def _start(model: Path) -> tuple[TemplateWorker, Any]:
    """A worker that has compiled the template, and its description of it; None where there is no template.

    Raises:
        CheckpointError: the template, or a file it needs, cannot be read or parsed.
        TemplateWorkerFailed: it did not start.
    """
    worker = TemplateWorker(model)
    about = json.loads(worker.exchange(None, START_SECONDS))
    if about is not None and "error" in about:
        worker.stop()
        raise CheckpointError(about["error"])
    return worker, about
