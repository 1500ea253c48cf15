"""The layer that benchmarks time on the native kernels is the mixture that plain torch computes."""

import pytest
import torch

from benchmarks.layers.native import native_layer
from model.backends.cpu.kernels.library import load
from model.moe.infinity import InfinityMixture
from model.moe.topk import TopKMixture
from tests.model.tiny import infinity, randomise, topk, use

WIDTH = 32


@pytest.mark.skipif(not load().native, reason="no native kernels")
@pytest.mark.parametrize(
    "module", [TopKMixture(WIDTH, topk(width=16)), InfinityMixture(WIDTH, infinity(draws="points"))]
)
def test_the_native_layer_computes_the_mixture(module: TopKMixture | InfinityMixture) -> None:
    randomise(module)
    module.bfloat16().requires_grad_(False)
    layer = native_layer(module.config, dict(module.named_parameters()))
    assert layer is not None
    x_TD, step = torch.randn(5, WIDTH).bfloat16(), use([1, 2, 2, 3, 1])
    expected_TD = module(x_TD, step).float()
    assert (layer(x_TD, step) - expected_TD).square().mean().sqrt() < 0.05 * expected_TD.std()
