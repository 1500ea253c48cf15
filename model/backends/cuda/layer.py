"""One sparse mixture on a GPU: router, layout of the pairs, gates and ups, downs, the ordered sum; about six launches.

Nothing is read back: counts, choices and loads stay on the device, and the host knows only how many tokens there are
and the largest count. Not here: attention, whole decoders, and how launches become a graph.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from model.backends.cuda.kernels.align import align, empty_tiles
from model.backends.cuda.kernels.combine import combine
from model.backends.cuda.kernels.gemm import gemm
from model.backends.cuda.kernels.norm import Norm
from model.backends.cuda.kernels.operands import TILES, PairTiles, Tile, Weight
from model.backends.cuda.kernels.repair import Repair
from model.backends.cuda.kernels.route import TokenRules, route
from model.backends.cuda.kernels.sparse_mixer import sparse_mixer
from model.backends.cuda.kernels.weighed import weighed
from model.backends.cuda.quantise import AS_LOADED, Precision
from model.moe.repair import RepairTables
from model.moe.topk import TopKMixture
from model.shapes.mixtures import Dense, Router, TopK


@dataclass(frozen=True, slots=True)
class Routing:
    """What a layer chose: experts [T, K], best first, then the number of experts where a token runs fewer."""

    expert_TK: Tensor  # int32
    weight_TK: Tensor
    experts: int

    @property
    def loads_E(self) -> Tensor:
        """Pairs per expert, computed on the device when it is asked for."""
        chosen_R = self.expert_TK.flatten().long()
        loads = chosen_R.new_zeros(self.experts + 1)
        return loads.scatter_add_(0, chosen_R, torch.ones_like(chosen_R))[: self.experts]


@dataclass(frozen=True, slots=True)
class SharedExpert:
    """The part that every token uses; `gate` gives the logit whose sigmoid multiplies it."""

    up: Weight
    down: Weight
    gate: Weight | None = None

    def __call__(self, x_TD: Tensor) -> tuple[Tensor, Tensor | None]:
        """Its output [T, D] and its logits [T, 1], float32."""
        tile = row_tile(len(x_TD))
        h_TF = x_TD.new_empty(len(x_TD), self.up.units)
        gemm(x_TD, self.up, h_TF, tile=tile)
        y_TD = x_TD.new_empty(x_TD.shape, dtype=torch.float32)
        gemm(h_TF, self.down, y_TD, tile=tile)
        if self.gate is None:
            return y_TD, None
        gate_T1 = y_TD.new_empty(len(x_TD), 1)
        gemm(x_TD, self.gate, gate_T1, tile=tile)
        return y_TD, gate_T1


@dataclass(frozen=True, slots=True)
class MoELayer:
    """The weights of a sparse mixture as the kernels read them; the parameters of the module it was made of."""

    router: Router
    logits: Weight
    gate_up: Weight
    down: Weight
    logit_bias_E: Tensor | None = None
    selection_bias_E: Tensor | None = None
    shared: SharedExpert | None = None
    repair: RepairTables | None = None

    @property
    def experts(self) -> int:
        """How many a token chooses among."""
        return self.gate_up.values_EOD.shape[0]

    def __call__(
        self,
        normed_TD: Tensor,
        counts_T: Tensor,
        k_max: int,
        x_TD: Tensor,
        next_norm: Norm | None = None,
        out_TD: Tensor | None = None,
        scale: float = 1.0,
        rules: TokenRules | None = None,
    ) -> Routing:
        """Add scale · mixture(normed) to the residual `x_TD`, in place, and write its norm to `out_TD`.

        `k_max` is the largest of the counts, or any larger number up to that of the experts.

        Raises:
            ValueError: a rule has repair, and the layer has no statistics.
        """
        repair = repair_of(self.repair, counts_T, rules)
        routing = self.route(normed_TD, counts_T, k_max, rules)
        pair_RD = self.run_pairs(normed_TD, routing)
        shared_TD, gate_T1 = (None, None) if self.shared is None else self.shared(normed_TD)
        weight_TK = None if self.router.weigh_input else routing.weight_TK
        chosen = (routing.expert_TK, weight_TK, self.experts)
        combine(pair_RD, *chosen, x_TD, next_norm, out_TD, shared_TD, gate_T1, scale, repair)
        return routing

    def route(self, normed_TD: Tensor, counts_T: Tensor, k_max: int, rules: TokenRules | None = None) -> Routing:
        """Each token's experts and their weights."""
        tokens = len(normed_TD)
        logits_TE = normed_TD.new_empty(tokens, self.experts, dtype=torch.float32)
        gemm(normed_TD, self.logits, logits_TE, tile=row_tile(tokens))
        columns = k_max if rules is None else min(self.experts, k_max + rules.most_reuse)
        expert_TK = counts_T.new_empty(tokens, columns, dtype=torch.int32)
        weight_TK = logits_TE.new_empty(tokens, columns)
        if self.router.score == "sparse_mixer":
            sparse_mixer(logits_TE, counts_T, self.router.jitter, expert_TK, weight_TK)
            return Routing(expert_TK, weight_TK, self.experts)
        biases = (self.logit_bias_E, self.selection_bias_E)
        route(logits_TE, counts_T, self.router, expert_TK, weight_TK, *biases, rules)
        return Routing(expert_TK, weight_TK, self.experts)

    def run_pairs(self, normed_TD: Tensor, routing: Routing) -> Tensor:
        """What each routed pair's expert gives, [T · K, D], float32; rows of pairs that do not run are not written."""
        pairs, k_max = routing.expert_TK.numel(), routing.expert_TK.shape[1]
        tile = row_tile(pairs // self.experts)
        tiles = self._laid_out(routing.expert_TK, tile)
        h_RF = normed_TD.new_empty(pairs, self.gate_up.units)
        if self.router.weigh_input:
            weighed_RD = normed_TD.new_empty(pairs, normed_TD.shape[1])
            weighed(normed_TD, routing.expert_TK, routing.weight_TK, self.experts, weighed_RD)
            normed_TD, k_max = weighed_RD, 1
        gemm(normed_TD, self.gate_up, h_RF, tiles, k_max, tile)
        pair_RD = h_RF.new_empty(pairs, normed_TD.shape[1], dtype=torch.float32)
        gemm(h_RF, self.down, pair_RD, tiles, 1, tile)
        return pair_RD

    def _laid_out(self, expert_TK: Tensor, tile: Tile) -> PairTiles:
        """Pairs by expert; where they are so few that they hardly meet, each is a tile of its own."""
        pairs = expert_TK.numel()
        if pairs <= self.experts // 4:
            return PairTiles(expert_TK.flatten(), None, pairs)
        tiles = empty_tiles(pairs, self.experts, tile.rows, expert_TK)
        align(expert_TK, tiles, expert_TK.new_empty(self.experts))
        return tiles


def row_tile(rows: int) -> Tile:
    """The tile for so many rows of one expert, about: all give the same bits."""
    return next((tile for height, tile in TILES.items() if rows <= height), TILES[128])


def refusal(shape: TopK) -> str | None:
    """Why this layer has no kernels, or None."""
    router = shape.router
    if router.score == "sparse_mixer" and router != Router("sparse_mixer", jitter=router.jitter):
        return "a sparse mixer with biases, groups, a scale or weights of its own has no GPU kernel"
    return None


def moe_layer(module: TopKMixture, repair: RepairTables | None = None, precision: Precision = AS_LOADED) -> MoELayer:
    """The layer of a module whose shape `refusal` lets pass. Statistics of repair are not copied, nor are weights that
    `precision` keeps as they are.

    Raises:
        ValueError: it does not.
    """
    shape, reason = module.config, refusal(module.config)
    if reason is not None:
        raise ValueError(reason)
    gate_up_bias, down_bias = (module.gate_up_bias, module.down_bias) if shape.bias else (None, None)
    gate_up = Weight(module.gate_up, gate_up_bias, shape.activation, gated=True, interleaved=shape.interleaved)
    return MoELayer(
        router=shape.router,
        logits=Weight(module.router[None]),
        gate_up=precision.experts(gate_up),
        down=precision.experts(Weight(module.down, down_bias)),
        logit_bias_E=module.router_bias if shape.router.logit_bias else None,
        selection_bias_E=module.selection_bias if shape.router.selection_bias else None,
        shared=None if shape.shared is None else _shared(module, shape.shared, precision),
        repair=repair,
    )


def repair_of(tables: RepairTables | None, counts_T: Tensor, rules: TokenRules | None) -> Repair | None:
    """The repair of a mixture's output; None where no token's rule has it.

    Raises:
        ValueError: a rule has it, and there are no statistics.
    """
    if rules is None or rules.repair_T is None:
        return None
    if tables is None:
        raise ValueError("a routing rule asks for repair, and no statistics were loaded")
    return Repair(tables, counts_T, rules.repair_T)


def _shared(module: TopKMixture, shape: Dense, precision: Precision) -> SharedExpert:
    ffn = module.shared
    up_bias, down_bias = (linear.bias[None] if shape.bias else None for linear in (ffn.up, ffn.down))
    up = precision.linear(Weight(ffn.up.weight[None], up_bias, shape.activation, gated=shape.gated))
    down = precision.linear(Weight(ffn.down.weight[None], down_bias))
    gate = Weight(module.shared_gate.weight[None]) if module.config.shared_gate else None
    return SharedExpert(up, down, gate)
