"""The recipe of small soft and deep models: that they learn at all experts, and that what it exports is served."""

from pathlib import Path
from typing import Any

import pytest
import torch

from engine.build import build_engine
from engine.types import EngineSettings, Request, Sampling
from model.budget import ExpertBudget
from training import soft_stories, switch_stories
from training.corpus import train_tokenizer
from training.soft_stories import CONFIGS, Constraint, begin, drawn, export, quality, train

TEXTS = ["Once upon a time there was a big red dog. It ran to the sea, and it saw a small boat. " * 2] * 4
SMALL: dict[str, Any] = {"num_experts": 3}
SIZES: dict[str, dict[str, Any]] = {
    "soft": {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 16, "segment_length": 5},
    "deep": {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 16, "gate_intermediate_size": 8},
    "t5": {"d_model": 32, "d_kv": 8, "d_ff": 16, "num_layers": 2, "num_decoder_layers": 1},
}


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"LENGTH": 24, "ROWS": 4, "WARM": 2}.items():
        monkeypatch.setattr(soft_stories, name, value)
    monkeypatch.setattr(switch_stories, "LENGTH", 24)
    monkeypatch.setattr(switch_stories, "PROMPTS", (3, 9))


@pytest.mark.parametrize("kind", CONFIGS)
def test_it_learns_and_is_served(kind: str, tmp_path: Path) -> None:
    tokenizer = train_tokenizer(TEXTS, 300)
    raw = CONFIGS[kind] | {"vocab_size": tokenizer.get_vocab_size()} | SMALL | SIZES[kind]
    model = begin(raw, seed=1)
    rows = drawn(model, tokenizer, TEXTS, seed=2)(8)
    before, _ = quality(model, *rows, count=3)
    assert len(list(train(model, drawn(model, tokenizer, TEXTS, seed=1), steps=25, minutes=5))) == 25
    after, guessed = quality(model, *rows, count=3)
    assert after < 0.8 * before and guessed > 0
    export(model, raw, tokenizer, tmp_path)
    engine, info = build_engine(EngineSettings(model=str(tmp_path), kv_cache_bytes=1 << 23, step_ms=0, threads=1))
    assert (info.experts.trained, info.experts.maximum) == (3, 3)
    ids = tokenizer.encode("Once upon a time", add_special_tokens=False).ids
    prompt = (*ids, 0) if kind == "t5" else (0, *ids)
    engine.add(Request("0", prompt, ExpertBudget((2,) * info.experts.layers), Sampling(4, seed=0)))
    while engine.has_work:
        for event in engine.step().events:
            assert event.error is None


def test_an_expert_far_above_the_mean_has_no_weight_until_the_others_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soft_stories, "MARGIN", 2.0)
    constraint, logits_TE = Constraint(2), torch.tensor([[9.0, 0.0]]).expand(6, -1)
    weights = [constraint(logits_TE).softmax(-1)[0, 0].item() > 0.5 for _ in range(4)]
    assert weights == [True, False, True, False]
    kept_TE = Constraint(2)(logits_TE)
    assert torch.equal(kept_TE, logits_TE), "the sums are of one training"
