"""Limits of containers, as the kernel writes them into files: made-up trees of both versions of control groups."""

from pathlib import Path

import pytest

from model.resources import HOST, available_cores, available_memory

V2 = "30 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"
V1 = (
    "32 31 0:29 {0} /sys/fs/cgroup/cpu,cpuacct rw shared:9 - cgroup cgroup rw,cpu,cpuacct\n"
    "35 31 0:32 {0} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
)
UNLIMITED = "9223372036854771712"
MB = 1 << 20


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


def test_version_2_leaves_what_is_not_used_and_files_that_were_read_are_not_used(tmp_path: Path) -> None:
    files = {
        "proc/self/mountinfo": V2,
        "proc/self/cgroup": "0::/",
        "sys/fs/cgroup/memory.max": str(100 * MB),
        "sys/fs/cgroup/memory.current": str(70 * MB),
        "sys/fs/cgroup/memory.stat": f"anon {30 * MB}\ninactive_file {40 * MB}",
        "sys/fs/cgroup/cpu.max": "150000 100000",
    }
    root = tree(tmp_path, files)
    memory, cores = available_memory(root), available_cores(root)
    assert (memory.value, memory.source) == (70 * MB, f"{tmp_path}/sys/fs/cgroup/memory.max")
    assert (cores.value, cores.source) == (1, f"{tmp_path}/sys/fs/cgroup/cpu.max")


def test_of_nested_groups_the_least_counts(tmp_path: Path) -> None:
    top = "sys/fs/cgroup/kubepods.slice"
    files = {
        "proc/self/mountinfo": V2,
        "proc/self/cgroup": "0::/kubepods.slice/pod1/server",
        f"{top}/memory.max": str(90 * MB),
        f"{top}/memory.current": str(50 * MB),
        f"{top}/cpu.max": "100000 100000",
        f"{top}/pod1/memory.max": "max",
        f"{top}/pod1/memory.current": str(20 * MB),
        f"{top}/pod1/cpu.max": "max 100000",
        f"{top}/pod1/server/memory.max": str(60 * MB),
        f"{top}/pod1/server/memory.current": str(10 * MB),
    }
    root = tree(tmp_path, files)
    assert available_memory(root).value == 40 * MB
    assert available_cores(root).value == 1
    assert "kubepods.slice/memory.max" in available_memory(root).source


@pytest.mark.parametrize(("mounted", "own"), [("/docker/1f2e", "/docker/1f2e"), ("/", "/docker/1f2e"), ("/", "/")])
def test_version_1_with_and_without_a_namespace(tmp_path: Path, mounted: str, own: str) -> None:
    """A container sees its own group on top of the mount, whatever the host calls it."""
    files = {
        "proc/self/mountinfo": V1.format(mounted),
        "proc/self/cgroup": f"5:memory:{own}\n3:cpu,cpuacct:{own}\n1:name=systemd:{own}",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": str(64 * MB),
        "sys/fs/cgroup/memory/memory.usage_in_bytes": str(24 * MB),
        "sys/fs/cgroup/memory/memory.stat": f"inactive_file 1\ntotal_inactive_file {4 * MB}",
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "50000",
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000",
    }
    root = tree(tmp_path, files)
    assert available_memory(root).value == 44 * MB
    assert available_cores(root).value == 1
    assert available_cores(root).source.endswith("cpu.cfs_quota_us")


def test_without_limits_the_host_counts(tmp_path: Path) -> None:
    files = {
        "proc/self/mountinfo": V1.format("/") + V2.replace("/sys/fs/cgroup", "/sys/fs/cgroup/unified"),
        "proc/self/cgroup": "5:memory:/\n3:cpu,cpuacct:/\n0::/",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": UNLIMITED,
        "sys/fs/cgroup/memory/memory.usage_in_bytes": str(24 * MB),
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1",
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000",
    }
    root = tree(tmp_path, files)
    assert available_memory(root).source == HOST and available_cores(root).source == HOST


def test_a_limit_that_is_used_up_leaves_nothing(tmp_path: Path) -> None:
    files = {
        "proc/self/mountinfo": V2,
        "proc/self/cgroup": "0::/../other",
        "sys/fs/cgroup/memory.max": str(10 * MB),
        "sys/fs/cgroup/memory.current": str(11 * MB),
    }
    assert available_memory(tree(tmp_path, files)).value == 0


@pytest.mark.parametrize("text", ["", "garbage", "0::", "-:-:\n::", "5:memory"])
def test_what_cannot_be_read_is_no_limit(tmp_path: Path, text: str) -> None:
    root = tree(tmp_path, {"proc/self/mountinfo": text, "proc/self/cgroup": text})
    assert available_memory(root).source == available_cores(root).source == HOST
    assert available_memory(tmp_path / "nowhere").source == HOST
