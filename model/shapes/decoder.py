"""The shape of a decoder and of its mixtures, as frozen values. Families build these from a checkpoint's config.json.

A value that no decoder can have is a ValueError. Nothing here knows tensor names, files or requests; what lets tokens
see each other is `model/shapes/attention.py`'s.
"""

from dataclasses import dataclass
from typing import Literal

from model.budget import ExpertRange
from model.shapes.attention import Mixer
from model.shapes.checks import counts, one_of, reals, sizes

MOST_EXPERTS = 8192  # of one layer; each has tensors of its own in a checkpoint
Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "swiglu_clamped"]
Score = Literal["softmax", "sigmoid", "sparse_mixer"]
GroupScore = Literal["max", "top2"]
SigmaLink = Literal["exp", "softplus"]
Draws = Literal["independent", "antithetic"]
Norm = Literal["layer", "rms"]
Positions = Literal["rotary", "learned"]


@dataclass(frozen=True, slots=True)
class Dense:
    """An ordinary feed-forward layer of `width` hidden units."""

    width: int
    activation: Activation
    gated: bool = True
    bias: bool = False

    def __post_init__(self) -> None:
        sizes(width=self.width)
        one_of("activation", self.activation, Activation)


@dataclass(frozen=True, slots=True)
class Router:
    """How router logits become a choice and its weights.

    "softmax" or "sigmoid" over all experts (Shazeer et al. 2017; DeepSeek-V3, arXiv 2412.19437 eq. 15), or
    Phi-3.5-MoE's sparse mixer, which gives each kept expert its share among those close to it.
    """

    score: Score = "softmax"
    normalise: bool = False  # divide the K kept weights by their sum
    scale: float = 1.0  # what the weights are multiplied by in the end
    logit_bias: bool = False
    selection_bias: bool = False  # added to the scores for choosing, not for weighing
    groups: int = 1  # of neighbouring experts
    kept_groups: int = 1  # a token chooses inside its best groups
    group_score: GroupScore = "max"  # of a group: its best score, or the sum of its two best
    weigh_input: bool = False  # the weight multiplies an expert's input, not its output (Llama 4)
    jitter: float = 0.01  # sparse mixer: how far below the best an expert may lie, relatively, to share with it
    least_sum: float = 0.0  # added to, or with `clamp_sum` the least of, the sum that normalises
    clamp_sum: bool = False

    def __post_init__(self) -> None:
        one_of("score", self.score, Score)
        one_of("group_score", self.group_score, GroupScore)
        sizes(groups=self.groups, kept_groups=self.kept_groups)
        reals(scale=self.scale, jitter=self.jitter, least_sum=self.least_sum)
        if self.kept_groups > self.groups:
            raise ValueError(f"{self.kept_groups} groups cannot be kept of {self.groups}")


