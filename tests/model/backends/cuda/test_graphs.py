"""Steps under graphs give what the same steps give as they are, whatever came before them; and when they run so."""

import logging
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

from model.backends.cuda import graphs
from model.backends.cuda.buckets import TOKENS, Buckets
from model.backends.cuda.graphs import GraphSet
from model.backends.cuda.inputs import StepInputs, StepShape
from model.batch import Cache
from model.errors import EngineDown
from tests.model.backends.cuda.fake_recorder import FakeRecorder, NotRecordable
from tests.model.backends.cuda.toy import LENGTH, MOST, TRAINED, Outputs, Step, compute, decoding, empty_cache

BUCKETS = Buckets(LENGTH, TRAINED, MOST)
CPU = torch.device("cpu")
FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


class Bench:
    """A set of graphs beside the same steps without graphs, on a cache of their own."""

    def __init__(self, failure: Exception | None = None, most: int = 64, most_bytes: int = 1 << 30) -> None:
        self.cache, self.plain = empty_cache(), empty_cache()
        self.recorder = FakeRecorder(list(self.cache.layers), failure)
        self.computed = 0
        self.failure: Exception | None = None  # of every step that is computed
        self.graphs: GraphSet[Outputs] = GraphSet(self.compute, BUCKETS, self.recorder, CPU, most, most_bytes)

    def compute(self, inputs: StepInputs) -> Outputs:
        self.computed += 1
        if self.failure is not None:
            raise self.failure
        return compute(inputs)

    def run(self, step: Step) -> Outputs:
        """A step's outputs, compared."""
        inputs, late = step.inputs(self.cache)
        found = self.graphs.run(inputs, late)
        for tensor in (inputs.ids_T, inputs.positions_T, inputs.counts_LT):
            tensor.fill_(5)  # the host goes on
        expected_inputs, late = step.inputs(self.plain)
        if late is not None:
            expected_inputs = replace(expected_inputs, ids_T=late.put(expected_inputs.ids_T))
        expected = compute(expected_inputs)
        assert torch.equal(found.logits_BV[: len(expected.logits_BV)], expected.logits_BV)
        assert torch.equal(torch.stack(found.loads), torch.stack(expected.loads))
        for layer, plain in zip(self.cache.layers, self.plain.layers, strict=True):
            assert torch.equal(layer[:-1], plain[:-1])
        return found

    @property
    def replays(self) -> int:
        return sum(recording.replays for recording in self.recorder.recordings)


