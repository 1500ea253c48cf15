"""A new kind of mixture that is not token-local, added by files of its own, gives what its definition gives.

It averages over the tokens of its own sequence seen so far. Two sequences in one batch, chunked and whole, alone and
mixed, with preemptions, and while decoding, all equal a reference in float64.
"""

import copy
import json
import random
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine.build import build_engine
from engine.engine import Engine
from engine.types import EngineInfo, EngineSettings, Request, Sampling
from model.backends.choose import choose
from model.backends.cpu.kernels.library import load
from model.backends.torch.attend import PagedAttend, WholeAttend
from model.backends.torch.backend import TorchBackend
from model.batch import Cache, LayerBudget, Pages, Span
from model.budget import ExpertBudget
from model.decoder import Decoder
from model.errors import CheckpointError
from model.options import Options
from model.step import LayerStep
from tests.engine.random_workload import Served, alone, assert_as_alone, storm
from tests.model.tiny import VOCABULARY, PagedRun, decoder, llama_like, randomise, topk, whole_batch
from tests.new_kind import installed
from tests.new_kind.shape import RunningMean
from weights.config import read_config
from weights.load import load_model
from weights.save import save_model

MEAN = RunningMean(width=24, experts=6, hidden=12, trained=2)
CONFIG = llama_like(MEAN, topk(), MEAN, context=40)
SERVED = Served(CONFIG, block=4, few=10, requests=20)
NEAR = {"atol": 2e-5, "rtol": 1e-5}
RAW: dict[str, Any] = {
    "model_type": "running_mean",
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "intermediate_size": 12,
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "dtype": "float32",
}


@pytest.fixture(scope="module", autouse=True)
def kind() -> Iterator[None]:
    """The new kind, for this file's tests only."""
    with installed():
        yield


class Definition(nn.Module):
    """The mixture of one whole sequence, token by token as it is defined."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.router, self.up, self.down = module.router, module.up, module.down

    def forward(self, x_TD: Tensor, step: LayerStep) -> Tensor:
        return torch.stack([self.token(x_TD[: t + 1].mean(0), int(k)) for t, k in enumerate(step.budget.counts_T)])

    def token(self, m_D: Tensor, count: int) -> Tensor:
        probs = (self.router @ m_D).softmax(0)
        best = sorted(range(len(probs)), key=lambda e: -float(probs[e]))[:count]
        parts = [probs[e] * (self.down[e] @ nn.functional.silu(self.up[e] @ m_D)) for e in best]
        return torch.stack(parts).sum(0)


@cache
def reference() -> Decoder:
    """The served decoder in float64, its new mixtures replaced by their definition."""
    made = copy.deepcopy(decoder(CONFIG)).double()
    for layer in made.layers:
        if hasattr(layer.ffn, "up"):
            layer.ffn = Definition(layer.ffn)
    return made


def expected(ids: list[int], counts: list[int], seed: int = 0) -> Tensor:
    return reference()(whole_batch(ids, counts, seed), WholeAttend(len(ids)))


def sequences(number: int) -> tuple[list[list[int]], list[list[int]]]:
    rng = random.Random(number)
    rows = [[rng.randrange(VOCABULARY) for _ in range(rng.randint(9, 30))] for _ in range(number)]
    return rows, [[rng.randint(1, 6) for _ in CONFIG.mixtures] for _ in rows]


def test_the_reference_has_the_definition() -> None:
    kinds = Counter(type(layer.ffn).__name__ for layer in reference().layers)
    assert kinds == {"Definition": 2, "TopKMixture": 1}


@pytest.mark.parametrize("largest", [1, 3, 40], ids=["decoding", "chunks", "whole"])
@pytest.mark.parametrize("together", [1, 2, 5])
def test_any_chunks_in_any_company(largest: int, together: int) -> None:
    """At 1 every token is a step, as when decoding; at 40 every sequence is one chunk."""
    rows, counts = sequences(5)
    run, rng = PagedRun(decoder(CONFIG), rows, counts), random.Random(largest)
    parts: dict[int, list[Tensor]] = {row: [] for row in range(len(rows))}
    while todo := [row for row in parts if run.done[row] < len(rows[row])]:
        some = rng.sample(todo, min(together, len(todo)))
        lengths = {row: min(largest, len(rows[row]) - run.done[row]) for row in some}
        for row, logits in run.step(lengths).items():
            parts[row].append(logits)
    for row, ids in enumerate(rows):
        torch.testing.assert_close(torch.cat(parts[row]).double(), expected(ids, counts[row], row), **NEAR)


def test_the_past_matters() -> None:
    """Else equality would say little: with attention as it is, another first token changes what the mixtures add."""
    step = LayerStep(LayerBudget(torch.full((6,), 2), 2), torch.zeros(6), torch.arange(6), past=WholeAttend(6))
    module: Any = decoder(CONFIG).layers[0].ffn
    x_TD = torch.randn(6, 24, generator=torch.Generator().manual_seed(1))
    other_TD = torch.cat([torch.zeros(1, 24), x_TD[1:]])
    assert ((module(x_TD, step) - module(other_TD, step)).abs().amax(-1) > 1e-3).all()


def test_a_layer_can_ask_which_rows_are_one_sequences() -> None:
    """Side by side and whole, or as the pages of a step have them."""
    assert WholeAttend(3).spans(6) == (Span(0, 3, 3), Span(3, 3, 3))
    spans_B3 = torch.tensor([[0, 1, 9], [1, 4, 4]])
    pages = Pages(Cache(16, []), torch.zeros(2, 1, dtype=torch.int64), spans_B3)
    step = LayerStep(
        LayerBudget(torch.ones(5), 1), torch.zeros(5), torch.arange(5), past=PagedAttend(pages, torch.device("cpu"))
    )
    assert step.spans == (Span(0, 1, 9), Span(1, 4, 4))


def test_the_engine_serves_it_in_a_storm() -> None:
    """Requests join and leave, prompts are cut, memory runs out: every token's logits are the reference's."""
    crowd, requests = storm(SERVED, seed=1, requests=SERVED.requests)
    for request in requests:
        assert_as_alone(SERVED, crowd, alone(SERVED, request), request.id)
        tokens = [*request.prompt, *crowd.tokens.get(request.id, [])]
        rows = expected(tokens, list(request.budget.per_layer), request.sampling.seed)
        for length, logits_V in crowd.logits.get(request.id, {}).items():
            torch.testing.assert_close(logits_V.double(), rows[length - 1], **NEAR)
    assert sum(stats.preemptions for stats in crowd.stats) > 2 and crowd.chunks > 2
    assert sum(stats.mixed for stats in crowd.stats) > 10 and crowd.found == 0
    assert sum(stats.prefix_queries for stats in crowd.stats) == 0


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A random checkpoint of the family."""
    (tmp_path / "config.json").write_text(json.dumps(RAW))
    config, raw = read_config(tmp_path)
    made = Decoder(config)
    randomise(made)
    save_model(made, raw, tmp_path, torch.float32)
    return tmp_path


