"""Memory for a model's weights on a device, and whether there is enough. It depends on parameters as numbers of bytes,
not on files."""

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from model.devices import CPU, free_memory
from model.errors import CheckpointError


def check_memory(model: nn.Module, device: str = CPU, kept: Mapping[str, int] | None = None) -> None:
    """Raise CheckpointError, with the shortfall, where the weights are larger than the memory that is free.

    `kept`: the bytes of the parameters that stay quantised.
    """
    sizes = {name: p.numel() * p.dtype.itemsize for name, p in model.named_parameters()} | dict(kept or {})
    check_free(sum(sizes.values()), "the weights", device)


def check_free(needed: int, what: str, device: str = CPU) -> None:
    """Raise CheckpointError, with the shortfall, where fewer than the `needed` bytes are free."""
    free = free_memory(device).value
    if needed > free:
        place = "" if device == CPU else f" on {device}"
        both = f"{what} need {needed / 1e9:.2f} GB and {free / 1e9:.2f} GB of memory are free{place}"
        raise CheckpointError(f"{both}: {(needed - free) / 1e9:.2f} GB too little")


def take_memory(model: nn.Module, names: Iterable[str], device: str = CPU) -> None:
    """Allocate uninitialised memory for parameters of a model on the meta device. (torch's `to_empty` does so too, but
    its imports take as long as reading half a gigabyte.)"""
    for target in names:
        place, _, name = target.rpartition(".")
        empty = model.get_parameter(target)
        memory = torch.empty(empty.shape, dtype=empty.dtype, device=device)
        setattr(model.get_submodule(place), name, nn.Parameter(memory, requires_grad=False))
