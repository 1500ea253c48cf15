"""A byte tokenizer, a chat template and an engine whose behaviour tests set. No model, no process."""

import asyncio
import codecs
import os
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from typing import Any

from msgspec import structs

from engine.types import (
    EngineInfo,
    Finish,
    Logprob,
    Request,
    RequestStats,
    Routes,
    StepReport,
    StepStats,
    TimedEvent,
    TokenEvent,
)
from model.budget import ExpertCounts
from model.errors import EngineDown, EngineStopped, InvalidRequest, MoedialError
from model.expert_range import ExpertRange
from server.protocols import EngineState
from weights.tokenizer import TooManyTokens

EOS = 256
REFUSED = "/refused/"  # a grammar with this regex
STATS = RequestStats(
    queue_s=0.001,
    prefill_s=0.002,
    decode_s=0.003,
    cached_tokens=0,
    preemptions=0,
    computed_tokens=5,
    routed_pairs=60,
    trained_pairs=60,
)
ROUTES = Routes(first=2, shape=(2, 3, 4), dtype="uint8", bits=False, data=bytes(range(24)))
INFO = EngineInfo(
    kernels="torch",
    kernels_reason="off",
    quantize="none",
    family="infinity_moe",
    dtype="float32",
    parameters=1000,
    vocabulary=257,
    max_model_len=256,
    experts=ExpertRange(layers=3, trained=4, minimum=1, maximum=8),
    experts_total=16,
    shared_experts=0,
    kv_blocks=100,
    block_size=16,
    load_seconds=0.1,
    step_cost=None,
)


class FakeDecoder:
    def __init__(self, shows_end: bool = False) -> None:
        self.decoder, self.end = codecs.getincrementaldecoder("utf-8")("replace"), b"<end>" if shows_end else b""

    def push(self, id: int) -> str:
        return self.decoder.decode(bytes([id]) if id < 256 else self.end)

    def flush(self) -> str:
        return self.decoder.decode(b"", final=True)


class FakeTokenizer:
    """One token is one byte, so that characters and stop strings are always split."""

    eos_ids = (EOS,)
    specials: Mapping[str, int] = {"<end>": EOS}
    named: Mapping[str, str] = {"eos_token": "<end>"}

    def least_tokens(self, text: str) -> int:
        return 0

    def encode(self, text: str, framed: bool = True, most: int | None = None) -> list[int]:
        if most is not None and len(text.encode()) > most:
            raise TooManyTokens(len(text.encode()), most)
        return list(text.encode())

    def encode_chat(self, text: str, framed: bool = False, most: int | None = None) -> list[int]:
        return self.encode(text, framed, most)

    def decode(self, ids: Sequence[int], specials: bool = False) -> str:
        parts = (bytes([id]) if id < 256 else b"<end>" * specials for id in ids)
        return b"".join(parts).decode(errors="replace")

    def token_bytes(self, id: int) -> bytes:
        return bytes([id]) if id < 256 else b""

    def stream(self, shown: Sequence[str] = (), continues: bool = False) -> FakeDecoder:
        return FakeDecoder("<end>" in shown)


class FakeChat:
    knows_tools = True
    knows_thinking = True
    source = "a fake"

    def render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
        continue_final_message: bool = False,
    ) -> str:
        if len(messages) > 20:
            raise InvalidRequest("the chat template takes at most 20 messages", "messages")
        head = "".join(f"<{name}={value}>" for name, value in (variables or {}).items())
        head += f"<tools {' '.join(tool['function']['name'] for tool in tools)}>" if tools else ""
        text = "".join(f"<{m['role']}>{m['content']}" for m in messages)
        return head + text + ("<assistant>" if add_generation_prompt else "")


Script = Callable[[Request], Sequence[int]]


def says(text: str) -> Script:
    """An engine that says `text` and then its end-of-text token."""
    return lambda _: [*text.encode(), EOS]


