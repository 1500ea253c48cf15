"""Sampling with kernels: see `DeviceSamplingOps`. Only single edits are plain torch, on as many values."""

import torch
from torch import Tensor

from model.backends.cuda.kernels.token_draws import draw_tokens
from model.backends.cuda.kernels.tokens import best, masked
from model.backends.torch.device_sampling import edited
from model.sampling import Chosen, SamplingInputs


class CudaSampling:
    """See `DeviceSamplingOps`. Where no row draws, one pass over the logits chooses."""

    def choose(self, logits_RV: Tensor, inputs: SamplingInputs) -> Chosen:
        """The best token of each row (the lowest of equal ones), or a drawn one."""
        raw_RV = logits_RV.contiguous()
        adjusted_RV = raw_RV if inputs.edits is None else edited(raw_RV.float(), inputs.edits)
        if inputs.allowed is not None:
            adjusted_RV = masked(adjusted_RV, inputs.allowed)
        values_RV = adjusted_RV if inputs.grammar is None else masked(adjusted_RV, inputs.grammar, raw_RV)
        token_R, best_R, finite_R = best(values_RV, raw_RV)
        if inputs.draws is not None:
            draw_tokens(values_RV, best_R, inputs.draws, token_R)
        excluded_R = None
        if adjusted_RV is not raw_RV:
            excluded_R = adjusted_RV.gather(1, token_R[:, None])[:, 0] == -torch.inf
        return Chosen(token_R, finite_R != 0, excluded_R)