def tokens(engine: Engine, requests: list[Request]) -> Iterator[list[int]]:
    for request in requests:
        engine.add(request)
    found: dict[str, list[int]] = {request.id: [] for request in requests}
    while engine.has_work:
        for event in engine.step().events:
            assert event.error is None
            if event.token is not None:
                found[event.request_id].append(event.token)
    return iter(found.values())


def built(folder: Path, **changes: Any) -> tuple[Engine, EngineInfo]:
    return build_engine(EngineSettings(model=str(folder), kv_cache_bytes=1 << 22, step_ms=0, threads=1, **changes))


def test_a_checkpoint_of_its_family_loads_and_is_served(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Count by count, alone and together; and the log says that there is no prefix cache."""
    caplog.set_level("INFO")
    engine, info = built(folder)
    assert (info.family, info.kernels, info.experts_total) == ("running_mean", "torch", 5)
    assert "no prefix cache: this model keeps states" in caplog.text
    assert info.kernels_reason == (load().reason or "layers of the kind RunningMean")
    prompt = tuple(range(1, 40))
    requests = [Request(str(k), prompt, ExpertBudget((k, k)), Sampling(8, seed=0, temperature=0.0)) for k in (1, 2, 5)]
    together = list(tokens(engine, requests))
    assert together == [next(tokens(engine, [request])) for request in requests]
    assert len({tuple(found) for found in together}) > 1
    model, _ = load_model(folder)
    whole = model(whole_batch([*prompt, *together[1][:-1]], [2, 2]), WholeAttend(len(prompt) + 7))
    assert whole[len(prompt) - 1 :].argmax(-1).tolist() == together[1]


def test_drafts_and_quantised_weights_and_caches_are_refused(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="speculate ngram: this model keeps states"):
        built(folder, speculate="ngram")
    with pytest.raises(CheckpointError, match="quantize int8 needs the native kernels: "):
        built(folder, quantize="int8")
    with pytest.raises(CheckpointError, match="a KV cache in int8 needs the native kernels: "):
        built(folder, kv_cache_dtype="int8")


def test_it_runs_on_the_backend_that_knows_any_kind() -> None:
    backend, reason = choose(CONFIG, Options())
    assert isinstance(backend, TorchBackend) and reason
