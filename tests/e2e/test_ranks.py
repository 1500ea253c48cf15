"""`moedial serve --ranks 2`: the same answers as one process in plain torch, also after a rank has died.

Slow: `make test-ranks` runs it.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from tests.e2e.live import Live, serving

pytestmark = [pytest.mark.slow, pytest.mark.redundant]
FLAGS = ("--model", "topk-stories", "--threads", "1", "--step-ms", "0", "--max-running", "4")
COUNTS = (1, 4, 32)


@pytest.fixture(scope="module")
def expected() -> Iterator[list[str]]:
    """What one process says in plain torch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOEDIAL_KERNELS", "off")
        with serving(*FLAGS, watched=False) as live:
            yield answers(live)


@pytest.mark.parametrize("ranks", [2, 4])
def test_answers_are_those_of_one_process_also_after_a_rank_died(ranks: int, expected: list[str]) -> None:
    with serving(*FLAGS, "--ranks", str(ranks), watched=False) as live:
        execution = httpx.get(f"{live.url}/v1/models").json()["data"][0]["meta"]["execution"]
        sizes = execution["expert_bytes"]
        assert execution["ranks"] == len(sizes) == ranks and len(set(sizes)) == 1
        assert execution["reason"] == f"experts on {ranks} ranks run in plain torch"
        assert answers(live) == expected
        started = rank_pids(live.process.pid)
        assert len(started) == ranks - 1
        os.kill(started[-1], signal.SIGKILL)
        wait_ready(live)
        assert answers(live) == expected
        assert not set(started) & set(rank_pids(live.process.pid))  # the others ended with their engine


def test_ranks_join_from_outside(expected: list[str]) -> None:
    moedial = str(Path(sys.executable).with_name("moedial"))
    address = "127.0.0.1:29517"
    command = [moedial, "rank", "--join", address, "--rank", "1"]
    with subprocess.Popen(command) as rank:
        with serving(*FLAGS, "--ranks", "2", "--rank-address", address, watched=False) as live:
            assert answers(live) == expected
        assert rank.wait(30) == 1  # rank 0 has ended


def answers(live: Live) -> list[str]:
    """Greedy texts at several counts."""
    body = {"prompt": "Once upon a time", "max_tokens": 12, "temperature": 0}
    found = [httpx.post(f"{live.url}/v1/completions", json=body | {"num_experts": n}, timeout=60) for n in COUNTS]
    return [answer.json()["choices"][0]["text"] for answer in found]


def wait_ready(live: Live, seconds: float = 90) -> None:
    """Until the engine has been lost and started again."""
    deadline = time.monotonic() + seconds
    while live.metric("engine_restarts_total") < 1 or httpx.get(f"{live.url}/ready").status_code != 200:
        assert time.monotonic() < deadline, "the engine did not come back"
        time.sleep(0.2)


def rank_pids(server: int) -> list[int]:
    """The rank processes below a server's engine."""
    below = psutil.Process(server).children(recursive=True)
    return [process.pid for process in below if "engine.ranks.rank" in process.cmdline()]
