"""Every kernel against float64 on the card, in every dtype, with counts from none to all experts. Memory holds what is
not a number wherever nothing was written. Errors are relative: root mean squares of difference and result.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu import shapes
from benchmarks.gpu.pages import mask_of, paged
from benchmarks.gpu.part import Part
from benchmarks.gpu.poison import poisoned
from benchmarks.gpu.shapes import LayerShape
from model.backends.cuda.infinity import infinity_layer
from model.backends.cuda.kernels import reference
from model.backends.cuda.kernels.attend import PAGE
from model.backends.cuda.kernels.gemm import gemm
from model.backends.cuda.kernels.norm import Norm, residual_norm
from model.backends.cuda.kernels.operands import TILES, Weight
from model.backends.cuda.layer import MoELayer, moe_layer
from model.backends.cuda.quantise import DTYPE, quantised
from model.batch import LayerBudget
from model.moe.infinity import InfinityMixture
from model.moe.topk import TopKMixture
from model.step import LayerStep

PARITY = "against float64"
MOST = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}  # relative error
MAX_OTHER = 0.01  # share of groups: near-ties of scores that were rounded otherwise
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, slots=True)
class Parity:
    """Compares results of one dtype with float64."""

    part: Part
    dtype: torch.dtype

    def check(self, kernel: str, what: str, found: Tensor, wanted: Tensor) -> None:
        """One row; what is not finite where the result is makes the error infinite."""
        difference, size = found.double() - wanted.double(), wanted.double().square().mean().sqrt()
        error = float(difference.square().mean().sqrt() / size.clamp(min=1e-30))
        error = error if error == error else float("inf")
        dtype = str(self.dtype).removeprefix("torch.")
        self.part.add(PARITY, kernel=kernel, what=what, dtype=dtype, error=error, most=MOST[self.dtype],
                      holds=error <= MOST[self.dtype])  # fmt: skip


def run(part: Part) -> None:
    """All kernels in all dtypes; in the interpreter float32, and one shape."""
    jobs: list[tuple[str, Callable[[], None]]] = []
    for dtype in (torch.float32,) if part.dry else DTYPES:
        parity = Parity(part, dtype)
        for shape in shapes.shapes(part.dry)[-1 if part.dry else 0 :]:
            for name, check in CHECKS.items():
                jobs.append((f"{name}, {shape.name}, {dtype}", partial(_poisoned, check, parity, shape)))
        jobs.append((f"∞-MoE, {dtype}", partial(_poisoned, _infinity, parity)))
    part.share(jobs)


def _poisoned(check: Callable, *given: object) -> None:
    with poisoned():
        check(*given)


def _dense(parity: Parity, shape: LayerShape) -> None:
    """A dense layer with bias, in every tile."""
    device, many = parity.part.device, 5 if parity.part.dry else 131
    outputs = 40 if parity.part.dry else 1000  # no multiple of a tile
    inner = shape.width
    values_OD = (shapes.rows(outputs, inner, device, torch.float32) * inner**-0.5).to(parity.dtype)
    bias_O = shapes.rows(1, outputs, device, torch.float32)[0]
    x_TD = shapes.rows(many, inner, device, parity.dtype, seed=3)
    weight = Weight(values_OD[None], bias_O[None], "gelu")
    wanted = reference.linear(x_TD, values_OD, bias_O, "gelu")
    for tile in [TILES[16], TILES[128]] if parity.part.dry else TILES.values():
        for at_once in (False, True):
            out_TU = torch.full((many, outputs), torch.nan, device=device, dtype=parity.dtype)
            gemm(x_TD, weight, out_TU, tile=tile, side_by_side=at_once)
            how = "side by side" if at_once else "in turn"
            parity.check("gemm", f"{shape.name} {inner} to {outputs}, {tile.rows} rows, {how}", out_TU, wanted)


def _packed(parity: Parity, shape: LayerShape) -> None:
    """Weights of 8 bits, against what they stand for."""
    device, many = parity.part.device, 3 if parity.part.dry else 70
    outputs, inner = 40 if parity.part.dry else 1000, shape.width
    values_OD = (shapes.rows(outputs, inner, device, torch.float32) * inner**-0.5).to(parity.dtype)
    x_TD = shapes.rows(many, inner, device, parity.dtype, seed=3)
    for kind in DTYPE:
        weight = quantised(Weight(values_OD[None]), kind)  # type: ignore[arg-type]
        assert weight.scale_EO is not None
        stood_for_OD = weight.values_EOD[0].float().double() * weight.scale_EO[0, :, None].double()
        wanted = reference.linear(x_TD, stood_for_OD)
        for tile in (TILES[16], TILES[64]):
            out_TU = torch.full((many, outputs), torch.nan, device=device, dtype=parity.dtype)
            gemm(x_TD, weight, out_TU, tile=tile)
            parity.check("gemm", f"{shape.name} {inner} to {outputs}, {tile.rows} rows, {kind}", out_TU, wanted)


def _counts(part: Part, shape: LayerShape) -> list[int]:
    """From none to all, and mixed ones (-1)."""
    experts, trained = shape.moe.maximum, shape.moe.trained
    return [-1, experts] if part.dry else [-1, 0, 1, 2, trained, trained + 1, experts // 2, experts]


def _mixture(parity: Parity, shape: LayerShape) -> None:
    """The layer's choices against the router's, and its result against the same choices in float64."""
    device, many = parity.part.device, 4 if parity.part.dry else 15 if parity.dtype == torch.float32 else 37
    module = shapes.mixture(shape, device, parity.dtype)
    layer, x_TD = moe_layer(module), shapes.rows(many, shape.width, device, parity.dtype, seed=4)
    for count in _counts(parity.part, shape):
        counts_T = torch.full((many,), count, device=device)
        if count < 0:
            counts_T = torch.arange(many, device=device) % (shape.moe.trained + 1)
        _one_count(parity, shape, module, layer, x_TD, counts_T, "mixed K" if count < 0 else f"K = {count}")


def _one_count(
    parity: Parity, shape: LayerShape, module: TopKMixture, layer: MoELayer, x_TD: Tensor, counts_T: Tensor, name: str
) -> None:
    many, k_max = len(x_TD), max(1, int(counts_T.max()))
    residual_TD = torch.zeros(many, shape.width, device=x_TD.device)
    routing = layer(x_TD, counts_T, k_max, residual_TD)
    what = f"{shape.name} {name}"
    ran_T = (routing.expert_TK < shape.moe.experts).sum(1)
    parity.check("route", f"{what}: experts of a token", ran_T, counts_T)
    logits_TE = x_TD.double() @ module.router.double().T
    if shape.moe.router.logit_bias:
        logits_TE = logits_TE + module.router_bias.double()
    best_TK = logits_TE.topk(k_max).values
    runs_TK = torch.arange(k_max, device=x_TD.device) < counts_T[:, None]
    padded_TE = torch.cat([logits_TE, torch.zeros_like(logits_TE[:, :1])], dim=1)
    taken_TK = padded_TE.gather(1, routing.expert_TK.long())
    parity.check("route", f"{what}: logits of the choice", taken_TK * runs_TK, best_TK * runs_TK)
    shares_TK = torch.where(runs_TK, taken_TK, -torch.inf)
    weight_TK = (shares_TK - (shares_TK if shape.moe.router.normalise else logits_TE).logsumexp(1, True)).exp()
    weight_TK = torch.where(runs_TK, weight_TK, 0.0)
    parity.check("route", f"{what}: weights", routing.weight_TK, weight_TK)
    wanted_TD = _chosen(module, x_TD, routing.expert_TK, weight_TK)
    parity.check("mixture", what, residual_TD, wanted_TD)


def _chosen(module: TopKMixture, x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """Σ weight · expert(x) in float64."""
    shape = module.config
    total_TD = torch.zeros(x_TD.shape, dtype=torch.float64, device=x_TD.device)
    for expert in range(shape.experts):
        token_R, rank_R = (expert_TK == expert).nonzero(as_tuple=True)
        up_bias, down_bias = (module.gate_up_bias[expert], module.down_bias[expert]) if shape.bias else (None, None)
        given = (module.gate_up[expert], up_bias, shape.activation, True, shape.interleaved)
        hidden_RF = reference.linear(x_TD[token_R], *given)
        out_RD = reference.linear(hidden_RF, module.down[expert], down_bias)
        total_TD.index_add_(0, token_R, weight_TK[token_R, rank_R, None].double() * out_RD)
    return total_TD


def _attention(parity: Parity, shape: LayerShape) -> None:
    """Decoding beside chunks; what no query sees, and the ends of the last pages, hold what is not a number."""
    device, dry = parity.part.device, parity.part.dry
    steps = [(1, 70), (3, 3)] if dry else [(1, 2500), (77, 77), (40, 1100), (1, 1), (1, 64), (1, 65)]
    for window in (20,) if dry else (0, 128):
        spec = mask_of(shape.attention, device, window)
        batch = paged(shape.attention, steps, device, parity.dtype)
        for span, table_P in zip(batch.spans, batch.tables_BP, strict=True):
            last = int(table_P[(span.context - 1) // PAGE])
            batch.cache_PSGC[:, last * PAGE + (span.context - 1) % PAGE + 1 : (last + 1) * PAGE] = torch.nan
        with device:
            given = (batch.q_THC, batch.cache_PSGC, batch.tables_BP, batch.spans_B3, spec, PAGE)
            wanted = reference.attend(*given)
        for at_once in (False, True):
            how = "side by side" if at_once else "in turn"
            found = batch.run(spec, side_by_side=at_once)
            parity.check("attend", f"{shape.name}, window {window}, {how}", found, wanted)


def _norm(parity: Parity, shape: LayerShape) -> None:
    """Addition to the residual, and the norm of what was stored."""
    device, many = parity.part.device, 3 if parity.part.dry else 61
    x_TD, update_TD = (shapes.rows(many, shape.width, device, parity.dtype, seed=seed) for seed in (1, 2))
    weight_D = shapes.rows(1, shape.width, device, parity.dtype)[0]
    out_TD, added_TD = torch.full_like(x_TD, torch.nan), x_TD.double() + update_TD.double()
    residual_norm(x_TD, Norm(weight_D, 1e-5), out_TD, update_TD)
    parity.check("norm", f"{shape.name}: residual", x_TD, added_TD)
    scale_T1 = (x_TD.double().square().mean(1, keepdim=True) + 1e-5).rsqrt()
    parity.check("norm", f"{shape.name}: norm", out_TD, x_TD.double() * scale_T1 * weight_D.double())


def _infinity(parity: Parity) -> None:
    """Both products under the masks that the kernels make; masks against the module's where scores are alike."""
    device, dry = parity.part.device, parity.part.dry
    many, width = (4, 32) if dry else (33, 768)
    kind = replace(shapes.infinity_shape(dry), draws="antithetic")
    module: InfinityMixture = shapes.infinity(kind, width, device, parity.dtype)
    layer, x_TD = infinity_layer(module), shapes.rows(many, width, device, parity.dtype)
    counts_T = 1 + torch.arange(many, device=device) % kind.maximum
    budget = LayerBudget(counts_T, int(counts_T.max()))
    step = LayerStep(budget, torch.full_like(counts_T, 5), torch.arange(many, device=device))
    mask_TE = layer.masks(x_TD, step)
    other = float(((mask_TE != 0) != (module.masks(x_TD, step) != 0)).float().mean())
    parity.part.add("groups that ∞-MoE keeps, beside the decoder's module", dtype=str(parity.dtype), other=other,
                    most=MAX_OTHER, holds=other <= MAX_OTHER)  # fmt: skip
    hidden_TF = reference.linear(x_TD, module.up, None, kind.activation)
    hidden_TF = hidden_TF * mask_TE.double().repeat_interleave(kind.block, dim=1)
    wanted_TD = hidden_TF @ module.down.double().T
    parity.check("∞-MoE", "products under the masks", layer.run_masked(x_TD, mask_TE), wanted_TD)


CHECKS = {"dense": _dense, "8 bits": _packed, "mixture": _mixture, "attention": _attention, "norm": _norm}