def test_padding_changes_no_result_whatever_the_number_of_rows() -> None:
    bench = Bench()
    for tokens in range(1, 258):
        bench.run(decoding(*range(1, tokens + 1), late=tokens // 2, states=True, seed=tokens))
    assert bench.graphs.recorded == sum(high - low > 1 for low, high in pairwise((0, *TOKENS)))
    bench.recorder.finish()


context = st.one_of(st.integers(1, 200), st.integers(900, 1100), st.integers(1, LENGTH))
decodes = st.builds(
    lambda contexts, **values: decoding(*contexts, **values),
    st.lists(context, min_size=1, max_size=20),
    k_max=st.integers(1, MOST),
    rules=st.booleans(),
    late=st.integers(0, 4),
    states=st.booleans(),
    wanted=st.none() | st.integers(0, 20),
    seed=st.integers(0, 99),
)
prompts = st.builds(
    lambda spans, seed: Step(tuple(map(sum, spans)), tuple(rows for rows, _ in spans), seed=seed),
    st.lists(st.tuples(st.integers(1, 90), st.integers(0, 300)), min_size=1, max_size=4),
    st.integers(0, 99),
)


@settings(deadline=None, max_examples=40)
@given(st.lists(decodes | prompts, min_size=1, max_size=6), st.lists(st.integers(0, 5), max_size=20), st.integers(1, 4))
def test_any_steps_in_any_order_give_what_they_give_without_graphs(
    made: list[Step], order: list[int], most: int
) -> None:
    bench = Bench(most=most)
    for number in order:
        bench.run(made[number % len(made)])
    bench.recorder.finish()
    assert bench.graphs.recorded <= most


def test_the_first_step_of_a_bucket_runs_the_second_is_recorded_and_all_others_are_replayed() -> None:
    bench = Bench()
    for seed in range(5):
        bench.run(decoding(5, 70, 900, seed=seed))
        assert (bench.computed, bench.replays) == ((1, 0), (2, 1), (2, 2), (2, 3), (2, 4))[seed]
    bench.run(Step((40, 9), (30, 1)))
    bench.run(Step((40, 9), (30, 1)))
    assert bench.graphs.recorded == 1 and bench.computed == 4, "prompts run as they are"


def test_a_step_does_not_wait_for_the_copy_of_the_step_before() -> None:
    bench = Bench()
    for number in range(6):
        bench.run(decoding(5, 70, seed=number))
        assert bench.recorder.waited_for <= max(0, number - 1)


def test_outputs_hold_until_the_next_replay_of_their_bucket() -> None:
    bench = Bench()
    for _ in range(2):
        first = bench.run(decoding(5, 6)).logits_BV
        for _ in range(2):
            bench.run(decoding(5, 6, 7))
    before = first.clone()
    bench.run(decoding(9, 9, 9, seed=1))
    assert torch.equal(first, before)
    second = bench.run(decoding(9, 9, seed=1)).logits_BV
    assert second.data_ptr() == first.data_ptr() and not torch.equal(first, before)


def test_counts_above_the_trained_one_are_served_by_graphs_of_their_own() -> None:
    bench = Bench()
    for k_max in (1, TRAINED, 2, TRAINED + 1, 2 * TRAINED, MOST, MOST):
        bench.run(decoding(5, 6, k_max=k_max))
    assert bench.graphs.recorded == 3


def test_a_cache_of_its_own_has_graphs_of_its_own() -> None:
    bench = Bench()
    for _ in range(3):
        bench.run(decoding(5, 6))
    bench.cache, bench.plain = empty_cache(), empty_cache()
    bench.recorder.static += bench.cache.layers
    for _ in range(3):
        bench.run(decoding(5, 6))
    assert bench.graphs.recorded == 2


def test_graphs_not_used_for_longest_are_dropped() -> None:
    bench = Bench(most=3)
    for tokens in (1, 2, 4, 1, 1, 8, 8):
        for _ in range(2):
            bench.run(decoding(*(9,) * tokens))
    assert bench.graphs.recorded == 3
    computed = bench.computed
    for tokens in (1, 4, 8):
        bench.run(decoding(*(9,) * tokens))
    assert bench.computed == computed
    bench.run(decoding(9, 9))
    assert bench.computed == computed + 1


def test_outputs_are_bounded_in_bytes() -> None:
    one = Bench()
    for _ in range(2):
        one.run(decoding(*(9,) * 8))
    bytes_of_8 = 8 * 7 * 8 + 2 * 8
    bench = Bench(most_bytes=2 * bytes_of_8)
    for tokens in (8, 7, 16, 16, 8, 8, 4, 4):
        bench.run(decoding(*(9,) * tokens))
    assert bench.graphs.recorded == 2
    alone = Bench(most_bytes=1)
    for _ in range(3):
        alone.run(decoding(9))
    assert alone.replays == 2, "the bucket in use stays"


@pytest.mark.parametrize("failure", [FULL, RuntimeError("operation not permitted when stream is capturing")])
def test_a_bucket_that_cannot_be_recorded_runs_without_a_graph(
    failure: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    bench = Bench(failure)
    with caplog.at_level(logging.WARNING):
        for _ in range(4):
            bench.run(decoding(5, 6))
    assert bench.graphs.recorded == 0 and bench.computed == 5
    (record,) = caplog.records
    assert "2 tokens, 4 experts and contexts up to 1024 run without a graph" in record.getMessage()
    bench.recorder.failure = None
    for _ in range(2):
        bench.run(decoding(5, 6, 7))
    assert bench.graphs.recorded == 1 and bench.recorder.pools == 2, "a pool that nothing uses may be gone"


def test_a_device_lost_while_recording_is_lost() -> None:
    bench = Bench(torch.AcceleratorError("CUDA error: an illegal memory access was encountered"))
    bench.run(decoding(5, 6))
    with pytest.raises(EngineDown):
        bench.run(decoding(5, 6))


def test_out_of_memory_gives_up_all_graphs() -> None:
    bench = Bench()
    for _ in range(3):
        bench.run(decoding(5, 6))
    bench.failure = FULL
    with pytest.raises(torch.OutOfMemoryError):
        bench.run(Step((40, 9), (30, 1)))
    assert bench.graphs.recorded == 0
    bench.failure = None
    for _ in range(3):
        bench.run(decoding(5, 6))
    assert bench.graphs.recorded == 1


def host_value(inputs: StepInputs) -> Outputs:
    return replace(compute(inputs), logits_BV=torch.tensor([[1]]) + inputs.ids_T)


def fresh(tensor: Tensor) -> Callable[[StepInputs], Outputs]:
    return lambda inputs: replace(compute(inputs), logits_BV=tensor + inputs.ids_T)


def read_back(inputs: StepInputs) -> Outputs:
    return replace(compute(inputs), logits_BV=inputs.ids_T * int(inputs.ids_T[0]))


@pytest.mark.parametrize("broken", [host_value, fresh(torch.zeros(1)), read_back])
def test_the_fake_refuses_what_a_gpu_cannot_record(broken: Callable[[StepInputs], Outputs]) -> None:
    cache = empty_cache()
    inputs, _ = decoding(5, 6).inputs(cache)
    recorder = FakeRecorder([*cache.layers, *graphs._tensors(replace(inputs, cache=Cache(1, [])))])
    recorder.record(lambda: compute(inputs), recorder.pool())
    with pytest.raises(NotRecordable):
        recorder.record(lambda: broken(inputs), recorder.pool())


def shape(tokens: int, longest: int, k_max: int, rows: int | None = None) -> StepShape:
    return StepShape(tokens, tokens if rows is None else rows, tokens, tokens, 1, -(-longest // 64), longest, k_max)


shapes = st.builds(shape, st.integers(1, 256), st.integers(1, LENGTH), st.integers(1, MOST))


@given(shapes, shapes)
def test_buckets_hold_their_steps_and_grow_with_them(one: StepShape, other: StepShape) -> None:
    bucket, larger = BUCKETS.of(one), BUCKETS.of(other)
    assert bucket is not None and larger is not None
    numbers = [(getattr(one, name), getattr(other, name)) for name in ("tokens", "longest", "k_max")]
    held = [(getattr(bucket, name), getattr(larger, name)) for name in ("tokens", "longest", "k_max")]
    assert all(has >= needs for (has, _), (needs, _) in zip(held, numbers, strict=True))
    assert all(low <= high for (low, high), (a, b) in zip(held, numbers, strict=True) if a <= b)
    assert BUCKETS.of(bucket) == bucket
    assert bucket.blocks * 64 == bucket.longest and bucket.longest % 1024 == 0 and bucket.longest < LENGTH + 1024


@pytest.mark.parametrize(
    ("step", "bucket"),
    [
        (shape(3, 1, 1), (4, 1024, TRAINED)),
        (shape(9, 1025, TRAINED), (16, 2048, TRAINED)),
        (shape(57, 2100, TRAINED + 1), (64, 4096, 8)),
        (shape(65, 4097, 9), (80, 6144, MOST)),  # no more segments than the positions served have
        (shape(5, 1, MOST + 3), (8, 1024, MOST + 3)),
        (shape(257, 1, 1), None),
        (shape(0, 1, 1), None),
        (replace(shape(3, 1, 1), sequences=2, tiles=2), None),
        (replace(shape(3, 1, 1), tile_rows=2), None),
        (shape(3, 1, 1, rows=4), None),
    ],
)
def test_what_is_rounded_up(step: StepShape, bucket: tuple[int, int, int] | None) -> None:
    found = BUCKETS.of(step)
    assert (found and (found.tokens, found.longest, found.k_max)) == bucket
