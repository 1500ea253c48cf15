"""The client against a real child process: streams, aborts, deaths, restarts, stops. Nothing may hang."""

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import pytest

from engine.process.client import EngineClient
from engine.types import EngineSettings, StepReport
from model.errors import EngineDown, GenerationFailed, InvalidRequest
from tests.engine.fake import CRASH, LOST, FakeRunner, request
from tests.engine.process.streams import generate

FAKE = (sys.executable, "-m", "tests.engine.fake")
OVERLAPPING = (sys.executable, "-m", "tests.engine.overlapping")
LONG = 350


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(90):
            await test()

    asyncio.run(bounded())


@asynccontextmanager
async def serving(
    model: str = "fake",
    on_report: Callable[[StepReport], None] | None = None,
    hang_seconds: float = 10.0,
    command: tuple[str, ...] = FAKE,
) -> AsyncIterator[EngineClient]:
    settings = EngineSettings(model, max_running=8, max_step_tokens=64)
    client = EngineClient(settings, command=command, on_report=on_report, hang_seconds=hang_seconds)
    await client.start()
    try:
        await client.ready(40)
        yield client
    finally:
        await client.stop(5)
        assert client.pid is None
        assert not client._sinks or client.state == "stopped"


async def text(client: EngineClient, id: str, max_tokens: int = 4, prompt: tuple[int, ...] = (1, 2, 3)) -> list[int]:
    events = [event async for event in generate(client, request(id, prompt, max_tokens))]
    assert [event.finish for event in events[:-1]] == [None] * (len(events) - 1)
    assert events[-1].finish == "length"
    return [event.token for event in events if event.token is not None]


@pytest.mark.parametrize("command", [FAKE, OVERLAPPING])
def test_generate_many_at_once(command: tuple[str, ...]) -> None:
    reports: list[StepReport] = []

    async def test() -> None:
        async with serving(on_report=reports.append, command=command) as client:
            assert (client.state, client.restarts) == ("ready", 0)
            assert client.info
            assert client.info.family == "fake"
            prompts = [(index, 1, 2) for index in range(20)]
            texts = await asyncio.gather(*(text(client, f"r{p[0]}", 9, p) for p in prompts))
            runner = FakeRunner(16)
            assert texts == [runner.reference(request("x", prompt, 9)) for prompt in prompts]
            assert client._sinks == {}

    run(test)
    assert sum(report.stats.generated_tokens for report in reports) == 180


def test_refused_request_raises() -> None:
    async def test() -> None:
        async with serving() as client:
            with pytest.raises(InvalidRequest) as caught:
                await text(client, "a", max_tokens=1000)
            assert (caught.value.param, caught.value.code) == ("max_tokens", "context_length_exceeded")
            with pytest.raises(InvalidRequest, match="64 bits"):
                await anext(generate(client, request("a", seed=2**64)))
            assert len(await text(client, "a")) == 4

    run(test)


def test_a_request_larger_than_a_frame_is_refused_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        async with serving() as client:
            monkeypatch.setattr("engine.process.messages.MAX_FRAME", 800)
            with pytest.raises(InvalidRequest, match="bytes; the limit is 800"):
                await text(client, "a", prompt=(1,) * 800)
            assert len(await text(client, "a")) == 4
            assert client.restarts == 0

    run(test)


def test_closing_the_stream_frees_blocks_within_a_step() -> None:
    reports: list[StepReport] = []

    async def test() -> None:
        async with serving("slow", reports.append) as client:
            async with aclosing(generate(client, request("a", max_tokens=LONG))) as stream:
                assert (await anext(stream)).token is not None
                with pytest.raises(InvalidRequest, match="already running"):
                    await anext(generate(client, request("a")))
            seen = len(reports)
            with pytest.raises(InvalidRequest, match="already running"):
                await anext(generate(client, request("a")))  # until the engine has confirmed the end
            while not any(event.finish for event in reports[-1].events):
                await asyncio.sleep(0.005)
            assert len(reports) - seen <= 2  # the step that was running, and the next
            assert reports[-1].events[-1].finish == "abort"
            assert reports[-1].stats.blocks_used == 0
            assert len(await text(client, "a")) == 4

    run(test)


@pytest.mark.parametrize("command", [FAKE, OVERLAPPING])
def test_cancelled_reader_aborts(command: tuple[str, ...]) -> None:
    reports: list[StepReport] = []

    async def test() -> None:
        async with serving("slow", reports.append, command=command) as client:
            tasks = [asyncio.create_task(text(client, f"r{i}", LONG)) for i in range(30)]
            await asyncio.sleep(0.1)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            while client._sinks:
                await asyncio.sleep(0.005)
            ends = [event.finish for report in reports for event in report.events if event.finish]
            assert ends == ["abort"] * 30
            assert reports[-1].stats.blocks_used == reports[-1].stats.running == reports[-1].stats.waiting == 0

    run(test)


