"""Upcycling: what the mixture computes before training, what it learns from, and the whole command."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from model.backends.torch.attend import WholeAttend
from model.decoder import Decoder
from model.layers import DenseFFN
from model.moe.base import sort_pairs
from model.moe.topk import TopKMixture
from tests.training.gpu.tiny import WORDS, write_llama2
from training import upcycle as upcycling
from training.dense_teacher import read_teacher
from training.recipe import Recipe
from training.step import make_batch
from training.upcycle import Cut, Distiller, mixtral_config, run_split, upcycle
from weights.load import load_model
from weights.tokenizer import Tokenizer

CUT = Cut(experts=4, copies=2, trained=2)
STORY = "the happy little dog jumped over the blue house with the cat and ran to the tree "
IDS = torch.tensor([[0, 3, 260, 1, 7, 265, 270, 280]])
Dense = tuple[Decoder, dict[str, Any]]


@pytest.fixture
def dense(tmp_path: Path) -> Dense:
    model, raw, _ = read_teacher(tmp_path / "llama2.data", write_llama2(tmp_path / "llama2.data"))
    with torch.no_grad():
        for number in range(len(model.layers)):
            module = model.layers[number].ffn
            assert isinstance(module, DenseFFN)
            module.up.weight *= 4  # so that it matters which units are computed
            module.down.weight *= 30
    return model, raw


def mixture_of(model: Decoder, number: int) -> TopKMixture:
    """The mixture of one layer."""
    module = model.layers[number].ffn
    assert isinstance(module, TopKMixture)
    return module


def prefer_none(model: Decoder) -> None:
    """Give all experts equal weights."""
    for number in range(len(model.layers)):
        mixture_of(model, number).router.data.zero_()


def logits(model: Decoder, count: int) -> Tensor:
    found: Tensor = model(make_batch(IDS, [count] * len(model.config.mixtures), 0), WholeAttend(IDS.shape[1]))
    return found.detach()


def test_a_router_that_prefers_none_makes_what_the_dense_model_computes(dense: Dense) -> None:
    mixture = upcycle(*dense, CUT, seed=1)
    prefer_none(mixture)
    expected = logits(dense[0], 0)
    for count in (CUT.trained, CUT.experts):  # ties go to the first experts: one copy, or all
        torch.testing.assert_close(logits(mixture, count), expected, atol=1e-3, rtol=1e-3)
    assert (logits(mixture, 1) - expected).abs().max() > 0.1


def test_every_copy_has_all_units_in_an_order_of_its_own(dense: Dense) -> None:
    mixture = upcycle(*dense, CUT, seed=1)
    gate_EFD = mixture_of(mixture, 0).gate_up.chunk(2, dim=1)[0]
    units = [copy_EFD.flatten(0, 1).tolist() for copy_EFD in gate_EFD.split(CUT.parts)]
    wanted = dense[0].get_parameter("layers.0.ffn.up.weight").chunk(2)[0].tolist()
    assert units[0] != units[1] and all(sorted(copy) == sorted(wanted) for copy in units)


def test_experts_from_stacks_that_are_taken_apart_compute_the_same(dense: Dense) -> None:
    mixture = mixture_of(upcycle(*dense, CUT, seed=1), 0)
    generator = torch.Generator().manual_seed(1)
    x_TD = torch.randn(6, dense[1]["hidden_size"], generator=generator)
    token_R, expert_R = torch.arange(6).repeat(2), torch.tensor([0, 1, 1, 3, 3, 0, 3, 0, 3, 0, 1, 1])  # 2 has none
    pairs = sort_pairs(token_R, expert_R, torch.rand(12, generator=generator), CUT.experts)
    torch.testing.assert_close(run_split(mixture, x_TD, pairs), mixture.run_ragged(x_TD, pairs))


def distiller(dense: Dense, cut: Cut, out: Path, **changes: Any) -> Distiller:
    sizes = {"steps": 20, "rows": 4, "micro_rows": 4, "length": 8, "warmup": 2} | changes
    recipe = Recipe(mixtral_config(dense[1], cut), muon_lr=0.005, adam_lr=1e-3, **sizes)
    tokens = np.random.default_rng(1).integers(0, dense[1]["vocab_size"], 400).astype(np.uint16)
    return Distiller(recipe, tokens, out, dense[0], upcycle(*dense, cut, seed=1))


def loss(made: Distiller) -> float:
    with torch.no_grad():
        return float(made.loss(IDS, torch.Generator()))


def test_a_mixture_that_computes_what_the_teacher_does_has_nothing_to_learn(dense: Dense, tmp_path: Path) -> None:
    every = distiller(dense, Cut(experts=4, copies=2, trained=4), tmp_path)
    prefer_none(every.model)
    assert loss(every) == pytest.approx(0.0, abs=1e-5)
    assert loss(distiller(dense, CUT, tmp_path)) > 0.01


def test_the_loss_adds_the_balance_of_the_trained_count(dense: Dense, tmp_path: Path) -> None:
    losses = [loss(distiller(dense, CUT, tmp_path, balance=balance)) for balance in (0.0, 1.0)]
    assert 0.9 < losses[1] - losses[0] < 1.5  # 1 where the load is even


def test_it_learns_at_the_trained_count(dense: Dense, tmp_path: Path) -> None:
    made = distiller(dense, CUT, tmp_path)
    before = loss(made)
    made.windows.tokens = IDS.flatten().repeat(50).numpy()
    for _ in range(20):
        made.train_step()
    assert loss(made) < 0.5 * before


def test_the_command_writes_a_checkpoint_that_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_llama2(tmp_path / "llama2.data")
    stories = "\n<|endoftext|>\n".join(STORY * count for count in range(2, 12))
    (tmp_path / "stories.txt").write_text(stories)
    (tmp_path / "heldout.txt").write_text(" ".join(WORDS) + f"\n<|endoftext|>\n{stories}")
    monkeypatch.setattr(upcycling, "CUT", CUT)
    monkeypatch.setattr(upcycling, "COUNTS", (1, 2, 4))
    monkeypatch.setattr("training.train.COUNTS", (1, 2))
    out = tmp_path / "upcycled"
    given: dict[str, Any] = {"teacher": tmp_path / "llama2.data", "out": out, "steps": 3, "limit": 4}
    given |= {"text": tmp_path / "stories.txt", "heldout": tmp_path / "heldout.txt"}
    upcycling.main(**given)
    model, raw = load_model(out, "float32")
    assert raw["model_type"] == "mixtral" and model.config.experts.trained == 2
    assert Tokenizer.load(out).decode(Tokenizer.load(out).encode("dog ran")) == "dog ran"
    card = json.loads((out / "card.json").read_text())
    assert card["steps"] == 3 and [row["num_experts"] for row in card["quality"]] == [1, 2, 4]
    before = (out / "model.safetensors").read_bytes()
    upcycling.main(**given)  # is done already
    assert (out / "model.safetensors").read_bytes() == before
