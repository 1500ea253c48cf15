"""Brownout over HTTP: requests without a count run with fewer experts while others wait, named counts never do."""

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import ValidationError
from structlog.testing import capture_logs

from model.errors import CheckpointError
from server import serve
from server.settings import Settings
from tests.server.calibrations import calibration
from tests.server.fakes import FakeEngine
from tests.server.harness import COMPLETIONS, app_of, eventually, in_background, in_memory, on_loopback, value
from weights.calibration import FILE
from weights.folder import resolve_model

OPTIONS: dict[str, Any] = {"calibration": calibration(), "brownout": True, "brownout_quality": 0.9}


def counts(engine: FakeEngine) -> list[tuple[int, ...]]:
    return [request.budget.per_layer for request in engine.seen]


def test_requests_without_a_count_are_lowered_when_they_start_not_when_they_arrive() -> None:
    """One runs; four arrive while nothing is lowered yet, and wait so long that the level rises."""
    engine = FakeEngine()
    engine.gate = asyncio.Event()
    named = {"prompt": "hi", "num_experts": 4}
    with capture_logs() as logs, on_loopback(engine, max_running=1, **OPTIONS) as (url, service):
        with in_background(2, url + COMPLETIONS, {"prompt": "hi"}) as first:  # one and a spare slot
            eventually(lambda: len(engine.seen) == 2)
            with (
                in_background(3, url + COMPLETIONS, {"prompt": "hi"}) as silent,
                in_background(1, url + COMPLETIONS, named) as asked,
            ):
                eventually(lambda: value(service, "brownout_level") >= 1)
                engine.gate.set()
        assert counts(engine)[:2] == [(4, 4, 4)] * 2, "they started before"
        assert sorted(counts(engine)[2:]) == [(1, 1, 4)] * 3 + [(4, 4, 4)]
        reports = [answer.json()["usage"] for answer in silent]
        assert {usage["experts"]["chosen_by"] for usage in reports} == {"brownout"}
        assert {usage["num_experts"] for usage in reports} == {2}
        assert all("experts" not in answer.json()["usage"] for answer in [*first, *asked])
        assert {answer.headers["x-num-experts"] for answer in silent} == {"2"}
        assert value(service, "experts_lowered_total", reason="brownout") == 3
        assert value(service, "brownout_relative_quality") == pytest.approx(0.9512)
        eventually(lambda: value(service, "brownout_level") == 0, seconds=10)
    told = [line for line in logs if line["event"].startswith(("brownout lowers", "brownout raises"))]
    assert told[0]["event"] == "brownout lowers experts" and told[0]["option"] == "cost2" and told[0]["waiting"]
    assert told[-1]["event"] == "brownout raises experts again" and told[-1]["level"] == 0


@pytest.mark.parametrize(
    "fields",
    [
        {"num_experts": 4},
        {"model": "tiny@k4"},
        {"model": "tiny@best"},
        {"experts": {"count": [4, 4, 4]}},
        {"experts": {"prefill": 4}},
        {"experts": {"normaliser": "raw"}},
        {"experts": {"auto": {"min_quality": 1.0}}},
    ],
)
def test_whoever_names_a_count_or_a_rule_gets_it(fields: dict[str, Any]) -> None:
    engine = FakeEngine()
    with in_memory(engine, **OPTIONS) as client:
        service = client.app.state.service  # type: ignore[attr-defined]
        service.lowering._brownout.level = 1
        assert client.post(COMPLETIONS, json={"prompt": "hi"} | fields).status_code == 200
        assert sum(engine.seen[-1].budget.per_layer) >= 12
        header = client.post(COMPLETIONS, json={"prompt": "hi"}, headers={"x-num-experts": "4"})
        assert header.headers["x-num-experts"] == "4"
        assert client.post(COMPLETIONS, json={"prompt": "hi"}).json()["usage"]["experts"]["chosen_by"] == "brownout"


