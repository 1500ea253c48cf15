"""Threads in groups, one for each memory node: equal bits whatever the groups, and how they are chosen."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from model.backends.cpu.kernels import threads
from model.backends.cpu.kernels.pack import Kind, pack, unpack
from model.resources import HOST, Amount
from model.shapes.attention import GatedDeltaNet
from model.shapes.mixtures import Router
from model.topology import Node, usable_cpus
from tests.model.backends.cpu.kernels.cases import (
    KINDS,
    Case,
    Make,
    argmax_case,
    chosen,
    constrain_case,
    experts_case,
    ffn_case,
    linear_case,
    ops,
)
from tests.model.backends.cpu.kernels.delta_cases import delta_case
from tests.model.backends.cpu.kernels.latent_cases import latent_case
from tests.model.backends.cpu.kernels.mixture_cases import draw_case, masks_case, route_case, topk_case
from tests.model.backends.cpu.kernels.pages import attend_case, attention_case
from tests.model.backends.cpu.kernels.rule_cases import repaired_infinity_case
from tests.model.tiny import infinity, llama_like

# Threads, and the cores of each node. More threads than this machine has cores, nodes that differ, and a node too many.
GROUPS = [(4, [1, 1]), (5, [3, 1]), (6, [1, 1, 1, 1]), (2, [1, 1, 1, 1])]


@pytest.fixture(autouse=True)
def one_group(monkeypatch: pytest.MonkeyPatch) -> Any:
    yield
    ops.set_nodes([1], [])


def same_in_groups(run: Callable[[], Tensor]) -> None:
    ops.set_nodes([1], [])
    ops.set_threads(1)
    alone = run()
    for count, cores in GROUPS:
        ops.set_nodes(cores, [])
        ops.set_threads(count)
        assert torch.equal(run(), alone), f"{count} threads in {len(cores)} groups"


def products(kind: Kind) -> list[Case]:
    """Few and many rows; more and fewer panels than nodes; panels with a tail."""
    make = Make(1)
    return [
        linear_case(make, 1, 1000, 300, kind, "rms", True),
        linear_case(make, 9, 48, 700, kind),
        linear_case(make, 200, 130, 90, kind),
        experts_case(make, chosen(make, 2, 9), 250, 180, kind),
        experts_case(make, chosen(make, 120, 9), 70, 100, kind),
        ffn_case(make, 3, 200, 300, kind, bias=True),
        topk_case(make, 25, 130, 180, 6, kind, router=Router(normalise=True)),
        repaired_infinity_case(make, 25, 80, infinity(), 480, kind),
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_groups_change_no_product(kind: Kind) -> None:
    for case in products(kind):
        same_in_groups(lambda case=case: case.run(torch.arange(case.rows)))  # type: ignore[misc]


def test_groups_change_no_row() -> None:
    make = Make(2)
    for case in (
        argmax_case(make, 200, 900),
        constrain_case(make, 200, 900),
        route_case(make, 300, 60, Router(normalise=True)),
        draw_case(make, 300, infinity()),
        masks_case(make, 300, 90, 20),
    ):
        same_in_groups(lambda case=case: case.run(torch.arange(case.rows)))  # type: ignore[misc]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_groups_change_no_attention(dtype: torch.dtype) -> None:
    kind: Kind = "float" if dtype == torch.float32 else "bfloat16"
    layer = llama_like(infinity(), head_width=16)
    for case in (
        attend_case(Make(1), [1500, 40], 4, 2, 16, dtype),
        attention_case(Make(1), [90, 120], layer, kind),
    ):
        same_in_groups(lambda case=case: case.run(case.layout.whole()))  # type: ignore[misc]


def test_groups_change_no_latent_no_state_and_no_cache_in_int8() -> None:
    for case in (
        latent_case(Make(1), [60, 17], "bfloat16"),
        delta_case(Make(1), [30, 5], GatedDeltaNet(2, 4, 16, 32, 4), "bfloat16"),
        attend_case(Make(1), [1100, 40], 4, 1, 16, torch.int8),
    ):
        same_in_groups(lambda case=case: case.run(case.layout.whole()))  # type: ignore[misc]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("outputs", [16, 80, 700])
def test_weights_placed_on_nodes_are_the_same(kind: Kind, outputs: int) -> None:
    """Three matrices whose parts begin within pages."""
    weight = Make(1).weight(3, outputs, 60)
    plain = pack(weight, kind)
    for cores in ([1, 1], [1, 1, 1, 1]):
        ops.set_nodes(cores, [])
        ops.set_threads(4)
        placed = pack(weight, kind)
        assert torch.equal(placed.packed, plain.packed) and torch.equal(unpack(placed, 3), unpack(plain, 3))


@pytest.mark.parametrize("size, matrices, outputs", [(0, 0, 0), (0, 1, 16), (5, 1, 16), (1 << 22, 2, 80)])
def test_fresh_memory_is_zero_and_of_its_size(size: int, matrices: int, outputs: int) -> None:
    for cores in ([1], [1, 1]):
        ops.set_nodes(cores, [])
        memory = ops.allocate(size, matrices, outputs)
        assert memory.shape == (size,) and not memory.any()


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[int], list[int]]]:
    """What the pool is told of nodes, on a machine of two that may use processors 0 to 7."""
    calls: list[tuple[list[int], list[int]]] = []
    monkeypatch.setattr(ops, "set_nodes", lambda *given: calls.append(given), raising=False)
    monkeypatch.setattr(threads, "memory_nodes", lambda: [Node((0, 1, 4), 2), Node((2, 3), 2)])
    monkeypatch.setattr(threads, "usable_cpus", lambda: frozenset(range(8)))
    monkeypatch.delenv("MOEDIAL_NODES", raising=False)
    return calls


def test_nodes_are_those_of_the_machine(told: list[Any]) -> None:
    threads.arrange()
    assert told == [([2, 2], [0, 0, 1, 1, 0])]


def test_threads_of_a_machine_with_one_node_are_not_bound(told: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "memory_nodes", lambda: [Node((0, 1), 2)])
    threads.arrange()
    monkeypatch.setattr(threads, "memory_nodes", lambda: [Node((cpu,), 1) for cpu in range(33)])
    threads.arrange()
    assert told == [([2], []), ([8], [])]


@pytest.mark.parametrize(
    "asked, cores, node_of_cpu",
    [("4", [1] * 4, []), ("1", [1], []), ("0-3/4,6-7", [4, 3], [0, 0, 0, 0, 1, -1, 1, 1]), ("2", [1, 1], [])],
)
def test_nodes_are_those_that_are_asked_for(
    told: list[Any], monkeypatch: pytest.MonkeyPatch, asked: str, cores: list[int], node_of_cpu: list[int]
) -> None:
    monkeypatch.setattr(threads, "node_of", lambda cpus: Node(tuple(sorted(cpus)), len(cpus)))
    monkeypatch.setenv("MOEDIAL_NODES", asked)
    threads.arrange()
    assert told == [(cores, node_of_cpu)]


@pytest.mark.parametrize(
    "asked, said",
    [
        ("0", "MOEDIAL_NODES makes 0 groups, not 1 to 32"),
        ("33", "MOEDIAL_NODES makes 33 groups, not 1 to 32"),
        ("two", "MOEDIAL_NODES is 'two': 'two' is no processor"),
        ("0-1/", "MOEDIAL_NODES is '0-1/': '' is no processor"),
        ("0-1/1-2", "MOEDIAL_NODES is '0-1/1-2', which names a processor in two groups"),
        ("0-1/8", "MOEDIAL_NODES is '0-1/8', but this process may not use processor 8"),
    ],
)
def test_nodes_that_cannot_be_are_refused(
    told: list[Any], monkeypatch: pytest.MonkeyPatch, asked: str, said: str
) -> None:
    monkeypatch.setenv("MOEDIAL_NODES", asked)
    with pytest.raises(ValueError, match=f"^{said}"):
        threads.arrange()
    assert not told


def test_threads_wait_long_only_where_processors_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "usable_cpus", lambda: frozenset(range(8)))
    monkeypatch.setattr(threads, "available_cores", lambda: Amount(8, HOST))
    assert [threads.spin_time_us(count) for count in (6, 7, 8)] == [500, 50, 50]
    monkeypatch.setattr(threads, "available_cores", lambda: Amount(8, "cpu.max"))
    assert threads.spin_time_us(2) == 50


def test_threads_bound_to_processors_compute_the_same() -> None:
    """Of two nodes, one has this process's processors and one none."""
    case = linear_case(Make(1), 30, 300, 200, "float")
    alone = case.run(torch.arange(30))
    ops.set_nodes([1, 1], threads.node_of_cpu([Node(tuple(usable_cpus()), 1)]))
    ops.set_threads(4)
    assert torch.equal(case.run(torch.arange(30)), alone)