@pytest.mark.parametrize("command", [FAKE, OVERLAPPING])
def test_runner_fault_reaches_its_reader_only(command: tuple[str, ...]) -> None:
    async def test() -> None:
        async with serving(command=command) as client:
            [event] = [event async for event in generate(client, request("a", (CRASH,)))]
            assert event.finish == "error"
            assert "ZeroDivisionError" in (event.error or "")
            assert len(await text(client, "b")) == 4
            assert client.restarts == 0

    run(test)


@pytest.mark.parametrize(("death", "count"), [("kill", 12), ("lost device", 5)])  # of 12, some still wait
def test_death_fails_the_running_and_serves_again(death: str, count: int) -> None:
    async def test() -> None:
        async with serving("slow") as client:
            assert client.pid
            tasks = [asyncio.create_task(text(client, f"r{i}", LONG)) for i in range(count)]
            await asyncio.sleep(0.1)
            if death == "kill":
                os.kill(client.pid, signal.SIGKILL)
            else:
                tasks.append(asyncio.create_task(text(client, "bad", 4, (LOST,))))
            started = time.monotonic()
            for result in await asyncio.gather(*tasks, return_exceptions=True):
                assert isinstance(result, GenerationFailed)
            assert time.monotonic() - started < 1
            assert client.state == "restarting"
            with pytest.raises(EngineDown, match="restarting"):
                await text(client, "x")
            await client.ready(40)
            assert client.restarts == 1
            assert len(await text(client, "r0")) == 4

    run(test)


@pytest.mark.parametrize("busy", [pytest.param(True, marks=pytest.mark.redundant), False])
def test_a_process_that_hangs_is_killed_and_the_next_one_serves(busy: bool) -> None:
    async def test() -> None:
        async with serving("slow", hang_seconds=0.5) as client:
            assert client.pid
            count = 5 if busy else 0
            tasks = [asyncio.create_task(text(client, f"r{i}", LONG)) for i in range(count)]
            await asyncio.sleep(0.3)
            os.kill(client.pid, signal.SIGSTOP)
            started = time.monotonic()
            while client.state == "ready":
                await asyncio.sleep(0.02)
            assert time.monotonic() - started < 10
            for result in await asyncio.gather(*tasks, return_exceptions=True):
                assert isinstance(result, GenerationFailed) and "hung" in str(result)
            await client.ready(40)
            assert client.restarts == 1
            assert len(await text(client, "r0")) == 4

    run(test)


def test_a_process_that_hangs_says_where(capfd: pytest.CaptureFixture[str]) -> None:
    async def test() -> None:
        async with serving("stuck", hang_seconds=0.3) as client:
            await text(client, "a", 2)
            with pytest.raises(GenerationFailed, match="hung"):
                await text(client, "b", LONG)

    run(test)
    assert "tests/engine/fake.py" in capfd.readouterr().err


def test_a_process_that_hangs_while_it_loads_is_replaced() -> None:
    async def test() -> None:
        client = EngineClient(EngineSettings("hanging"), command=FAKE, load_timeout=0.3)
        await client.start()
        with pytest.raises(EngineDown, match="3 times in a row while loading"):
            await client.ready(40)
        assert client.restarts == 2
        await client.stop()

    run(test)


@pytest.mark.redundant  # seven seconds of waiting; test_silence.py has the rule, with a clock of its own
def test_long_steps_silence_without_work_and_a_busy_loop_are_no_hang() -> None:
    async def test() -> None:
        async with serving("long", hang_seconds=1.0) as client:
            pid = client.pid
            await asyncio.sleep(1.5)
            assert client.silence < 1.0, "it was asked for a sign of life"
            assert len(await text(client, "a", 2)) == 2
            time.sleep(1.5)  # as a machine that slept
            assert len(await text(client, "b", 1)) == 1
            assert (client.pid, client.restarts) == (pid, 0)

    run(test)


def test_a_process_that_answered_is_replaced_at_once_and_one_that_did_not_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("engine.process.client.FIRST_DELAY", 60.0)

    async def test() -> None:
        async with serving() as client:
            await text(client, "a")
            assert client.pid
            os.kill(client.pid, signal.SIGKILL)
            while client.state == "ready":
                await asyncio.sleep(0.01)
            await client.ready(40)
            os.kill(client.pid, signal.SIGKILL)
            with pytest.raises(EngineDown):
                while client.state == "ready":
                    await asyncio.sleep(0.01)
                await client.ready(0.5)

    run(test)


def test_a_reader_that_fails_ends_no_other() -> None:
    def broken(_: object) -> None:
        raise RuntimeError("a fault in a reader")

    async def test() -> None:
        async with serving("slow") as client:
            client.submit(request("bad"), broken)
            assert len(await text(client, "good")) == 4
            assert client.restarts == 0

    run(test)


def test_failed_load_is_permanent_and_says_why() -> None:
    async def test() -> None:
        client = EngineClient(EngineSettings("broken"), command=FAKE)
        await client.start()
        with pytest.raises(EngineDown, match="truncated"):
            await client.ready(40)
        assert client.state == "failed"
        with pytest.raises(EngineDown, match="truncated"):
            await text(client, "a")
        await client.stop()
        assert (client.state, client.restarts) == ("stopped", 0)

    run(test)


