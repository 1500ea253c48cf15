"""Shapes of what each op returns, for torch's tracing and compiling. Registered on import, after the library.

A function here names those of its op's arguments that the shape depends on.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Shape = Callable[..., Any]


def _fake(op: str) -> Callable[[Shape], Shape]:
    """Registers a function of the op's arguments, which it takes by name."""
    names = [argument.name for argument in getattr(torch.ops.moedial, op).default._schema.arguments]

    def register(shape: Shape) -> Shape:
        wanted = inspect.signature(shape).parameters.keys()
        assert wanted <= set(names), f"{op} has no argument {wanted - set(names)}"

        def fake(*given: object) -> Any:
            values = dict(zip(names, given, strict=True))
            return shape(**{name: values[name] for name in wanted})

        torch.library.register_fake(f"moedial::{op}")(fake)
        return shape

    return register


@_fake("linear")
def _linear(x: Tensor, outputs: int) -> Tensor:
    return x.new_empty(x.shape[0], outputs)


@_fake("argmax")
def _argmax(logits: Tensor) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.int64)


@_fake("constrain")
def _constrain(logits: Tensor) -> Tensor:
    return torch.empty_like(logits)


@_fake("draw_tokens")
def _draw_tokens(rows: Tensor) -> Tensor:
    return torch.empty_like(rows)


@_fake("quantise")
def _quantise(weight: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    rows, inputs = weight.shape
    codes = weight.new_empty(rows, inputs // 2, dtype=torch.uint8)
    scales = weight.new_empty(rows, inputs // group, dtype=torch.int8)
    return codes, scales, weight.new_empty(rows, dtype=torch.float32)


@_fake("experts")
def _experts(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@_fake("attend")
def _attend(q: Tensor, values: int) -> Tensor:
    return q.new_empty(*q.shape[:2], values or q.shape[2])


@_fake("route")
def _route(logits: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    pairs = torch.library.get_ctx().new_dynamic_size()
    token = logits.new_empty(pairs, dtype=torch.int32)
    load = logits.new_empty(logits.shape[1], dtype=torch.int64)
    return token, logits.new_empty(pairs), load, torch.empty_like(counts)


@_fake("draw")
def _draw(gaussian: Tensor) -> Tensor:
    return gaussian.new_empty(torch.library.get_ctx().new_dynamic_size(), gaussian.shape[1] // 2)


@_fake("masks")
def _masks(scores: Tensor, counts: Tensor) -> Tensor:
    return scores.new_empty(counts.shape[0], scores.shape[1])


@_fake("topk_block")
def _topk_block(x: Tensor, experts: int) -> Tensor:
    return x.new_empty(experts, dtype=torch.int64)


@_fake("infinity_block")
def _infinity_block(x: Tensor, groups: int) -> Tensor:
    return x.new_empty(groups, dtype=torch.int64)


@_fake("write_cache")
@_fake("attention_block")
@_fake("delta_block")
@_fake("latent_block")
@_fake("ffn_block")
def _in_place() -> None:
    return None
