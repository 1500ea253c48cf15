"""A packed model: the calls that build a program of kernels, with their tensors, as a folder of plain files.

`packed.json` lists the calls in order: an op's name, its numbers as they are, its tensors by name. The tensors of a
call lie in a safetensors file of its own, `part-00000.safetensors` and so on, in the order of the layers. They are
mapped, not read: a start touches only what it looks at, processes share the pages, and what memory does not hold is
read again from the disk. Not here: what the calls mean (see `model/backends/cpu/calls.py`).
"""

import json
import math
import mmap
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any
from weakref import WeakValueDictionary

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from model.backends.cpu.calls import OpCall
from model.errors import CheckpointError
from model.options import Quantize, QuantizeLayers
from weights.files import DTYPES, read_header
from weights.folder import PACKED, open_regular, read_text
from weights.sizes import BytesPerWeight

FORMAT = 2
PAGE, LINE = 4096, 64
MAX_NUMBER = 1 << 26  # no size, count or width of a real model is higher; products of two fit 64 bits
Name = Annotated[str, msgspec.Meta(max_length=1000)]  # of what is shown to people
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class TensorName(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Stands for a tensor: the number of the call in whose file it lies, and its name there."""

    part: int
    tensor: str


class StoredCall(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An op and its arguments by name."""

    op: str
    values: dict[str, TensorName | bool | int | float | None]


class Index(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The contents of `packed.json`."""

    layout: Name  # of the kernels' weights
    dtype: Name
    quantize: Quantize
    quantize_layers: QuantizeLayers
    kept: Name  # the forms of matrices that were quantised in the checkpoint
    parameters: Annotated[int, msgspec.Meta(ge=0)]
    loaded_bytes: BytesPerWeight
    checkpoint: Name  # the hash of the one it was made from, which calibrations and expert sets name
    repaired: tuple[int, ...] = ()  # counts at which repair helps; their tables are in the layers' calls
    calls: tuple[StoredCall, ...] = ()
    format: int = FORMAT


def is_packed(folder: Path) -> bool:
    """Whether a folder holds a packed model."""
    return (folder / PACKED).exists()


def write_packed(folder: Path, about: Index, calls: Iterable[OpCall]) -> None:
    """Write the calls one after the other; `packed.json` comes last, so that a folder that has it is whole.

    A tensor that several calls share, as the same object, is written once.
    """
    stored: list[StoredCall] = []
    shared: WeakValueDictionary[int, Tensor] = WeakValueDictionary()
    names: dict[int, TensorName] = {}
    for number, call in enumerate(calls):
        own: dict[str, Tensor] = {}
        for name, value in call.values.items():
            if isinstance(value, Tensor) and shared.get(id(value)) is not value:
                own[name], shared[id(value)] = value, value
                names[id(value)] = TensorName(number, name)
        write_tensors(folder / _file(number), own)
        stored.append(StoredCall(call.op, {name: _place(value, names) for name, value in call.values.items()}))
    text = msgspec.json.format(msgspec.json.encode(msgspec.structs.replace(about, calls=tuple(stored))), indent=1)
    (folder / PACKED).write_bytes(text + b"\n")


def _place(value: object, names: Mapping[int, TensorName]) -> TensorName | bool | int | float | None:
    if isinstance(value, Tensor):
        return names[id(value)]
    assert value is None or isinstance(value, bool | int | float)
    return value


def _file(number: int) -> str:
    return f"part-{number:05}.safetensors"


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file in which every tensor begins at a multiple of the largest power of two in its size, up to a
    cache line, and the first at a page. Those of round sizes come first; otherwise the order is the given one."""
    ordered = sorted(tensors.items(), key=lambda item: -_roundness(item[1].nbytes))
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in ordered:
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % PAGE)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in ordered:
            if tensor.numel():
                flat: Any = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()
                file.write(memoryview(flat))


def _roundness(size: int) -> int:
    return min(size & -size, LINE) if size else LINE


def read_index(folder: Path) -> Index:
    """What `packed.json` says.

    Raises:
        CheckpointError: it is damaged, or of another format.
    """
    try:
        index = msgspec.json.decode(read_text(folder / PACKED), type=Index)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{PACKED}: {error}") from None
    if index.format != FORMAT:
        raise CheckpointError(f"{PACKED}: format {index.format} is not {FORMAT}: pack the model again")
    return index


class MappedTensors:
    """The tensors of a packed folder, mapped read-only; a file is opened when its first tensor is asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._parts: dict[int, dict[str, Tensor]] = {}

    def calls(self, index: Index, vocabulary: int) -> Iterator[OpCall]:
        """The calls of an index with their tensors. Of what config.json says only the vocabulary is compared here,
        which the sampler trusts: building counts the layers, and a first token, which every engine computes, finds what
        else does not fit.

        Raises:
            CheckpointError: a file is damaged, a tensor is not there, a number cannot be a model's, or the vocabulary
                differs.
        """
        parts = len(index.calls)
        for call in index.calls:
            outputs = call.values.get("outputs")
            if call.op == "set_head" and outputs != vocabulary:
                raise CheckpointError(f"{PACKED} has {outputs} logits, config.json a vocabulary of {vocabulary}")
            yield OpCall(call.op, {name: self._value(name, value, parts) for name, value in call.values.items()})

    def _value(self, name: str, value: object, parts: int) -> object:
        if isinstance(value, TensorName):
            if not 0 <= value.part < parts:
                raise CheckpointError(f"{PACKED}: part {value.part} of {name!r:.80} is not one of {parts}")
            if value.part not in self._parts:
                self._parts[value.part] = mapped(self.folder / _file(value.part))
            found = self._parts[value.part].get(value.tensor)
            if found is None:
                raise CheckpointError(f"{PACKED}: {_file(value.part)} has no tensor {value.tensor!r:.80}")
            return found
        if isinstance(value, int | float) and not abs(value) <= MAX_NUMBER:  # nor is NaN
            raise CheckpointError(f"{PACKED}: {name!r:.80} is {value}, more than {MAX_NUMBER}")
        return value


def mapped(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file over its mapped bytes, which nothing may write.

    Raises:
        CheckpointError: it is damaged, or a tensor does not lie at a multiple of its elements' size.
    """
    start, header = read_header(path)
    try:
        with safe_open(path, framework="np"):
            pass  # the library checks offsets and sizes
        with open_regular(path) as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path.name} is damaged: {error}") from None
    return {name: _view(path, data, start, name, entry) for name, entry in header.items()}


def _view(path: Path, data: mmap.mmap, start: int, name: str, entry: Mapping[str, Any]) -> Tensor:
    dtype, shape = DTYPES.get(entry["dtype"]), tuple(entry["shape"])
    if dtype is None:
        raise CheckpointError(f"{path.name}: tensor {name!r:.80} has dtype {entry['dtype']}, which is not supported")
    first, count = start + entry["data_offsets"][0], math.prod(shape)
    if first % dtype.itemsize or first + count * dtype.itemsize > len(data):
        raise CheckpointError(f"{path.name}: tensor {name!r:.80} cannot be mapped at byte {first}")
    if not count:
        return torch.empty(shape, dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of memory that nothing may write, which is what is wanted
        return torch.frombuffer(data, dtype=dtype, count=count, offset=first).view(shape)
