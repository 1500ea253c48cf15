"""The shapes of what lets tokens see each other: attention, latent attention, recurrent layers, and rotary positions.

Frozen values that families build from a checkpoint's config.json; what no decoder can have is a ValueError. What a
layer keeps of a sequence is part of its shape: `Pages` grow with it, a `State` does not.
"""

from dataclasses import dataclass
from typing import Literal

from model.shapes.checks import naturals, one_of, positive, reals, sizes

Scaling = Literal["default", "linear", "dynamic", "yarn", "llama3", "longrope"]
QKNorm = Literal["none", "full", "head", "unit"]


@dataclass(frozen=True, slots=True)
class Pages:
    """Memory that grows with the sequence: per token `heads` keys of `key_width`, and values unless they are the first
    columns of the keys."""

    heads: int
    key_width: int
    values: bool = True


@dataclass(frozen=True, slots=True)
class State:
    """Memory of fixed size per sequence: `size` float32 values."""

    size: int


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary positions (Su et al. 2021) of the first `width` elements of a head, and how they are stretched.

    `interleaved`: pairs are neighbours (2i, 2i + 1), not (i, i + width / 2). The fields below `scaling` are those of
    Hugging Face's `rope_parameters`; what a scaling does not use is ignored. `original` is the context before
    stretching.
    """

    width: int
    theta: float = 10000.0
    interleaved: bool = False
    scaling: Scaling = "default"
    factor: float = 1.0
    original: int = 0
    attention_factor: float | None = None  # what cosines and sines are multiplied by; None: as the scaling says
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    truncate: bool = True
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    short_mscale: float | None = None
    long_mscale: float | None = None

    def __post_init__(self) -> None:
        sizes(rotary_width=self.width)
        one_of("rope_type", self.scaling, Scaling)
        if self.width % 2:
            raise ValueError(f"rotary positions need an even width, got {self.width}")
        if self.scaling in ("dynamic", "yarn", "llama3", "longrope"):
            sizes(original_max_position_embeddings=self.original)
        positive(rope_theta=self.theta, factor=self.factor)
        for value in (*self.short_factor, *self.long_factor):
            positive(short_factor_or_long_factor=value)
        reals(attention_factor=self.attention_factor, mscale=self.mscale, mscale_all_dim=self.mscale_all_dim)
        reals(beta_fast=self.beta_fast, beta_slow=self.beta_slow)
        reals(low_freq_factor=self.low_freq_factor, high_freq_factor=self.high_freq_factor)
        reals(short_mscale=self.short_mscale, long_mscale=self.long_mscale)


@dataclass(frozen=True, slots=True)
class Attention:
    """Grouped-query attention: `heads` queries over `kv_heads` keys and values of `head_width`.

    `window`: only so many tokens back, itself included; `chunk`: only within its own run of so many positions; 0: all.
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
    def memory(self) -> Pages:
        return Pages(self.kv_heads, self.head_width)


@dataclass(frozen=True, slots=True)
class Latent:
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
    def memory(self) -> Pages:
        return Pages(1, self.rank + self.rope.width, values=False)


@dataclass(frozen=True, slots=True)
class Delta:
    """Gated delta rule (arXiv 2412.06464) behind a short causal convolution, as in Qwen3-Next: a recurrent state per
    head instead of keys and values."""

    key_heads: int
    value_heads: int
    key_width: int
    value_width: int
    kernel: int  # of the convolution

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
    def memory(self) -> State:
        return State(self.channels * (self.kernel - 1) + self.value_heads * self.key_width * self.value_width)


Mixer = Attention | Latent | Delta
