"""Sampling in plain torch where the logits are, on any device: the reference for kernels. Nothing is waited for.

Maxima and sums of integers do not depend on their order, so that a row's token depends on no other row.
"""

import torch
from torch import Tensor

from model.sampling import Chosen, Draws, Edits, Masks, SamplingInputs, fixed_point

GROUP = 1 << 23  # logits drawn from at a time, so that intermediates stay below about 500 MB
WORD = 32
NO_LIMIT = 1 << 62


class TorchDeviceSampling:
    """See `DeviceSamplingOps`."""

    def choose(self, logits_RV: Tensor, inputs: SamplingInputs) -> Chosen:
        """The best token of each row (the lowest of equal ones), or a drawn one."""
        raw_RV = logits_RV.float()
        finite_R = torch.isfinite(raw_RV).all(-1)
        adjusted_RV = adjusted(raw_RV, inputs)
        values_RV = constrained(adjusted_RV, raw_RV, inputs.grammar)
        best_R = values_RV.amax(-1)
        token_R = _lowest_equal(values_RV, best_R)
        if inputs.draws is not None:
            drawn_R = _drawn(values_RV, best_R, inputs.draws)
            draws_R = (inputs.draws.temperature_R > 0) & best_R.isfinite()
            token_R = torch.where(draws_R, drawn_R, token_R)
        token_R = torch.where(finite_R, token_R, 0)
        excluded_R = None
        if adjusted_RV is not raw_RV:
            excluded_R = adjusted_RV.gather(1, token_R[:, None])[:, 0] == -torch.inf
        return Chosen(token_R, finite_R, excluded_R)


def adjusted(raw_RV: Tensor, inputs: SamplingInputs) -> Tensor:
    """The float32 logits with edits, and without what settings do not allow; the same tensor if nothing changes."""
    values_RV = raw_RV if inputs.edits is None else edited(raw_RV, inputs.edits)
    if inputs.allowed is not None:
        allowed_RV = _unpacked(inputs.allowed, values_RV.shape[1])
        values_RV = values_RV.masked_fill(~allowed_RV, -torch.inf)
    return values_RV


def edited(raw_RV: Tensor, edits: Edits) -> Tensor:
    """A copy of the float32 logits with edits, computed in float64."""
    where = edits.row_N, edits.id_N
    old_N = raw_RV[where].double()
    scaled_N = torch.where(old_N > 0, old_N / edits.factor_N, old_N * edits.factor_N)
    return raw_RV.index_put(where, (scaled_N + edits.shift_N).float())


def constrained(values_RV: Tensor, raw_RV: Tensor, grammar: Masks | None) -> Tensor:
    """The values without what grammars forbid. Where nothing finite is left, a row is taken from `raw_RV` first."""
    if grammar is None:
        return values_RV
    allowed_RV = _unpacked(grammar, values_RV.shape[1])
    left_R1 = (allowed_RV & values_RV.isfinite()).any(-1, keepdim=True) | (grammar.mask_of_R < 0)[:, None]
    return torch.where(left_R1, values_RV, raw_RV).masked_fill(~allowed_RV, -torch.inf)


def _unpacked(masks: Masks, width: int) -> Tensor:
    """Which tokens each row may have, bool; all where it has no mask."""
    bit_B = torch.arange(WORD, device=masks.words_MW.device, dtype=torch.int32)
    allowed_MV = (masks.words_MW[:, :, None] >> bit_B & 1).bool().flatten(1)[:, :width]
    return allowed_MV[masks.mask_of_R.clamp(min=0)] | (masks.mask_of_R < 0)[:, None]


def _lowest_equal(values_RV: Tensor, value_R: Tensor) -> Tensor:
    """The lowest id whose value is the given one; some id where there is none."""
    width = values_RV.shape[1]
    id_V = torch.arange(width, device=values_RV.device, dtype=torch.int32)
    found_R = torch.where(values_RV == value_R[:, None], id_V, width - 1).amin(-1)
    return found_R.long()


def _drawn(values_RV: Tensor, best_R: Tensor, draws: Draws) -> Tensor:
    """A token of each row, drawn in vocabulary order, or from the best on where a cut applies; some id where a row does
    not draw."""
    size = max(1, GROUP // values_RV.shape[1])
    groups = [slice(first, first + size) for first in range(0, len(values_RV), size)]
    return torch.cat([_drawn_group(values_RV[group], best_R[group], draws.rows(group)) for group in groups])


def _drawn_group(values_RV: Tensor, best_R: Tensor, draws: Draws) -> Tensor:
    weight_RV = ((values_RV - best_R[:, None]) / draws.temperature_R.float()[:, None]).exp()
    mass_RV = fixed_point(weight_RV)
    order_RV = None
    if draws.cuts:
        order_RV = _drawing_order(values_RV, draws)
        mass_RV = _kept(mass_RV.gather(1, order_RV), weight_RV.gather(1, order_RV), draws)
    cum_RV = mass_RV.cumsum(-1)
    end_R = cum_RV[:, -1]
    target_R = torch.minimum((draws.u_R * end_R).long(), end_R - 1)
    rank_R1 = (cum_RV <= target_R[:, None]).sum(-1, keepdim=True).clamp(max=values_RV.shape[1] - 1)
    token_R1 = rank_R1 if order_RV is None else order_RV.gather(1, rank_R1)
    return token_R1[:, 0]


def _drawing_order(values_RV: Tensor, draws: Draws) -> Tensor:
    """The ids of each row, best first (the lowest first of equal ones); in vocabulary order if nothing is cut."""
    width = values_RV.shape[1]
    cut_R = (draws.top_k_R < width) | (draws.top_p_R < 1) | (draws.min_p_R > 0)
    ranked_RV = values_RV.sort(descending=True, stable=True).indices
    return torch.where(cut_R[:, None], ranked_RV, torch.arange(width, device=values_RV.device))


def _kept(mass_RV: Tensor, weight_RV: Tensor, draws: Draws) -> Tensor:
    """The masses, in drawing order, of what top-k keeps, then of that top-p, and min-p; 0 for the others."""
    rank_V = torch.arange(mass_RV.shape[1], device=mass_RV.device)
    mass_RV = torch.where(rank_V < draws.top_k_R[:, None], mass_RV, 0)
    cum_RV = mass_RV.cumsum(-1)
    share_R = torch.where(draws.top_p_R < 1, (draws.top_p_R * cum_RV[:, -1]).ceil().long(), NO_LIMIT)
    keeps_RV = (cum_RV - mass_RV < share_R[:, None]) & (weight_RV >= draws.min_p_R[:, None])
    return torch.where(keeps_RV, mass_RV, 0)
