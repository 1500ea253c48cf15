"""How much memory and how many cores this process may use: those of its container, where that has fewer than the host.

Reads control groups, version 1 and 2, under a root folder, so that a test can bring its own.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from model.topology import computing_cpus

HOST = "the host"


@dataclass(frozen=True, slots=True)
class Amount:
    """Bytes or cores, and where the number comes from."""

    value: int
    source: str


@dataclass(frozen=True, slots=True)
class Version:
    """Where one version of control groups writes its limits. `unused`: what the kernel gives up first of files read."""

    memory: str
    usage: str
    unused: str


V1 = Version("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
V2 = Version("memory.max", "memory.current", "inactive_file")


def available_memory(root: Path = Path("/")) -> Amount:
    """Bytes that can still be allocated: the least of the host and of every control group that holds this process."""
    return min([Amount(psutil.virtual_memory().available, HOST), *_memory(root)], key=_value)


def available_cores(root: Path = Path("/")) -> Amount:
    """Cores that this process may compute on, at least 1: of a quota of 1.5 cores one, since half a core would only be
    waited for, and the HTTP process needs some of it.
    """
    return min([Amount(computing_cpus(root), HOST), *_quotas(root)], key=_value)


def _value(amount: Amount) -> int:
    return amount.value


def _memory(root: Path) -> Iterator[Amount]:
    """What each limit leaves. Usage counts without files that were read, which the kernel gives up first."""
    for version, folder in _groups(root, "memory"):
        file = folder / version.memory
        limit, used = _number(file), _number(folder / version.usage)
        if limit is not None and used is not None:
            unused = _table(folder / "memory.stat").get(version.unused, 0)
            kept = max(0, used - unused)
            yield Amount(max(0, limit - kept), str(file))


def _quotas(root: Path) -> Iterator[Amount]:
    for version, folder in _groups(root, "cpu"):
        file = folder / ("cpu.max" if version is V2 else "cpu.cfs_quota_us")
        words = _text(file).split()
        if version is V1:
            words += _text(folder / "cpu.cfs_period_us").split()
        if len(words) == 2 and all(word.isdecimal() for word in words) and int(words[1]):  # "max" and -1: no quota
            cores = int(words[0]) // int(words[1])
            yield Amount(max(1, cores), str(file))


def _groups(root: Path, controller: str) -> Iterator[tuple[Version, Path]]:
    """This process's control groups that may limit something, from its own up to the uppermost one that is mounted."""
    entries = _text(root / "proc/self/cgroup").splitlines()
    paths = dict(map(_entry, entries))
    for line in _text(root / "proc/self/mountinfo").splitlines():
        left, _, right = line.partition(" - ")
        fields, kind = left.split(), right.split()
        if kind[:1] == ["cgroup2"] and "" in paths:
            folders = _upwards(root, fields[3], fields[4], paths[""])
            yield from ((V2, folder) for folder in folders)
        elif kind[:1] == ["cgroup"] and controller in kind[-1].split(","):
            matching = (path for names, path in paths.items() if controller in names.split(","))
            folders = _upwards(root, fields[3], fields[4], next(matching, "/"))
            yield from ((V1, folder) for folder in folders)


def _entry(line: str) -> tuple[str, str]:
    """The controllers and the path of a line such as `4:memory:/docker/1f2e`; version 2 names no controllers."""
    _, names, path = [*line.split(":", 2), "", ""][:3]
    return names, path


def _upwards(root: Path, mounted: str, point: str, own: str) -> Iterator[Path]:
    """The folders of a group and of those above it. A container often sees its own group as the top of the mount, and
    its path as the host names it: folders that are not there are passed over."""
    top = root / point.lstrip("/")
    inside = own.removeprefix(mounted.rstrip("/")).strip("/")
    folder = top / inside if ".." not in inside.split("/") else top
    for each in (folder, *folder.parents):
        if each.is_dir():
            yield each
        if each == top:
            return


def _text(path: Path) -> str:
    try:
        return path.read_text("ascii", "replace")
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    word = _text(path).strip()
    return int(word) if word.isdecimal() else None


def _table(path: Path) -> dict[str, int]:
    pairs = [line.split() for line in _text(path).splitlines()]
    complete = (pair for pair in pairs if len(pair) == 2)
    return {name: int(value) for name, value in complete if value.isdecimal()}
