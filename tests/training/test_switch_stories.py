"""The recipe of the small Switch: what a row asks for, that it learns, and that what it exports is served."""

from pathlib import Path

import pytest
import torch

from engine.build import build_engine
from engine.types import EngineSettings, Request, Sampling
from model.budget import ExpertBudget
from model.encoder_decoder import decoder_of
from training import switch_stories
from training.corpus import train_tokenizer
from training.switch_stories import CONFIG, Stories, begin, export, loss_of, train
from weights.load import decoder_config

TEXTS = ["Once upon a time there was a big red dog. It ran to the sea, and it saw a small boat. " * 2] * 4


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"LENGTH": 24, "ROWS": 4, "PROMPTS": (3, 9), "WARM": 2}.items():
        monkeypatch.setattr(switch_stories, name, value)


def test_a_row_is_a_beginning_its_end_and_what_follows() -> None:
    tokenizer = train_tokenizer(TEXTS, 300)
    story = [*tokenizer.encode(TEXTS[0], add_special_tokens=False).ids, 0]
    ids_BS, target_BS = Stories(tokenizer, TEXTS, seed=1).rows(50)
    ends = 0
    for ids, targets in zip(ids_BS.tolist(), target_BS.tolist(), strict=True):
        prompt = ids.index(0)
        assert 3 <= prompt <= 9 and 0 not in ids[prompt + 1 :] and len(ids) == len(targets) == 24
        assert set(targets[:prompt]) == {-100} and ids[prompt + 1 :] == targets[prompt:-1]
        text = [*ids[:prompt], *targets[prompt:]]
        assert any(story[start : start + 24] == text for start in range(len(story) - 23))
        ends += targets[-1] == 0
    assert 10 < ends < 45


def test_it_learns_and_is_served(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(TEXTS, 300)
    raw = CONFIG | {"vocab_size": tokenizer.get_vocab_size(), "d_model": 32, "d_kv": 8, "d_ff": 16, "num_experts": 3}
    model = decoder_of(decoder_config(raw))
    begin(model, seed=1)
    with torch.no_grad():
        before = loss_of(model, *Stories(tokenizer, TEXTS, seed=2).rows(8), count=1, balance=0.0)
    steps = list(train(model, Stories(tokenizer, TEXTS, seed=1), steps=25, minutes=5))
    assert len(steps) == 25 and all(parameter.grad is None for parameter in model.parameters())
    with torch.no_grad():
        after = loss_of(model, *Stories(tokenizer, TEXTS, seed=2).rows(8), count=1, balance=0.0)
    assert after < 0.8 * before
    export(model, raw, tokenizer, tmp_path)
    engine, info = build_engine(EngineSettings(model=str(tmp_path), kv_cache_bytes=1 << 23, step_ms=0, threads=1))
    assert (info.experts.trained, info.experts.layers) == (1, 3)
    prompt = (*tokenizer.encode("Once upon a time", add_special_tokens=False).ids, 0)
    engine.add(Request("0", prompt, ExpertBudget((1,) * 3), Sampling(4, seed=0)))
    while engine.has_work:
        for event in engine.step().events:
            assert event.error is None
