"""The engine process, run inside the test on one end of a socket pair, and once for real."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest

from engine.engine import Engine
from engine.grammars.compiler import GrammarCompiler, refusal
from engine.grammars.matcher import Matcher
from engine.pace import FIRST_STEP_SECONDS
from engine.process import messages, packing
from engine.process.messages import (
    HEADER,
    Abort,
    Busy,
    Compile,
    Compiled,
    Events,
    Failed,
    FrameError,
    FromEngine,
    Ping,
    Pong,
    PromptLogprobsPart,
    Ready,
    Rejected,
    Reports,
    SetCounts,
    Start,
    Stop,
    Submit,
    ToEngine,
    frame,
    read_from_engine,
)
from engine.process.worker import Connection, serve
from engine.types import EngineSettings, StepReport, TokenEvent
from model.errors import EngineDown
from tests.engine.fake import LOST, build_fake, request
from weights.folder import BUNDLED, DEFAULT

SETTINGS = EngineSettings("fake", max_running=4, max_step_tokens=64)


class Parent:
    """The other end."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        sock.settimeout(10)

    def send(self, *messages: ToEngine) -> None:
        self.sock.sendall(b"".join(map(frame, messages)))

    def receive(self) -> FromEngine:
        """The next message that is not the announcement of a long step."""
        while isinstance(message := self.receive_any(), Busy):
            pass
        return message

    def receive_any(self) -> FromEngine:
        (size,) = HEADER.unpack(self._exactly(HEADER.size))
        return read_from_engine(self._exactly(size))

    def until_end(self, count: int) -> dict[str, str | None]:
        """How each of `count` requests ended."""
        ends: dict[str, str | None] = {}
        while len(ends) < count:
            message = self.receive()
            assert isinstance(message, Reports)
            events = [event for report in message.reports for event in report.events]
            ends |= {event.request_id: event.finish for event in events if event.finish}
        return ends

    def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            more = self.sock.recv(size - len(data))
            if not more:
                raise EOFError
            data += more
        return data


class Serving:
    """`serve` in a thread, which may hold reports for long: its engine, the parent's end, and how it ended."""

    def __init__(self, grammars: GrammarCompiler | None = None) -> None:
        ours, theirs = socket.socketpair()
        self.parent, self.child = Parent(ours), theirs
        made = build_fake(SETTINGS)[0]
        self.engine: Engine = Engine(made.runner, made.scheduler, grammars)
        self.error: Exception | None = None
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            with self.child:
                serve(Connection(self.child), self.engine, interval=60.0)
        except Exception as error:
            self.error = error

    def join(self) -> Exception | None:
        self.thread.join(10)
        assert not self.thread.is_alive()
        return self.error


def test_requests_in_events_out_and_stop_waits_for_the_running() -> None:
    serving = Serving()
    serving.parent.send(Submit((request("a", max_tokens=50), request("b"))), Stop())
    assert serving.parent.until_end(2) == {"a": "length", "b": "length"}
    assert serving.join() is None


def test_refusal_names_the_field() -> None:
    serving = Serving()
    serving.parent.send(Submit((request("a", max_tokens=10_000),)))
    message = serving.parent.receive()
    assert isinstance(message, Rejected)
    assert (message.request_id, message.param, message.code) == ("a", "max_tokens", "context_length_exceeded")
    assert "10000" in message.message
    serving.parent.sock.close()
    assert isinstance(serving.join(), EOFError)


def test_abort() -> None:
    serving = Serving()
    serving.parent.send(Submit((request("a", max_tokens=390), request("b", max_tokens=9))), Abort(("a", "nobody")))
    assert serving.parent.until_end(2) == {"a": "abort", "b": "length"}
    assert serving.engine.scheduler.blocks.used == 0


@pytest.mark.parametrize("grammar", ["", "0.2"])
def test_counts_are_set_while_a_request_waits_for_a_grammar_or_not(grammar: str) -> None:
    serving = Serving(SlowGrammars())
    serving.parent.send(Submit((request("a", grammar=grammar),)), SetCounts("a", (1, 4)), SetCounts("unknown", (1, 1)))
    found: list[TokenEvent] = []
    while not found or found[-1].finish is None:
        message = serving.parent.receive()
        assert isinstance(message, Reports)
        found += [event for report in message.reports for event in report.events]
    stats = found[-1].stats
    assert stats is not None and stats.routed_pairs == stats.computed_tokens * 5


class SlowGrammars(GrammarCompiler):
    """A grammar is the number of seconds that it takes, or "bad"."""

    def __init__(self) -> None:
        super().__init__("", 1000, (0,))

    def compile(self, grammar: str) -> Matcher:
        if grammar == "bad":
            raise refusal("it is bad")
        time.sleep(float(grammar))
        return None  # type: ignore[return-value]  # the fake's runner asks no matcher


