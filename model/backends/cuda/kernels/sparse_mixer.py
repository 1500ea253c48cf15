"""The sparse mixer's routing (Phi-3.5-MoE): the best expert weighs its softmax share among those not far below it; then
the same again without it. As `_sparse_mixer` in `model/moe/router.py`.

A program routes one token. Ranks beyond its count get the sentinel expert E. Axes in kernels: E experts, padded to a
power of two.
"""

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _sparse_mixer(
    logits,
    counts,
    expert_out,
    weight_out,
    experts,
    k_max,
    jitter,
    E: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, E)
    is_open = place < experts
    logit = tl.load(logits + token * experts + place, mask=is_open, other=0.0).to(tl.float32)
    logit = tl.where(logit == logit, logit, float("-inf"))
    count = tl.load(counts + token)
    for k in range(k_max):
        best = tl.max(tl.where(is_open, logit, float("-inf")), axis=0)
        expert = tl.min(tl.where(is_open & (logit == best), place, E), axis=0)
        is_far = (best - logit) / tl.maximum(tl.abs(logit), best) > 2 * jitter
        power = tl.where(is_open & (is_far == 0), tl.exp(logit - best), 0.0)
        share = tl.sum(tl.where(place == expert, power, 0.0), axis=0) / tl.sum(power, axis=0)
        is_open = is_open & (place != expert)
        runs = k < count
        tl.store(expert_out + token * k_max + k, tl.where(runs, expert, experts))
        tl.store(weight_out + token * k_max + k, tl.where(runs, share, 0.0))


def sparse_mixer(logits_TE: Tensor, counts_T: Tensor, jitter: float, expert_TK: Tensor, weight_TK: Tensor) -> None:
    """Write the best `counts_T` experts of each token, int32, best first, and their weights, float32.

    Ranks beyond a token's count get expert E and weight 0.
    """
    (tokens, experts), k_max = logits_TE.shape, expert_TK.shape[1]
    padded = triton.next_power_of_2(experts)
    _sparse_mixer[(tokens,)](
        logits_TE,
        counts_T,
        expert_TK,
        weight_TK,
        experts,
        k_max,
        jitter,
        E=padded,
        num_warps=max(1, min(8, padded // 256)),
        enable_fp_fusion=False,
    )
