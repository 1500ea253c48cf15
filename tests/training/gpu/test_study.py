"""The sets of rows, and that a study goes on after a row that fails."""

import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.training.gpu.tiny import shape
from training.gpu.plan import Plan
from training.gpu.study import Job, table, work
from training.gpu.study_sets import FIRST, SECOND, SETS, Run


def test_rows_have_names_of_their_own() -> None:
    names = [run.name for runs in SETS.values() for run in runs]
    assert len(set(names)) == len(names)
    assert (len(FIRST), len(SECOND)) == (13, 12)


def test_a_row_that_fails_does_not_cost_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan(rows=4, length=16, warmup=1)
    runs = (
        Run("works", shape("infinity", layers=1), plan),
        Run("fails", shape("infinity", layers=1), replace(plan, counts="linear")),
        Run("works too", shape("topk", layers=1), plan),
    )
    monkeypatch.setitem(SETS, "tiny", runs)
    np.save(tmp_path / "tokens.npy", np.tile(np.arange(10, dtype=np.uint16), 30))
    np.save(tmp_path / "held.npy", np.tile(np.arange(10, dtype=np.uint16), 4)[:34].reshape(2, 17))
    job = Job("tiny", tmp_path / "tokens.npy", tmp_path / "held.npy", tmp_path / "out.jsonl", 2, 2, time.time() + 60)
    for worker in (1, 0):
        work(job, worker)
    found = [json.loads(line) for line in job.out.read_text().splitlines()]
    assert [each["name"] for each in found] == ["fails", "works", "works too"]
    lines = table(job.out, runs).splitlines()
    assert [line[:58].strip() for line in lines] == ["works", "fails", "works too"]
    assert "(3)" in lines[0] and "ValueError: counts must be" in lines[1]
    work(replace(job, deadline=0), 0)
    assert len(job.out.read_text().splitlines()) == 3
