"""Steps under graphs: a decoding step is padded to its bucket, recorded when the bucket comes a second time, and from
then on replayed: one launch instead of hundreds.

Every bucket has input memory of its own, which each of its steps overwrites. What a replay returns are the recording's
own tensors: they hold until the bucket's next replay, so whatever reads them must be queued on the device before the
next step is (the sampler, copies to the host). Not here: what the steps compute, and which shapes there are
(`buckets.py`).
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from model.backends.cuda.buckets import Buckets
from model.backends.cuda.inputs import StepInputs, StepShape
from model.backends.cuda.padding import padded
from model.backends.cuda.recorder import Pool, Recorder, Recording
from model.backends.cuda.staging import Staging, StepMemory
from model.batch import LateIds
from model.devices import DeviceErrors
from model.errors import EngineDown

log = logging.getLogger(__name__)

MAX_GRAPHS = 96
MAX_BYTES = 1 << 28  # of outputs: hidden states, and what mixtures chose
GRAPH_BYTES = MAX_BYTES + (MAX_GRAPHS << 22)  # what graphs take, about: 4 MiB each beside their outputs
T = TypeVar("T")
RulesKey = tuple[int, int, int, bool] | None  # what rules say that sizes launches, or makes them others
Key = tuple[StepShape, RulesKey, int]  # with the cache


@dataclass(slots=True)
class _Bucket(Generic[T]):
    """A bucket that has come at least once."""

    memory: StepMemory
    recording: Recording[T] | None = None
    bytes: int = 0  # of the recording's outputs
    is_new: bool = True


class GraphSet(Generic[T]):
    """Runs steps, those of buckets under graphs.

    `compute` queues a step's work and must follow from its inputs alone. A bucket's first step runs as it is, which
    compiles what is missing; a bucket whose recording fails runs so for good. Of buckets beyond `most`, and of
    recordings whose outputs have more than `most_bytes`, those not used for longest are dropped.
    """

    def __init__(
        self,
        compute: Callable[[StepInputs], T],
        buckets: Buckets,
        recorder: Recorder,
        device: torch.device,
        most: int = MAX_GRAPHS,
        most_bytes: int = MAX_BYTES,
    ) -> None:
        self._compute, self._buckets, self._recorder, self._device = compute, buckets, recorder, device
        self._most, self._most_bytes = most, most_bytes
        self._staging = Staging(recorder)
        self._kept: OrderedDict[Key, _Bucket[T]] = OrderedDict()  # the last used last
        self._failed: set[Key] = set()
        self._pool: Pool = None

    @property
    def recorded(self) -> int:
        """How many graphs there are."""
        return sum(bucket.recording is not None for bucket in self._kept.values())

    def run(self, inputs: StepInputs, late: LateIds | None = None) -> T:
        """Queue a step, whose inputs are on the host and may be overwritten once this returns. What belongs to padding
        comes behind the rows and tokens of the step."""
        shape = self._buckets.of(inputs.shape)
        try:
            if shape is None:
                memory = StepMemory(inputs, self._recorder)
                memory.fill(inputs, late, self._staging)
                return self._compute(memory.inputs)
            return self._run_padded(padded(inputs, shape), late)
        except torch.OutOfMemoryError:
            self.clear()  # the next try may need what graphs keep
            raise

    def clear(self) -> None:
        """Drop all graphs and their memory."""
        self._kept.clear()

    def _run_padded(self, step: StepInputs, late: LateIds | None) -> T:
        key = (step.shape, _rules_key(step), id(step.cache))
        bucket = self._kept.get(key)
        if bucket is None:
            bucket = self._kept[key] = _Bucket(StepMemory(step, self._recorder))
        self._kept.move_to_end(key)
        bucket.memory.fill(step, late, self._staging)
        if bucket.recording is None and not bucket.is_new and key not in self._failed:
            self._record(key, bucket)
        bucket.is_new = False
        self._drop_beyond_bounds()
        if bucket.recording is None:
            return self._compute(bucket.memory.inputs)
        bucket.recording.replay()
        return bucket.recording.outputs

    def _record(self, key: Key, bucket: _Bucket[T]) -> None:
        if not self.recorded:
            self._pool = self._recorder.pool()  # one that no recording uses any more may be gone
        try:
            with DeviceErrors(self._device):
                bucket.recording = self._recorder.record(partial(self._compute, bucket.memory.inputs), self._pool)
        except EngineDown:
            raise
        except Exception as error:
            self._failed.add(key)
            log.warning("steps of %s run without a graph: %s: %s", _named(key), type(error).__name__, error)
        else:
            bucket.bytes = _bytes(bucket.recording.outputs)

    def _drop_beyond_bounds(self) -> None:
        """The bucket of this step stays in any case."""
        while len(self._kept) > 1 and (
            len(self._kept) > self._most or sum(bucket.bytes for bucket in self._kept.values()) > self._most_bytes
        ):
            self._kept.popitem(last=False)


def _rules_key(step: StepInputs) -> RulesKey:
    rules = step.rules
    return None if rules is None else (rules.ranks, rules.most_reuse, rules.most_skip, rules.repair_T is not None)


def _named(key: Key) -> str:
    shape, rules_key, _ = key
    rules = " with rules" if rules_key else ""
    return f"{shape.tokens} tokens, {shape.k_max} experts{rules} and contexts up to {shape.longest}"


def _bytes(value: Any) -> int:
    """What the tensors of a value take."""
    storages = [tensor.untyped_storage() for tensor in _tensors(value)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _tensors(value: Any) -> Iterator[Tensor]:
    """All tensors of a value, and of the values in it."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)
    elif is_dataclass(value):
        for field in fields(value):
            yield from _tensors(getattr(value, field.name))
