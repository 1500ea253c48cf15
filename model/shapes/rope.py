"""The shape of rotary positions: which part of a head is turned, and how they are stretched beyond their context."""

import math
from dataclasses import dataclass
from typing import Literal

from model.shapes.checks import one_of, positive, reals, sizes

Scaling = Literal["default", "linear", "dynamic", "yarn", "llama3", "longrope"]


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
        self._check_factors(short_factor=self.short_factor, long_factor=self.long_factor)
        reals(attention_factor=self.attention_factor, mscale=self.mscale, mscale_all_dim=self.mscale_all_dim)
        reals(beta_fast=self.beta_fast, beta_slow=self.beta_slow)
        reals(low_freq_factor=self.low_freq_factor, high_freq_factor=self.high_freq_factor)
        reals(short_mscale=self.short_mscale, long_mscale=self.long_mscale)

    def _check_factors(self, **factors: tuple[float, ...]) -> None:
        """Raise ValueError unless every pair has a factor above zero, where the scaling uses them."""
        pairs = self.width // 2
        for name, values in factors.items():
            if self.scaling == "longrope" and len(values) != pairs:
                raise ValueError(f"{name} has {len(values)} factors, but {self.width} elements are {pairs} pairs")
            for value in values:
                positive(**{name: value})


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """0.1 · mscale · ln(factor) + 1 (2309.00071 eq. 22; DeepSeek's form)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
