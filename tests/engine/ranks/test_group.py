"""A real rank process beside rank 0: it loads its part, answers, and its end is named."""

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from engine import logs
from engine.ranks import group, rank
from engine.ranks.group import RankGroup
from engine.types import EngineSettings
from model.decoder import Decoder
from model.errors import CheckpointError, EngineDown
from model.ranks.share import Share
from tests.model.ranks.threads import checkpoint
from tests.model.tiny import PagedRun
from weights.load import load_model
from weights.share import expert_bytes

ROWS, COUNTS = [[5, 1, 30, 8], [11, 60, 59]], [[1, 3], [7, 2]]
Started = tuple[RankGroup, Decoder, Path, "list[EngineDown]"]


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Started]:
    """Two ranks, rank 0's decoder, the checkpoint, and the losses that were noticed while nothing ran."""
    folder, lost = checkpoint(tmp_path_factory.mktemp("ranks")), list[EngineDown]()
    settings = EngineSettings(model=str(folder), device="cpu", ranks=2, rank_seconds=30)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(group, "BEAT_SECONDS", 0.2)
        made = RankGroup(settings, folder, 1, lost.append)
        decoder, _ = load_model(folder, share=Share(0, 2))
        held = made.connect(decoder)
        whole = expert_bytes(load_model(folder)[0])
        assert sum(held) == whole and max(held) < 0.6 * whole
        yield made, decoder, folder, lost
    for process in made.processes.values():
        process.kill()
        process.wait()


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that runs in this process leaves its logging alone."""
    monkeypatch.setattr(logs, "configure", lambda level, format: None)


@pytest.mark.slow
def test_a_rank_of_another_process_gives_the_same_bits(started: Started) -> None:
    _, decoder, folder, _ = started
    runs = [PagedRun(each, ROWS, COUNTS) for each in (decoder, load_model(folder)[0])]
    for lengths in ({0: 3, 1: 1}, {0: 1, 1: 2}):
        found, expected = (run.step(lengths) for run in runs)
        assert all(torch.equal(found[row], expected[row]) for row in expected)


def test_a_rank_joins_once_and_must_be_one_of_the_group(started: Started, quiet: None) -> None:
    made = started[0]
    with pytest.raises(CheckpointError, match=r"rank 1 has joined 127.* already"):
        rank.run(made.address, 1)
    with pytest.raises(CheckpointError, match="rank 2 is not between 1 and 1, the ranks beside rank 0"):
        rank.run(made.address, 2)


@pytest.mark.slow
def test_a_rank_that_is_killed_in_a_step_ends_it_with_its_name(started: Started) -> None:
    made, decoder, _, lost = started
    process = made.processes[1]
    os.kill(process.pid, signal.SIGSTOP)  # it has been asked and has not answered when it is killed
    threading.Timer(0.3, process.kill).start()
    with pytest.raises(EngineDown, match="rank 1 has ended: its connection is closed"):
        PagedRun(decoder, ROWS, COUNTS).step({0: 4, 1: 3})
    made.beats.join(30)
    assert [str(error) for error in lost] == ["rank 1 has ended: its connection is closed"]


def test_a_rank_with_another_checkpoint_ends_the_start(started: Started, tmp_path: Path, quiet: None) -> None:
    _, decoder, folder, _ = started
    settings = EngineSettings(model=str(folder), device="cpu", ranks=2, rank_address="127.0.0.1:0")
    made = RankGroup(settings, folder, 1)
    other = checkpoint(tmp_path)
    (other / "config.json").write_text((other / "config.json").read_text() + " ")
    with pytest.raises(CheckpointError, match="is not the checkpoint that rank 0 serves"):
        rank.run(made.address, 1, str(other))
    with pytest.raises(CheckpointError, match=r"^rank 1: .* is not the checkpoint that rank 0 serves"):
        made.connect(decoder)


def test_an_address_that_is_not_here_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    settings = EngineSettings(model=str(tmp_path), device="cpu", ranks=2, rank_address="192.0.2.1:0")
    with pytest.raises(CheckpointError, match=r"rank_address 192\.0\.2\.1:0: "):
        RankGroup(settings, tmp_path, 1)
