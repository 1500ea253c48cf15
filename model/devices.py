"""Devices that a model can run on: which there are, which one a setting means, how much memory is free there, and what
their errors mean.

Nothing of CUDA is loaded where torch finds no GPU. Not here: what runs on a device (see `model/backends/`).
"""

import re
import traceback
from collections.abc import Sequence

import torch
from torch import Tensor

from model.errors import CheckpointError, EngineDown, OutOfDeviceMemory
from model.resources import Amount, available_memory

CPU = "cpu"
_NUMBERED = re.compile(r"cuda:([0-9]{1,2})")
_NO_MEMORY = ("out of memory", "ALLOC_FAILED")
_LOST = ("illegal memory access", "launch failure", "device-side assert", "uncorrectable", "device is lost")


def devices() -> dict[str, str]:
    """The devices of this machine, the default one first, and what each is."""
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    return {f"cuda:{number}": torch.cuda.get_device_name(number) for number in gpus} | {CPU: "the processor"}


def resolve(setting: str) -> str:
    """The device that a setting means: "auto" is the first GPU, or the CPU where there is none; "cuda" the first GPU.

    Raises:
        CheckpointError: no such device is there.
    """
    if setting == CPU:
        return CPU
    there = devices()
    if setting == "auto":
        return next(iter(there))
    match = _NUMBERED.fullmatch("cuda:0" if setting == "cuda" else setting)
    device = f"cuda:{int(match[1])}" if match else ""
    if device not in there:
        listed = ", ".join(f"{name} ({what})" for name, what in there.items())
        raise CheckpointError(f"device {setting!r} is not on this machine; it has {listed}")
    return device


def make_current(device: str) -> None:
    """Make a GPU the one that launches go to: kernels of this process run on the current device, whatever their
    arguments are on."""
    if device != CPU:
        torch.cuda.set_device(device)


def readable(x: Tensor) -> bool:
    """Whether the host reads a tensor's values without waiting. Where it does not, every size in a step must follow
    from what the host knows."""
    return x.device.type == CPU


def tensor_on(values: Sequence[float], device: torch.device) -> Tensor:
    """A tensor of the host's values on a device, which is not waited for."""
    return torch.tensor(values).to(device, non_blocking=True)


class Fetched:
    """Tensors on their way to the host. On a GPU the copies run while the host goes on, after what was launched before
    and beside nothing that comes later: what they read may be overwritten by any later launch."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._event: torch.cuda.Event | None = None
        self._copies = _copies(tensors)
        on_gpu = next((tensor for tensor in tensors if tensor.is_cuda), None)
        if on_gpu is not None:
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(on_gpu.device))

    def wait(self) -> list[Tensor]:
        """The tensors on the host."""
        if self._event is not None:
            self._event.synchronize()
        return self._copies


def _copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors on the host, or on their way: those of one type in one copy, since a step may have one per layer."""
    copies, remote = list(tensors), [at for at, tensor in enumerate(tensors) if not readable(tensor)]
    for dtype in dict.fromkeys(tensors[at].dtype for at in remote):
        places = [at for at in remote if tensors[at].dtype == dtype]
        together = torch.cat([tensors[at].flatten() for at in places])
        pinned = torch.empty(len(together), dtype=dtype, pin_memory=together.is_cuda)
        parts = pinned.copy_(together, non_blocking=True).split([tensors[at].numel() for at in places])
        for at, part in zip(places, parts, strict=True):
            copies[at] = part.view(tensors[at].shape)
    return copies


def free_memory(device: str) -> Amount:
    """Bytes that can still be allocated on a device: of the CPU within the container's limits."""
    if device == CPU:
        return available_memory()
    free, _ = torch.cuda.mem_get_info(device)
    return Amount(free, device)


class DeviceErrors:
    """A context that raises errors of the device as what they mean (`translated`); around the launch of a step, and
    around what waits for its results. It may be entered again and again.

    After `OutOfDeviceMemory` the memory of what failed has been given back, so that a smaller step may fit. After
    `EngineDown` nothing may be asked of the device any more: only a new process can use it. Other errors pass.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if not isinstance(error, Exception):
            return
        meaning = translated(error, self._device)
        if meaning is error:
            return
        if isinstance(meaning, OutOfDeviceMemory):
            _give_back(error, self._device)
        raise meaning from error


def translated(error: Exception, device: torch.device) -> Exception:
    """What an error means: `OutOfDeviceMemory` that there was too little memory, `EngineDown` that the device is lost.

    Any other error is returned itself. The device is lost if the error is of a kind that a GPU never recovers from, or
    if it is another error of CUDA after which the device does not answer.
    """
    text = str(error)
    of_torch = isinstance(error, torch.OutOfMemoryError | torch.AcceleratorError)
    if not of_torch and not (isinstance(error, RuntimeError) and "CUDA" in text):
        return error
    if any(words in text for words in _LOST) or not _answers(device):
        return EngineDown(f"{device} is lost: {text.partition(chr(10))[0]}")
    if isinstance(error, torch.OutOfMemoryError) or any(words in text for words in _NO_MEMORY):
        return OutOfDeviceMemory(_out_of_memory(device))
    return error


def _out_of_memory(device: torch.device) -> str:
    """The sentence for the caller whose request did not fit."""
    free = ""
    if device.type == "cuda":
        free_GiB, total_GiB = (amount / 2**30 for amount in torch.cuda.mem_get_info(device))
        free = f" ({free_GiB:.1f} of {total_GiB:.1f} GiB were free)"
    return (
        f"the memory of {device} is too small to compute this request{free}; a shorter prompt or fewer experts may "
        "fit, as may any request on a server with a lower kv_cache_fraction or max_step_tokens"
    )


def _answers(device: torch.device) -> bool:
    """Whether the device still computes: after an error that it does not recover from, every call fails."""
    if device.type != "cuda":
        return True
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return False
    return True


def _give_back(error: Exception, device: torch.device) -> None:
    """Free what the failed calls still hold, and what the allocator keeps."""
    traceback.clear_frames(error.__traceback__)
    if device.type == "cuda":
        torch.cuda.empty_cache()
