"""What errors of a device mean: too little memory for a request, a lost device, or neither; with a GPU that is not
there."""

import gc
import weakref
from collections.abc import Callable

import pytest
import torch

from model.devices import DeviceErrors, translated
from model.errors import EngineDown, OutOfDeviceMemory

CPU, GPU = torch.device("cpu"), torch.device("cuda:1")
FULL = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 1 has a total capacity of 79.19 GiB"
LOST = [
    torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nSearch for more"),
    torch.AcceleratorError("CUDA error: unspecified launch failure"),
    torch.AcceleratorError("CUDA error: device-side assert triggered"),
    torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered"),
    RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
]
NO_MEMORY = [
    torch.OutOfMemoryError(FULL),
    torch.AcceleratorError("CUDA error: out of memory"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
]
UNCLEAR = [
    torch.AcceleratorError("CUDA error: unknown error"),
    RuntimeError("Triton Error [CUDA]: invalid argument"),
    torch.OutOfMemoryError(FULL),
]
OTHER = [RuntimeError("shapes differ"), ValueError("CUDA error: out of memory"), MemoryError(), EngineDown("cuda")]


def name(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]:.50}"


class Card:
    """Stands in for torch.cuda; `dead`: every call fails."""

    def __init__(self) -> None:
        self.dead = False
        self.emptied = 0

    def synchronize(self, device: torch.device) -> None:
        assert device == GPU
        if self.dead:
            raise torch.AcceleratorError("CUDA error: unknown error")

    def mem_get_info(self, device: torch.device) -> tuple[int, int]:
        self.synchronize(device)
        return 3 << 29, 80 << 30

    def empty_cache(self) -> None:
        self.emptied += 1


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    made = Card()
    for function in ("synchronize", "mem_get_info", "empty_cache"):
        monkeypatch.setattr(torch.cuda, function, getattr(made, function))
    return made


@pytest.mark.parametrize("device", [CPU, GPU], ids=str)
@pytest.mark.parametrize("error", LOST, ids=name)
def test_a_lost_device_ends_the_engine(error: Exception, device: torch.device, card: Card) -> None:
    with pytest.raises(EngineDown) as caught, DeviceErrors(device):
        raise error
    assert caught.value.__cause__ is error
    assert str(device) in str(caught.value) and "\n" not in str(caught.value)
    assert not card.emptied, "nothing is asked of a lost device"


@pytest.mark.parametrize("device", [CPU, GPU], ids=str)
@pytest.mark.parametrize("error", NO_MEMORY, ids=name)
def test_too_little_memory_is_a_sentence_for_the_caller(error: Exception, device: torch.device, card: Card) -> None:
    with pytest.raises(OutOfDeviceMemory) as caught, DeviceErrors(device):
        raise error
    assert caught.value.__cause__ is error
    assert f"the memory of {device} is too small" in str(caught.value) and "kv_cache_fraction" in str(caught.value)
    assert ("1.5 of 80.0 GiB were free" in str(caught.value)) == (device == GPU)
    assert card.emptied == (device == GPU)


@pytest.mark.parametrize("error", UNCLEAR, ids=name)
def test_a_device_that_does_not_answer_is_lost(error: Exception, card: Card) -> None:
    assert not isinstance(translated(error, GPU), EngineDown)
    card.dead = True
    assert isinstance(translated(error, GPU), EngineDown)


@pytest.mark.parametrize("error", [*OTHER, UNCLEAR[1]], ids=name)
def test_other_errors_pass(error: Exception, card: Card) -> None:
    with pytest.raises(type(error)) as caught, DeviceErrors(GPU):
        raise error
    assert caught.value is error and not card.emptied


def test_the_context_can_be_entered_again() -> None:
    errors = DeviceErrors(CPU)
    for _ in range(2):
        with pytest.raises(OutOfDeviceMemory), errors:
            raise torch.OutOfMemoryError(FULL)


def test_memory_of_what_failed_is_free_before_the_next_try() -> None:
    held: list[weakref.ref[torch.Tensor]] = []

    def step(fail: Callable[[], None]) -> None:
        intermediate = torch.zeros(8)
        held.append(weakref.ref(intermediate))
        fail()

    def fail() -> None:
        raise torch.OutOfMemoryError(FULL)

    gc.disable()
    try:
        with pytest.raises(OutOfDeviceMemory), DeviceErrors(CPU):
            step(fail)
        assert held[0]() is None
    finally:
        gc.enable()
