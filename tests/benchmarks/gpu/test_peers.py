"""What ours is held against on a GPU computes the same mixture as the decoder's own module."""

import pytest
import torch

from benchmarks.gpu import peers
from model.moe.topk import TopKMixture
from model.shapes.mixtures import Router, TopK
from tests.model.tiny import randomise, use

SHAPES = {
    "olmoe": TopK(6, 24, 2),
    "qwen3_moe": TopK(6, 24, 2, Router(normalise=True)),
    "gpt_oss": TopK(
        6, 24, 2, Router(normalise=True, logit_bias=True), activation="swiglu_clamped", bias=True, interleaved=True
    ),
}


@pytest.mark.parametrize("way", [peers.grouped, peers.gathered])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_peer_computes_the_mixture(shape: TopK, way: peers.Layer) -> None:
    module = TopKMixture(32, shape)
    randomise(module)
    module.requires_grad_(False)
    x_TD = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    for count in (1, 2, 6):
        torch.testing.assert_close(way(module, x_TD, count), module(x_TD, use([count] * 5)), atol=2e-5, rtol=2e-5)
