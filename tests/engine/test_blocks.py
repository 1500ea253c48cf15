"""Block accounting and prefix sharing: nothing leaks, nothing is freed twice, only equal prefixes are shared."""

from itertools import takewhile
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine.blocks import BlockManager
from engine.sequence import Sequence
from tests.engine.fake import request

SIZE = 4


def computed(blocks: BlockManager, id: str, prompt: tuple[int, ...], **options: Any) -> Sequence:
    """A sequence whose whole prompt has been computed and committed."""
    sequence = Sequence(request(id, prompt, **options), 0.0)
    assert blocks.admit(sequence)
    assert blocks.reserve(sequence, len(prompt))
    sequence.computed = len(prompt)
    blocks.publish(sequence)
    return sequence


def answered(id: str, tokens: tuple[int, ...], prompt: int, **options: Any) -> Sequence:
    """A sequence after a preemption: its first `prompt` tokens are its prompt, the others were generated."""
    sequence = Sequence(request(id, tokens[:prompt], **options), 0.0)
    sequence.tokens += tokens[prompt:]
    return sequence


def by_position(sequence: Sequence) -> list[tuple[int, ...]]:
    """The rule of a budget said once more: the counts of every token, one after the other."""
    budget, prompt = sequence.request.budget, len(sequence.request.prompt)
    return [budget.prefill or budget.per_layer] * prompt + [budget.per_layer] * (len(sequence.tokens) - prompt)


def cached(blocks: BlockManager, prompt: tuple[int, ...], **options: Any) -> int:
    """How many tokens of this prompt are found."""
    sequence = Sequence(request("probe", prompt, **options), 0.0)
    assert blocks.admit(sequence)
    found = sequence.computed
    blocks.release(sequence)
    return found


PROMPT = tuple(range(10))


def test_same_prompt_and_budget_share_full_blocks() -> None:
    blocks = BlockManager(8, SIZE)
    first = computed(blocks, "a", PROMPT)
    second = computed(blocks, "b", PROMPT)
    assert second.blocks[:2] == first.blocks[:2]
    assert second.blocks[2] != first.blocks[2]
    assert blocks.used == 4
    blocks.check()


def test_whole_prompt_is_never_found() -> None:
    blocks = BlockManager(8, SIZE)
    computed(blocks, "a", PROMPT[:8])
    assert cached(blocks, PROMPT[:8]) == 4
    assert cached(blocks, PROMPT[:9]) == 8


def test_budgets_never_share() -> None:
    blocks = BlockManager(8, SIZE)
    computed(blocks, "a", PROMPT, budget=(2, 2))
    assert cached(blocks, PROMPT, budget=(2, 3)) == 0
    assert cached(blocks, PROMPT, budget=(2, 2, 2)) == 0
    assert cached(blocks, PROMPT, budget=(2, 2)) == 8


COUNTS = st.tuples(st.integers(1, 2))
TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=14).map(tuple)


def sequences(id: str) -> st.SearchStrategy[Sequence]:
    """Sequences of few different tokens, so that many begin alike, with prompts of any length."""
    return st.builds(answered, st.just(id), TOKENS, st.integers(1, 14), budget=COUNTS, prefill=st.just(()) | COUNTS)


