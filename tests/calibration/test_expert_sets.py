"""Expert sets as measured: which experts are kept, what the file says, and the commands that make and use one."""

from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from typer.testing import CliRunner

from calibration.expert_sets import gate_mass, kept_count, loss, make_set
from calibration.windows import window_batch
from model.backends.torch.attend import WholeAttend
from model.budget import ExpertBudget
from model.errors import CheckpointError, InvalidRequest
from model.step import Observer
from server.cli import app
from tests.calibration.checkpoints import TWO, two_experts, write_text
from tests.e2e.live import serving
from tests.weights.checkpoints import INFINITY, OLMOE, random_decoder, write
from weights.calibration import checkpoint_hash
from weights.expert_sets import find, read
from weights.extract import extract, restricted
from weights.load import load_model

GREEDY: dict[str, Any] = {"max_tokens": 24, "temperature": 0}
WINDOWS = [tuple(i * 7 % 37 for i in range(start, start + 17)) for start in range(12)]


class Scores(Observer):
    """All router scores of one pass."""

    def __init__(self) -> None:
        self.found: list[torch.Tensor] = []

    def routed(self, layer: int, pairs: int, load_E: torch.Tensor, scores_TE: torch.Tensor | None) -> None:
        assert scores_TE is not None
        self.found.append(scores_TE)


def test_gate_mass_is_the_sum_of_the_two_best_scores_of_each_token() -> None:
    model = random_decoder(OLMOE)
    seen = Scores()
    batch = window_batch(torch.tensor(WINDOWS), [ExpertBudget((2, 2))] * len(WINDOWS))
    model.hidden(batch, WholeAttend(17), seen)
    expected = torch.zeros(2, 5, dtype=torch.float64)
    for layer, scores_TE in enumerate(seen.found):
        for row in scores_TE.double().tolist():
            for expert in sorted(range(5), key=lambda e: -row[e])[:2]:
                expected[layer, expert] += row[expert]
    torch.testing.assert_close(gate_mass(model, WINDOWS), expected)


def test_the_loss_is_of_all_tokens_but_the_first_of_a_window() -> None:
    model = random_decoder(OLMOE)
    total = 0.0
    for window in WINDOWS:
        batch = window_batch(torch.tensor([window[:-1]]), [ExpertBudget((2, 2))])
        log_TV = model(batch, WholeAttend(16)).double().log_softmax(-1)
        total -= sum(float(log_TV[i, token]) for i, token in enumerate(window[1:]))
    assert loss(model, WINDOWS) == pytest.approx(total / (16 * len(WINDOWS)), rel=1e-5)


def test_the_experts_that_a_text_uses_are_kept(tmp_path: Path) -> None:
    """Experts 0 and 1 alone do anything; all tokens score them best."""
    folder, text = two_experts(tmp_path / "model"), write_text(tmp_path / "text.txt")
    found, path = make_set(str(folder), [text], "4", "stories", 1000, [text], None)
    assert read(find(folder, "stories"), checkpoint_hash(folder)) == found
    assert path == folder / "expert-sets" / "stories.json"
    assert all({0, 1} <= set(experts) and len(experts) == 4 for experts in found.experts)
    assert (found.name, found.text, found.num_experts) == ("stories", "text.txt", 6)
    assert all(0.9 < mass <= 1 for mass in found.mass)
    model, raw = load_model(folder)
    assert found.other is not None
    assert found.task.all == pytest.approx(found.other.all, rel=0.2)
    assert restricted(model, raw, found.experts)[0].config.mixtures[0].num_experts == 4


def test_keeping_everything_changes_no_loss(tmp_path: Path) -> None:
    folder, text = two_experts(tmp_path / "model"), write_text(tmp_path / "text.txt")
    found, _ = make_set(str(folder), [text], "100%", "all", 1000, [], tmp_path / "out")
    assert found.experts == (tuple(range(6)),) * 2
    assert found.task.all == found.task.kept and found.other is None
    assert found.mass == pytest.approx((1, 1))
    assert (tmp_path / "out/expert-sets/all.json").exists()


