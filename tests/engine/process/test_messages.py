"""The wire: every message survives it, and what is not a message is refused."""

from dataclasses import replace

import msgspec
import pytest

from engine.process import messages
from engine.process.messages import (
    HEADER,
    Abort,
    Busy,
    Failed,
    FrameError,
    FromEngine,
    Ping,
    Pong,
    Ready,
    Rejected,
    Reports,
    SetCounts,
    Start,
    Stop,
    Submit,
    ToEngine,
    frame,
    frame_size,
    read_from_engine,
    read_to_engine,
)
from engine.types import EngineSettings, Logprob, RequestStats, Routes, StepReport, StepStats, TokenEvent
from model.budget import ExpertBudget, RoutingRule
from tests.engine.costs import COST
from tests.engine.fake import build_fake, request

SETTINGS = EngineSettings("fake")
FULL = request("é", (1, 2), logit_bias=((5, float("-inf")),), logprobs=2, seed=-(2**63), stop_token_ids=(7,))
BUDGET = ExpertBudget(
    (2, 1),
    (4, 4),
    RoutingRule(7, 0.5, 0.25, repair=True, reuse=3, skip=1, kept=("0110", "1111")),
    changes=((9, (1, 1)),),
)
RULED = replace(FULL, id="ruled", budget=BUDGET, return_routes=True)
ROUTES = Routes(16, (2, 2, 1), "uint8", False, bytes(4))
EVENT = TokenEvent("a", 3, Logprob(-0.5, ((3, -0.5), (4, -1.0))), "stop", None, RequestStats(1.0, 2.0, 3.0, 4, 5, 6, 7))
STATS = StepStats(0.1, 0.2, 1, 2, 3, 4, 5, True, 1.5, 0, 0, 0, 0, 0, 1, 0, 0.5, 3, 4)


def payload(message: ToEngine | FromEngine) -> bytes:
    data = frame(message)
    assert HEADER.unpack_from(data)[0] == len(data) - HEADER.size
    return data[HEADER.size :]


@pytest.mark.parametrize(
    "message",
    [
        Start(SETTINGS),
        Submit((FULL, RULED, request("b"))),
        Abort(("a", "b")),
        SetCounts("a", (1, 2)),
        Stop(),
        Ping(),
    ],
)
def test_messages_to_the_engine_survive(message: ToEngine) -> None:
    assert read_to_engine(payload(message)) == message


@pytest.mark.parametrize(
    "message",
    [
        Ready(build_fake(SETTINGS)[1]),
        Ready(replace(build_fake(SETTINGS)[1], step_cost=COST)),
        Failed("no"),
        Rejected("a", "too long", None, "x"),
        Pong(),
        Busy(2.5),
        Reports((StepReport((EVENT, TokenEvent("b", None, finish="abort")), STATS), StepReport((), STATS, 0.01))),
        Reports((StepReport((TokenEvent("c", 1, finish="length", routes=ROUTES),), STATS),)),
    ],
)
def test_messages_from_the_engine_survive(message: FromEngine) -> None:
    assert read_from_engine(payload(message)) == message


@pytest.mark.parametrize(
    "garbage",
    [b"", b"\xc1", b"\x80", payload(Failed("no")), msgspec.msgpack.encode({"type": "submit", "requests": [{"id": 1}]})],
)
def test_what_is_no_message_is_refused(garbage: bytes) -> None:
    with pytest.raises(FrameError):
        read_to_engine(garbage)


def test_frames_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "MAX_FRAME", 100)
    assert frame_size(100) == 100
    with pytest.raises(FrameError, match="101 bytes"):
        frame_size(101)
    with pytest.raises(FrameError):
        frame(Failed("x" * 100))


def test_integers_beyond_64_bits_are_refused() -> None:
    with pytest.raises(FrameError, match="64 bits"):
        frame(Submit((request("a", seed=2**64),)))
