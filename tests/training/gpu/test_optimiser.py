"""Muon's views of parameters as matrices, and which parameter goes to which optimiser."""

import pytest
import torch
from torch import nn

from tests.training.gpu.tiny import network, shape
from training.gpu.optimiser import Muon, Optimiser, cut, join, view_of
from training.gpu.plan import Plan
from training.optimiser import orthogonalise


@pytest.mark.parametrize("view", [(1, 1), (4, 1), (1, 3), (2, 3)])
def test_joining_undoes_cutting(view: tuple[int, int]) -> None:
    stacked = torch.arange(2 * 8 * 6.0).view(2, 8, 6)
    matrices = cut(stacked, view)
    assert matrices.shape == (2, *view, 8 // view[0], 6 // view[1])
    assert torch.equal(join(matrices), stacked)
    rows, columns = 8 // view[0], 6 // view[1]
    assert torch.equal(matrices[1, 0, -1], stacked[1, :rows, -columns:])


def test_matrices_are_orthogonalised_each_for_itself() -> None:
    """One step from zero, without decay: the parameter is the negative direction, of a momentum that has just begun."""
    parameter = nn.Parameter(torch.zeros(8, 6))
    grad = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
    parameter.grad = grad.clone()
    Muon([parameter], [(2, 1)], decay=0.0).step(0.1)
    expected = orthogonalise((0.05 + 0.95 * 0.05) * torch.stack(grad.chunk(2))).flatten(0, 1)
    torch.testing.assert_close(parameter.detach(), -0.1 * expected, atol=1e-3, rtol=0.02)


def test_parameters_of_one_shape_do_not_mix() -> None:
    generator = torch.Generator().manual_seed(1)
    alone, first, second = (nn.Parameter(torch.ones(6, 6)) for _ in range(3))
    grad, other = (torch.randn(6, 6, generator=generator) for _ in range(2))
    alone.grad, first.grad, second.grad = grad.clone(), grad.clone(), other
    Muon([alone], [(1, 1)], 0.1).step(0.1)
    Muon([first, second], [(1, 1)] * 2, 0.1).step(0.1)
    torch.testing.assert_close(first, alone, atol=2e-3, rtol=0.02)
    assert not torch.allclose(first, second, atol=0.01)


@pytest.mark.parametrize("name", ["infinity", "topk"])
def test_muon_takes_the_hidden_matrices_and_adam_the_rest(name: str) -> None:
    net = network(shape(name))
    optimiser = Optimiser(net, Plan(adam_lr=0.3, route_lr=0.2))
    names = {id(parameter): key for key, parameter in net.named_parameters()}
    muon = {names[id(p)] for group in optimiser.muon.groups for p in group}
    assert {key.split(".", 2)[-1] for key in muon} == {"qkv", "out", "ffn.up", "ffn.down"}
    embedding, routes = ({names[id(p)] for p in group["params"]} for group in optimiser.adam.param_groups)
    assert embedding == {"embed"}
    assert {key.split(".")[-1] for key in routes} == ({"router", "scores"} if name == "infinity" else {"router"})


def test_views_follow_blocks_and_experts() -> None:
    plan, whole = Plan(), Plan(by_block=False)
    infinity, topk = shape("infinity"), shape("topk")
    assert view_of(infinity, plan, "layers.0.ffn.up") == (96, 1)
    assert view_of(infinity, plan, "layers.0.ffn.down") == (1, 96)
    assert view_of(topk, plan, "layers.0.ffn.up") == (64, 1)  # a gate and an up of each expert
    assert view_of(topk, whole, "layers.0.ffn.up") == view_of(topk, plan, "layers.0.qkv") == (1, 1)