def test_a_stream_that_begins_before_its_count_is_known_has_no_header_with_one() -> None:
    engine = FakeEngine()
    engine.gate = asyncio.Event()
    body = {"prompt": "hi", "stream": True, "stream_options": {"include_usage": True}}
    with (
        on_loopback(engine, max_running=1, heartbeat=0.05, **OPTIONS) as (url, _),
        in_background(2, url + COMPLETIONS, {"prompt": "hi"}),
    ):
        eventually(lambda: len(engine.seen) == 2)
        with (
            httpx.stream("POST", url + COMPLETIONS, json=body) as silent,
            httpx.stream("POST", url + COMPLETIONS, json=body | {"num_experts": 2}) as named,
        ):
            assert "x-num-experts" not in silent.headers and named.headers["x-num-experts"] == "2"
            engine.gate.set()
            assert '"num_experts":' in "".join(silent.iter_text())


def test_without_brownout_the_header_is_there_however_long_a_request_waits() -> None:
    engine = FakeEngine()
    engine.gate = asyncio.Event()
    body = {"prompt": "hi", "stream": True}
    with (
        on_loopback(engine, calibration=calibration(), max_running=1, heartbeat=0.05) as (url, _),
        in_background(2, url + COMPLETIONS, {"prompt": "hi"}),
    ):
        eventually(lambda: len(engine.seen) == 2)
        with httpx.stream("POST", url + COMPLETIONS, json=body) as silent:
            assert silent.headers["x-num-experts"] == "4" and len(engine.seen) == 2
            engine.gate.set()


def test_nothing_goes_below_the_floor() -> None:
    with in_memory(**OPTIONS | {"brownout_quality": 0.97}) as client:
        service = client.app.state.service  # type: ignore[attr-defined]
        assert [option.name for option in service.loaded.lowering] == ["k4"]
        assert service.loaded.tiers["tiny@fast"].name == "k4", "the operator's floor is that of @fast, too"
    with in_memory(**OPTIONS | {"brownout_quality": 0.5}) as client:
        service = client.app.state.service  # type: ignore[attr-defined]
        assert [option.name for option in service.loaded.lowering] == ["k4", "cost2", "k1"]


def test_it_is_off_unless_it_is_asked_for() -> None:
    with in_memory(calibration=calibration()) as client:
        service = client.app.state.service  # type: ignore[attr-defined]
        assert service.lowering is None and service.loaded.lowering == ()
        assert client.post(COMPLETIONS, json={"prompt": "hi"}).headers["x-num-experts"] == "4"


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({}, "--brownout needs a calibration.*moedial calibrate"),
        ({"calibration": calibration(), "default_num_experts": 3}, "default count, 3.*moedial calibrate"),
    ],
)
def test_without_what_it_needs_the_server_does_not_start(given: dict[str, Any], reason: str) -> None:
    service = app_of(FakeEngine(), brownout=True, **given).state.service
    with pytest.raises(CheckpointError, match=reason):
        asyncio.run(service.boot())


def test_a_missing_calibration_is_told_before_the_model_is_loaded(tmp_path: Path) -> None:
    for file in resolve_model("topk-stories").iterdir():
        if file.name != FILE:
            (tmp_path / file.name).symlink_to(file)
    settings = Settings(model=str(tmp_path), brownout=True)
    with pytest.raises(CheckpointError, match=r"--brownout needs a calibration.*moedial calibrate"):
        serve.load(settings)


@pytest.mark.parametrize("ratio", [0.5, 1.0, 1.19])
def test_a_time_per_token_that_an_unloaded_server_exceeds_is_refused(ratio: float) -> None:
    with pytest.raises(ValidationError, match=r"must be 0 or at least 1\.2, got"):
        Settings(brownout_itl=ratio)
    assert Settings(brownout_itl=0.0).brownout_itl == 0 and Settings(brownout_itl=1.2).brownout_itl == 1.2
