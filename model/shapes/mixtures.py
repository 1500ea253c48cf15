"""The shapes of feed-forward layers: dense ones, and every kind of mixture of experts.

Frozen values that families build from a checkpoint's config.json; what no decoder can have is a ValueError. A new kind
is a new class here or in a file of its own, with the properties of `FeedForward`, and the module in `model/moe/`
that computes it.
"""

from dataclasses import dataclass, replace
from typing import Literal

from model.shapes.checks import counts, one_of, reals, sizes
from model.shapes.dropping import Dropping
from model.shapes.feed_forward import TokenLocal
from model.shapes.work import TokenWork

MAX_EXPERTS = 8192  # of one layer; each has tensors of its own in a checkpoint
Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "swiglu_clamped"]
Score = Literal["softmax", "sigmoid", "sparse_mixer", "top_any", "relu"]
GATES = ("top_any", "relu")  # scores with which an expert runs only where its own gate is open
GroupScore = Literal["max", "top2"]
SigmaLink = Literal["exp", "softplus"]
Draws = Literal["independent", "antithetic", "points"]
Aggregate = Literal["mean", "norm"]


@dataclass(frozen=True, slots=True)
class Dense(TokenLocal):
    """An ordinary feed-forward layer of `width` hidden units."""

    width: int
    activation: Activation
    gated: bool = True
    bias: bool = False
    num_experts = experts_per_draw = trained = maximum = shared_experts = 0
    fixed = False

    def __post_init__(self) -> None:
        sizes(width=self.width)
        one_of("activation", self.activation, Activation)

    def token_work(self, width: int, count: float) -> TokenWork:
        """The whole layer."""
        weights = (2 + self.gated) * width * self.width
        return TokenWork(weights, 0, weights)


@dataclass(frozen=True, slots=True)
class Router:
    """How router logits become a choice and its weights.

    "softmax" or "sigmoid" over all experts (Shazeer et al. 2017; DeepSeek-V3, arXiv 2412.19437 eq. 15), or
    Phi-3.5-MoE's sparse mixer, which gives each kept expert its share among those close to it. With "top_any" (DynMoE,
    arXiv 2405.14297) and "relu" (ReMoE, arXiv 2412.14711) every expert has a gate, open or not (`model/moe/gates.py`).
    """

    score: Score = "softmax"
    normalise: bool = False  # divide the K kept weights by their sum
    scale: float = 1.0  # multiplies the weights
    logit_bias: bool = False
    selection_bias: bool = False  # added to the scores for choosing, not for weighing
    groups: int = 1  # of neighbouring experts
    kept_groups: int = 1  # a token chooses inside its best groups
    group_score: GroupScore = "max"  # of a group: its best score, or the sum of its two best
    weigh_input: bool = False  # the weight multiplies an expert's input, not its output (Llama 4)
    jitter: float = 0.01  # sparse mixer: how far below the best an expert may lie, relatively, to share with it
    eps: float = 0.0  # added to the sum that normalises; with `clamp_sum` its lower bound
    clamp_sum: bool = False

    def __post_init__(self) -> None:
        one_of("score", self.score, Score)
        one_of("group_score", self.group_score, GroupScore)
        sizes(groups=self.groups, kept_groups=self.kept_groups)
        reals(scale=self.scale, jitter=self.jitter, eps=self.eps)
        if self.kept_groups > self.groups:
            raise ValueError(f"{self.kept_groups} groups cannot be kept of {self.groups}")
        if self.score in GATES and replace(self, score="softmax") != Router(scale=self.scale):
            raise ValueError(f"a router with gates ({self.score}) has no other field than scale")


@dataclass(frozen=True, slots=True)
class TopK(TokenLocal):
    """Sparse mixture: a token runs the K of its `experts` that its router scores best.

    `shared` runs for every token and is no part of K. `fixed`: only the trained count is defined for this router.
    `dropping`: which choices do not run; None: all do.
    """

    experts: int
    width: int
    trained: int
    router: Router = Router()
    activation: Activation = "silu"
    bias: bool = False
    interleaved: bool = False  # gate and up rows alternate
    shared: Dense | None = None
    shared_gate: bool = False  # the shared part times the sigmoid of its own logit
    fixed: bool = False
    gated: bool = True
    dropping: Dropping | None = None
    experts_per_draw = 0

    def __post_init__(self) -> None:
        sizes(experts=self.experts, width=self.width)
        if self.experts > MAX_EXPERTS:
            raise ValueError(f"experts must be at most {MAX_EXPERTS}, got {self.experts}")
        if self.experts % self.router.groups:
            raise ValueError(f"{self.experts} experts cannot be cut into {self.router.groups} groups")
        if self.router.group_score == "top2" and self.router.groups > 1 and self.router.groups * 2 > self.experts:
            raise ValueError(f"{self.router.groups} groups of {self.experts} experts have no two best")
        counts(self.trained, self.maximum)
        one_of("activation", self.activation, Activation)

    @property
    def token_local(self) -> bool:
        """False if tokens compete for an expert's capacity."""
        return self.dropping is None or not self.dropping.has_capacity

    @property
    def num_experts(self) -> int:
        """The routed experts, without the shared part."""
        return self.experts

    @property
    def shared_experts(self) -> int:
        """1 if there is a shared part, however wide; else 0."""
        return int(self.shared is not None)

    @property
    def rule_refusal(self) -> str:
        """Not empty if weights do not multiply the outputs of single experts, since rules change such weights."""
        if self.router.score == "sparse_mixer":
            return "the sparse mixer's weights are defined for its own rule only"
        if self.router.weigh_input:
            return "this model's router weighs what its experts read, not what they answer"
        if self.router.score in GATES:
            return "this model's experts have gates: experts.gate_offset moves them"
        return ""

    @property
    def set_refusal(self) -> str:
        """Not empty if the routing depends on the number of experts: then none can be left out."""
        if self.router.groups > 1:
            return f"its router chooses among {self.router.groups} groups of equally many experts"
        if self.dropping is not None and self.dropping.has_capacity:
            return "its experts have a capacity (drop_tokens), which is made for their number"
        return ""

    @property
    def own_fields(self) -> tuple[str, ...]:
        """`gate_offset` if the experts have gates."""
        return ("gate_offset",) if self.router.score in GATES else ()

    @property
    def adaptive(self) -> bool:
        """True with gates: only the experts whose gates are open run."""
        return self.router.score in GATES

    @property
    def maximum(self) -> int:
        """The experts of the groups that a token keeps."""
        if self.router.score == "sparse_mixer":
            return 2  # the rule is defined for the two best experts
        return self.experts // self.router.groups * self.router.kept_groups

    def token_work(self, width: int, count: float) -> TokenWork:
        """The router, the chosen experts, and the shared part."""
        always = self.shared.token_work(width, 0).shared + self.shared_gate * width if self.shared else 0
        shared = self.experts * width + always
        routed = count * (2 + self.gated) * width * self.width
        return TokenWork(shared, routed, shared + routed)


