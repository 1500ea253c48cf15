"""Families whose count is an upper bound: in mixed batches, in chunks, in the engine and over HTTP."""

import random
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from torch import Tensor

from engine.build import build_engine
from engine.types import EngineSettings, Request, RequestStats, Sampling
from model.backends.cpu import refusal as cpu
from model.backends.cuda import refusal as cuda
from model.backends.torch.attend import WholeAttend
from model.batch import BudgetRows
from model.budget import FAMILY_RULE, ExpertBudget, RoutingRule
from model.decoder import Decoder
from model.errors import InvalidRequest
from model.options import Options
from tests.e2e.live import serving
from tests.families import reference
from tests.model.tiny import PagedRun, whole_batch
from tests.weights.checkpoints import random_decoder
from tests.weights.words import write_tokenizer
from weights.load import load_model
from weights.save import save_model

# Of a routing rule, the field that the family takes.
FIELDS = {"dynmoe": "gate_offset", "remoe": "gate_offset", "moe_plus_plus": "free_bias"}
CASES = [(family, number) for family in FIELDS for number in range(len(reference.example_list(family)))]
each = pytest.mark.parametrize(("family", "number"), CASES)
each_family = pytest.mark.parametrize("family", FIELDS)
IDS = reference.PROMPT


def raw(family: str, number: int = 0, **changes: Any) -> dict[str, Any]:
    example = reference.example_list(family)[number]
    return reference.BASE | {"model_type": family, "dtype": "float32"} | example | changes


@cache
def made(family: str, number: int = 0, vocabulary: int = 61) -> Decoder:
    """A random model in which some gates are open."""
    model = random_decoder(raw(family, number, vocab_size=vocabulary))
    for name, parameter in model.named_parameters():
        if name.endswith("temperature"):
            parameter.fill_(4.0)
    return model


def write(folder: Path, family: str, number: int = 0, vocabulary: int = 61) -> Decoder:
    """The same as a checkpoint."""
    model = made(family, number, vocabulary)
    save_model(model, raw(family, number, vocab_size=vocabulary), folder, torch.float32)
    return model


def moved(family: str, amount: float) -> RoutingRule:
    """The rule that moves what a token runs."""
    if FIELDS[family] == "gate_offset":
        return RoutingRule(gate_offset=amount)
    return RoutingRule(free_bias=amount)


def logits(family: str, number: int, ids: list[int], count: int, rule: RoutingRule = FAMILY_RULE) -> Tensor:
    """Of one sequence whole, [T, V]."""
    model = made(family, number)
    batch = whole_batch(ids, [count] * len(model.config.mixtures))
    if rule != FAMILY_RULE:
        budget = replace(batch.budget, rules=(rule,), rule_T=torch.zeros(len(ids), dtype=torch.int64))
        batch = replace(batch, budget=budget)
    found: Tensor = model(batch, WholeAttend(len(ids)))
    return found


@each
def test_a_checkpoint_loads_as_it_was_saved(family: str, number: int, tmp_path: Path) -> None:
    saved = write(tmp_path, family, number)
    loaded, _ = load_model(tmp_path)
    assert loaded.config == saved.config and loaded.config.experts.adaptive
    for name, parameter in saved.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter)


@each
def test_counts_rules_and_chunks_in_one_batch_equal_running_alone(family: str, number: int) -> None:
    model = made(family, number)
    layers, most = len(model.config.mixtures), model.config.experts.maximum
    rng = random.Random(number)
    rows = [[rng.randrange(61) for _ in range(length)] for length in (13, 9, 17, 6)]
    counts = [1, 3, 2, most]
    rules = [FAMILY_RULE, moved(family, 0.7), moved(family, -0.7), FAMILY_RULE]
    run = Ruled(model, rows, [[count] * layers for count in counts], rules)
    parts: dict[int, list[Tensor]] = {row: [] for row in range(len(rows))}
    while todo := [row for row in parts if run.done[row] < len(rows[row])]:
        some = rng.sample(todo, min(3, len(todo)))
        lengths = {row: min(rng.randint(1, 6), len(rows[row]) - run.done[row]) for row in some}
        for row, part in run.step(lengths).items():
            parts[row].append(part)
    for row, ids in enumerate(rows):
        alone = logits(family, number, ids, counts[row], rules[row])
        torch.testing.assert_close(torch.cat(parts[row]), alone, atol=2e-5, rtol=1e-5)
    plain = logits(family, number, rows[1], 3)
    assert not torch.allclose(plain, logits(family, number, rows[1], 3, rules[1]), atol=1e-3)


