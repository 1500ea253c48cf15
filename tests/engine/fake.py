"""A model without tensors, for tests of everything around the model. `python -m tests.engine.fake FD` serves it.

Its keys and values are digests written into real block slots and read back through the block table, so a block that is
shared, evicted or overwritten wrongly changes the text.
"""

import logging
import sys
import time
from dataclasses import replace
from hashlib import blake2b
from typing import Any

from engine.blocks import BlockManager
from engine.engine import Engine
from engine.plan import Chunk, MoEWork, Plan, Sampled, StepResult, rows_of
from engine.process.worker import main
from engine.scheduler import Scheduler
from engine.types import EngineInfo, EngineSettings, Logprob, Request, Sampling
from model.budget import ExpertBudget
from model.errors import CheckpointError, EngineDown
from model.expert_range import ExpertRange

log = logging.getLogger("tests.engine.fake")
VOCABULARY = 1000
STEP_SECONDS = {"slow": 0.01, "long": 1.2}  # by the name of the model
CRASH, POISON, LOST = 1001, 1002, 1003  # prompt tokens: the runner raises, reports a bad sample, loses its device


def request(id: str, prompt: tuple[int, ...] = (1, 2, 3), max_tokens: int = 4, **options: Any) -> Request:
    """`budget` and `prefill`: expert counts per layer, of all tokens and of the prompt's own."""
    counts, prefill = options.pop("budget", (2, 2)), options.pop("prefill", ())
    budget = ExpertBudget(counts, prefill, contrast=options.pop("contrast", None))
    seed, salt = options.pop("seed", 0), options.pop("salt", "")
    return Request(id, prompt, budget, Sampling(max_tokens=max_tokens, seed=seed, **options), salt=salt)


def digest(*parts: object) -> bytes:
    return blake2b(repr(parts).encode(), digest_size=8).digest()


def joined(states: list[bytes]) -> bytes:
    """What a token follows from: the states of all rows."""
    return states[0] if len(states) == 1 else digest(*states)


def blocks_of(chunk: Chunk) -> list[list[int]]:
    return [row.blocks for row in chunk.sequence.rows]


def token_of(state: bytes) -> int:
    return int.from_bytes(state, "little") % VOCABULARY


