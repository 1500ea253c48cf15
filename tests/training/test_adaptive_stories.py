"""The recipe of models whose tokens run as many experts as they need: they learn, and what is exported is served."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.build import build_engine
from engine.types import EngineSettings
from model.decoder import Decoder
from training import adaptive_stories
from training.adaptive_stories import CONFIG, Kind, Regulariser, Routing, loss_of, made, main, train
from training.corpus import encode, train_tokenizer

STORY = "Once upon a time there was a big red dog. It ran to the sea, and it saw a small boat. " * 2
KINDS: tuple[Kind, ...] = ("dynmoe", "remoe", "moe_plus_plus")
SMALL = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 16}
each_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"LENGTH": 24, "ROWS": 4, "WARM": 2, "VOCABULARY": 300, "CONFIG": CONFIG | SMALL}.items():
        monkeypatch.setattr(adaptive_stories, name, value)


def small(kind: Kind, vocabulary: int) -> Decoder:
    return made(CONFIG | SMALL | {"model_type": kind, "vocab_size": vocabulary}, seed=1)


@each_kind
def test_it_learns_and_so_does_every_part_of_it(kind: Kind) -> None:
    tokenizer = train_tokenizer([STORY], 300)
    tokens_N = torch.from_numpy(encode(tokenizer, [STORY] * 8).astype(np.int64))
    model = small(kind, tokenizer.get_vocab_size())
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    steps = list(train(model, tokens_N, minutes=5, steps=30, seed=1))
    assert len(steps) == 30 and steps[-1][0] < 0.8 * steps[0][0]
    same = [name for name, parameter in model.named_parameters() if torch.equal(before[name], parameter)]
    assert not same, "no gradient"


def test_remoe_is_steered_to_the_wanted_count() -> None:
    model = small("remoe", 40)
    regulariser, routing = Regulariser(model), Routing()
    first = regulariser.coefficient
    with torch.no_grad():
        loss_of(model, torch.randint(40, (2, 25)), routing, count=8)
        assert routing.mean > adaptive_stories.WANTED and float(regulariser(routing)) > 0
    assert regulariser.coefficient > first


@each_kind
def test_what_it_writes_is_served(kind: Kind, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("<|endoftext|>\n".join([STORY] * 20))
    main(kind, text, tmp_path / "out", minutes=5, steps=3)
    rows = json.loads((tmp_path / "out" / "quality.json").read_text())
    assert len(rows) == 8 and all(0 <= row["mean_experts"] <= 8 and row["loss"] > 0 for row in rows)
    settings = EngineSettings(model=str(tmp_path / "out"), kv_cache_bytes=1 << 22, step_ms=0, threads=1)
    _, info = build_engine(settings)
    assert (info.family, info.experts.adaptive) == (kind, True)
