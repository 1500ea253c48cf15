"""How the kernels' threads are divided among the machine's memory nodes, and how long they spin before they sleep.

`MOEDIAL_NODES` chooses the nodes: nothing, as the machine has them; a number of groups, of threads that are bound to no
processor; or processors by group, as `0-15/16-31`. Nothing here changes a result.
"""

import os
from collections.abc import Sequence

import torch

from model.resources import HOST, available_cores
from model.topology import Node, cpu_list, memory_nodes, node_of, usable_cpus

MAX_NODES = 32  # `MAX_NODES` of csrc/pool.h
SPIN_TIME_US, LONG_SPIN_TIME_US = 50, 500
SPARE_CPUS = 2  # for the HTTP process and the system


def arrange() -> None:
    """Divide the threads as MOEDIAL_NODES says.

    Raises:
        ValueError: it says nothing that this machine could do.
    """
    asked = os.environ.get("MOEDIAL_NODES", "")
    if asked.isdecimal():
        torch.ops.moedial.set_nodes([1] * _checked(int(asked)), [])
        return
    nodes = _groups(asked) if asked else memory_nodes()
    if len(nodes) > MAX_NODES and not asked:  # no harm but to speed
        nodes = [node_of(usable_cpus())]
    _checked(len(nodes))
    torch.ops.moedial.set_nodes([node.cores for node in nodes], node_of_cpu(nodes) if len(nodes) > 1 else [])


def use(threads: int) -> None:
    """Have the kernels compute on so many threads."""
    torch.ops.moedial.set_threads(threads)
    torch.ops.moedial.set_spin_time(spin_time_us(threads))


def spin_time_us(threads: int) -> int:
    """How long a thread spins before it sleeps.

    If processors are left for other programs, longer than the time between two steps; if not, or if a container's
    processor time is limited, about the time between two layers.
    """
    ours = available_cores().source == HOST and len(usable_cpus()) >= threads + SPARE_CPUS
    return LONG_SPIN_TIME_US if ours else SPIN_TIME_US


def node_of_cpu(nodes: Sequence[Node]) -> list[int]:
    """For each processor up to the last usable one the node's place in the list; -1 where it is in none."""
    places = {cpu: place for place, node in enumerate(nodes) for cpu in node.cpus}
    return [places.get(cpu, -1) for cpu in range(max(places) + 1)]


def _groups(asked: str) -> list[Node]:
    lists = []
    for text in asked.split("/"):
        try:
            lists.append(cpu_list(text))
        except ValueError as error:
            raise ValueError(f"MOEDIAL_NODES is {asked!r:.80}: {error}") from None
    listed = [cpu for cpus in lists for cpu in cpus]
    if len(set(listed)) != len(listed):
        raise ValueError(f"MOEDIAL_NODES is {asked!r:.80}, which names a processor in two groups")
    if foreign := set(listed) - usable_cpus():
        raise ValueError(f"MOEDIAL_NODES is {asked!r:.80}, but this process may not use processor {min(foreign)}")
    return [node_of(cpus) for cpus in lists]


def _checked(count: int) -> int:
    if not 1 <= count <= MAX_NODES:
        raise ValueError(f"MOEDIAL_NODES makes {count} groups, not 1 to {MAX_NODES}")
    return count