class FakeEngine:
    """Answers each request by `script`; waits for `gate` before each token; fails where a test sets it to."""

    def __init__(self, script: Script | None = None) -> None:
        self.script = script or says("hello world")
        self.info: EngineInfo | None = INFO
        self.state: EngineState = "loading"
        self.restarts, self.silence = 0, 0.5
        self.pid: int | None = os.getpid()
        self.on_report: Callable[[StepReport], None] | None = None
        self.gate: asyncio.Event | None = None  # None: open
        self.likely: Callable[[Request], float] = lambda _: -0.5  # log-probability of every token of a request
        self.unsure: Callable[[Request], float] = lambda _: 2.0  # what is measured at every token of a request
        self.stats = STATS  # of a request that ends
        self.free = 0  # tokens of each request that need no gate
        self.first_stats = False  # whether the first event has stats, as a real engine's does
        self.together = 1  # events that arrive at one time
        self.fail_at: dict[str, tuple[int, Exception | str]] = {}  # by id suffix: after so many tokens
        self.load_error: Exception | None = None
        self.seen: list[Request] = []
        self.sinks: dict[str, Callable[[Sequence[TimedEvent] | MoedialError], None]] = {}
        self.running: dict[str, asyncio.Future[None]] = {}
        self.compiling = asyncio.Event()  # set: grammars are compiled at once
        self.compiling.set()
        self.compiled: list[str] = []
        self.aborted: list[str] = []
        self.changed: list[tuple[str, ExpertCounts]] = []

    async def start(self) -> None:
        pass

    async def ready(self, timeout: float) -> EngineInfo:
        if self.load_error is not None:
            self.state = "failed"
            raise self.load_error
        self.state = "ready"
        assert self.info is not None
        return self.info

    async def stop(self, timeout: float) -> None:
        self.state = "stopped"
        for id, task in list(self.running.items()):
            del self.running[id]
            task.cancel()
            self.sinks[id](EngineStopped("the server was stopped while the request was running"))

    def submit(self, request: Request, sink: Callable[[Sequence[TimedEvent] | MoedialError], None]) -> None:
        if self.state != "ready":
            raise EngineDown(f"the engine is {self.state}")
        self.seen.append(request)
        self.sinks[request.id] = sink
        self.running[request.id] = asyncio.ensure_future(self._run(request, sink))

    def compile(self, id: str, grammar: str, sink: Callable[[Sequence[TimedEvent] | MoedialError], None]) -> None:
        async def compiled() -> None:
            await self.compiling.wait()
            self.running.pop(id, None)
            if REFUSED in grammar:
                sink(InvalidRequest("the grammar or schema cannot be used: a reason", "grammar", "invalid_grammar"))
            else:
                sink(())

        self.compiled.append(grammar)
        self.running[id] = asyncio.ensure_future(compiled())

    def set_counts(self, request_id: str, counts: ExpertCounts) -> None:
        self.changed.append((request_id, counts))

    def abort(self, request_id: str) -> None:
        if task := self.running.pop(request_id, None):
            task.cancel()
            self.aborted.append(request_id)

    async def _run(self, request: Request, sink: Callable[[Sequence[TimedEvent] | MoedialError], None]) -> None:
        arrivals: list[TimedEvent] = []
        try:
            async for event in self._events(request):
                if event.finish is not None:
                    self.running.pop(request.id, None)
                arrivals.append(TimedEvent(event, time.monotonic()))
                if len(arrivals) == self.together or event.finish is not None:
                    sink(arrivals)
                    arrivals = []
        except Exception as error:
            self.running.pop(request.id, None)
            sink(error)  # type: ignore[arg-type]

    async def _events(self, request: Request) -> AsyncGenerator[TokenEvent, None]:
        sampling, tokens = request.sampling, list(self.script(request))
        if REFUSED in sampling.grammar:
            raise InvalidRequest("the grammar or schema cannot be used: a reason", "grammar", "invalid_grammar")
        if not sampling.max_tokens:
            scores = _prompt_logprobs(request)
            yield TokenEvent(
                request.id, None, finish="length", stats=STATS, prompt_logprobs=scores, routes=_routes(request)
            )
        failure = next((f for suffix, f in self.fail_at.items() if request.id.endswith(suffix)), None)
        for i, token in enumerate(tokens[: sampling.max_tokens]):
            if failure is not None and failure[0] == i:
                if isinstance(failure[1], Exception):
                    raise failure[1]
                yield TokenEvent(request.id, None, finish="error", error=failure[1], stats=STATS)
                return
            await (self.gate.wait() if self.gate and i >= self.free else asyncio.sleep(0))
            finish: Finish | None = "stop" if token in sampling.stop_token_ids else None
            if finish is None and i + 1 == min(sampling.max_tokens, len(tokens)):
                finish = "length"
            self.report(request)
            prompt = _prompt_logprobs(request) if i == 0 else None
            logprob = _logprob(request, self.likely(request))
            stats = self.stats if finish or (self.first_stats and i == 0) else None
            routes = _routes(request) if finish else None
            event = TokenEvent(request.id, token, logprob, finish, stats=stats, prompt_logprobs=prompt, routes=routes)
            yield structs.replace(event, measured=self.unsure(request) if sampling.measured else None)
            if finish:
                return

    def report(self, request: Request) -> None:
        if self.on_report is not None:
            self.on_report(StepReport((), step_stats(sum(request.budget.per_layer))))


def _routes(request: Request) -> Routes | None:
    return ROUTES if request.return_routes else None


def _prompt_logprobs(request: Request) -> tuple[Logprob, ...] | None:
    wanted = request.sampling.prompt_logprobs
    if wanted is None:
        return None
    return tuple(Logprob(-0.25, ((token, -0.25),) * min(wanted, 1)) for token in request.prompt[1:])


def _logprob(request: Request, value: float) -> Logprob | None:
    wanted = request.sampling.logprobs
    if wanted is None:
        return None
    return Logprob(value, tuple((65 + i, -1.0 - i if i else float("-inf")) for i in range(wanted)))


def step_stats(pairs: int) -> StepStats:
    return StepStats(
        seconds=0.001,
        estimated_s=0.002,
        prompt_tokens=0,
        generated_tokens=1,
        routed_pairs=pairs,
        trained_pairs=12,
        distinct_experts=5,
        mixed=False,
        load_imbalance=1.5,
        preemptions=0,
        prefix_queries=10,
        prefix_hits=4,
        drafted=2,
        accepted=1,
        running=1,
        waiting=0,
        oldest_waiting_s=0.5,
        blocks_used=25,
        blocks_total=100,
        snapshots=3,
        snapshot_bytes=3000,
        snapshots_displaced=2,
    )
