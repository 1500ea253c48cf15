"""The long-context benchmark's own logic: its options, its ceilings, and what its copies of a cache decode."""

from pathlib import Path

import pytest
import typer

from benchmarks import long_context
from benchmarks.checkpoints import LONG, write_random
from benchmarks.long_context import WAYS, Way, measured, numbers, report, rows_of, ways_of
from benchmarks.rounds import Rounds
from benchmarks.systems.long_ours import copies, measure
from benchmarks.systems.system import LongRates, PeerFailed
from engine.build import prepare
from engine.types import EngineSettings
from model.backends.cpu.kernels.library import load
from tests.benchmarks.test_figures import SMALL
from weights.config import read_config
from weights.load import load_model

TINY = LONG | SMALL | {"num_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("long") / "model"
    write_random(TINY, path)
    return path


def test_options_name_what_is_wrong() -> None:
    assert numbers("4096,64,64", "--contexts", 5000) == [64, 4096]
    with pytest.raises(typer.BadParameter, match="--contexts: '0' is no number from 1 to 5000"):
        numbers("64,0", "--contexts", 5000)
    with pytest.raises(typer.BadParameter, match="--systems: 'llama' is none of bf16"):
        ways_of("bf16,llama")


@pytest.mark.skipif(not load().native, reason="ours would run on torch")
def test_ours_comes_first_and_counts_the_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_context, "installed", lambda peer: "1")
    assert [way.name for way in ways_of("llamacpp-q4_0,int4")] == ["moedial int4", "llama.cpp q4_0"]


def test_every_length_and_batch_is_measured(folder: Path) -> None:
    rates = measure(folder, [40, 160], [1, 3], 2, 2)
    assert [(each.context, each.batch) for each in rates] == [(40, 1), (40, 3), (160, 1), (160, 3)]
    assert all(each.prefill > 0 and each.decode > 0 and (each.touched or 0) >= 4 for each in rates)


def test_copies_decode_as_the_first_does(folder: Path) -> None:
    settings = EngineSettings(str(folder), max_model_len=160, block_size=128)
    made = copies(prepare(load_model(folder, "bfloat16")[0], settings)[0], 160, 2, 2)
    made.prefill(0, 150)
    made.copy(150)
    made.prompt[1] = made.prompt[0]  # the same token after the prompt
    made.decode(150, 2, 4)
    assert made.sequences[0].tokens == made.sequences[1].tokens
    assert len(made.sequences[0].tokens) == 150 + 1 + 4


def test_ceiling_counts_weights_and_cache(folder: Path) -> None:
    config, _ = read_config(folder)
    runs = [LongRates(length, 2, 1, 1, 4) for length in (100, 200)]
    short, long = rows_of({WAYS["bf16"]: runs}, config, 10.0)
    cached = 2 * 100 * len(config.attention) * 2 * 64 * 2  # sequences, tokens, layers, keys and values, width, bytes
    assert (long["gigabytes"] - short["gigabytes"]) * 1e9 == pytest.approx(cached)
    assert long["ceiling"] == pytest.approx(2 * 10.0 / long["gigabytes"])
    assert "| 100, 2 " in report([short, long])


def test_a_ceiling_of_several_sequences_needs_ours(folder: Path) -> None:
    """What experts they touch is counted by ours at the same length and batch; one sequence touches its own count."""
    config, _ = read_config(folder)
    theirs = {WAYS["llamacpp-bf16"]: [LongRates(100, batch, 1, 1) for batch in (1, 8)]}
    one, eight = rows_of(theirs, config, 10.0)
    assert one["ceiling"] > 0
    assert eight["ceiling"] is None
    cells = [line.split("|")[1:-1] for line in report([one, eight]).splitlines() if line.startswith("| 100, 8")]
    assert [cell.strip() for cell in cells[-1]] == ["100, 8", "–"]
    ours = {WAYS["bf16"]: [LongRates(100, 8, 1, 1, 7.0), LongRates(200, 8, 1, 1, 6.0)]}
    at_8 = [each for each in rows_of(ours | theirs, config, 10.0) if (each["context"], each["batch"]) == (100, 8)]
    assert [each["system"] for each in at_8] == ["moedial", "llama.cpp bf16"]
    assert at_8[0]["ceiling"] == at_8[1]["ceiling"]


def test_every_system_has_its_turn_in_each_round(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    turns: list[str] = []

    def call(way: Way) -> list[LongRates]:
        turns.append(way.name)
        if turns == ["moedial", "llama.cpp bf16"] * 2:
            raise PeerFailed("no memory")
        return [LongRates(100, 1, 10, len(turns), 4)]

    found = measured([WAYS["bf16"], WAYS["llamacpp-bf16"]], call, Rounds(3, 60))
    assert turns == ["moedial", "llama.cpp bf16", "moedial", "llama.cpp bf16", "moedial"]
    ours, theirs = rows_of(found, read_config(folder)[0], 10.0)
    assert (ours["decode"], [run["decode"] for run in ours["runs"]]) == (3, [1, 3, 5])
    assert [run["decode"] for run in theirs["runs"]] == [2]
    assert "llama.cpp bf16 is out: no memory" in capsys.readouterr().out
