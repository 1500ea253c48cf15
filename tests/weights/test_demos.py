"""The demo models that ship: small files, cards that say what was measured, and weights that have learned."""

import pytest
import torch

from model.backends.torch.attend import WholeAttend
from training.demos.measure import asked_of
from training.demos.recipes import RECIPES
from training.demos.rows import NONE
from training.step import make_batch
from weights.folder import read_card, resolve_model
from weights.load import load_model
from weights.tokenizer import Tokenizer

BEGINNING = "Once upon a time, there was a little dog named Max."
REST = " He loved to play outside in the park with his friends."
each = pytest.mark.parametrize("name", RECIPES)


@each
def test_a_demo_is_small_and_its_card_is_of_its_recipe(name: str) -> None:
    folder, recipe = resolve_model(name), RECIPES[name]
    card = read_card(folder)
    assert sum(file.stat().st_size for file in folder.iterdir()) < 2.5e6
    assert (card["name"], card["family"]) == (name, recipe.family)
    for kind, asked in asked_of(recipe, card["trained"]).items():
        rows = card[kind]
        assert [{key: row[key] for key in one.described()} for one, row in zip(asked, rows, strict=True)] == [
            one.described() for one in asked
        ]
        assert all(row["loss"] < 4.0 and 0 < row["accuracy"] < 1 for row in rows), "6.9: nothing learned"
    assert all(row["tokens_per_second"].keys() == {"1", "16"} for row in card["quality"] + card["rules"])
    assert f"# {name}\n" in (folder / "README.md").read_text()


@each
def test_a_story_is_likely(name: str) -> None:
    """Its second sentence, at the trained count."""
    model, _ = load_model(resolve_model(name), "float32")
    tokenizer = Tokenizer.load(resolve_model(name))
    beginning = tokenizer.encode(BEGINNING)
    rest = tokenizer.encode(REST, framed=False)
    target = [NONE] * (len(beginning) - 1) + rest
    ids_1S = torch.tensor([[*beginning, *rest[:-1]]])
    counts = [model.config.experts.trained] * len(model.config.mixtures)
    logits_TV = model(make_batch(ids_1S, counts, 0), WholeAttend(ids_1S.shape[1])).float()
    assert torch.nn.functional.cross_entropy(logits_TV, torch.tensor(target)) < 3.0, "a random model has 6.9"