class FakeRunner:
    """`noisy`: the text depends on the seed. `mixing`: a token's state depends on the chunk that it was computed in."""

    def __init__(self, block_size: int, *, noisy: bool = False, mixing: bool = False, step_s: float = 0.0) -> None:
        self._slots: dict[tuple[int, int], bytes] = {}
        self._steps, self.stuck_at = 0, 0
        self._block_size, self._noisy, self._mixing, self._step_s = block_size, noisy, mixing, step_s

    def run(self, plan: Plan) -> StepResult:
        self._steps += 1
        time.sleep(60.0 if self._steps == self.stuck_at else self._step_s)
        return self.result(plan, [self.compute_rows(chunk, chunk.tokens, blocks_of(chunk)) for chunk in plan])

    def result(self, plan: Plan, states: list[list[bytes]]) -> StepResult:
        """What a plan gives, from the states that `compute` returned for its chunks."""
        sampled = [self._sample(*pair) for pair in zip(plan, states, strict=True)]
        scores = tuple(
            tuple(Logprob(-float(position)) for position in chunk.scored_positions)
            for chunk in plan
            if chunk.scored_positions
        )
        pairs = sum(sum(counts) * tokens for chunk in rows_of(plan) for counts, tokens in chunk.count_runs)
        return StepResult(tuple(result for result in sampled if result), MoEWork(pairs, 2 * pairs, 1, 1.0), scores)

    def reference(self, request: Request) -> list[int]:
        """The text of a request that runs alone, without cache or interruption."""
        tokens = list(request.prompt)
        rows = [replace(request, budget=budget) for budget in (request.budget, request.budget.weak) if budget]
        states = [b""] * len(rows)
        for position, token in enumerate(tokens):
            states = [self._state(*row, position, token, request.prompt) for row in zip(rows, states, strict=True)]
        while len(tokens) < len(request.prompt) + request.sampling.max_tokens:
            tokens.append(token_of(joined(states)))
            if tokens[-1] in request.sampling.stop_token_ids:
                break
            last, token = len(tokens) - 1, tokens[-1]
            states = [self._state(*row, last, token, [token]) for row in zip(rows, states, strict=True)]
        return tokens[len(request.prompt) :]

    def compute_rows(self, chunk: Chunk, tokens: list[int], blocks_of_rows: list[list[int]]) -> list[bytes]:
        """The states after the chunk's last token and after each guess, of all rows together."""
        rows = zip(rows_of((chunk,)), blocks_of_rows, strict=True)
        states = [self.compute(row, tokens, blocks) for row, blocks in rows]
        return [joined(list(of_rows)) for of_rows in zip(*states, strict=True)]

    def compute(self, chunk: Chunk, tokens: list[int], blocks: list[int]) -> list[bytes]:
        """The states after the chunk's last token and after each guess."""
        sequence = chunk.sequence
        if CRASH in tokens:
            raise ZeroDivisionError("secret: /internal/path")
        if LOST in tokens:
            raise EngineDown("the device is lost")
        state = self._slots[self._slot(blocks, chunk.start - 1)] if chunk.start else b""
        states = []
        for position, token in enumerate(tokens, chunk.start):
            state = self._state(sequence.request, state, position, token, tokens)
            self._slots[self._slot(blocks, position)] = state
            states.append(state)
        return states[chunk.length - 1 :]

    def _slot(self, blocks: list[int], position: int) -> tuple[int, int]:
        return blocks[position // self._block_size], position % self._block_size

    def _state(self, request: Request, state: bytes, position: int, token: int, chunk: object) -> bytes:
        seed = request.noise if self._noisy else None
        counts = request.budget.at(position, len(request.prompt)), request.budget.rule.skip
        return digest(state, token, counts, seed, tuple(chunk) if self._mixing else None)  # type: ignore[arg-type]

    @staticmethod
    def _sample(chunk: Chunk, states: list[bytes]) -> Sampled | None:
        if not chunk.samples:
            return None
        error = "the logits are not finite" if POISON in chunk.sequence.tokens else None
        tokens = list(map(token_of, states))
        right = next((i for i, guess in enumerate(chunk.drafts) if tokens[i] != guess), len(chunk.drafts))
        return Sampled(tokens[0], error=error, after_drafts=tuple(map(Sampled, tokens[1 : right + 1])))


def build_fake(settings: EngineSettings, runner: FakeRunner | None = None) -> tuple[Engine, EngineInfo]:
    """`settings.model` chooses the behaviour: "fake", "slow" (10 ms a step), "broken", "hanging" (while it loads),
    "talking" (a log line)."""
    if settings.model == "broken":
        raise CheckpointError("model.safetensors: truncated")
    if settings.model == "hanging":
        time.sleep(60)
    if settings.model == "talking":
        log.info("loading the %s", "weights")
    size = settings.block_size or 16
    blocks = BlockManager(32, size, prefix_cache=settings.prefix_cache)
    scheduler = Scheduler(blocks, settings.max_running, settings.max_step_tokens, max_model_len=400)
    runner = runner or FakeRunner(size, step_s=STEP_SECONDS.get(settings.model, 0.0))
    if settings.model == "stuck":
        runner.stuck_at = 9
    info = EngineInfo(
        kernels="torch",
        kernels_reason="off",
        quantize="none",
        family="fake",
        dtype="float32",
        parameters=0,
        vocabulary=VOCABULARY,
        max_model_len=400,
        experts=ExpertRange(layers=2, trained=2, minimum=1, maximum=8),
        experts_total=8,
        shared_experts=0,
        kv_blocks=32,
        block_size=size,
        load_seconds=0.0,
        step_cost=None,
    )
    return Engine(runner, scheduler), info


if __name__ == "__main__":
    sys.exit(main(builder=build_fake))
