"""A whole calibration of tiny checkpoints: known answers, interruption, and where the file goes."""

import hashlib
import os
from pathlib import Path
from typing import Any

import pytest

from calibration import measure, opening, speed
from calibration.calibrate import run
from calibration.options import Options
from calibration.partial import FILE as PARTIAL
from calibration.scoring import Score, Scorer
from engine.build import build_engine
from engine.types import EngineSettings
from model.backends.cpu.kernels.library import load
from model.errors import CheckpointError, InvalidRequest
from tests.calibration.checkpoints import two_experts, write_task, write_text
from tests.calibration.runs import equal_experts
from tests.weights.checkpoints import INFINITY, write
from weights import calibration as files
from weights.calibration import Calibration
from weights.config import read_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return two_experts(tmp_path_factory.mktemp("two"))


@pytest.fixture(autouse=True)
def one_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of times, which are not what these tests are about."""
    monkeypatch.setattr(speed, "MIN_ROUNDS", 1)
    monkeypatch.setattr(speed, "MAX_ROUNDS", 1)


def options(folder: Path, **changes: Any) -> Options:
    """A short calibration of a folder."""
    fields: dict[str, Any] = {"model": str(folder), "minutes": 0.02, "searches": False}
    return Options(**fields | changes)


def calibrated(folder: Path, **changes: Any) -> Calibration:
    return files.read(run(options(folder, **changes)), files.checkpoint_hash(folder))


def test_experts_that_do_nothing_cost_no_quality(folder: Path, tmp_path: Path) -> None:
    found = calibrated(folder, output=tmp_path)  # on its own text, where the trained count is best by construction
    quality = {option.counts[0]: option.quality for option in found.options}
    assert set(quality) == {1, 2, 3, 4, 5, 6} and found.trained == 4
    for count in (2, 3, 4, 5, 6):
        assert quality[count].relative == pytest.approx(1.0, abs=1e-6)
        assert quality[count].agreement == 1.0
        assert quality[count].kl == pytest.approx(0.0, abs=1e-6)
    assert quality[1].relative < 0.98
    assert quality[1].kl > 1e-3
    assert quality[1].agreement < 1.0


def test_the_file_says_what_was_measured(folder: Path, tmp_path: Path) -> None:
    text, task = write_text(tmp_path / "text.txt"), write_task(tmp_path / "riddles.jsonl")
    plots = [tmp_path / "plot.svg", tmp_path / "plot.png"]
    found = calibrated(folder, text=[text], tasks=[task], counts="1,2", price_per_hour=0.9, output=tmp_path, plot=plots)
    assert [option.name for option in found.options] == ["k1", "k2", "k4"]
    assert found.text.endswith("windows of text.txt")
    assert found.tokens > 0 and found.layers == 2
    first, second, trained = found.options
    for option in found.options:
        assert option.speed is not None
        assert set(option.quality.tasks) == {"riddles acc", "riddles acc_norm"}
        rate = option.speed.tokens_per_second["16"]
        assert found.cost_per_million[option.name] == pytest.approx(0.9 / 3600 / rate * 1e6)
        assert option.pairs_per_token == 2 * option.counts[0]
    assert trained.relative_cost == 1.0
    expert = 2 * 3 * 64 * 16 * 4  # of two layers, in float32
    assert second.bytes_per_token - first.bytes_per_token == expert
    assert second.flops_per_token - first.flops_per_token == expert / 2
    assert found.aiq == pytest.approx(measure.aiq(found.options))
    assert all(plot.stat().st_size > 0 for plot in plots)
    assert not (tmp_path / PARTIAL).exists()


def test_without_a_text_the_model_writes_one(folder: Path, tmp_path: Path) -> None:
    found = calibrated(folder, output=tmp_path, counts="1")
    assert "the model wrote at the trained count" in found.text
    trained, one = found.options[1].quality, found.options[0].quality
    assert one.kl > 0 and trained.kl == pytest.approx(0.0, abs=1e-6)


@pytest.mark.skipif(not load().native, reason="native kernels are not loaded")
def test_the_file_says_with_which_settings_it_was_measured(folder: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"quantize": "int8", "kv_cache_dtype": "int8", "output": tmp_path, "counts": "4"}
    found = calibrated(folder, **settings)
    assert (found.dtype, found.quantize, found.kv_cache_dtype) == ("float32", "int8 experts", "int8")


def test_random_draws_are_the_same_for_every_budget(tmp_path: Path) -> None:
    write(tmp_path / "model", INFINITY)
    found = calibrated(tmp_path / "model", counts="1,2")
    assert found.options[1].quality.kl == 0.0
    assert found.options[1].quality.agreement == 1.0


def test_an_interrupted_run_goes_on_where_it_stopped(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"text": [write_text(tmp_path / "text.txt")], "counts": "1,2", "minutes": 5}  # enough for the whole text
    whole = calibrated(folder, output=tmp_path / "whole", **given)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        scored = count_windows(patch, stop_after=5)
        run(options(folder, output=tmp_path / "cut", **given))
    assert (tmp_path / "cut" / PARTIAL).exists()
    assert not (tmp_path / "cut" / files.FILE).exists()

    again = count_windows(monkeypatch, stop_after=10**9)
    resumed = calibrated(folder, output=tmp_path / "cut", **given)
    windows = resumed.tokens // read_config(folder)[0].context
    assert len(scored) + len(again) == 3 * windows
    assert [option.quality for option in resumed.options] == [option.quality for option in whole.options]
    assert not (tmp_path / "cut" / PARTIAL).exists()


def count_windows(monkeypatch: pytest.MonkeyPatch, stop_after: int) -> list[int]:
    """Count the windows that are scored; after so many a Ctrl-C comes."""
    seen: list[int] = []
    score = Scorer._score

    def counted(self: Scorer, *arguments: Any) -> Score:
        if len(seen) == stop_after:
            raise KeyboardInterrupt
        seen.append(1)
        return score(self, *arguments)

    monkeypatch.setattr(Scorer, "_score", counted)
    return seen


def test_results_of_another_text_are_not_taken_over(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        count_windows(patch, stop_after=2)
        run(options(folder, text=[write_text(tmp_path / "a.txt")], output=tmp_path, counts="1"))
    calibrated(folder, text=[write_text(tmp_path / "b.txt", words=1500)], output=tmp_path, counts="1")
    assert "is of another text: the calibration starts again" in caplog.text


def test_a_read_only_checkpoint_is_calibrated_into_the_cache(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test may run as root, whom no mode of a folder stops."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    writable = opening.writable
    monkeypatch.setattr(opening, "writable", lambda place: place != folder and writable(place))
    before = sorted(os.listdir(folder))
    path = run(options(folder, counts="1"))
    assert path.is_relative_to(tmp_path)
    assert files.find(folder) == path
    assert sorted(os.listdir(folder)) == before


def test_a_folder_where_no_file_can_be_made_is_not_writable(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert not opening.writable(tmp_path / "file" / "below")
    assert opening.writable(tmp_path / "new")
    with pytest.raises(CheckpointError, match="cannot be written"):
        opening.work_folder(tmp_path, tmp_path / "file" / "below")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"counts": "9"}, "--counts must be between 1 and 6 for this model, got 9"),
        ({"counts": "two"}, "--counts takes whole numbers from 1 on, as 1,2,4; got 'two'"),
        ({"plot": [Path("plot.pdf")]}, "--plot plot.pdf: the name must end in one of .svg, .png"),
    ],
)
def test_options_that_cannot_be_met_are_refused_first(folder: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message.replace(".", r"\.")):
        run(options(folder, **changes))


def test_a_dense_model_has_nothing_to_calibrate(tmp_path: Path) -> None:
    raw = {"model_type": "llama", "vocab_size": 37, "hidden_size": 16, "num_hidden_layers": 1}
    raw |= {"num_attention_heads": 4, "intermediate_size": 12, "max_position_embeddings": 64, "dtype": "float32"}
    write(tmp_path, raw)
    with pytest.raises(CheckpointError, match="no mixture-of-experts layers"):
        run(options(tmp_path))


def test_statistics_of_repairs_are_kept_beside_the_calibration_that_names_them(tmp_path: Path) -> None:
    folder = equal_experts(tmp_path)
    found = calibrated(folder, text=[write_text(tmp_path / "text.txt")], counts="1,2", searches=True)
    assert found.repaired == (1,)
    assert found.repair_hash == hashlib.sha256((folder / files.REPAIR_FILE).read_bytes()).hexdigest()
    repaired, plain = found.option("k1-repaired"), found.option("k1")
    assert repaired is not None and plain is not None
    assert repaired.quality.kl < 1e-6 < plain.quality.kl
    assert build_engine(EngineSettings(model=str(folder), step_ms=0))[1].experts.repaired == (1,)
    assert not list(folder.glob(".*"))

    assert calibrated(folder, counts="1,2").repair_hash == ""
    assert not (folder / files.REPAIR_FILE).exists()


def test_text_and_tasks_need_a_tokenizer(tmp_path: Path) -> None:
    write(tmp_path / "model", INFINITY)
    for name, path in (("text", write_text(tmp_path / "a.txt")), ("tasks", write_task(tmp_path / "b.jsonl"))):
        with pytest.raises(CheckpointError, match=f"--{name} needs a tokenizer.json"):
            run(options(tmp_path / "model", **{name: [path]}))
