"""The whole engine, with chunks, pages and counts mixed in one batch, continues as plain full-sequence forwards do."""

from pathlib import Path

import pytest

from engine.build import build_engine
from engine.engine import Engine
from engine.types import EngineSettings, Request, Sampling
from model.budget import ExpertBudget
from model.errors import InvalidRequest
from tests.families import reference
from tests.families.test_parity import EXAMPLES, counts, loaded
from tests.model.tiny import whole_logits

TOKENS = 6
NEAR = 1e-3  # a greedy choice may differ from the plain one by so much of a logit: sums run in another order


def generate(engine: Engine, requests: list[Request]) -> dict[str, list[int]]:
    """All requests at once, until each has ended."""
    tokens: dict[str, list[int]] = {request.id: [] for request in requests}
    for request in requests:
        engine.add(request)
    while engine.has_work:
        for event in engine.step().events:
            assert event.error is None, event.error
            if event.token is not None:
                tokens[event.request_id].append(event.token)
        engine.scheduler.check()
    return tokens


# Of each family one example: `test_pages_chunks_and_mixed_counts_equal_one_pass` in `test_parity.py` has them all.
each = pytest.mark.parametrize(
    ("family", "number"),
    [
        pytest.param(family, number, id=f"{family}-{number}", marks=pytest.mark.redundant if number else ())
        for family, number in EXAMPLES
    ],
)


@each
def test_the_engine_equals_the_plain_forward(family: str, number: int, tmp_path: Path) -> None:
    model = loaded(family, number, tmp_path)
    settings = EngineSettings(
        model=str(tmp_path),
        allow_extrapolated_experts=True,
        kv_cache_bytes=1 << 22,
        max_running=4,
        max_step_tokens=8,
        step_ms=0,
    )
    engine, info = build_engine(settings)
    layers = len(model.config.mixtures)
    assert info.family == family and info.experts.layers == layers
    requests = []
    for row, count in enumerate(counts(model) * 2):
        prompt = tuple(reference.PROMPT[row:])
        budget = ExpertBudget((count or 1,) * layers)
        requests.append(Request(str(row), prompt, budget, Sampling(TOKENS, seed=row, temperature=0.0)))
    for request, tokens in zip(requests, generate(engine, requests).values(), strict=True):
        ids = [*request.prompt, *tokens]
        rows = whole_logits(model, ids[:-1], list(request.budget.per_layer), seed=request.sampling.seed)
        rows = rows[len(request.prompt) - 1 :]
        for row, token in zip(rows, tokens, strict=True):
            assert row.max() - row[token] < NEAR


@pytest.mark.parametrize("count", [0, 1])
def test_a_dense_model_refuses_any_count(count: int, tmp_path: Path) -> None:
    model = loaded("llama", 0, tmp_path)
    with pytest.raises(InvalidRequest, match="this model has no mixture-of-experts layers"):
        model.config.experts.budget(count)
