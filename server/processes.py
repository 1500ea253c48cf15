"""Memory, processor time and open files of both processes, under the names that all Prometheus clients use.

They are read from /proc at a scrape; on other systems than Linux there are none.
"""

from collections.abc import Callable

from prometheus_client import CollectorRegistry
from prometheus_client.process_collector import ProcessCollector

ENGINE_NAMESPACE = "moedial:engine"
SERIES = (
    ("resident_memory_bytes", "gauge", "Resident memory"),
    ("virtual_memory_bytes", "gauge", "Virtual memory"),
    ("cpu_seconds_total", "counter", "User and system processor time"),
    ("open_fds", "gauge", "Open file descriptors"),
    ("max_fds", "gauge", "File descriptors that may be open"),
    ("start_time_seconds", "gauge", "When the process started, since the epoch"),
)


def watch_processes(registry: CollectorRegistry, engine_pid: Callable[[], int | None]) -> None:
    """Add the series of this process, and of the engine process while there is one."""
    ProcessCollector(registry=registry)
    ProcessCollector(ENGINE_NAMESPACE, lambda: engine_pid() or "none", registry=registry)


def process_rows() -> list[str]:
    """The series as rows of the docs' table."""
    owners = (("", "of the HTTP process"), (f"{ENGINE_NAMESPACE}_", "of the engine process"))
    rows = []
    for namespace, owner in owners:
        for name, kind, meaning in SERIES:
            rows.append(f"| `{namespace}process_{name}` | {kind} | | {meaning}, {owner} |")
    return rows
