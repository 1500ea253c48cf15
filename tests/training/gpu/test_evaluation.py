"""Held-out loss and use of blocks per count."""

import pytest
import torch

from tests.training.gpu.tiny import network, shape
from training.gpu.evaluation import evaluate, spreads
from training.gpu.network import Infinity

HELD = torch.randint(0, 50, (5, 17), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ["infinity", "topk"])
def test_the_used_share_is_proportional_to_the_count(name: str) -> None:
    rows = evaluate(network(shape(name)), HELD, (1, 2, 8), rows=2)
    assert [row["K"] for row in rows] == [1, 2, 8]
    assert [row["used"] for row in rows] == [0.0312, 0.0625, 0.25]
    assert all(0 < row["evenness"] <= 1 and 3 < row["loss"] < 5 for row in rows)


def test_the_loss_does_not_depend_on_how_windows_are_batched() -> None:
    net = network(shape("infinity"))
    losses = [evaluate(net, HELD, (2,), rows=rows)[0]["loss"] for rows in (1, 3, 5)]
    assert losses == pytest.approx([losses[0]] * 3, abs=2e-3)  # in bfloat16
    assert net.training


def test_a_dense_network_has_no_use_of_blocks() -> None:
    assert set(evaluate(network(shape("infinity", kind="dense", largest=1)), HELD, (1,))[0]) == {"K", "loss"}


def test_a_spread_per_layer_as_a_share_of_that_of_the_means() -> None:
    net = network(shape("infinity"))
    for layer, block in enumerate(net.stack()):
        assert isinstance(block.ffn, Infinity)
        block.ffn.router.data[net.shape.space :] = 0  # a spread of 1
        block.ffn.router.data[: net.shape.space] *= 10 ** (layer - 1)
    first, second = spreads(net, HELD)
    assert first == pytest.approx(10, rel=0.2) and second == pytest.approx(1, rel=0.2)
    assert not any(block.ffn._forward_pre_hooks for block in net.stack())
