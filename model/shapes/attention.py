"""The shapes of what lets tokens see each other: attention, multi-head latent attention, recurrent layers.

Frozen values that families build from a checkpoint's config.json; what no decoder can have is a ValueError. What a
layer keeps of a sequence is part of its shape.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

from model.shapes.checks import naturals, one_of, reals, sizes
from model.shapes.memory import Memory, PagedMemory, StateMemory
from model.shapes.rope import Rope

QKNorm = Literal["none", "full", "head", "unit"]


class AttentionShape(Protocol):
    """What the decoder and the engine ask the shape of a layer's attention."""

    @property
    def memory(self) -> Memory:
        """What is kept of a running sequence between steps."""

    @property
    def rope(self) -> Rope | None:
        """The rotary positions that it uses, if any."""


@dataclass(frozen=True, slots=True)
class Attention:
    """Grouped-query attention: `heads` queries over `kv_heads` keys and values of `head_width`.

    `window`: only so many tokens back, itself included; `chunk`: only within its own run of so many positions; 0: all.
    Not `causal`: later tokens as well, as in an encoder.
    """

    heads: int
    kv_heads: int
    head_width: int
    rope: Rope | None = None
    bias: bool = False  # of queries, keys and values
    out_bias: bool = False
    qk_norm: QKNorm = "none"  # "full": over all heads at once, "head": each, "unit": each, after rotation, no weights
    clip: float | None = None
    scale: float | None = None  # None: head_width ** -0.5
    window: int = 0
    chunk: int = 0
    sinks: bool = False  # one learned logit per head that takes weight and gives nothing
    gated: bool = False  # the output times the sigmoid of a gate that comes with the queries
    floor_scale: float | None = None  # queries times 1 + attn_scale · log(1 + ⌊(position + 1) / floor_scale⌋)
    attn_scale: float = 0.0
    causal: bool = True

    def __post_init__(self) -> None:
        sizes(heads=self.heads, kv_heads=self.kv_heads, head_width=self.head_width)
        naturals(window=self.window, chunk=self.chunk)
        reals(clip=self.clip, scale=self.scale, floor_scale=self.floor_scale, attn_scale=self.attn_scale)
        one_of("qk_norm", self.qk_norm, QKNorm)
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} heads cannot share {self.kv_heads} key-value heads")
        if self.rope is not None and self.rope.width > self.head_width:
            raise ValueError(f"rotary positions of {self.rope.width} elements do not fit heads of {self.head_width}")

    @property
    def memory(self) -> PagedMemory:
        """Keys and values of every token."""
        return PagedMemory(self.kv_heads, self.head_width)


@dataclass(frozen=True, slots=True)
class MLA:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434 §2.1): the cache holds one latent of `rank` and one
    rotary key per token, shared by all heads."""

    heads: int
    query_rank: int | None  # None: queries are projected at once
    rank: int
    plain_width: int  # of a head's part without positions
    rope: Rope
    value_width: int
    bias: bool = False
    scale: float | None = None  # None: (plain_width + rope.width) ** -0.5
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        sizes(heads=self.heads, rank=self.rank, plain_width=self.plain_width, value_width=self.value_width)
        reals(scale=self.scale, norm_eps=self.norm_eps)

    @property
    def memory(self) -> PagedMemory:
        """One latent and one rotary key per token; values are the latents."""
        return PagedMemory(1, self.rank + self.rope.width, values=False)


@dataclass(frozen=True, slots=True)
class GatedDeltaNet:
    """Gated delta spec (arXiv 2412.06464) behind a short causal convolution, as in Qwen3-Next: a recurrent state per
    head instead of keys and values."""

    key_heads: int
    value_heads: int
    key_width: int
    value_width: int
    kernel: int  # of the convolution
    rope = None

    def __post_init__(self) -> None:
        sizes(key_heads=self.key_heads, value_heads=self.value_heads, kernel=self.kernel)
        sizes(key_width=self.key_width, value_width=self.value_width)
        if self.value_heads % self.key_heads:
            raise ValueError(f"{self.value_heads} value heads cannot share {self.key_heads} key heads")

    @property
    def channels(self) -> int:
        """Of the convolution: queries, keys and values side by side."""
        return 2 * self.key_heads * self.key_width + self.value_heads * self.value_width

    @property
    def memory(self) -> StateMemory:
        """The last inputs of the convolution, and a matrix per value head."""
        inputs = self.channels * (self.kernel - 1)
        matrices = self.value_heads * self.key_width * self.value_width
        return StateMemory(inputs + matrices)
