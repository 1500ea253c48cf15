"""Tunes one count's row of the repair tables by gradient, from a row that was fitted in closed form.

The loss is what repair is for: the KL divergence of the next token's distribution from that of the trained count, which
sees all layers together. The model's weights do not change. This is ours, not part of LDA.
"""

import time
from typing import Any

import torch
from torch import Tensor, nn

from calibration.repair_fit import Tables, hooked
from calibration.windows import window_batch
from model.backends.torch.attend import WholeAttend
from model.budget import ExpertBudget
from model.decoder import Decoder

STEPS, MAX_SECONDS = 80, 90.0  # whichever comes first
RATE = 0.008  # of Adam; it falls to 0 over the second half
TOKENS_PER_STEP = 1024
SEED = 0  # of which windows a step takes


def tune(model: Decoder, window_BS: Tensor, count: int, start: Tables, seconds: float = MAX_SECONDS) -> Tables:
    """Tables whose row for `count` is tuned, from that of `start`; others are neutral."""
    scale_LD = start.scale[:, count].clone().requires_grad_()
    shift_LD = start.shift[:, count].clone().requires_grad_()
    optimiser = torch.optim.Adam([scale_LD, shift_LD])
    generator = torch.Generator().manual_seed(SEED)
    rows = max(1, TOKENS_PER_STEP // window_BS.shape[1])
    started = time.monotonic()
    for step in range(STEPS):
        done = max(step / STEPS, (time.monotonic() - started) / seconds)
        if done >= 1:
            break
        optimiser.param_groups[0]["lr"] = RATE * min(1.0, 2 * (1 - done))
        part_BS = window_BS[torch.randint(len(window_BS), (rows,), generator=generator)]
        optimiser.zero_grad()
        _divergence(model, part_BS, count, scale_LD, shift_LD).backward()
        optimiser.step()
    tables = Tables.neutral(*start.scale.shape)
    tables.scale[:, count], tables.shift[:, count] = scale_LD.detach(), shift_LD.detach()
    return tables


def _divergence(model: Decoder, window_BS: Tensor, count: int, scale_LD: Tensor, shift_LD: Tensor) -> Tensor:
    """Mean KL divergence of the repaired count from the trained one, in nats per token."""

    def repair(layer: int, _: nn.Module, __: tuple[Any, ...], output_TD: Tensor) -> Tensor:
        return (output_TD.float() * scale_LD[layer] + shift_LD[layer]).to(output_TD.dtype)

    with torch.no_grad():
        trained_TV = _log_probs(model, window_BS, model.config.mixtures[0].trained)
    with hooked(model, repair):
        repaired_TV = _log_probs(model, window_BS, count)
    return (trained_TV.exp() * (trained_TV - repaired_TV)).sum(-1).mean()


def _log_probs(model: Decoder, window_BS: Tensor, count: int) -> Tensor:
    budget = ExpertBudget((count,) * len(model.config.mixtures))
    batch = window_batch(window_BS, [budget] * len(window_BS))
    logits_TV: Tensor = model(batch, WholeAttend(window_BS.shape[1]))
    return logits_TV.float().log_softmax(-1)
