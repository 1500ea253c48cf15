"""What the sampler leaves to a backend, on native kernels."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.sampling import PARAMETERS


class NativeSampling:
    """See `SamplingOps`."""

    def greedy(self, logits_BV: Tensor) -> list[int]:
        """The index of the highest logit of each row; -1 for a row that is not finite."""
        floats_BV = logits_BV if logits_BV.dtype == torch.float32 else logits_BV.float()
        tokens: list[int] = torch.ops.moedial.argmax.default(floats_BV).tolist()
        return tokens

    def constrain(
        self, logits_BV: Tensor, raw_BV: Tensor, allowed_MW: NDArray[np.int32], mask_of_B: NDArray[np.int64]
    ) -> Tensor:
        """A copy of the logits without what the masks forbid, in one pass."""
        allowed, mask_of = torch.from_numpy(allowed_MW), torch.from_numpy(mask_of_B)
        masked_BV: Tensor = torch.ops.moedial.constrain(logits_BV.contiguous(), raw_BV, allowed, mask_of)
        return masked_BV

    def draw(self, logits_BV: Tensor, rows_R: NDArray[np.int64], params_R: NDArray[np.void]) -> NDArray[np.int64]:
        """The tokens that rows draw (csrc/tokens.h)."""
        assert PARAMETERS.names is not None
        rules_R5 = np.stack([params_R[name].astype(np.float64) for name in PARAMETERS.names], axis=1)
        rows, rules = torch.from_numpy(rows_R), torch.from_numpy(rules_R5)
        token_R: NDArray[np.int64] = torch.ops.moedial.draw_tokens(logits_BV, rows, rules).numpy()
        return token_R
