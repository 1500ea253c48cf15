"""Shapes of what each op returns, for torch's tracing and compiling. Registered on import, after the library."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def _fake(op: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return torch.library.register_fake(f"moedial::{op}")


def _whole(value: object) -> int:
    assert isinstance(value, int)
    return value


@_fake("linear")
def _linear(x: Tensor, *rest: object) -> Tensor:
    return x.new_empty(x.shape[0], _whole(rest[5]))


@_fake("best")
def _best(logits: Tensor) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.int64)


@_fake("constrain")
def _constrain(logits: Tensor, *_: object) -> Tensor:
    return torch.empty_like(logits)


@_fake("experts")
def _experts(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x)


@_fake("attend")
def _attend(q: Tensor, *_: object) -> Tensor:
    return torch.empty_like(q)


@_fake("route")
def _route(logits: Tensor, counts: Tensor, k_max: int, normalise: bool) -> tuple[Tensor, Tensor, Tensor]:
    pairs = torch.library.get_ctx().new_dynamic_size()
    return (
        logits.new_empty(pairs, dtype=torch.int32),
        logits.new_empty(pairs),
        logits.new_empty(logits.shape[1], dtype=torch.int64),
    )


@_fake("draw")
def _draw(gaussian: Tensor, *_: object) -> Tensor:
    return gaussian.new_empty(torch.library.get_ctx().new_dynamic_size(), gaussian.shape[1] // 2)


@_fake("masks")
def _masks(scores: Tensor, counts: Tensor, *_: object) -> Tensor:
    return scores.new_empty(counts.shape[0], scores.shape[1])


@_fake("topk_block")
def _topk_block(x: Tensor, *rest: object) -> Tensor:
    return x.new_empty(_whole(rest[11]), dtype=torch.int64)


@_fake("infinity_block")
def _infinity_block(x: Tensor, *rest: object) -> Tensor:
    return x.new_empty(_whole(rest[17]), dtype=torch.int64)


@_fake("write_cache")
@_fake("attention_block")
@_fake("ffn_block")
def _in_place(*_: object) -> None:
    return None