@dataclass(frozen=True, slots=True)
class TopK:
    """Sparse mixture: a token runs the K of its `experts` that its router scores best.

    `shared` runs for every token and is no part of K. `fixed`: only the trained count is defined for this router.
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

    def __post_init__(self) -> None:
        sizes(experts=self.experts, width=self.width)
        if self.experts > MOST_EXPERTS:
            raise ValueError(f"experts must be at most {MOST_EXPERTS}, got {self.experts}")
        if self.experts % self.router.groups:
            raise ValueError(f"{self.experts} experts cannot be cut into {self.router.groups} groups")
        if self.router.group_score == "top2" and self.router.groups > 1 and self.router.groups * 2 > self.experts:
            raise ValueError(f"{self.router.groups} groups of {self.experts} experts have no two best")
        counts(self.trained, self.maximum)
        one_of("activation", self.activation, Activation)

    @property
    def maximum(self) -> int:
        if self.router.score == "sparse_mixer":
            return 2  # what it is defined for
        return self.experts // self.router.groups * self.router.kept_groups


@dataclass(frozen=True, slots=True)
class Infinity:
    """∞-MoE (arXiv 2601.17680): a Gaussian over expert space; each of K draws z masks one wide feed-forward layer.

    The fields below `trained` are choices that the paper leaves open; a checkpoint states each of them.
    """

    units: int  # width of the one feed-forward layer
    space: int  # Z: width of the expert space
    share: float  # share of the units that one draw keeps
    trained: int
    maximum: int  # the largest K served: the paper sets none, a server must
    block: int = 1  # neighbouring units that share one score; 1 is the paper
    activation: Activation = "gelu"
    sigma_link: SigmaLink = "exp"
    sigma_min: float = 0.0  # added to the linked value
    draws: Draws = "independent"
    fixed = False

    def __post_init__(self) -> None:
        sizes(units=self.units, space=self.space, block=self.block)
        reals(sigma_min=self.sigma_min, kept_share=self.share)
        counts(self.trained, self.maximum)
        one_of("activation", self.activation, Activation)
        one_of("sigma_link", self.sigma_link, SigmaLink)
        one_of("draws", self.draws, Draws)
        if self.units % self.block:
            raise ValueError(f"{self.units} units cannot be cut into blocks of {self.block}")
        if not 0 < self.share <= 1:
            raise ValueError(f"the kept share must be above 0 and at most 1, got {self.share!r:.40}")

    @property
    def blocks(self) -> int:
        return self.units // self.block

    @property
    def kept(self) -> int:
        """Blocks that one draw keeps."""
        return max(1, round(self.blocks * self.share))


FeedForward = Dense | TopK | Infinity


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """One decoder-only transformer of pre-norm layers. Widths are in elements, `context` in tokens.

    `mixers` and `layers` are what each layer's two halves are: what lets tokens see each other, and the feed-forward
    part.
    """

    vocabulary: int
    width: int
    context: int
    mixers: tuple[Mixer, ...]
    layers: tuple[FeedForward, ...]
    norm: Norm = "rms"
    norm_eps: float = 1e-5
    norm_offset: float = 0.0  # added to the weights of RMS norms: 1 where they are stored around zero
    positions: Positions = "rotary"
    tied: bool = False
    head_bias: bool = False
    embed_scale: float = 1.0
    residual_scale: float = 1.0  # what each half of a layer is multiplied by before it is added
    logit_scale: float = 1.0
    extrapolates: bool = False  # other counts than the trained one are allowed even where a router is not made for them

    def __post_init__(self) -> None:
        sizes(vocabulary=self.vocabulary, width=self.width, context=self.context, layers=len(self.layers))
        reals(norm_eps=self.norm_eps, norm_offset=self.norm_offset, embed_scale=self.embed_scale)
        reals(residual_scale=self.residual_scale, logit_scale=self.logit_scale)
        if self.norm_eps < 0:
            raise ValueError(f"norm_eps must be at least 0, got {self.norm_eps!r:.40}")
        one_of("norm", self.norm, Norm)
        one_of("positions", self.positions, Positions)
        if len(self.mixers) != len(self.layers):
            raise ValueError(f"{len(self.mixers)} mixers do not fit {len(self.layers)} layers")

    @property
    def mixtures(self) -> tuple[TopK | Infinity, ...]:
        """The layers whose expert count a request may choose, in order."""
        return tuple(ffn for ffn in self.layers if not isinstance(ffn, Dense))

    @property
    def experts(self) -> ExpertRange:
        """The counts that every MoE layer can run."""
        kinds = self.mixtures
        if not kinds:
            return ExpertRange(0, 0, 0, 0)
        trained, most = kinds[0].trained, min(kind.maximum for kind in kinds)
        if any(kind.fixed for kind in kinds) and not self.extrapolates:
            return ExpertRange(len(kinds), trained, trained, trained)
        return ExpertRange(len(kinds), trained, 1, most)

    @property
    def draws_noise(self) -> bool:
        """Whether a request's seed changes the hidden states, and so belongs to the prefix cache's key."""
        return any(isinstance(kind, Infinity) for kind in self.layers)
