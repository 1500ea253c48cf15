"""The shape of a decoder and of its mixtures, as frozen values. Families build these from a checkpoint's config.json.

A value that no decoder can have is a ValueError. Nothing here knows tensor names, files or requests.
"""

from dataclasses import dataclass
from typing import Literal, get_args

from model.budget import ExpertRange

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]
SigmaLink = Literal["exp", "softplus"]
Draws = Literal["independent", "antithetic"]
Norm = Literal["layer", "rms"]
Positions = Literal["rotary", "learned"]
QKNorm = Literal["none", "full"]


def _one_of(name: str, value: object, kind: object) -> None:
    if value not in get_args(kind):
        raise ValueError(f"{name} {value!r:.40} is not known, only {', '.join(get_args(kind))}")


def _sizes(**values: object) -> None:
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {value!r:.40}")


def _counts(trained: int, maximum: int) -> None:
    _sizes(trained=trained, maximum=maximum)
    if trained > maximum:
        raise ValueError(f"the trained expert count {trained} is more than the largest, {maximum}")


@dataclass(frozen=True, slots=True)
class Dense:
    """An ordinary feed-forward layer of `width` hidden units."""

    width: int
    activation: Activation
    gated: bool = True
    bias: bool = False

    def __post_init__(self) -> None:
        _sizes(width=self.width)
        _one_of("activation", self.activation, Activation)


@dataclass(frozen=True, slots=True)
class TopK:
    """Sparse mixture: softmax over `experts` router logits, the K best run (Shazeer et al. 2017; OLMoE, Mixtral)."""

    experts: int
    width: int
    trained: int
    normalise: bool  # divide the K kept probabilities by their sum
    activation: Activation = "silu"

    def __post_init__(self) -> None:
        _sizes(experts=self.experts, width=self.width)
        _counts(self.trained, self.experts)
        _one_of("activation", self.activation, Activation)

    @property
    def maximum(self) -> int:
        return self.experts


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

    def __post_init__(self) -> None:
        _sizes(units=self.units, space=self.space, block=self.block)
        _counts(self.trained, self.maximum)
        _one_of("activation", self.activation, Activation)
        _one_of("sigma_link", self.sigma_link, SigmaLink)
        _one_of("draws", self.draws, Draws)
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
    """One decoder-only transformer, GPT-2-like or Llama-like. Widths are in elements, `context` in tokens."""

    vocabulary: int
    width: int
    heads: int
    kv_heads: int
    head_width: int
    context: int
    layers: tuple[FeedForward, ...]
    norm: Norm = "rms"
    norm_eps: float = 1e-5
    positions: Positions = "rotary"
    rope_theta: float = 10000.0
    qk_norm: QKNorm = "none"  # "full": over all heads at once, as OLMoE
    clip_qkv: float | None = None
    attention_bias: bool = False
    tied: bool = False

    def __post_init__(self) -> None:
        _sizes(vocabulary=self.vocabulary, width=self.width, context=self.context, layers=len(self.layers))
        _sizes(heads=self.heads, kv_heads=self.kv_heads, head_width=self.head_width)
        _one_of("norm", self.norm, Norm)
        _one_of("positions", self.positions, Positions)
        _one_of("qk_norm", self.qk_norm, QKNorm)
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} heads cannot share {self.kv_heads} key-value heads")
        if self.positions == "rotary" and self.head_width % 2:
            raise ValueError(f"rotary positions need an even head width, got {self.head_width}")

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
        return ExpertRange(len(kinds), kinds[0].trained, 1, min(kind.maximum for kind in kinds))

    @property
    def draws_noise(self) -> bool:
        """Whether a request's seed changes the hidden states, and so belongs to the prefix cache's key."""
        return any(isinstance(kind, Infinity) for kind in self.layers)
