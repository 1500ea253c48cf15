"""Layers of published shapes with random weights, made on the card: their parts of a decoder, and toy ones of the same
kinds for dry runs. It measures nothing.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from model.moe.infinity import InfinityMixture
from model.moe.topk import TopKMixture
from model.shapes.attention import Attention
from model.shapes.mixtures import Infinity, Router, TopK
from model.shapes.rope import Rope

SEED = 11


@dataclass(frozen=True, slots=True)
class LayerShape:
    """One layer of a decoder of this width."""

    name: str
    width: int
    moe: TopK
    attention: Attention

    @property
    def expert_weights(self) -> int:
        """Of one expert."""
        return 3 * self.width * self.moe.width


GPT_OSS_ROUTER = Router(normalise=True, logit_bias=True)
SHAPES = (
    LayerShape("OLMoE-1B-7B", 2048, TopK(64, 1024, 8), Attention(16, 16, 128, Rope(128), qk_norm="full")),
    LayerShape(
        "Qwen3-30B-A3B", 2048, TopK(128, 768, 8, Router(normalise=True)),
        Attention(32, 4, 128, Rope(128), qk_norm="head")
    ),
    LayerShape(
        "gpt-oss-20b", 2880,
        TopK(32, 2880, 4, GPT_OSS_ROUTER, activation="swiglu_clamped", bias=True, interleaved=True),
        Attention(64, 8, 64, Rope(64), bias=True, out_bias=True, sinks=True),
    ),
)  # fmt: skip
INFINITY = Infinity(units=12288, latent_dim=64, keep_ratio=0.25, trained=2, maximum=8, block=64)


def toy(shape: LayerShape) -> LayerShape:
    """The same kinds of layers in sizes that an interpreter takes."""
    attention = replace(shape.attention, heads=4, kv_heads=2, head_width=16, rope=Rope(16))
    return replace(shape, width=32, moe=replace(shape.moe, experts=4, width=24, trained=2), attention=attention)


def shapes(dry: bool) -> list[LayerShape]:
    """All, or toys of all."""
    return [toy(shape) for shape in SHAPES] if dry else list(SHAPES)


def infinity_shape(dry: bool) -> Infinity:
    """The ∞-MoE of the visit."""
    return replace(INFINITY, units=128, latent_dim=6, block=16) if dry else INFINITY


@torch.no_grad()
def randomise(module: nn.Module, device: torch.device, seed: int = SEED) -> None:
    """Matrices keep the size of what they multiply, norms are near one, biases are small."""
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in module.named_parameters():
        is_norm = "norm" in name and name.endswith("weight")
        std = 0.1 if parameter.ndim < 2 else parameter.shape[-1] ** -0.5
        parameter.normal_(mean=float(is_norm), std=std, generator=generator)


def mixture(shape: LayerShape, device: torch.device, dtype: torch.dtype, seed: int = SEED) -> TopKMixture:
    """The module of the layer's mixture."""
    with torch.device("meta"):
        module = TopKMixture(shape.width, shape.moe).to(dtype)
    module = module.to_empty(device=device)
    randomise(module, device, seed)
    return module.requires_grad_(False)


def infinity(kind: Infinity, width: int, device: torch.device, dtype: torch.dtype) -> InfinityMixture:
    """The module of an ∞-MoE."""
    with torch.device(device):
        module = InfinityMixture(width, kind).to(dtype)
    randomise(module, device)
    return module.requires_grad_(False)


def rows(tokens: int, width: int, device: torch.device, dtype: torch.dtype, seed: int = SEED) -> Tensor:
    """Inputs of a layer."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(tokens, width, generator=generator, device=device).to(dtype)
