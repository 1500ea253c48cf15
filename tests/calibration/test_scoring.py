"""Scores are what their definitions give, in one part or many, kept or computed again."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from calibration import scoring
from calibration.partial import Partial
from calibration.progress import Progress
from calibration.scoring import Score, Scorer, Windows
from engine.build import build_engine
from engine.runner import ModelRunner
from engine.types import EngineSettings
from model.budget import ExpertBudget
from tests.model.tiny import whole_logits
from tests.weights.checkpoints import OLMOE, write
from weights.load import load_model

COUNTS, TRAINED = (1, 3), (2, 2)
TEXT = Windows("text", tuple(tuple((i * i * 7 + start) % 37 for i in range(41)) for start in range(3)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("olmoe")
    write(folder, OLMOE | {"hidden_size": 64})
    return folder


def scores(folder: Path, partial: Partial, counts: Sequence[tuple[int, ...]] = (COUNTS,)) -> list[Score]:
    engine, _ = build_engine(EngineSettings(model=str(folder), step_ms=0, prefix_cache=False))
    assert isinstance(engine.runner, ModelRunner)
    scorer = Scorer(engine.runner, ExpertBudget(TRAINED), partial, Progress())
    return scorer.score([ExpertBudget(each) for each in counts], TEXT)


def defined(folder: Path) -> dict[str, float]:
    """Loss, agreement and divergence by their definitions, over the whole decoder's distributions in float64."""
    model, _ = load_model(folder, "float32")
    losses, agreed, divergences = [], [], []
    for window in TEXT.windows:
        log_q, log_p = (logprobs(model, window, counts) for counts in (COUNTS, TRAINED))
        losses.append(F.nll_loss(log_q, torch.tensor(window[1:]), reduction="none"))
        agreed.append((log_q.argmax(-1) == log_p.argmax(-1)).double())
        divergences.append((log_p.exp() * (log_p - log_q)).sum(-1))
    parts = {"loss": losses, "agreement": agreed, "kl": divergences}
    return {name: float(torch.cat(part).mean()) for name, part in parts.items()}


def logprobs(model: Any, window: tuple[int, ...], counts: tuple[int, ...]) -> Tensor:
    return torch.log_softmax(whole_logits(model, window, counts)[:-1].double(), -1)


@pytest.mark.parametrize("logit_bytes", [1 << 20, 7 * 4 * 37], ids=["one part", "six parts"])
@pytest.mark.parametrize("reference_bytes", [1 << 20, 40 * 4 * 37, 0], ids=["kept", "one kept", "none kept"])
def test_figures_are_those_of_their_definitions(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logit_bytes: int, reference_bytes: int
) -> None:
    monkeypatch.setattr(scoring, "LOGIT_BYTES", logit_bytes)
    monkeypatch.setattr(scoring, "REFERENCE_BYTES", reference_bytes)
    few, trained = scores(folder, Partial(tmp_path / "partial", {}), (COUNTS, TRAINED))
    expected = defined(folder)
    assert few.tokens == trained.tokens == TEXT.tokens == 120
    assert few.loss == pytest.approx(expected["loss"], rel=1e-5)
    assert few.kl == pytest.approx(expected["kl"], rel=1e-3)
    assert few.agreement == pytest.approx(expected["agreement"])
    assert 0 < few.agreement < 1 and few.kl > 1e-3
    assert few.pairs_per_token == sum(COUNTS)
    assert trained.agreement == 1.0
    assert trained.kl == pytest.approx(0, abs=1e-7)


def test_what_was_scored_is_not_scored_again(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    partial = Partial(tmp_path / "partial", {})
    first = scores(folder, partial)
    partial.flush()
    monkeypatch.setattr(Scorer, "_score", None)
    assert scores(folder, Partial(tmp_path / "partial", {})) == first


def test_what_else_decides_an_outcome_keeps_results_apart(folder: Path, tmp_path: Path) -> None:
    engine, _ = build_engine(EngineSettings(model=str(folder), step_ms=0, prefix_cache=False))
    assert isinstance(engine.runner, ModelRunner)
    partial = Partial(tmp_path / "partial", {})
    scorer = Scorer(engine.runner, ExpertBudget(TRAINED), partial, Progress())
    scorer.score([ExpertBudget(COUNTS)], TEXT)
    partial.flush()
    before = partial.path.read_text().count("score ")
    scorer.score([ExpertBudget(COUNTS)], TEXT, salt="other tables")
    partial.flush()
    assert partial.path.read_text().count("score ") == before + 1
