"""Snapshots of recurrent states: a prefix that is found gives the answers of one that is computed.

First alone, in any order of calls; then in real engines of tiny models whose layers keep states.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine.assembly import assemble
from engine.blocks import BlockManager
from engine.scheduler import Scheduler
from engine.sequence import Sequence
from engine.sizes import cache_sizes
from engine.snapshots import Snapshots
from engine.types import Request, Sampling
from model.backends.cpu.kernels.library import load
from model.budget import ExpertBudget
from model.contrast import Contrast
from model.errors import CheckpointError
from model.shapes.attention import Attention, GatedDeltaNet
from model.shapes.memory import bytes_per_block, bytes_per_sequence
from model.shapes.rope import Rope
from tests.engine.fake import request
from tests.engine.random_workload import Bench, Served, alone, assert_as_alone, bench, storm
from tests.engine.test_overlap_model import OnDevice
from tests.model.tiny import VOCABULARY, decoder, llama_like, topk

SIZE, FIRST_SLOT, COUNT = 2, 10, 3


def served(context: int, head_width: int, width: int, block: int, **options: Any) -> Served:
    """Layers that keep states around one that keeps keys and values. Snapshots may be one block apart."""
    delta = GatedDeltaNet(key_heads=2, value_heads=4, key_width=width, value_width=width, kernel=4)
    layers = (delta, Attention(4, 2, head_width, rope=Rope(head_width)), delta)
    config = llama_like(topk(), topk(normalise=True), topk(), attention=layers, context=context)
    return Served(config, block, snapshots=8, snapshot_tokens=16 * block, **options)


TORCH = served(40, 6, 4, 4, few=10, requests=8)
NATIVE = served(80, 16, 16, 16, few=5, requests=24, native=True)
without = pytest.mark.skipif(not load().native, reason=f"no native kernels: {load().reason}")
each_backend = pytest.mark.parametrize(
    "model", [pytest.param(TORCH, id="torch"), pytest.param(NATIVE, marks=without, id="native")]
)
Content = tuple[object, ...]


class AnyOrder(RuleBasedStateMachine):
    """Admissions, steps, preemptions, failures and evictions in any order. States are what they were computed from."""

    def __init__(self) -> None:
        super().__init__()
        self.states: dict[int, Content] = {}
        self.snapshots = Snapshots(FIRST_SLOT, COUNT, 4, SIZE, self.restore)
        self.blocks = BlockManager(8, SIZE, snapshots=self.snapshots)
        self.held: list[Sequence] = []
        self.count = 0

    def restore(self, source: int, target: int) -> None:
        assert source in self.snapshots.slots and target not in self.snapshots.slots
        self.states[target] = self.states[source]

    @rule(
        length=st.integers(1, 9),
        turn=st.integers(1, 9),
        count=st.integers(1, 2),
        prompt=st.integers(1, 9),
        contrast=st.sampled_from([None, None, Contrast(weak_rank=1)]),
    )
    def admit(self, length: int, turn: int, count: int, prompt: int, contrast: Contrast | None) -> None:
        """Prompts part at `turn`."""
        self.count += 1
        tokens = tuple(position + 20 * (position >= turn) for position in range(length))
        sequence = Sequence(request(str(self.count), tokens[:prompt], budget=(count,), contrast=contrast), 0.0)
        sequence.tokens += tokens[prompt:]
        before = {row.id: row.slot for row in self.held}
        if not self.blocks.admit(sequence):
            return
        assert before == {row.id: row.slot for row in self.held}
        self.held.append(sequence)
        for row in sequence.rows:
            if sequence.computed:
                assert self.states[row.slot] == self.content(row, sequence.computed)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), more=st.integers(1, 4), fails=st.booleans())
    def compute(self, data: st.DataObject, more: int, fails: bool) -> None:
        sequence = data.draw(st.sampled_from(self.held))
        start, end = sequence.computed, min(len(sequence.tokens), sequence.computed + more)
        if start == end or not self.blocks.reserve(sequence, end):
            return
        self.snapshots.plan(sequence, start, end)
        self.blocks.check()
        for row in sequence.rows:
            for at, slot in row.snapshots:
                assert start < at <= end
                self.states[slot] = self.content(row, at)
            self.states[row.slot] = self.content(row, end)
        if fails:
            self.release(sequence, data.draw(st.booleans()))
            return
        sequence.computed = end
        self.blocks.publish(sequence)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), forget=st.booleans())
    def leave(self, data: st.DataObject, forget: bool) -> None:
        self.release(data.draw(st.sampled_from(self.held)), forget)

    def release(self, sequence: Sequence, forget: bool) -> None:
        self.held.remove(sequence)
        self.blocks.release(sequence, forget=forget)

    @rule()
    def clear(self) -> None:
        self.blocks.clear()
        self.held.clear()
        assert not len(self.snapshots)

    @invariant()
    def sound(self) -> None:
        self.blocks.check()
        assert len(self.snapshots) <= COUNT

    @staticmethod
    def content(row: Sequence, end: int) -> Content:
        return tuple(row.tokens[:end]), row.count_runs(0, end), row.request.budget.without_counts


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=50, stateful_step_count=30, deadline=None)


def test_none_is_kept_behind_blocks_that_are_gone() -> None:
    """Two sequences hold equal blocks, of which one has a name; it fails, and the other goes on."""
    snapshots = Snapshots(FIRST_SLOT, COUNT, 4, SIZE, lambda source, target: None)
    blocks = BlockManager(8, SIZE, snapshots=snapshots)
    named, other = (Sequence(request(id, tuple(range(5))), 0.0) for id in ("named", "other"))
    for sequence, end in ((named, 2), (other, 2), (other, 4)):
        assert sequence.blocks or blocks.admit(sequence)
        assert blocks.reserve(sequence, end)
        snapshots.plan(sequence, sequence.computed, end)
        sequence.computed = end
        blocks.publish(sequence)
        if sequence is other:
            blocks.release(named, forget=True)
        blocks.check()
    assert len(snapshots) == 0


def test_none_of_a_failed_sequence_is_kept_behind_blocks_of_another() -> None:
    """The other one has equal blocks, and was first: it gave them their names."""
    snapshots = Snapshots(FIRST_SLOT, COUNT, 4, SIZE, lambda source, target: None)
    blocks = BlockManager(8, SIZE, snapshots=snapshots)
    named, failed = (Sequence(request(id, tuple(range(5))), 0.0) for id in ("named", "failed"))
    for sequence in (named, failed):
        assert blocks.admit(sequence) and blocks.reserve(sequence, 4)
        if sequence is failed:
            snapshots.plan(sequence, 0, 4)
        sequence.computed = 4
        blocks.publish(sequence)
    assert len(snapshots) == 1
    blocks.release(failed, forget=True)
    blocks.check()
    assert len(snapshots) == 0


def place(blocks: BlockManager, id: str, tokens: tuple[int, ...]) -> int:
    """Compute a prompt; returns how much of it was found."""
    sequence = Sequence(request(id, tokens), 0.0)
    assert blocks.admit(sequence) and blocks.reserve(sequence, len(tokens))
    found = sequence.computed
    assert blocks.snapshots is not None
    blocks.snapshots.plan(sequence, found, len(tokens))
    sequence.computed = len(tokens)
    blocks.publish(sequence)
    blocks.release(sequence)
    blocks.check()
    return found


def unlike(number: int) -> tuple[int, ...]:
    return tuple(range(100 * number, 100 * number + 5))


def few(count: int) -> BlockManager:
    return BlockManager(200, SIZE, snapshots=Snapshots(FIRST_SLOT, count, 4, SIZE, lambda source, target: None))


def test_what_many_started_from_outlives_what_was_used_once() -> None:
    """A prompt that two others began with is found after ten that nothing else begins with, each with a snapshot; one
    that a single other one went on from is not."""
    blocks, shared, once = few(4), unlike(0), unlike(1)
    assert place(blocks, "shared", shared) == place(blocks, "once", once) == 0
    assert [place(blocks, f"again {number}", shared) for number in range(2)] == [4, 4]
    assert place(blocks, "on", once) == 4
    for number in range(2, 12):
        assert place(blocks, str(number), unlike(number)) == 0
    assert place(blocks, "still", shared) == 4
    assert place(blocks, "gone", once) == 0


def test_shared_ones_leave_room_for_others() -> None:
    """Of four slots, three are of shared snapshots at most: the least recently used of a fourth is dropped with the
    next prompt. Slots for one hold the last one."""
    blocks = few(4)
    for number in range(4):
        assert [place(blocks, f"{number} {turn}", unlike(number)) for turn in range(3)] == [0, 4, 4]
    assert place(blocks, "new", unlike(9)) == 0
    assert [place(blocks, f"later {number}", unlike(number)) for number in (1, 2, 3, 0)] == [4, 4, 4, 0]
    blocks = few(1)
    assert [place(blocks, f"{number}", unlike(number)) for number in (0, 0, 0, 1, 1)] == [0, 4, 4, 0, 4]


def test_three_quarters_of_the_slots_are_shared_at_most() -> None:
    """Two prompts that are used once stay beside five that are shared, of which the least recently used two go."""
    blocks = few(5)
    for number in range(5):
        assert [place(blocks, f"{number} {turn}", unlike(number)) for turn in range(3)] == [0, 4, 4]
    assert [place(blocks, str(number), unlike(number)) for number in (7, 8, 7, 8)] == [0, 0, 4, 4]
    assert [place(blocks, f"later {number}", unlike(number)) for number in (2, 3, 4, 1)] == [4, 4, 4, 0]


@pytest.mark.parametrize(("others", "found"), [(34, 4), (35, 0)])
def test_a_shared_one_that_is_used_no_more_ages(others: int, found: int) -> None:
    """One of two slots: the first other prompt has the second, and each after it drops the one before. After more than
    32 the shared one goes."""
    blocks = few(2)
    assert [place(blocks, f"shared {turn}", unlike(0)) for turn in range(3)] == [0, 4, 4]
    for number in range(1, 1 + others):
        assert place(blocks, str(number), unlike(number)) == 0
    assert place(blocks, "still", unlike(0)) == found


def test_a_preempted_sequence_makes_nothing_shared() -> None:
    """It starts again and again from its own snapshot, which goes with the next prompts."""
    blocks, again = few(2), Sequence(request("again", unlike(0)), 0.0)
    assert place(blocks, "first", unlike(0)) == 0
    for turn in range(3):
        assert blocks.admit(again) and again.computed == 4
        again.admitted_at = float(turn)
        blocks.release(again)
    assert [place(blocks, str(number), unlike(number)) for number in (1, 2, 0)] == [0, 0, 0]


def test_conversations_are_found_with_few_snapshots() -> None:
    """Each turn begins with the last one of its conversation: what it started from is worth no more than what it
    left."""
    blocks = few(3)
    for turn in range(1, 6):
        for talk in range(2):
            found = place(blocks, f"{talk} {turn}", tuple(range(100 * talk, 100 * talk + 4 * turn + 1)))
            assert found == 4 * (turn - 1)


def test_slots_and_bytes_are_told() -> None:
    snapshots = Snapshots(FIRST_SLOT, 2, 4, SIZE, lambda source, target: None, state_bytes=1000)
    blocks = BlockManager(8, SIZE, snapshots=snapshots)
    place(blocks, "one", unlike(0))
    assert (len(snapshots), snapshots.held_bytes) == (1, 1000)
    place(blocks, "two", unlike(1))
    sequence = Sequence(request("three", unlike(2)), 0.0)
    assert blocks.admit(sequence)
    assert snapshots.plan(sequence, 0, 5) == 1, "one made room"
    assert snapshots.held_bytes == 1000


def test_a_plan_says_how_many_made_room() -> None:
    snapshots = Snapshots(FIRST_SLOT, 2, 4, SIZE, lambda source, target: None, state_bytes=1000)
    blocks = BlockManager(8, SIZE, snapshots=snapshots)
    place(blocks, "one", unlike(0))
    place(blocks, "two", unlike(1))
    scheduler = Scheduler(blocks, max_running=1, max_step_tokens=8, max_model_len=16)
    scheduler.add(request("three", unlike(2)))
    assert len(scheduler.schedule()) == 1 and scheduler.plan_stats.snapshots_displaced == 1


def asked(id: str, prompt: tuple[int, ...], new: int = 4, counts: int = 2, **options: Any) -> Request:
    sampling = Sampling(**{"max_tokens": new, "seed": 1, "temperature": 0.0} | options)
    return Request(id, prompt, ExpertBudget((counts,) * 3), sampling)


def text(length: int, first: int = 3) -> tuple[int, ...]:
    return tuple((first + 7 * position) % VOCABULARY for position in range(length))


def run(made: Bench, *requests: Request) -> None:
    for each in requests:
        made.engine.add(each)
    made.finish()


def check(model: Served, made: Bench, *requests: Request) -> None:
    """Each got what it gets alone, without a prefix cache."""
    for each in requests:
        assert_as_alone(model, made, alone(model, each), each.id)


@pytest.mark.parametrize(
    ("model", "seed"),
    [
        pytest.param(TORCH, 5, marks=pytest.mark.redundant, id="torch"),
        pytest.param(NATIVE, 4, marks=without, id="native"),
    ],
)
def test_a_storm_with_a_prefix_cache_gives_what_running_alone_gives(model: Served, seed: int) -> None:
    """Prompts are cut, memory runs out, sequences are preempted and go on from their snapshots, which are too few."""
    few = replace(model, snapshots=5, snapshot_tokens=1)
    crowd, requests = storm(few, seed, few.requests)
    check(few, crowd, *requests)
    assert sum(stats.preemptions for stats in crowd.stats) > 2 and crowd.chunks > 2
    assert crowd.found > 2 * model.block and sum(stats.mixed for stats in crowd.stats) > 10
    assert crowd.engine.scheduler.blocks.used == 0


@each_backend
def test_where_prompts_start(model: Served) -> None:
    """Behind the last full block of one before it; of one that it parts from, behind what a third one has in common
    with both; with the same counts alone; and what was found is told."""
    block = model.block
    first, made = text(3 * block + 2), bench(model)
    parted = (*first[: 2 * block], *text(block + 1, 5))
    other = (*first[: 2 * block], *text(2, 9))
    one, two = asked("one", first), asked("two", (*first, 1, 2))
    run(made, one)
    run(made, two)
    run(made, cheap := asked("cheap", first, counts=1))
    assert [made.cached[each] for each in ("one", "two", "cheap")] == [0, 3 * block, 0]
    assert made.cached.keys() == {"one", "two", "cheap"}
    run(made, three := asked("three", parted))
    run(made, four := asked("four", other))
    check(model, made, one, two, cheap, three, four)
    assert (made.cached["three"], made.cached["four"]) == (0, 2 * block)
    hits, queries = (sum(getattr(stats, name) for stats in made.stats) for name in ("prefix_hits", "prefix_queries"))
    assert hits == 5 * block and queries == sum(len(each.prompt) for each in (one, two, cheap, three, four))


@each_backend
def test_answers_of_one_prompt_compute_it_once(model: Served) -> None:
    prompt, made = text(2 * model.block + 3), bench(model)
    answers = [asked(str(number), prompt, seed=number, temperature=1.0) for number in range(4)]
    run(made, *answers)
    check(model, made, *answers)
    assert [made.cached[str(number)] for number in range(4)] == [0, *[2 * model.block] * 3]


@each_backend
def test_a_prompt_goes_on_where_an_answer_ended(model: Served) -> None:
    prompt, made, block = text(block := model.block), bench(model), model.block
    run(made, first := asked("first", prompt, new=block + 3))
    after = asked("after", (*prompt, *made.tokens["first"], 1, 2))
    run(made, after)
    check(model, made, first, after)
    assert made.cached["after"] == 2 * block


@without
def test_a_preempted_sequence_goes_on_from_its_last_snapshot() -> None:
    made = bench(replace(NATIVE, snapshot_tokens=1), blocks=8)
    requests = [asked(id, text(20, first), new=50) for id, first in (("old", 1), ("young", 2))]
    run(made, *requests)
    check(NATIVE, made, *requests)
    assert sum(stats.preemptions for stats in made.stats) == 1 and made.found >= 48
    assert [made.cached[each.id] for each in requests] == [0, 0]


@without
def test_contrast_and_scores() -> None:
    """Both rows start behind snapshots of their own. A prompt that is scored starts at its first token, and leaves
    snapshots."""
    made, prompt = bench(NATIVE), text(37)
    contrast = ExpertBudget((3, 2, 2), contrast=Contrast(0.7, 0.05, 2))
    scored = asked("scored", prompt, prompt_logprobs=0)
    pair = [Request(id, prompt, contrast, Sampling(6, seed=1, temperature=0.0)) for id in ("one", "two")]
    run(made, scored)
    run(made, plain := asked("plain", prompt))
    for each in pair:
        run(made, each)
    check(NATIVE, made, scored, plain, *pair)
    assert [made.cached[id] for id in ("scored", "plain", "one", "two")] == [0, 32, 0, 32]


def test_how_many_there_are(caplog: pytest.LogCaptureFixture) -> None:
    """An eighth of the cache, two for each running sequence at most, one at least, or as many as are asked for; none
    where steps overlap or the prefix cache is off."""
    caplog.set_level("INFO")
    states = bytes_per_sequence(TORCH.config.memory)
    for cache, given, changes, overlaps, expected in (
        (16 + 400, 0, {}, False, 24),
        (16 + 40, 0, {}, False, 5),
        (16 + 7, 0, {}, False, 1),
        (16 + 40, 9, {}, False, 9),
        (16 + 40, 9, {}, True, 0),
        (16 + 40, 0, {"prefix_cache": False}, False, 0),
    ):
        settings = TORCH.settings(kv_cache_bytes=cache * states, max_running=12, prefix_snapshots=given, **changes)
        assert cache_sizes(TORCH.config, settings, torch.float32, overlaps=overlaps).snapshots == expected
    long = replace(TORCH.config, context=400)
    needed = 400 // 4 * bytes_per_block(long.memory, 4, 4)
    assert needed > 3 * 8 * states, "an eighth of the cache would be more than three"
    for given, more, room in ((0, 2, 2), (2, 2, 2), (0, 0, None), (3, 2, None)):
        held = (16 + more) * states + needed
        settings = TORCH.settings(kv_cache_bytes=held, max_running=12, prefix_snapshots=given, max_model_len=400)
        if room is not None:
            assert cache_sizes(long, settings, torch.float32).snapshots == room
            continue
        field = "max_model_len or prefix_snapshots or raise" if given else "max_model_len or raise"
        with pytest.raises(CheckpointError, match=f"one sequence of 400 tokens needs {needed}; lower {field}"):
            cache_sizes(long, settings, torch.float32)
    settings = TORCH.settings(kv_cache_bytes=16 * states + (1 << 20), max_running=12)
    for model, said, shares in (
        (TORCH.model(), f"keeps 24 snapshots of states, {states / 1e6:.2f} MB each", True),
        (OnDevice(decoder(TORCH.config)), "no prefix cache: this model keeps states, and steps overlap on cpu", False),
    ):
        engine, _ = assemble(model, settings)
        assert said in caplog.text and engine.scheduler.blocks.prefix_cache == shares


@without
def test_the_spacing_of_snapshots() -> None:
    """None close to the start, every so many tokens of a long prompt, and as many in all as there is room for."""
    wide = replace(NATIVE, snapshot_tokens=32 * 16, snapshots=3)
    made = bench(wide)
    snapshots = made.engine.scheduler.blocks.snapshots
    assert snapshots is not None
    run(made, asked("short", text(32)))
    assert len(snapshots) == 0  # they are 32 tokens apart at least
    run(made, asked("long", text(41)))
    assert len(snapshots) == 1
    dense = bench(replace(NATIVE, snapshots=3))
    for first in range(5):
        run(dense, asked(str(first), text(70, first)))
    assert dense.engine.scheduler.blocks.snapshots is not None
    assert len(dense.engine.scheduler.blocks.snapshots) == 3
    assert all(len(layer) == 19 for layer in dense.engine.runner.cache.layers if layer.ndim == 2)  # type: ignore[attr-defined]
