"""Training: the data order, the counts, the optimiser, and that an interrupted run ends like a whole one."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.model.tiny import decoder, gpt2_like, infinity, llama_like, topk
from tests.weights.checkpoints import INFINITY, OLMOE
from training.corpus import ASSISTANT, CHAT_SHARE, END, USER, ChatMaker, documents, prepare
from training.evaluate import agreement, held_out_loss
from training.optimiser import Muon, build_optimisers, orthogonalise
from training.recipe import RECIPES, Recipe
from training.step import draw_counts, next_token_loss
from training.train import Trainer, Windows
from weights.config import decoder_config

RECIPE: dict[str, Any] = {"steps": 6, "rows": 4, "micro_rows": 2, "length": 8, "warmup": 2, "largest_count": 3}
TOKENS = np.random.default_rng(1).integers(0, 37, 400).astype(np.uint16)


def trainer(raw: dict[str, Any], out: Path) -> Trainer:
    config = decoder_config(raw)
    return Trainer(Recipe(raw, balance=0.01, **RECIPE), config, TOKENS, out)


@pytest.mark.parametrize("raw", [INFINITY, OLMOE], ids=lambda raw: raw["model_type"])
def test_an_interrupted_run_ends_with_the_weights_of_a_whole_one(raw: dict[str, Any], tmp_path: Path) -> None:
    whole = trainer(raw, tmp_path)
    losses = [whole.train_step() for _ in range(5)]
    first = trainer(raw, tmp_path)
    assert [first.train_step() for _ in range(2)] == losses[:2]
    first.save()
    second = trainer(raw, tmp_path)
    second.resume()
    assert second.step == 2
    assert [second.train_step() for _ in range(3)] == losses[2:]
    for name, value in whole.model.state_dict().items():
        assert torch.equal(second.model.state_dict()[name], value), name


def test_a_fresh_run_has_nothing_to_resume(tmp_path: Path) -> None:
    fresh = trainer(OLMOE, tmp_path)
    fresh.resume()
    assert fresh.step == 0


def test_training_learns(tmp_path: Path) -> None:
    """Twenty steps on a text that repeats itself."""
    made = trainer(OLMOE, tmp_path)
    made.windows.tokens = np.tile(np.arange(8, dtype=np.uint16), 50)
    losses = [made.train_step() for _ in range(20)]
    assert losses[-1] < losses[0] - 0.5


def test_every_window_comes_once_an_epoch_in_an_order_of_the_seed() -> None:
    tokens = np.arange(101, dtype=np.uint16)
    windows = Windows(tokens, length=10, seed=1)
    epochs = [[int(row[0]) for step in range(5) for row in windows(step + 5 * epoch, 2)] for epoch in range(2)]
    assert windows.count == 10
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(0, 100, 10))
    assert epochs[0] != epochs[1]
    again = Windows(tokens, length=10, seed=1)
    assert [int(row[0]) for row in again(7, 2)] == epochs[1][4:6]  # in any order of asking
    assert [int(row[0]) for step in range(5) for row in Windows(tokens, 10, 2)(step, 2)] != epochs[0]
    assert windows(0, 2)[0].tolist() == list(range(epochs[0][0], epochs[0][0] + 11))


def test_counts_are_uniform_up_to_the_largest_and_differ_between_layers() -> None:
    generator = torch.Generator().manual_seed(1)
    drawn = [draw_counts(llama_like(topk(), topk()), 4, generator) for _ in range(2000)]
    for layer in range(2):
        found = Counter(counts[layer] for counts in drawn)
        assert set(found) == {1, 2, 3, 4}
        assert all(abs(count / 2000 - 0.25) < 0.05 for count in found.values())
    assert any(first != second for first, second in drawn)


@pytest.mark.parametrize("name", RECIPES)
def test_no_recipe_draws_more_than_its_model_can_run(name: str) -> None:
    recipe = RECIPES[name]
    config = decoder_config(recipe.config)
    assert recipe.largest_count <= config.experts.maximum
    assert recipe.length <= config.context
    assert recipe.rows % recipe.micro_rows == 0


def test_the_learning_rate_rises_then_falls() -> None:
    recipe = Recipe({}, steps=100, warmup=10)
    rates = [recipe.schedule(step) for step in range(101)]
    assert rates[0] == 0.1 and max(rates) == rates[9] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[100] == pytest.approx(0.02)


def test_a_recipe_with_changed_fields() -> None:
    changed = RECIPES["infinity"].override(7, fields=["mask_block=1", 'draws="antithetic"'])
    assert (changed.steps, changed.config["mask_block"], changed.config["draws"]) == (7, 1, "antithetic")
    assert RECIPES["infinity"].config["mask_block"] != 1


@pytest.mark.parametrize("shape", [(16, 16), (8, 40), (40, 8), (3, 24, 10)])
def test_orthogonalising_brings_all_singular_values_near_one(shape: tuple[int, ...]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 7
    values = torch.linalg.svdvals(orthogonalise(matrix))
    assert values.min() > 0.5 and values.max() < 1.5


def test_stacked_experts_are_matrices_of_their_own() -> None:
    stacked = torch.randn(3, 12, 8, generator=torch.Generator().manual_seed(1))
    each = torch.stack([orthogonalise(matrix) for matrix in stacked])
    torch.testing.assert_close(orthogonalise(stacked), each, atol=0.05, rtol=0)


def test_muon_takes_the_hidden_matrices_and_adam_everything_else() -> None:
    model = decoder(gpt2_like(topk(), infinity())).requires_grad_(True)
    muon, adam = build_optimisers(model, 0.02, 0.004, 0.05)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    first, rest = ({names[id(p)] for p in o.param_groups[0]["params"]} for o in (muon, adam))
    assert isinstance(muon, Muon) and first.isdisjoint(rest) and first | rest == set(names.values())
    kinds = {name.split(".", 2)[-1] for name in first}
    assert kinds == {"attention.qkv.weight", "attention.out.weight", "ffn.gate_up", "ffn.down", "ffn.up"}


def test_the_loss_is_the_cross_entropy_of_the_next_token() -> None:
    model = decoder(llama_like(topk(), infinity()))
    window_BS = torch.randint(61, (4, 9), generator=torch.Generator().manual_seed(2))
    loss = float(next_token_loss(model, window_BS, [2, 2], seed=0))
    assert loss == pytest.approx(held_out_loss(model, window_BS, 2), abs=1e-5)
    assert next_token_loss(model, window_BS, [2, 2], 0, balance=1.0) > loss + 0.5  # about 1 per balanced layer
    assert agreement(model, window_BS, 2, 2) == 1.0 > agreement(model, window_BS, 1, 6)


STORIES = [
    f"Once the {word} dog ran to the {other} tree. It was happy."
    for word in ("red", "shiny")
    for other in ("purple", "wooden", "ancient")
] * 20


def test_questions_use_words_of_the_story() -> None:
    """Words that nearly every story has say nothing and are not asked for; nor is a word that is hardly ever used."""
    common = [" ".join(f"{first}{second}q" for first in "abcdefghijklmnopqrstuvwxyz" for second in "abcdefghij")] * 200
    maker = ChatMaker([*STORIES, *common], 1)
    asked = [maker.question("The ancient dog saw a shiny thing, abq") for _ in range(60)]
    lists = [question.partition(" with the word")[2].removeprefix("s") for question in asked]
    words = {word for text in lists for word in re.findall("[a-z]+", text)} - {"and"}
    assert words and words <= {"ancient", "dog", "shiny", "the"}
    assert "" in lists and any(" and " in text for text in lists)


def test_a_share_of_the_stories_becomes_chats() -> None:
    maker = ChatMaker(STORIES, 1)
    made = [maker("The dog ran.") for _ in range(1000)]
    chats = [text for text in made if text != "The dog ran."]
    assert abs(len(chats) / 1000 - CHAT_SHARE) < 0.05
    assert all(text.startswith(USER) and text.endswith(f"{ASSISTANT}The dog ran.") for text in chats)


def test_every_document_begins_with_the_end_of_text_token(tmp_path: Path) -> None:
    text = tmp_path / "stories.txt"
    text.write_text(f"\n{END}\n".join([*STORIES, "", "  "]))
    assert len(list(documents(text))) == len(STORIES)
    count = prepare(text, tmp_path / "tokens", vocabulary=300, seed=1)
    ids = np.load(tmp_path / "tokens" / "tokens.npy")
    assert len(ids) == count and ids.dtype == np.uint16 and ids.max() < 300
    assert ids[0] == 0 and (ids == 0).sum() == len(STORIES)
    assert (ids == 1).sum() == (ids == 2).sum() > 0
