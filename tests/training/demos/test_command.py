"""The recipes: they learn, a run that was stopped goes on as one that was not, and what is exported is served."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

from benchmarks.demo_speed import speed
from engine.build import build_engine
from engine.types import EngineSettings
from tests.training.demos.small import small, small_base
from training.corpus import train_tokenizer
from training.demos import __main__ as command
from training.demos import loop, rows
from training.demos.export import export, write_card
from training.demos.fresh import fresh_model
from training.demos.loop import Run
from training.demos.recipes import BASE_RECIPE, RECIPES, Recipe
from training.demos.rows import windows

STORY = "Once upon a time there was a big red dog. It ran to the sea, and it saw a small boat. " * 2
STEPS = 25


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    values: list[tuple[Any, str, Any]] = [(rows, "LENGTH", 24), (rows, "PROMPTS", (3, 9)), (loop, "ROWS", 4)]
    values += [(command, "VOCABULARY", 300), (command, "HELD_OUT_ROWS", 8)]
    for module, name, value in values:
        monkeypatch.setattr(module, name, value)


def of_tests(name: str) -> Recipe:
    counts = tuple(count for count in RECIPES[name].counts if count <= 8)
    return replace(RECIPES[name], config=small(name), steps=STEPS, warm=2, counts=counts)


LIKE_OTHERS = ("deep-stories", "dynmoe-stories", "soft-t5-stories", "st-moe-stories")
EACH = [pytest.param(name, marks=pytest.mark.redundant) if name in LIKE_OTHERS else name for name in RECIPES]


@pytest.mark.parametrize("name", EACH)
def test_a_recipe_learns_and_its_checkpoint_is_served(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(RECIPES, name, of_tests(name))
    text = tmp_path / "text"
    text.write_text("<|endoftext|>\n".join([STORY] * 20))
    base = None if "d_model" in RECIPES[name].config else tmp_path / "base"
    if base is not None:
        monkeypatch.setattr(command, "BASE_RECIPE", replace(BASE_RECIPE, config=small_base(), steps=2, warm=2))
        command.train_base(text, base)
    command.train(name, text, text, tmp_path / "out", base)
    facts = json.loads((tmp_path / "out" / "card.json").read_text())
    assert all(row["loss"] < 5.0 for row in facts["quality"] if row["num_experts"] == facts["trained"]), "5.7: none"
    assert f"`python -m training.demos train {name}`" in (tmp_path / "out" / "README.md").read_text()
    settings = EngineSettings(model=str(tmp_path / "out"), kv_cache_bytes=1 << 23, step_ms=0, threads=1)
    _, info = build_engine(settings)
    assert (info.family, info.experts.trained) == (RECIPES[name].family, facts["trained"])


def test_decoders_alone_begin_with_a_base(tmp_path: Path) -> None:
    with pytest.raises(typer.BadParameter, match="mu-stories needs --base"):
        command.train("mu-stories", tmp_path, tmp_path, tmp_path)
    with pytest.raises(typer.BadParameter, match="switch-stories takes no --base"):
        command.train("switch-stories", tmp_path, tmp_path, tmp_path, tmp_path)


def test_a_run_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    tokenizer, recipe = train_tokenizer([STORY], 300), of_tests("remoe-stories")
    found = []
    for stops, folder in ((False, "whole"), (True, "parts")):
        run = Run(fresh_model(recipe.config, 1), recipe, windows(tokenizer, [STORY] * 9, 1), tmp_path / folder)
        if stops:
            for _ in zip(range(9), run.train(), strict=False):
                pass
            run.save()
            run = Run(fresh_model(recipe.config, 2), recipe, windows(tokenizer, [STORY] * 9, 1), tmp_path / folder)
            run.resume()
            assert run.step > 8 and run.seconds > 0
        list(run.train())
        found.append(run.model.state_dict())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_speed_is_added_to_what_a_request_can_ask_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "moe-plus-plus-stories"
    recipe = replace(of_tests(name), counts=(1, 2), values=(1.0,))
    monkeypatch.setitem(RECIPES, name, recipe)
    tokenizer = train_tokenizer([STORY], 300)
    export(fresh_model(recipe.config, 1), dict(recipe.config), tokenizer, tmp_path)
    write_card(tmp_path, {"name": name, "trained": 2, "quality": [{}, {}], "rules": [{}], "restrictions": []})
    speed([tmp_path], rounds=1)
    facts = json.loads((tmp_path / "card.json").read_text())
    assert [row["tokens_per_second"].keys() for row in facts["quality"] + facts["rules"]] == [{"1", "16"}] * 3
    assert facts["machine"]
