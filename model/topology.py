"""The processors that this process may use, by physical core and memory node, as the kernel lists them under /sys.

Every file is read up to a limit, under a root folder, so that a test can bring its own. What cannot be read is taken
for a machine with one node and one processor a core. A container's quota is in `model/resources.py`.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

FILE_LIMIT = 1 << 16  # bytes
MAX_CPUS = 1 << 14  # the kernel's own limit is 8,192
MAX_NODES = 1 << 10
FEW_CPUS = 4
DEVICES = "sys/devices/system"


@dataclass(frozen=True, slots=True)
class Node:
    """A memory node's processors (hardware threads) that this process may use, and how many physical cores they are."""

    cpus: tuple[int, ...]
    cores: int


def usable_cpus() -> frozenset[int]:
    """The processors in this process's affinity mask."""
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def physical_cores(root: Path = Path("/"), cpus: Iterable[int] | None = None) -> int:
    """Physical cores of the processors, by default of the usable ones: two hardware threads of a core are one."""
    return len({_core(root, cpu) for cpu in (usable_cpus() if cpus is None else cpus)})


def computing_cpus(root: Path = Path("/")) -> int:
    """How many threads are to compute: one for each physical core, but up to four for as many processors.

    One thread alone does not fill a core: it waits for memory and for its own results. Where threads are many,
    memory is the limit, and a second one on a core would only cost.
    """
    return max(physical_cores(root), min(len(usable_cpus()), FEW_CPUS))


def memory_nodes(root: Path = Path("/")) -> list[Node]:
    """The nodes that have usable processors, by number."""
    usable = usable_cpus()
    folders = sorted((root / DEVICES / "node").glob("node[0-9]*"), key=_number)[:MAX_NODES]
    found = [usable & _listed(folder / "cpulist") for folder in folders]
    if sum(map(len, found)) != len(usable) or frozenset().union(*found) != usable:
        found = [usable]
    return [node_of(cpus, root) for cpus in found if cpus]


def node_of(cpus: Iterable[int], root: Path = Path("/")) -> Node:
    """A node of these processors."""
    numbers = tuple(sorted(cpus))
    return Node(numbers, physical_cores(root, numbers))


def cpu_list(text: str) -> frozenset[int]:
    """The numbers of a list such as `0-3,8`, as the kernel writes it.

    Raises:
        ValueError: it is no such list, or names a processor that the kernel could not number.
    """
    numbers: set[int] = set()
    for part in text.strip().split(","):
        first, dash, last = part.partition("-")
        if not first.isdecimal() or not (last if dash else first).isdecimal():
            raise ValueError(f"{part!r:.40} is no processor and no range of processors")
        begin, end = int(first), int(last if dash else first)
        if not begin <= end < MAX_CPUS:
            raise ValueError(f"processors {part!r:.40} are not a rising range below {MAX_CPUS}")
        numbers.update(range(begin, end + 1))
    return frozenset(numbers)


def _core(root: Path, cpu: int) -> int:
    """A processor's core, named by the first processor on it."""
    siblings = _listed(root / DEVICES / "cpu" / f"cpu{cpu}" / "topology" / "thread_siblings_list")
    return min(siblings, default=cpu)


def _number(folder: Path) -> int:
    digits = folder.name.removeprefix("node")
    return int(digits) if digits.isdecimal() else MAX_NODES


def _listed(file: Path) -> frozenset[int]:
    """The processors that a file lists; none where it cannot be read."""
    try:
        with file.open("r", encoding="ascii", errors="replace") as opened:
            return cpu_list(opened.read(FILE_LIMIT))
    except (OSError, ValueError):
        return frozenset()
