"""What the sampler leaves to a backend, on numpy."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.backends.torch.draw import draw


class TorchSampling:
    """See `SamplingOps`."""

    def greedy(self, logits_BV: Tensor) -> list[int]:
        """The best token of each row; -1 for a row that is not finite."""
        raw_BV = logits_BV.float()
        best_B: NDArray[np.int64] = raw_BV.numpy().argmax(-1)  # at the speed of memory; torch's is ten times slower
        finite_B: NDArray[np.bool_] = torch.isfinite(raw_BV.sum(-1)).numpy()
        tokens: list[int] = np.where(finite_B, best_B, -1).tolist()
        return tokens

    def constrain(
        self, logits_BV: Tensor, raw_BV: Tensor, allowed_MW: NDArray[np.int32], mask_of_B: NDArray[np.int64]
    ) -> Tensor:
        """A copy of the logits without what the masks forbid."""
        masked_BV = logits_BV.clone()
        values_BV: NDArray[np.float32] = masked_BV.numpy()
        allowed_MV = _unpacked(allowed_MW, values_BV.shape[1])
        for row in np.flatnonzero(mask_of_B >= 0):
            allowed_V = allowed_MV[mask_of_B[row]]
            if not np.isfinite(values_BV[row, allowed_V]).any():
                values_BV[row] = raw_BV[row].numpy()
            values_BV[row, ~allowed_V] = -np.inf
        return masked_BV

    def draw(self, logits_BV: Tensor, rows_R: NDArray[np.int64], params_R: NDArray[np.void]) -> NDArray[np.int64]:
        """See `draw.py`."""
        return draw(logits_BV, rows_R, params_R)


def _unpacked(allowed_MW: NDArray[np.int32], vocabulary: int) -> NDArray[np.bool_]:
    """Masks as booleans, [M, V]."""
    bytes_MB = np.ascontiguousarray(allowed_MW).view(np.uint8)
    return np.unpackbits(bytes_MB, axis=1, bitorder="little", count=vocabulary).view(np.bool_)