def test_child_that_cannot_be_started_is_tried_again_with_back_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.process.client.FIRST_DELAY", 0.01)

    async def test() -> None:
        client = EngineClient(EngineSettings("fake"), command=("/nonexistent",))
        await client.start()
        with pytest.raises(EngineDown, match="not ready within"):
            await client.ready(0.5)
        assert client.state == "restarting"
        assert 1 <= client.restarts <= 6  # 10 ms, 20 ms, 40 ms, ...
        await client.stop()

    run(test)


@pytest.mark.parametrize(
    ("death", "how"),
    [("raise SystemExit(3)", "with status 3"), ("import os; os.kill(os.getpid(), 9)", r"by signal 9 \(Killed\)")],
)
def test_a_first_load_that_ends_the_process_three_times_fails(
    death: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.process.client.FIRST_DELAY", 0.01)

    async def test() -> None:
        client = EngineClient(EngineSettings("fake"), command=(sys.executable, "-S", "-c", death))
        await client.start()
        with pytest.raises(EngineDown, match=f"could not be loaded: .* 3 times in a row .* {how}"):
            await client.ready(20)
        assert (client.state, client.restarts) == ("failed", 2)
        await client.stop()

    run(test)


def test_a_folder_of_the_same_name_where_the_command_was_started_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "__init__.py").write_text("raise SystemExit(7)")
    monkeypatch.chdir(tmp_path)

    async def test() -> None:
        async with serving() as client:
            assert len(await text(client, "a")) == 4

    run(test)


def test_what_is_sent_between_a_death_and_its_notice_ends_once() -> None:
    async def test() -> None:
        async with serving("slow") as client:
            ends: list[object] = []
            client.submit(request("before", max_tokens=LONG), ends.append)
            await asyncio.sleep(0.1)
            assert client.pid
            ends.clear()
            os.kill(client.pid, signal.SIGKILL)
            for number in range(5):
                client.submit(request(f"r{number}", max_tokens=LONG), ends.append)
            client.abort("r0")
            while client.state == "ready":
                await asyncio.sleep(0.01)
            assert [type(end) for end in ends] == [GenerationFailed] * 5, "one for each that was not aborted"
            await client.ready(40)
            assert len(await text(client, "r0")) == 4 and client._sinks == {}

    run(test)


def test_stop_does_not_wait_for_the_back_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.process.client.FIRST_DELAY", 10.0)

    async def test() -> None:
        client = EngineClient(EngineSettings("fake"), command=("/nonexistent",))
        await client.start()
        while client.state != "restarting":
            await asyncio.sleep(0.01)
        started = time.monotonic()
        await client.stop()
        assert time.monotonic() - started < 1

    run(test)


def test_requests_before_ready_are_refused_and_a_hanging_load_is_killed() -> None:
    async def test() -> None:
        client = EngineClient(EngineSettings("hanging"), command=FAKE)
        await client.start()
        assert client.state == "loading"
        with pytest.raises(EngineDown, match="loading"):
            await text(client, "a")
        await asyncio.sleep(0.3)
        await client.stop(5)
        assert (client.state, client.pid) == ("stopped", None)

    run(test)


def test_stop_lets_the_running_finish() -> None:
    async def test() -> None:
        async with serving("slow") as client:
            task = asyncio.create_task(text(client, "a", 20))
            await asyncio.sleep(0.05)
            stop = asyncio.create_task(client.stop(10))
            await asyncio.sleep(0)
            with pytest.raises(EngineDown, match="stopped"):
                await text(client, "b")
            assert len(await task) == 20
            await stop

    run(test)


def test_stop_kills_after_its_timeout_and_a_second_stop_at_once() -> None:
    async def test() -> None:
        for timeouts in ((0.2,), (60, 60)):
            async with serving("slow") as client:
                task = asyncio.create_task(text(client, "a", LONG))
                await asyncio.sleep(0.05)
                started = time.monotonic()
                await asyncio.gather(*(client.stop(timeout) for timeout in timeouts))
                assert time.monotonic() - started < 1
                with pytest.raises(GenerationFailed, match="stopped"):
                    await task

    run(test)


def test_broken_report_hook_does_not_stop_answers() -> None:
    def broken(_: StepReport) -> None:
        raise RuntimeError("metrics")

    async def test() -> None:
        async with serving(on_report=broken) as client:
            assert len(await text(client, "a")) == 4

    run(test)


def test_counts_of_a_running_request_are_set_and_checked() -> None:
    async def test() -> None:
        async with serving() as client:
            generated = generate(client, request("a", max_tokens=LONG))
            events = [await anext(generated)]
            client.set_counts("a", (1, 1))
            client.set_counts("unknown", (1, 1))
            with pytest.raises(InvalidRequest, match="2 MoE layers"):
                client.set_counts("a", (1,))
            with pytest.raises(InvalidRequest, match="between 1 and 8"):
                client.set_counts("a", (1, 9))
            events += [event async for event in generated]
            stats = events[-1].stats
            assert stats is not None and stats.computed_tokens * 2 < stats.routed_pairs < stats.computed_tokens * 4

    run(test)
