"""The numbers that benchmarks print are what they say they are."""

from pathlib import Path

import pytest
import torch

from benchmarks.arrivals import Loaded
from benchmarks.checkpoints import MIXTRAL_500M, OLMOE_900M, write_random
from benchmarks.dial_http import falls
from benchmarks.layers.shapes import Shape, calls, parameters, work
from benchmarks.layers.systems import build, torch_mixture
from benchmarks.mixed import classes, figures
from benchmarks.systems.ours import OurEngine
from benchmarks.tables import grid, rivals, runs, table, titled
from benchmarks.touched import expert_weights, shared_weights, step_bytes
from benchmarks.workload import OUTPUT
from model.decoder import Decoder, parameter_count
from model.shapes.mixtures import Infinity, Router, TopK
from weights.config import read_config
from weights.tokenizer import Tokenizer

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 600,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("benchmark") / "mixtral"
    write_random(MIXTRAL_500M | SMALL, path)
    return path


def row(
    system: str, batch: int, decode: float, weights: str = "bf16", ours: bool = False, file: str = ""
) -> dict[str, object]:
    return {
        "system": system,
        "weights": weights,
        "file": file,
        "ours": ours,
        "batch": batch,
        "num_experts": 2,
        "decode": decode,
        "prefill": 1.0,
        "runs": [{"decode": decode, "prefill": 1.0}],
    }


def test_peers_are_held_against_what_stores_weights_alike() -> None:
    rows = [
        row("we", 1, 90, ours=True),
        row("we int8", 1, 120, "8 bit", True),
        row("a", 1, 45),
        row("b", 1, 40, "8 bit"),
    ]
    assert rivals(rows) == {"a": "we", "b": "we int8"}
    assert rivals([rows[0], rows[3]]) == {"b": "we"}
    last = table(rows, "decode").splitlines()[-1]
    assert [cell.strip() for cell in last.strip("|").split("|")] == ["1, 2", "90", "120", "45", "40", "2.00", "3.00"]


def test_peers_are_held_against_the_same_file_first() -> None:
    ours = [row("we", 1, 90, ours=True), row("we int4", 1, 200, "4 bit", True)]
    files = [row(f"we {kind}", 1, 150, "4 bit", True, kind) for kind in ("q4_0", "q4_k_m")]
    peers = [row(f"they {kind}", 1, 100, "4 bit", file=kind) for kind in ("q4_0", "q4_k_m", "iq4_xs")]
    assert rivals([*ours, *files, *peers]) == {
        "they q4_0": "we q4_0",
        "they q4_k_m": "we q4_k_m",
        "they iq4_xs": "we int4",
    }


def test_without_ours_peers_are_held_against_nothing() -> None:
    assert rivals([row("a", 1, 45)]) == {}
    assert table([row("a", 1, 45)], "decode").splitlines()[-1].split() == ["|", "1,", "2", "|", "45", "|"]


def test_tables_say_of_how_many_runs_they_are_and_how_far_these_spread() -> None:
    once, thrice = row("we", 1, 90, ours=True), row("a", 1, 45)
    assert "slowest" not in titled("decode", [once], "decode")
    assert titled("decode", [once], "decode").startswith("**decode, tokens/s, one run**")
    thrice["runs"] = [{"decode": speed, "prefill": 1.0} for speed in (45, 1240, 44)]
    both = titled("decode", [once, thrice], "decode")
    assert both.startswith("**decode, tokens/s, medians of 1 to 3 runs**")
    assert both.splitlines()[-3].split() == ["|", "batch,", "K", "|", "we", "|", "a", "|"]
    assert both.splitlines()[-1].split() == ["|", "1,", "2", "|", "90–90", "|", "44–1,240", "|"]
    assert runs([thrice]) == "medians of 3 runs"


def test_tables_by_other_keys() -> None:
    rows = [row("we", 8, 90, ours=True) | {"context": 4096}]
    lines = table(rows, "decode", ("context", "batch")).splitlines()
    assert [cell.strip() for cell in lines[0].strip("|").split("|")] == ["context, batch", "we"]
    assert [cell.strip() for cell in lines[2].strip("|").split("|")] == ["4,096, 8", "90"]


def test_a_missing_figure_is_a_dash() -> None:
    lines = table([row("we", 1, 90, ours=True), row("we", 4, 9, ours=True), row("a", 4, 45)], "decode").splitlines()
    assert "–" in lines[2]
    assert "–" not in lines[3]


