"""The calls that build a program of native kernels (csrc/program.h): made from a decoder here, or read from files.

A call is an op's name and its arguments by name. No files here (see `weights/packed.py`), and no running of programs.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, get_args

import torch
from torch import Tensor

from model.backends.cpu.attention import Tables, block_of
from model.backends.cpu.blocks import feed_forward_block
from model.backends.cpu.kernels.pack import Kind, Packed, interleave, pack, pack_grouped
from model.backends.cpu.kernels.params import BlockParams, LinearParams, by_schema, named
from model.backends.cpu.weights import Precision, norm_params
from model.decoder import Decoder, Layer
from model.grouped import Grouped, Values, code_bits

PROGRAM = "program"  # makes a program; every other op adds to one
HEAD = "set_head"
ORDER = (
    1  # of outputs, units and heads in what a call holds; to be raised when it changes, for folders that were packed
)


@dataclass(frozen=True, slots=True)
class OpCall:
    """An op and its arguments by name: tensors, numbers, None. Those of `PROGRAM` are in their order."""

    op: str
    values: Mapping[str, object]


def calls_of(model: Decoder, length: int, precision: Precision) -> Iterator[OpCall]:
    """The calls for a decoder that serves `length` positions. Each layer is given up as soon as the next is asked for,
    so that memory holds one layer twice at most."""
    config = model.config
    embeddings = model.embed.weight.detach()
    head = model.embed if config.tied else model.head
    places = model.embed_positions.weight.detach() if config.positions == "learned" else None
    made = {"width": config.width, "embeddings": embeddings, "scale": float(config.embed_scale), "places": places}
    yield OpCall(PROGRAM, made)
    last = LinearParams(
        norm=norm_params(model.norm),
        weight=pack(head.weight, precision.linears),
        outputs=config.vocabulary,
        bias=model.head.bias.detach().float() if config.head_bias else None,
        scale=config.logit_scale,
    )
    yield OpCall(HEAD, named(last))
    del last
    yield from map(_add, _blocks(model, length, precision))


def _blocks(model: Decoder, length: int, precision: Precision) -> Iterator[BlockParams]:
    tables = Tables(length)
    moe_layer = 0
    for shape in model.config.feed_forward:
        layer = model.layers[0]
        assert isinstance(layer, Layer)
        yield block_of(layer.attention_norm, layer.attention, tables, precision, layer.scale)
        yield feed_forward_block(layer.ffn_norm, layer.ffn, moe_layer, precision, layer.repair, layer.scale)
        moe_layer += shape.num_experts > 0
        del model.layers[0], layer


def _add(block: BlockParams) -> OpCall:
    return OpCall(block.add_op, named(block))


def built(calls: Iterable[OpCall], layers: int) -> Any:
    """The program that the calls make: the first makes it, the second sets its head, and two add each layer.

    Raises:
        TypeError, RuntimeError: there are more or fewer, or they have other names, kinds or shapes than the kernels
            want. Nothing is read before it is checked.
    """
    program: Any = None
    count, wanted = 0, 2 + 2 * layers
    for call in calls:
        if count == wanted:
            raise TypeError(f"call {count}, {call.op!r:.80}, is one too many for {layers} layers")
        _check_place(call.op, count)
        try:
            program = _with(program, call)
        except (TypeError, RuntimeError, IndexError) as error:
            line, *_ = str(error).split("\n")
            raise RuntimeError(f"call {count}, {call.op!r}: {line}") from error
        count += 1
    if count < wanted:
        raise TypeError(
            f"{count} calls are too few: a program, its head and two for each of {layers} layers are {wanted}"
        )
    return program


def _with(program: Any, call: OpCall) -> Any:
    """The program after a call."""
    if call.op == PROGRAM:
        return torch.classes.moedial.Program(*call.values.values())
    getattr(torch.ops.moedial, call.op)(program, *by_schema(call.op, call.values))
    return program


def _check_place(op: str, place: int) -> None:
    """Raise TypeError unless an op may be the call of this number."""
    if place < 2 and op != (PROGRAM, HEAD)[place]:
        raise TypeError(f"call {place} is {op!r:.80}, not {(PROGRAM, HEAD)[place]!r}")
    if place >= 2 and (op == HEAD or op not in adding_ops()):
        raise TypeError(f"call {place}, {op!r:.80}, adds no block to a program")


@cache
def adding_ops() -> tuple[str, ...]:
    """The ops that add to a program, sorted."""
    names = (name.removeprefix("moedial::") for name in torch._C._dispatch_get_all_op_names())
    return tuple(sorted(name for name in names if name == HEAD or name.startswith("add_")))


@cache
def layout() -> str:
    """Names how weights lie in memory and what the ops take: a hash of `ORDER`, the ops' schemas and small packed
    matrices.

    It is the same on every machine and instruction set.
    """
    digest = hashlib.sha256(str(ORDER).encode())
    for op in adding_ops():
        digest.update(str(getattr(torch.ops.moedial, op).default._schema).encode())
    sample = (torch.arange(2 * 160 * 136) % 251 - 125).view(2, 160, 136) / 64
    matrices: list[Packed] = [pack(interleave(sample), kind) for kind in get_args(Kind)]
    for packed in (*matrices, *map(pack_grouped, _samples())):
        for tensor in (packed.packed, packed.scales):
            if tensor is not None:
                digest.update(_bytes(tensor))
    return digest.hexdigest()[:16]


def _samples() -> Iterator[Grouped]:
    """Small grouped matrices with codes of each width, with minima and without, and a last panel of 32 outputs."""
    kinds: tuple[Values, ...] = ("signed", "signed6", "bytes")
    for values in kinds:
        for minima in (None, torch.full((2, 160, 8), 0.5).half()):
            last = 16 * code_bits(values)
            codes = (torch.arange(2 * 160 * last) % 251).to(torch.uint8).view(2, 160, last)
            scales = (torch.arange(2 * 160 * 8) % 7 + 1.0).half().view(2, 160, 8)
            yield Grouped(codes.view(torch.int8) if values == "bytes" else codes, scales, 16, values, minima)


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()