def test_a_grammar_is_compiled_while_others_go_on() -> None:
    serving = Serving(SlowGrammars())
    serving.parent.send(Submit((request("slow", grammar="1.5"), request("quick", max_tokens=300))), Stop())
    ends = serving.parent.until_end(2)
    assert list(ends.items()) == [("quick", "length"), ("slow", "length")], "and a stop waits for it"
    assert serving.join() is None


def test_a_bad_grammar_is_refused() -> None:
    serving = Serving(SlowGrammars())
    serving.parent.send(Submit((request("a", grammar="bad"), request("b"))))
    message = serving.parent.receive()
    while not isinstance(message, Rejected):
        message = serving.parent.receive()
    assert (message.request_id, message.code) == ("a", "invalid_grammar") and "it is bad" in message.message


def test_abort_while_a_grammar_is_compiled() -> None:
    serving = Serving(SlowGrammars())
    serving.parent.send(Submit((request("a", grammar="0.2"),)), Abort(("a",)), Submit((request("a", max_tokens=2),)))
    message = serving.parent.receive()
    assert isinstance(message, Rejected) and message.code == "aborted"
    assert serving.parent.until_end(1) == {"a": "length"}
    time.sleep(0.3)
    serving.parent.send(Stop())
    assert serving.join() is None, "what was compiled for nobody is forgotten"


def test_a_grammar_is_compiled_before_its_request_comes() -> None:
    grammars = GrammarCompiler(str(BUNDLED / DEFAULT), 4096, (0,))
    serving = Serving(grammars)
    serving.parent.send(Compile("g", "start: /a/"), Compile("bad", "start: ("), Compile("left", "start: /b/"))
    serving.parent.send(Abort(("left",)))
    found = [serving.parent.receive() for _ in range(3)]
    refused = {message.request_id: message.code for message in found if isinstance(message, Rejected)}
    assert Compiled("g") in found and refused == {"bad": "invalid_grammar", "left": "aborted"}
    serving.parent.send(Submit((request("a", max_tokens=1, grammar="start: /a/"),)), Stop())
    assert serving.parent.until_end(1) == {"a": "length"} and serving.join() is None
    grammars.processes.quick.stop()


def test_a_grammar_needs_a_tokenizer() -> None:
    serving = Serving()
    serving.parent.send(Submit((request("a", grammar="start: /a/"),)))
    message = serving.parent.receive()
    assert isinstance(message, Rejected) and message.param == "grammar" and "no tokenizer" in message.message


def test_frames_may_arrive_in_pieces() -> None:
    serving = Serving()
    for byte in frame(Submit((request("a", max_tokens=1),))):
        serving.parent.sock.sendall(bytes((byte,)))
        time.sleep(0.0001)
    assert serving.parent.until_end(1) == {"a": "length"}


@pytest.mark.parametrize("garbage", [HEADER.pack(2**31), HEADER.pack(1) + b"\xc1", frame(Start(SETTINGS))])
def test_nonsense_ends_the_process(garbage: bytes) -> None:
    serving = Serving()
    serving.parent.sock.sendall(garbage)
    assert isinstance(serving.join(), FrameError)


def test_a_report_larger_than_a_frame_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "MAX_FRAME", 2500)
    monkeypatch.setattr(packing, "SOFT_LIMIT", 1000)
    serving = Serving()
    requests = [request("scored", (1,) * 300, prompt_logprobs=0), request("other", (2,) * 300, prompt_logprobs=0)]
    for each in requests:  # one message would be too large
        serving.parent.send(Submit((each,)))
    serving.parent.send(Stop())
    scores, ends = {"scored": 0, "other": 0}, 0
    while ends < 2:
        message = serving.parent.receive()
        if isinstance(message, PromptLogprobsPart):
            scores[message.request_id] += len(message.logprobs)
        parts = message.reports if isinstance(message, Reports) else [message] if isinstance(message, Events) else []
        for event in [event for part in parts for event in part.events]:
            scores[event.request_id] += len(event.prompt_logprobs or ())
            ends += event.finish == "length"
    assert scores == {"scored": 299, "other": 299}
    assert serving.join() is None


def test_lost_device_ends_the_process() -> None:
    serving = Serving()
    serving.parent.send(Submit((request("a", (LOST,)),)))
    assert isinstance(serving.join(), EngineDown)


def test_what_was_made_before_the_device_was_lost_is_told() -> None:
    serving = Serving()
    step, left = serving.engine.step, iter(range(5))

    def lost() -> StepReport:
        if next(left, None) is None:
            raise EngineDown("the device is gone")
        return step()

    serving.engine.step = lost  # type: ignore[method-assign]
    serving.parent.send(Submit((request("a", max_tokens=50),)))
    assert isinstance(serving.join(), EngineDown)
    reports: list[StepReport] = []
    with suppress(EOFError):
        while isinstance(message := serving.parent.receive(), Reports):
            reports += message.reports
    assert [len(report.events) for report in reports] == [1] * 5 and reports[1].buffered_s > 0


