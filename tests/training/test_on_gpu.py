"""From a teacher to a checkpoint that loads: the commands of `training.on_gpu` and `training.export_twin` on a CPU."""

import json
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from tests.training.gpu.tiny import WORDS, shape, write_llama2
from training import export_twin
from training.corpus import train_tokenizer
from training.gpu.plan import Plan
from training.gpu.recipes import TWINS
from training.on_gpu import app
from weights.load import load_model

STORY = "Once the happy little dog jumped over the blue house with the cat and ran to the tree. "


def run(*words: object) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Teacher, tokenizer, held-out text, and what `text` makes of them."""
    here = tmp_path_factory.mktemp("on_gpu")
    (here / "words.txt").write_text(write_llama2(here / "llama2.data"))
    (here / "heldout.txt").write_text("\n<|endoftext|>\n".join(STORY * count for count in range(2, 12)))
    train_tokenizer([STORY, " ".join(WORDS)], 300).save(str(here / "tokenizer.json"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.on_gpu.stories.workers", ThreadPool)  # tests fork no processes
        teacher = here / "teacher.safetensors"
        run("teacher", "--model", here / "llama2.data", "--vocabulary-text", here / "words.txt", "--out", teacher)
        given = ["--teacher", teacher, "--tokenizer", here / "tokenizer.json", "--heldout", here / "heldout.txt"]
        run("text", *given, "--out", here / "tokens", "--rows", 16, "--most", 4096, "--length", 32)
    return here


def test_text_writes_tokens_and_held_out_windows(folder: Path) -> None:
    tokens, held = np.load(folder / "tokens" / "tokens.npy"), np.load(folder / "tokens" / "held.npy")
    told = json.loads((folder / "tokens" / "text.json").read_text())
    assert tokens.dtype == held.dtype == np.uint16 and held.shape[1] == 33
    assert told["tokens"] == len(tokens) > 200 and (tokens == 0).sum() == told["stories"] > 0
    assert tokens.max() < 300


@pytest.mark.parametrize("name", ["infinity", "topk"])
def test_a_twin_is_trained_exported_and_loads(
    name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Plan(rows=4, length=32, warmup=2, by_block=name == "topk")
    monkeypatch.setitem(TWINS, name, (shape(name, vocabulary=300), plan))
    run("twin", name, "--tokens", folder / "tokens", "--out", tmp_path / "runs", "--steps", 3, "--rows", 2)
    told = json.loads((tmp_path / "runs" / f"{name}.json").read_text())
    assert (told["steps"], told["tokens"], told["device"]) == (3, 3 * 2 * 32, "cpu")
    assert [row["K"] for row in told["quality"]] == [1, 2, 3, 4, 6, 8, 12, 16]
    to = tmp_path / f"{name}-stories"
    tokenizer, heldout = folder / "tokenizer.json", folder / "heldout.txt"
    export_twin.main(name, tmp_path / "runs", tokenizer, heldout, to, limit=4)
    model, raw = load_model(to, "float32")
    assert raw["vocab_size"] == 300 and model.config.experts.maximum >= 8
    card = json.loads((to / "card.json").read_text())
    assert [row["num_experts"] for row in card["quality"]] == list(range(1, 9))
    assert card["quality"][3]["agreement"] == card["quality"][3]["relative_quality"] == 1.0
    trained = {row["K"]: row["loss"] for row in told["quality"]}
    for row in card["quality"]:
        if row["num_experts"] in trained:  # other windows, and weights in bfloat16
            assert row["loss"] == pytest.approx(trained[row["num_experts"]], abs=0.3)
    readme = (to / "README.md").read_text()
    assert f"# {name}-stories" in readme
    assert "192 tokens in 3 steps of 2 windows of 32" in readme and told["torch"] == torch.__version__