class Ruled(PagedRun):
    """Rows with a rule each."""

    def __init__(self, model: Decoder, rows: list[list[int]], counts: list[list[int]], rules: list[RoutingRule]):
        super().__init__(model, rows, counts)
        self.rules = tuple(rules)

    def _batch(self, parts: list[tuple[int, Tensor]]) -> Any:
        batch = super()._batch(parts)
        rule_T = torch.cat([torch.full((len(at),), row) for row, at in parts])
        budget: BudgetRows = replace(batch.budget, rules=self.rules, rule_T=rule_T)
        return replace(batch, budget=budget)


@each_family
def test_a_later_token_changes_no_earlier_logit(family: str) -> None:
    most = made(family).config.experts.maximum
    before = logits(family, 0, IDS, most)
    after = logits(family, 0, [*IDS[:-1], (IDS[-1] + 1) % 61], most)
    torch.testing.assert_close(before[:-1], after[:-1], atol=1e-6, rtol=0)
    assert not torch.allclose(before[-1], after[-1], atol=1e-3)


@each_family
def test_no_kernels_take_such_a_model(family: str) -> None:
    assert cpu.refusal(made(family).config, Options()) is not None
    assert "depends on the token" in (cuda.refusal(made(family).config, Options()) or "")


@each_family
def test_rules_are_taken_or_refused_by_name(family: str) -> None:
    experts, field = made(family).config.experts, FIELDS[family]
    experts.check_rule(moved(family, -3.0), "experts")
    with pytest.raises(InvalidRequest, match=rf"experts.{field} must be between -100 and 100, got 101"):
        experts.check_rule(moved(family, 101.0), "experts")
    for refused in (RoutingRule("raw"), RoutingRule(threshold=0.5), RoutingRule(top_p=0.5), RoutingRule(reuse=1)):
        with pytest.raises(InvalidRequest, match=f"is refused: .*experts.{field}"):
            experts.check_rule(refused, "experts")


def ran(engine: Any, *requests: Request) -> dict[str, RequestStats]:
    for one in requests:
        engine.add(one)
    stats: dict[str, RequestStats] = {}
    while engine.has_work:
        for event in engine.step().events:
            assert event.error is None
            if event.finish is not None and event.stats is not None:
                stats[event.request_id] = event.stats
    return stats


@each_family
def test_the_engine_counts_what_ran_and_shares_no_prefix_of_another_rule(family: str, tmp_path: Path) -> None:
    write(tmp_path, family)
    settings = EngineSettings(model=str(tmp_path), kv_cache_bytes=1 << 22, step_ms=0, threads=1)
    engine, info = build_engine(settings)
    assert info.kernels == "torch" and info.experts.adaptive
    most, prompt = info.experts.maximum, tuple(range(1, 40))

    def ask(id: str, amount: float) -> Request:
        count = 2 if FIELDS[family] == "free_bias" else most
        budget = ExpertBudget((count,) * info.experts.layers, rule=moved(family, amount))
        return Request(id, prompt, budget, Sampling(4, seed=0, temperature=0.0))

    together = ran(engine, ask("plain", 0.0), ask("up", 0.6), ask("down", -0.6))
    means = [together[id].mean_count(info.experts.layers) for id in ("plain", "up", "down")]
    assert len(set(means)) == 3 and all(0 < mean < most for mean in means)
    assert (means[2] < means[0] < means[1]) is (FIELDS[family] == "gate_offset")
    again = ran(engine, ask("again", 0.6), ask("other", 0.61))
    assert again["again"].cached_tokens > 0 and again["other"].cached_tokens == 0


# `tests/e2e/test_demos.py` asks the demo model of MoE++ the same; DynMoE's field is ReMoE's.
@pytest.mark.slow
@pytest.mark.parametrize(
    "family", ["remoe", *(pytest.param(name, marks=pytest.mark.redundant) for name in ("dynmoe", "moe_plus_plus"))]
)
def test_a_request_moves_its_count_over_http(family: str, tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    write(tmp_path, family, vocabulary=512)
    field, means = FIELDS[family], []
    with serving("--model", str(tmp_path), "--served-name", "tiny", "--threads", "1") as live:
        for amount in (-1.0, 0.0, 1.0):
            body = {"prompt": "Once upon a time", "max_tokens": 6, "ignore_eos": True, "experts": {field: amount}}
            usage = httpx.post(f"{live.url}/v1/completions", json=body, timeout=60).raise_for_status().json()["usage"]
            assert usage["routed_pairs"] < usage["routed_pairs_trained"]
            means.append(usage["num_experts"])
        assert means == sorted(means, reverse=field == "free_bias") and len(set(means)) == 3
        other = "free_bias" if field == "gate_offset" else "gate_offset"
        answer = httpx.post(f"{live.url}/v1/completions", json=body | {"experts": {other: 1}})
        assert answer.status_code == 400 and answer.json()["error"]["param"] == f"experts.{other}"