def test_a_ping_is_answered_between_steps_and_while_idle() -> None:
    serving = Serving()
    serving.parent.send(Ping())
    assert serving.parent.receive() == Pong()
    serving.parent.send(Submit((request("a", max_tokens=300),)), Ping())
    while not isinstance(message := serving.parent.receive(), Pong):
        assert isinstance(message, Reports)
    assert serving.parent.until_end(1) == {"a": "length"}


def test_a_long_step_is_announced_after_what_was_made_before() -> None:
    serving = Serving()
    serving.parent.send(Submit((request("a", max_tokens=4),)))
    assert serving.parent.receive_any() == Busy(FIRST_STEP_SECONDS), "nothing is known of the first step"
    assert isinstance(serving.parent.receive_any(), Reports)
    run = serving.engine.runner.run
    serving.engine.runner.run = lambda plan: time.sleep(0.3) or run(plan)  # type: ignore[method-assign, func-returns-value]
    assert serving.parent.until_end(1)
    serving.parent.send(Submit((request("b", max_tokens=3),)))
    kinds = [type(message := serving.parent.receive_any())]
    while not (isinstance(message, Reports) and any(event.finish for event in message.reports[-1].events)):
        kinds.append(type(message := serving.parent.receive_any()))
    assert kinds == [Busy, Reports] * 3
    assert isinstance(message, Reports)


def test_idle_engine_sleeps() -> None:
    serving = Serving()
    before = time.thread_time(), time.process_time()
    time.sleep(0.2)
    assert time.process_time() - before[1] < 0.1
    serving.parent.send(Stop())
    assert serving.join() is None


def test_idle_engine_sleeps_though_a_mask_came_for_an_answer_that_was_aborted() -> None:
    grammars = GrammarCompiler(str(BUNDLED / DEFAULT), 4096, (0,))
    grammars.compile("start: /a/").masks()
    quick = grammars.processes.quick
    assert quick._process is not None
    serving = Serving(grammars)
    os.kill(quick._process.pid, signal.SIGSTOP)
    serving.parent.send(Submit((request("a", grammar="start: /a/"),)))
    while not quick.busy:
        time.sleep(0.01)
    serving.parent.send(Abort(("a",)))
    assert serving.parent.until_end(1) == {"a": "abort"}
    os.kill(quick._process.pid, signal.SIGCONT)
    time.sleep(0.2)
    assert not quick.busy
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.1
    serving.parent.send(Stop())
    assert serving.join() is None
    assert quick._process is None, "a mask process outlives its engine"


def test_a_process_that_computes_masks_ends_without_a_word_when_the_engine_does() -> None:
    ours, theirs = socket.socketpair()
    path = str(BUNDLED / DEFAULT)
    command = [sys.executable, "-m", "engine.grammars.mask_process", str(theirs.fileno()), "0", path, "4096", "0"]
    with theirs, subprocess.Popen(command, pass_fds=(theirs.fileno(),), stderr=subprocess.PIPE, text=True) as process:
        theirs.close()
        ours.recv(1)  # the rest of its greeting stays unread, so that the connection is reset
        ours.close()
        assert process.stderr is not None
        assert process.stderr.read() == "" and process.wait(10) == 0


@contextmanager
def child(module: str = "tests.engine.fake") -> Iterator[tuple[subprocess.Popen[bytes], Parent]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        number = theirs.fileno()
        process = subprocess.Popen([sys.executable, "-m", module, str(number)], pass_fds=(number,))
        theirs.close()
        try:
            yield process, Parent(ours)
        finally:
            process.kill()
            process.wait()


def test_real_process_ignores_signals_serves_and_ends_with_its_parent() -> None:
    with child() as (process, parent):
        parent.send(Start(SETTINGS))
        assert isinstance(parent.receive(), Ready)
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGTERM)
        parent.send(Submit((request("a"),)))
        assert parent.until_end(1) == {"a": "length"}
        parent.sock.close()
        assert process.wait(10) == 0


def test_failed_load_is_told() -> None:
    with child() as (process, parent):
        parent.send(Start(EngineSettings("broken")))
        assert parent.receive() == Failed("model.safetensors: truncated")
        assert process.wait(10) == 0


def test_what_the_process_is_before_it_loads_a_model_needs_no_torch() -> None:
    """Importing torch takes seconds, in which the death of the parent would go unnoticed."""
    code = "import sys, engine.process.worker; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_killed_parent_takes_the_child_along() -> None:
    """Even one that is busy and does not look at its socket."""
    code = (
        "import socket, subprocess, sys, time\n"
        "from engine.process.messages import Start, frame\n"
        "from engine.types import EngineSettings\n"
        "ours, theirs = socket.socketpair()\n"
        "ours.sendall(frame(Start(EngineSettings('hanging'))))\n"
        "n = str(theirs.fileno())\n"
        "p = subprocess.Popen([sys.executable, '-m', 'tests.engine.fake', n], pass_fds=(theirs.fileno(),))\n"
        "time.sleep(0.7)\n"
        "print(p.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert parent.stdout
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 5
    while alive(pid):
        assert time.monotonic() < deadline, "the child outlived its parent"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as stat:
        return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
