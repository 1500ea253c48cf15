"""Masks come from processes beside the engine: what is dear, exhausted, killed or stopped there is its own answer's."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from llguidance import LLTokenizer

from engine.build import build_engine
from engine.cost import StepCost
from engine.engine import Engine
from engine.grammars.compiler import GrammarCompiler
from engine.grammars.mask_messages import LookAhead, Masks, Open
from engine.grammars.mask_process import MaskServer, live_bytes
from engine.grammars.matcher import Matcher
from engine.sampling.constraints import TOO_COMPLEX
from engine.sequence import Sequence
from engine.types import EngineSettings, Request, Sampling, TokenEvent
from model.budget import ExpertBudget
from model.errors import GenerationFailed, InvalidRequest
from server.generation.generation import _failure
from tests.engine.sampling.ops import sample
from weights.folder import BUNDLED

FOLDER: Path = BUNDLED / "topk-stories"
VOCABULARY, END = 4096, 0
DEAR = "start: s\ns: s s | s s s | /[a-z ]/ | /[a-z]+/ | /[a-e ]+/"
STATES = "start: /[a-z ]*[aeiou][a-z ]{%d}/"  # a state for each set of places where a vowel was
EASY = "start: /[a-z ]*/"


@pytest.fixture(scope="module")
def grammars() -> Iterator[GrammarCompiler]:
    found = GrammarCompiler(str(FOLDER), VOCABULARY, (END,))
    yield found
    found.processes.quick.stop()
    found.processes.slow.stop()


def follow(matcher: Matcher, seed: int, most: int) -> int:
    """Take random tokens that are allowed, up to `most` or an error; how many were taken."""
    rng = np.random.default_rng(seed)
    for taken in range(most):
        allowed = np.flatnonzero(matcher.masks()[0])
        if matcher.error or not (allowed > END).any():
            return taken
        matcher.advance((int(rng.choice(allowed[allowed > END])),))
    matcher.wait()
    return most


def request(id: str, tokens: int, grammar: str = "") -> Request:
    sampling = Sampling(tokens, seed=len(id), grammar=grammar, min_tokens=tokens - 1)
    return Request(id, (5, 6, 7), ExpertBudget((4,) * 6), sampling)


@pytest.fixture(scope="module")
def engine() -> Engine:
    made, info = build_engine(EngineSettings(str(FOLDER), max_running=40, step_ms=0, kv_cache_bytes=1 << 28))
    assert info.experts.layers == 6
    return made


def until(engine: Engine, id: str) -> dict[str, TokenEvent]:
    """Steps until a request ends; every request's last event."""
    ends: dict[str, TokenEvent] = {}
    while id not in ends:
        ends |= {event.request_id: event for event in engine.step().events if event.finish}
    return ends


def test_a_plain_request_does_not_wait_for_dear_masks(engine: Engine) -> None:
    engine.add(request("alone", 32))
    alone = until(engine, "alone")["alone"]
    for number in range(8):
        engine.add(request(f"dear {number}", 200, DEAR))
    made, began = 0, time.monotonic()
    while made < 8 * 35 and time.monotonic() - began < 6:  # masks of some milliseconds and more from here on
        made += sum(event.token is not None for event in engine.step().events)
    engine.add(request("plain", 32))
    steps, ended = 0, False
    while not ended:
        report = engine.step()
        steps, ended = steps + 1, any(event.request_id == "plain" and event.finish for event in report.events)
        assert report.stats.seconds < 0.5, "eight masks in a row took seconds"
    assert steps <= 40 and alone.finish == "length"
    for number in range(8):
        engine.abort(f"dear {number}")
    while engine.has_work:
        engine.step()


def test_an_answer_that_spends_too_much_ends_with_an_error_of_its_own(engine: Engine) -> None:
    engine.add(request("too dear", 300, DEAR))
    end = until(engine, "too dear")["too dear"]
    assert (end.finish, end.code) == ("error", TOO_COMPLEX) and "to find out what may follow took" in str(end.error)
    error = _failure(end)
    assert isinstance(error, InvalidRequest) and (error.param, error.code) == ("grammar", TOO_COMPLEX)
    assert isinstance(_failure(TokenEvent("a", None, finish="error", error="broken")), GenerationFailed)


def test_masks_are_counted_and_part_of_what_a_step_is_expected_to_take(engine: Engine) -> None:
    engine.scheduler.cost = StepCost(0.0, 0.001, 0.0, 0.0, ())
    for number in range(3):
        engine.add(request(f"easy {number}", 20, EASY))
    reports = [engine.step() for _ in range(12)]
    engine.scheduler.cost = None
    assert sum(report.stats.masks_s for report in reports) > 0
    decoding = [report.stats for report in reports if report.stats.generated_tokens == 3]
    assert decoding and decoding[-1].estimated_s > 0.003
    for number in range(3):
        engine.abort(f"easy {number}")
    assert engine.step().stats.masks_s >= 0