def test_grid_is_markdown() -> None:
    assert grid(["a", "b"], [["x", "1"]]).splitlines() == ["| a   |   b |", "| --- | --: |", "| x   |   1 |"]


def test_touched_weights_add_up_to_the_model(folder: Path) -> None:
    config, raw = read_config(folder)
    embedding = raw["vocab_size"] * raw["hidden_size"]
    every = step_bytes(config, "8 bit", None, raw["num_experts"])
    assert every == parameter_count(Decoder(config)) - embedding
    assert step_bytes(config, "bf16", 3, 2) == 2 * shared_weights(config) + 2 * 3 * expert_weights(config)
    assert step_bytes(config, "8 bit experts", 3, 2) == 2 * shared_weights(config) + 3 * expert_weights(config)
    weights = shared_weights(config) + 3 * expert_weights(config)
    assert step_bytes(config, "4 bit", 3, 2, own=True) == weights * (4 + 8 / 32) / 8
    assert step_bytes(config, "4 bit", 3, 2) == weights * (4 + 16 / 32) / 8


def test_random_checkpoint_serves_and_has_a_tokenizer(folder: Path) -> None:
    with OurEngine().open(folder, 2) as session:
        rates = session.run([2])[2]
    assert rates.prefill > 0
    assert rates.decode > 0
    assert 4 <= (rates.touched or 0) <= 8  # two layers, two requests, two experts each
    assert Tokenizer.load(folder).encode("Hello")


def test_mixed_requests_all_end_and_are_timed(folder: Path) -> None:
    wishes = classes(4, 8, 2)
    assert wishes == {0: 8, 1: 2, 2: 8, 3: 2}
    times = Loaded.load(folder).serve(wishes, 4, 0.0)
    assert all(len(moments) == OUTPUT and moments == sorted(moments) for moments in times.values())
    assert len(figures(times, wishes)) == 5


def test_figures_of_known_times() -> None:
    times = {0: [1.0 + n for n in range(OUTPUT)], 1: [3.0 + 2 * n for n in range(OUTPUT)]}
    found = figures(times, {0: 8, 1: 2})
    assert found["tok/s"] == pytest.approx(2 * OUTPUT / (3 + 2 * (OUTPUT - 1)))
    assert found["first token, K=8 class, ms"] == pytest.approx(1000)
    assert found["per token, K=2 class, ms"] == pytest.approx(2000)


TOPK = Shape("topk", 64, TopK(experts=8, width=32, trained=2, router=Router(normalise=True)))
INFINITE = Shape("infinity", 64, Infinity(units=256, latent_dim=16, keep_ratio=0.25, trained=2, maximum=8, block=32))


@pytest.mark.parametrize("shape", [TOPK, INFINITE], ids=lambda shape: shape.name)
def test_every_way_computes_the_same_layer(shape: Shape) -> None:
    weights = parameters(shape, 0)
    call = calls(shape, 4, 2)[0]
    with torch.inference_mode():
        expected = torch_mixture(shape, weights)(call.x_TD, call.use).float()
        for name, layers in build(shape, [weights]).items():
            if not name.startswith("dense"):
                assert torch.allclose(layers[0](call.x_TD, call.use).float(), expected, rtol=0.05, atol=0.02), name


def test_work_of_one_token_is_its_own() -> None:
    shape, count = TOPK, 3
    inputs = calls(shape, 1, count)
    found = work(shape, torch_mixture(shape, parameters(shape, 0)), inputs)
    expert, router = 3 * 64 * 32, 8 * 64
    assert found.distinct == count
    assert found.bytes == 2 * (router + count * expert + 2 * 64)
    assert found.flops == 2 * (router + count * expert)


def test_published_shapes() -> None:
    assert OLMOE_900M["num_experts"] == 64
    assert MIXTRAL_500M["norm_topk_prob"] is True


@pytest.mark.parametrize(
    ("losses", "speeds", "all_fall"),
    [
        ((2.0, 1.9, 1.8), (300, 200, 100), True),
        ((2.0, 2.0, 1.8), (300, 200, 100), False),
        ((3, 2, 1), (9, 9, 8), False),
    ],
)
def test_loss_and_speed_must_both_fall_from_count_to_count(
    losses: tuple[float, ...], speeds: tuple[float, ...], all_fall: bool
) -> None:
    rows = [{"loss": loss, "tokens_per_second": speed} for loss, speed in zip(losses, speeds, strict=True)]
    assert falls(rows) is all_fall