@dataclass(frozen=True, slots=True)
class Infinity(TokenLocal):
    """∞-MoE (arXiv 2601.17680): a Gaussian over expert space; each of K draws z masks one wide feed-forward layer.

    The fields below `trained` are choices that the paper leaves open; a checkpoint states each of them. Errors name the
    keys of config.json: `latent_dim` is gate_dim, `keep_ratio` is kept_share, `block` is mask_block.
    """

    units: int  # width of the one feed-forward layer
    latent_dim: int  # Z: width of the expert space
    keep_ratio: float  # share of the units that one draw keeps
    trained: int
    maximum: int  # the largest K served: the paper sets none, a server must
    block: int = 1  # neighbouring units that share one score, a group; 1 is the paper
    activation: Activation = "gelu"
    sigma_link: SigmaLink = "exp"
    sigma_min: float = 0.0  # added to the linked value
    draws: Draws = "independent"  # of noise; "points": the same fixed points for every token
    replacement: bool = True  # may a draw keep groups that an earlier draw of its token kept
    aggregate: Aggregate = "mean"  # of the draws' masks; "norm": the mean, brought to the norm of its draws
    fixed = False
    shared_experts = 0

    def __post_init__(self) -> None:
        sizes(intermediate_size=self.units, gate_dim=self.latent_dim, mask_block=self.block)
        reals(sigma_min=self.sigma_min, kept_share=self.keep_ratio)
        counts(self.trained, self.maximum)
        one_of("activation", self.activation, Activation)
        one_of("sigma_link", self.sigma_link, SigmaLink)
        one_of("draws", self.draws, Draws)
        one_of("aggregate", self.aggregate, Aggregate)
        if self.units % self.block:
            raise ValueError(f"{self.units} units cannot be cut into groups of {self.block} (mask_block)")
        if not 0 < self.keep_ratio <= 1:
            raise ValueError(f"kept_share must be above 0 and at most 1, got {self.keep_ratio!r:.40}")
        if self.draws == "points" and self.maximum > self.points:
            raise ValueError(
                f"{self.maximum} draws are more than the {self.points} points of width {self.latent_dim} (gate_dim)"
            )
        if not self.replacement and self.maximum * self.kept > self.blocks:
            raise ValueError(
                f"{self.maximum} draws without replacement cannot keep {self.kept} each of {self.blocks} groups"
            )

    @property
    def draws_noise(self) -> bool:
        """Whether a request's noise seed changes the draws; fixed points are the same for all requests."""
        return self.draws != "points"

    @property
    def rule_refusal(self) -> str:
        """Draws have no weights that a rule could change."""
        return "the draws of an ∞-MoE have no router weights"

    @property
    def points(self) -> int:
        """How many fixed points there are (`model/moe/points.py`): the mean, and two for each further direction."""
        return 2 * (max(2, 1 << (self.latent_dim - 1).bit_length()) - 1) + 1

    @property
    def num_experts(self) -> int:
        """The groups of units."""
        return self.blocks

    @property
    def experts_per_draw(self) -> int:
        """The groups that one draw keeps."""
        return self.kept

    @property
    def blocks(self) -> int:
        """The number of groups of neighbouring units that share one score."""
        return self.units // self.block

    @property
    def kept(self) -> int:
        """Groups that one draw keeps."""
        return max(1, round(self.blocks * self.keep_ratio))

    def token_work(self, width: int, count: float) -> TokenWork:
        """The router and the scores, which each draw multiplies, and the groups that the draws keep: with replacement
        at most so many."""
        router, scores = 2 * self.latent_dim * width, self.blocks * self.latent_dim
        routed = min(count * self.kept, self.blocks) * self.block * 2 * width
        return TokenWork(router + scores, routed, router + count * scores + routed)
