"""Processors, cores and memory nodes as the kernel lists them: made-up trees of /sys."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model import topology
from model.resources import HOST, available_cores
from model.topology import MAX_CPUS, Node, cpu_list, memory_nodes, physical_cores


def machine(root: Path, nodes: dict[int, str], siblings: dict[int, str]) -> Path:
    """A tree with the processors of each node, and those that share each one's core."""
    files = {f"node/node{node}/cpulist": text for node, text in nodes.items()}
    files |= {f"cpu/cpu{cpu}/topology/thread_siblings_list": text for cpu, text in siblings.items()}
    for name, text in files.items():
        path = root / topology.DEVICES / name
        path.parent.mkdir(parents=True)
        path.write_text(text + "\n")
    return root


@pytest.fixture
def usable(monkeypatch: pytest.MonkeyPatch) -> frozenset[int]:
    """A process that may use processors 0 to 11, but not 3."""
    cpus = frozenset(range(12)) - {3}
    monkeypatch.setattr(topology, "usable_cpus", lambda: cpus)
    return cpus


def test_nodes_hold_what_is_usable_and_hardware_threads_of_one_core_count_once(
    tmp_path: Path, usable: frozenset[int]
) -> None:
    siblings = {cpu: f"{cpu % 8},{cpu % 8 + 8}" for cpu in range(16)}
    root = machine(tmp_path, {0: "0-3,8-11", 1: "4-7,12-15", 2: ""}, siblings)
    # Of core 3 the second thread, 11, is usable; of nodes, 2 has memory alone.
    assert memory_nodes(root) == [Node((0, 1, 2, 8, 9, 10, 11), 4), Node((4, 5, 6, 7), 4)]
    assert physical_cores(root) == 8
    assert available_cores(root).value == 8 and available_cores(root).source == HOST


@pytest.mark.parametrize("cpus, threads", [(1, 1), (2, 2), (3, 3), (4, 4), (6, 4), (8, 4), (10, 5)])
def test_second_hardware_threads_compute_where_there_are_few(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cpus: int, threads: int
) -> None:
    root = machine(tmp_path, {}, {cpu: f"{cpu & ~1}-{cpu | 1}" for cpu in range(cpus)})
    monkeypatch.setattr(topology, "usable_cpus", lambda: frozenset(range(cpus)))
    assert physical_cores(root) == (cpus + 1) // 2 and available_cores(root).value == threads


def test_nodes_are_in_the_order_of_their_numbers(tmp_path: Path, usable: frozenset[int]) -> None:
    root = machine(tmp_path, {10: "0-2", 2: "4-11", 9: "12"}, {})
    assert [node.cpus[0] for node in memory_nodes(root)] == [4, 0]


@pytest.mark.parametrize("nodes", [{}, {0: "0-4"}, {0: "0-11", 1: "4-7"}, {0: "none"}, {0: "0-99999999"}])
def test_nodes_that_do_not_hold_each_processor_once_are_not_believed(
    tmp_path: Path, usable: frozenset[int], nodes: dict[int, str]
) -> None:
    assert memory_nodes(machine(tmp_path, nodes, {})) == [Node(tuple(sorted(usable)), 11)]


def test_this_machine_has_nodes_and_cores() -> None:
    nodes = memory_nodes()
    assert sorted(cpu for node in nodes for cpu in node.cpus) == sorted(topology.usable_cpus())
    assert sum(node.cores for node in nodes) == physical_cores() >= 1


@given(st.sets(st.integers(0, 300), min_size=1, max_size=9))
def test_a_list_is_read_back(cpus: set[int]) -> None:
    assert cpu_list(",".join(map(str, sorted(cpus)))) == cpus
    assert cpu_list(f"{min(cpus)}-{max(cpus)}\n") == set(range(min(cpus), max(cpus) + 1))


@pytest.mark.parametrize("text", ["", ",", "1,", "-1", "1-", "3-1", "a", "1-2-3", "0x1", f"0-{MAX_CPUS}", "9" * 30])
def test_what_is_no_list_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="processor"):
        cpu_list(text)
