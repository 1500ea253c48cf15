"""Copies of what layers keep as states, between the slots of one cache. It does not depend on sequences."""

from collections.abc import Callable, Iterable

import torch

from model.batch import Cache
from model.shapes.memory import Memory


def copier(cache: Cache, memory: Iterable[Memory]) -> Callable[[int, int], None]:
    """A function that copies the states of one slot to another. `memory`: what each layer of the cache keeps."""
    states = [layer for layer, kind in zip(cache.layers, memory, strict=True) if not kind.per_token]

    @torch.inference_mode()
    def copy(source: int, target: int) -> None:
        for state_SX in states:
            state_SX[target] = state_SX[source]

    return copy
