"""Copies a step's arrays to a device at once, not waited for."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ALIGNMENT = 16  # bytes; a multiple of every element's size


def upload(arrays: list[NDArray[np.generic]], device: torch.device) -> list[Tensor]:
    """The arrays on a device, in one copy that runs while the host goes on. On a GPU it starts from pinned memory,
    which torch does not give out again before it is done."""
    host = [torch.from_numpy(array) for array in arrays]
    start_N = np.cumsum([0, *(-(-tensor.nbytes // ALIGNMENT) * ALIGNMENT for tensor in host)]).tolist()
    staged = torch.empty(start_N[-1], dtype=torch.uint8, pin_memory=device.type == "cuda")
    for tensor, part in zip(host, _parts(staged, host, start_N), strict=True):
        part.copy_(tensor)
    return _parts(staged.to(device, non_blocking=True), host, start_N)


def _parts(packed: Tensor, like: list[Tensor], start_N: list[int]) -> list[Tensor]:
    """The tensors that lie in `packed` from these bytes on."""
    return [
        packed[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        for tensor, start in zip(like, start_N, strict=False)
    ]