@given(sequences("one"), sequences("two"))
def test_blocks_are_shared_where_tokens_and_counts_are_equal_position_by_position(one: Sequence, two: Sequence) -> None:
    """Whatever their prompts' lengths: as many as a model says that looks at every position, neither more nor fewer."""
    blocks = BlockManager(16, SIZE)
    assert blocks.admit(one) and blocks.reserve(one, len(one.tokens))
    one.computed = len(one.tokens)
    blocks.publish(one)
    pairs = zip(
        zip(one.tokens, by_position(one), strict=True), zip(two.tokens, by_position(two), strict=True), strict=False
    )
    equal = len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
    assert blocks.admit(two)
    assert two.computed == min(equal // SIZE, (len(two.tokens) - 1) // SIZE) * SIZE
    assert two.blocks == one.blocks[: len(two.blocks)]


def test_equal_tokens_and_budgets_with_other_prompt_lengths_share_up_to_the_shorter_prompt() -> None:
    blocks = BlockManager(16, SIZE)
    counts = {"budget": (2, 2), "prefill": (8, 8)}
    computed(blocks, "long", tuple(range(13)), **counts)
    short = answered("short", tuple(range(13)), 9, **counts)
    assert blocks.admit(short) and short.computed == 8  # the third block has a prompt token and three generated ones
    plain = answered("plain", tuple(range(13)), 9, budget=(8, 8))
    assert blocks.admit(plain) and plain.computed == 12


@pytest.mark.parametrize(("noisy", "found"), [(True, 0), (False, 8)])
def test_seeds_share_only_without_noise(noisy: bool, found: int) -> None:
    blocks = BlockManager(8, SIZE, noisy=noisy)
    computed(blocks, "a", PROMPT, seed=1)
    assert cached(blocks, PROMPT, seed=2) == found
    assert cached(blocks, PROMPT, seed=1) == 8


def test_salts_never_share() -> None:
    blocks = BlockManager(8, SIZE)
    first = computed(blocks, "a", PROMPT, salt="alice")
    assert cached(blocks, PROMPT, salt="bob") == cached(blocks, PROMPT) == 0
    assert cached(blocks, PROMPT, salt="alice") == 8
    reading = Sequence(request("b", PROMPT, salt="bob"), 0.0)
    first.computed = first.published = 0
    assert not blocks.prefix_in_flight(reading, [first]), (
        "another salt's prompt is being read, which is nothing to wait for"
    )


def test_same_tokens_after_another_prefix_are_not_shared() -> None:
    blocks = BlockManager(8, SIZE)
    computed(blocks, "a", (0, 1, 2, 3, 4, 5, 6, 7, 8))
    assert cached(blocks, (9, 1, 2, 3, 4, 5, 6, 7, 8)) == 0


def test_nothing_is_found_before_it_is_computed() -> None:
    blocks = BlockManager(8, SIZE)
    sequence = Sequence(request("a", PROMPT), 0.0)
    assert blocks.admit(sequence)
    assert blocks.reserve(sequence, 10)
    assert cached(blocks, PROMPT) == 0
    sequence.computed = 5
    blocks.publish(sequence)
    assert cached(blocks, PROMPT) == 4


def test_switched_off_cache_shares_nothing() -> None:
    blocks = BlockManager(8, SIZE, prefix_cache=False)
    computed(blocks, "a", PROMPT)
    assert cached(blocks, PROMPT) == 0


def test_freed_blocks_are_found_until_evicted_oldest_first() -> None:
    blocks = BlockManager(4, SIZE)
    blocks.release(computed(blocks, "a", (1, 1, 1, 1, 0)))
    blocks.release(computed(blocks, "b", (2, 2, 2, 2, 0)))
    assert blocks.used == 0
    assert cached(blocks, (1, 1, 1, 1, 0)) == 4  # a use: now b is the oldest
    blocks.release(computed(blocks, "c", (3,) * 12))  # three blocks: two empty ones, and b's
    assert cached(blocks, (1, 1, 1, 1, 0)) == 4
    assert cached(blocks, (2, 2, 2, 2, 0)) == 0
    blocks.check()


def test_end_of_a_prefix_is_evicted_before_its_beginning() -> None:
    blocks = BlockManager(3, SIZE)
    blocks.release(computed(blocks, "a", PROMPT))
    blocks.release(computed(blocks, "b", (7,) * 8))
    assert cached(blocks, PROMPT) == 4


def test_failed_sequence_leaves_nothing_behind() -> None:
    blocks = BlockManager(8, SIZE)
    first = computed(blocks, "a", PROMPT)
    blocks.release(computed(blocks, "b", PROMPT), forget=True)
    assert cached(blocks, PROMPT) == 0
    blocks.check()
    blocks.release(first)
    blocks.check()
    assert blocks.used == 0


def test_admission_counts_idle_hits_once() -> None:
    """Blocks that are found but free are no longer free once they are used."""
    blocks = BlockManager(3, SIZE)
    blocks.release(computed(blocks, "a", PROMPT))
    holder = computed(blocks, "b", (5,))
    sequence = Sequence(request("c", PROMPT), 0.0)
    assert not blocks.admit(sequence)
    blocks.release(holder)
    assert not blocks.admit(sequence, spare=1)
    assert blocks.admit(sequence)
    assert blocks.reserve(sequence, 10)
    blocks.check()


def test_reserve_takes_all_or_nothing() -> None:
    blocks = BlockManager(2, SIZE)
    sequence = Sequence(request("a", PROMPT), 0.0)
    assert not blocks.reserve(sequence, 9)
    assert blocks.used == 0
    assert blocks.reserve(sequence, 8)
    assert blocks.token_capacity(sequence) == 8


def test_check_sees_damage() -> None:
    blocks = BlockManager(4, SIZE)
    sequence = computed(blocks, "a", PROMPT)
    sequence.blocks.append(sequence.blocks[0])
    with pytest.raises(RuntimeError, match="holds a block twice"):
        blocks.check()
    sequence.blocks.pop()
    sequence.blocks.pop()
    sequence.computed = 8
    with pytest.raises(RuntimeError, match="reference counts"):
        blocks.check()


def test_hash_key_differs_between_managers() -> None:
    """A key per process: hashes that one server leaks say nothing about another's."""
    one, two = (computed(BlockManager(8, SIZE), "a", PROMPT).hashes for _ in range(2))
    assert one and one != two


class Blocks(RuleBasedStateMachine):
    """Any order of calls keeps the invariants, and a found prefix is always one that was computed with this budget."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = BlockManager(6, 2, noisy=True)
        self.held: list[Sequence] = []
        self.content: dict[int, tuple[object, ...]] = {}
        self.count = 0

    @rule(
        length=st.integers(1, 8),
        prompt=st.integers(1, 8),
        base=st.integers(0, 1),
        count=st.integers(1, 2),
        prefill=st.integers(0, 2),
        seed=st.integers(0, 1),
    )
    def admit(self, length: int, prompt: int, base: int, count: int, prefill: int, seed: int) -> None:
        self.count += 1
        tokens = tuple(range(base, base + length))
        sequence = answered(
            str(self.count), tokens, prompt, budget=(count,), prefill=(prefill,) * bool(prefill), seed=seed
        )
        if not self.blocks.admit(sequence):
            return
        self.held.append(sequence)
        assert sequence.computed < length
        for index, block in enumerate(sequence.blocks):
            assert self.content[block] == self.expected(sequence, index)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), more=st.integers(1, 4))
    def compute(self, data: st.DataObject, more: int) -> None:
        sequence = data.draw(st.sampled_from(self.held))
        target = min(len(sequence.tokens), sequence.computed + more)
        before = list(sequence.blocks)
        if not self.blocks.reserve(sequence, target):
            assert sequence.blocks == before
            return
        for position in range(sequence.computed, target):
            block = sequence.blocks[position // 2]
            assert sum(block in other.blocks for other in self.held) == 1, "a shared block is written"
            self.content[block] = self.expected(sequence, position // 2)
        sequence.computed = target
        self.blocks.publish(sequence)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), forget=st.booleans())
    def release(self, data: st.DataObject, forget: bool) -> None:
        sequence = data.draw(st.sampled_from(self.held))
        self.held.remove(sequence)
        self.blocks.release(sequence, forget=forget)
        assert not sequence.blocks

    @rule()
    def clear(self) -> None:
        self.blocks.clear()
        self.held.clear()
        assert self.blocks.used == 0

    @invariant()
    def sound(self) -> None:
        self.blocks.check()
        assert self.blocks.used == len({block for sequence in self.held for block in sequence.blocks})

    @staticmethod
    def expected(sequence: Sequence, index: int) -> tuple[object, ...]:
        tokens = sequence.tokens[: (index + 1) * 2]
        return tuple(zip(tokens, by_position(sequence), strict=False)), sequence.request.sampling.seed


TestBlocks = Blocks.TestCase
TestBlocks.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
