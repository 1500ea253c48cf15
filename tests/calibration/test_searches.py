"""Searches over rules on checkpoints where it is known what helps."""

from pathlib import Path

import pytest
import torch

from calibration import calibrate, normalisers, repair, thresholds
from calibration.options import Options
from calibration.repair_fit import Tables
from engine.build import build_engine
from engine.types import EngineSettings
from model.budget import RoutingRule
from tests.calibration.checkpoints import write_text, write_tokenizer
from tests.calibration.runs import equal_experts, idle_middle, run_of
from tests.weights.checkpoints import INFINITY, write
from weights import calibration as files


def test_repair_wins_back_what_is_pure_scale(tmp_path: Path) -> None:
    with run_of(equal_experts(tmp_path), "1,2,4") as run:
        found = repair.search(run)
        assert found.repaired == (1,) and set(found.options) == {"k1-repaired"}
        assert found.repair_file is not None and found.repair_file.is_file()
        plain, repaired, trained = run.score([run.uniform(1), found.options["k1-repaired"], run.uniform(2)], run.report)
        assert repaired.kl < 0.001 * plain.kl
        assert repaired.agreement > plain.agreement
        assert trained.kl == pytest.approx(0, abs=1e-6)
        assert bool((run.repair.scale[:, 2:] == 1).all() and (run.repair.shift[:, 2:] == 0).all())


def test_repair_that_does_not_help_is_not_kept(tmp_path: Path) -> None:
    with run_of(equal_experts(tmp_path), "1,2") as run:
        best = repair.Best(run, run.decide, (1,))
        best.offer(Tables(torch.full_like(best.tables.scale, 0.1), best.tables.shift), (1,))
        assert best.helped == [] and bool((best.tables.scale == 1).all())
        best.offer(Tables(torch.full_like(best.tables.scale, 1.9), best.tables.shift), (1,))
        best.offer(Tables(torch.full_like(best.tables.scale, 1.5), best.tables.shift), (1,))
        assert best.helped == [1] and bool((best.tables.scale[:, 1] == 1.9).all())


def test_a_normaliser_wins_back_what_is_pure_scale(tmp_path: Path) -> None:
    """M is a half; one expert weighs a quarter, and by the "kept" rule as much as both."""
    with run_of(equal_experts(tmp_path), "1,2") as run:
        found = normalisers.search(run)
        assert found.normalisers == {"1": "kept"}
        plain, kept = run.score([run.uniform(1), found.options["k1-kept"]], run.report)
        assert kept.kl < 0.001 * plain.kl


def test_thresholds_run_the_wanted_mean(tmp_path: Path) -> None:
    with run_of(idle_middle(tmp_path), "1,2,3,4") as run:
        found = thresholds.search(run)
        assert found.options
        for name, budget in found.options.items():
            count = int(name.rpartition("-")[2])
            adaptive, uniform = run.score([budget, run.uniform(count)], run.report)
            assert adaptive.pairs_per_token / 3 == pytest.approx(count, rel=0.15)
            assert adaptive.kl < uniform.kl
        for count_named, threshold in found.thresholds.items():
            assert found.options[f"threshold-{count_named}"].rule.threshold == threshold


def test_families_without_router_weights_are_left_alone(tmp_path: Path) -> None:
    write(tmp_path, INFINITY | {"num_experts_per_tok": 4})
    write_tokenizer(tmp_path)
    with run_of(tmp_path, "1,2,4") as run:
        assert not thresholds.search(run).options
        assert not normalisers.search(run).options


def test_an_engine_repairs_with_what_a_calibration_wrote(tmp_path: Path) -> None:
    folder = equal_experts(tmp_path)
    text = write_text(folder / "text.txt")
    path = calibrate.run(Options(model=str(folder), text=[text], counts="1,2", minutes=0.02, output=folder))
    calibration = files.read(path, files.checkpoint_hash(folder))
    assert calibration.repaired == (1,) and calibration.normalisers == {"1": "kept"}
    plain, repaired = calibration.option("k1"), calibration.option("k1-repaired")
    assert plain is not None and repaired is not None
    assert repaired.quality.kl < 0.001 * plain.quality.kl
    assert repaired.budget.rule == RoutingRule(repair=True)
    _, info = build_engine(EngineSettings(model=str(folder), max_model_len=64))
    assert info.experts.repaired == (1,) and info.calibration_reason == ""
