"""The shape of a decoder and of its mixtures, as frozen values. Families build these from a checkpoint's config.json.

Nothing here knows tensor names, files or requests.
"""

from dataclasses import dataclass
from typing import Literal

from model.budget import ExpertRange

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]


@dataclass(frozen=True, slots=True)
class Dense:
    """An ordinary feed-forward layer of `width` hidden units."""

    width: int
    activation: Activation
    gated: bool = True
    bias: bool = False


@dataclass(frozen=True, slots=True)
class TopK:
    """Sparse mixture: softmax over `experts` router logits, the K best run (Shazeer et al. 2017; OLMoE, Mixtral)."""

    experts: int
    width: int
    trained: int
    normalise: bool  # divide the K kept probabilities by their sum
    activation: Activation = "silu"

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
    sigma_link: Literal["exp", "softplus"] = "exp"
    sigma_min: float = 0.0  # added to the linked value
    draws: Literal["independent", "antithetic"] = "independent"

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
    norm: Literal["layer", "rms"] = "rms"
    norm_eps: float = 1e-5
    positions: Literal["rotary", "learned"] = "rotary"
    rope_theta: float = 10000.0
    qk_norm: Literal["none", "full"] = "none"  # "full": over all heads at once, as OLMoE
    clip_qkv: float | None = None
    attention_bias: bool = False
    tied: bool = False

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