def test_an_exhausted_automaton_is_its_own_answers_fault(grammars: GrammarCompiler) -> None:
    text = STATES % 40
    neighbour = grammars.compile(text)
    follow(neighbour, 1, 1)
    blamed = grammars.compile(text)
    assert follow(blamed, 2, 400) < 400 and "too many states" in blamed.error, "after one more try of its own"
    assert not neighbour.error and follow(neighbour, 3, 3) == 3, "the neighbour goes on"
    assert follow(later := grammars.compile(text), 4, 3) == 3 and not later.error


def test_masks_are_those_of_an_undisturbed_answer_after_the_automaton_was_replaced(grammars: GrammarCompiler) -> None:
    text = STATES % 41
    twin, fresh = grammars.compile(text), GrammarCompiler(str(FOLDER), VOCABULARY, (END,))
    tokens = [int(np.flatnonzero(twin.masks()[0])[-1])]
    twin.advance(tokens)
    assert follow(grammars.compile(text), 5, 400) < 400
    alone = fresh.compile(text)
    alone.advance(tokens)
    for _ in range(3):
        mask = twin.masks()[0]
        assert np.array_equal(mask, alone.masks()[0]) and not twin.error
        token = int(np.flatnonzero(mask)[-1])
        twin.advance((token,))
        alone.advance((token,))
    fresh.processes.quick.stop()


def test_kept_grammars_are_bounded_by_their_bytes() -> None:
    replies: list[Masks] = []
    tokenizer = LLTokenizer(str(FOLDER / "tokenizer.json"), n_vocab=VOCABULARY, eos_token=[END])
    bound, began = 16 << 20, live_bytes()
    server = MaskServer(tokenizer, VOCABULARY, [END], replies.append, lambda: None, kept_bytes=bound)
    for number in range(1, 13):  # each grows to 5 MB
        exhaust(server, replies, number)
        server.evict()
        assert live_bytes() - began < bound + (8 << 20)
    assert 0 < len(server.kept) < 12


def exhaust(server: MaskServer, replies: list[Masks], number: int) -> None:
    """Open an answer of a grammar of its own, guess a lot, and close it."""
    server.handle(Open(number, STATES % (40 + number), ()))
    while not replies or replies[-1].id != number:
        server.collect()
        time.sleep(0.001)
    row = np.frombuffer(replies[-1].rows, np.int32)
    allowed = np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little"))
    for token in allowed[-40:]:
        server.handle(LookAhead(number, (int(token),) * 6))
    server._states.clear()


def test_a_process_that_dies_between_two_questions_is_replaced(grammars: GrammarCompiler) -> None:
    matcher, other = grammars.compile(EASY), grammars.compile('start: "cat"')
    follow(matcher, 1, 3)
    expected = matcher.masks()[0]
    other.wait()
    assert grammars.processes.quick._process is not None
    os.kill(grammars.processes.quick._process.pid, signal.SIGKILL)
    time.sleep(0.1)
    grammars.processes.collect()
    assert np.array_equal(matcher.masks()[0], expected) and follow(matcher, 2, 3) == 3 and follow(other, 3, 1) == 1


def test_a_process_that_stands_still_is_replaced_and_one_answer_blamed(
    grammars: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.grammars.mask_client.STALL_SECONDS", 0.3)
    first, second = grammars.compile(EASY), grammars.compile(EASY)
    first.wait()
    second.wait()
    process = grammars.processes.quick._process
    assert process is not None
    os.kill(process.pid, signal.SIGSTOP)
    token = int(np.flatnonzero(first.masks()[0])[-1])
    first.advance((token,))
    second.advance((token,))
    grammars.processes.quick._stall_seconds = 0.3
    while not (first.ready and second.ready):
        grammars.processes.wait(0.05)
        grammars.processes.collect()
    assert "stood still" in first.error and not second.error and second.masks().any()


def test_guesses_that_are_not_looked_at_in_time_are_dropped(grammars: GrammarCompiler) -> None:
    matcher = grammars.compile(EASY)
    matcher.wait()
    sampling = Sampling(9, seed=1, temperature=0, grammar=EASY, stop_token_ids=(END,))
    of = Sequence(Request("a", (5,), ExpertBudget(()), sampling), 0.0, matcher)
    best = int(np.flatnonzero(matcher.masks()[0])[-1])
    logits_RV = torch.zeros(3, VOCABULARY)
    logits_RV[:, best] = 9
    (early,) = sample(logits_RV, [of], [(best, best)])
    assert early.token == best and not early.after_drafts and early.error is None
    matcher.look_ahead((best, best))
    matcher.wait()
    (late,) = sample(logits_RV, [of], [(best, best)])
    assert late.token == best and [result.token for result in late.after_drafts] == [best, best]


def test_an_answer_is_the_same_with_and_without_neighbours(engine: Engine) -> None:
    schema = 'start: %json {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}'

    def tokens(*neighbours: Request) -> list[int | None]:
        for other in neighbours:
            engine.add(other)
        engine.add(request("it", 40, schema))
        found: list[int | None] = []
        ended = False
        while not ended:
            own = [event for event in engine.step().events if event.request_id == "it"]
            found += [event.token for event in own]
            ended = any(event.finish for event in own)
        for other in neighbours:
            engine.abort(other.id)
        while engine.has_work:
            engine.step()
        return found

    others = [request("b", 60, EASY), request("c", 60), request("d", 60, DEAR)]
    assert tokens() == tokens(*others)