@pytest.mark.parametrize(
    ("keep", "count"), [("25%", 8), ("100%", 32), ("0%", 1), ("3.2%", 1), ("5%", 2), ("12.5%", 4), ("8", 8), ("99", 99)]
)
def test_a_share_is_rounded_to_the_nearest_number(keep: str, count: int) -> None:
    assert kept_count(keep, 32) == count


@pytest.mark.parametrize("keep", ["", "25 %", "-1", "a", "1e3%", "9" * 7, "٣"])
def test_a_share_that_is_none_is_refused(keep: str) -> None:
    with pytest.raises(InvalidRequest, match="--keep must be a share as 25% or a number"):
        kept_count(keep, 32)


@pytest.mark.parametrize(
    ("raw", "keep", "said"),
    [
        (TWO, "3", r"3 experts .* a token runs 4 \(the trained count\) of 6"),
        (TWO, "200%", "12 experts of a layer cannot be kept"),
        (INFINITY, "2", "no expert sets: its mixtures are of the kind Infinity"),
        (TWO, "4", "--text needs a tokenizer.json"),
    ],
)
def test_what_cannot_be_kept_is_refused_before_anything_is_read(
    tmp_path: Path, raw: dict[str, Any], keep: str, said: str
) -> None:
    write(tmp_path, raw)
    with pytest.raises(CheckpointError, match=said):
        make_set(str(tmp_path), [tmp_path / "no.txt"], keep, "x", 1000, [], None)


def test_the_commands_make_a_set_and_a_checkpoint(tmp_path: Path) -> None:
    folder, text = two_experts(tmp_path / "model"), write_text(tmp_path / "text.txt")
    options = ["--text", str(text), "--other", str(text), "--keep", "4", "--name", "stories", "--tokens", "1000"]
    made = CliRunner().invoke(app, ["expert-set", str(folder), *options])
    assert made.exit_code == 0, made.output
    assert "4 of 6 experts of each layer hold" in made.output and "loss on other text: " in made.output
    extracted = CliRunner().invoke(app, ["extract", str(folder), "stories", str(tmp_path / "small")])
    assert extracted.output == f"{tmp_path / 'small'} has 4 of 6 experts of each layer\n"
    model, _ = load_model(tmp_path / "small")
    assert model.config.experts.maximum == 4
    assert (tmp_path / "small/tokenizer.json").exists()


@pytest.mark.slow
def test_an_extracted_checkpoint_answers_as_requests_that_name_its_set_and_refuses_more(
    tmp_path: Path,
) -> None:
    folder, text = two_experts(tmp_path / "model"), write_text(tmp_path / "text.txt")
    found, _ = make_set(str(folder), [text], "5", "stories", 1000, [], None)
    extract(folder, found, tmp_path / "small")
    body = {"model": "small", "prompt": "once upon a", "max_tokens": 4, "ignore_eos": True}
    with serving("--model", str(tmp_path / "small"), "--threads", "1") as live:
        url = f"{live.url}/v1/completions"
        usage = httpx.post(url, json=body | {"num_experts": 5}, timeout=60).raise_for_status().json()["usage"]
        assert (usage["num_experts"], usage["completion_tokens"]) == (5, 4)
        refused = httpx.post(url, json=body | {"num_experts": 6}, timeout=60)
        assert refused.status_code == 400
        assert "num_experts must be between 1 and 5 for this model, got 6" in refused.text
        expected = httpx.post(url, json=body | GREEDY, timeout=60).raise_for_status().json()
    with serving("--model", str(folder), "--served-name", "small", "--threads", "1") as live:
        url = f"{live.url}/v1/completions"
        for same in ({"experts": {"set": "stories"}}, {"model": "small@stories"}):
            found = httpx.post(url, json=body | GREEDY | same, timeout=60).raise_for_status().json()
            assert found["choices"][0]["text"] == expected["choices"][0]["text"]
            assert found["usage"]["routed_pairs"] == expected["usage"]["routed_pairs"]
        assert (
            "'other' is not an expert set of this model; it has stories"
            in (httpx.post(url, json=body | {"experts": {"set": "other"}}, timeout=60).json()["error"]["message"])
        )
