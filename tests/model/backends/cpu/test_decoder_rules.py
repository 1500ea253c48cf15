"""A decoder on native kernels follows routing rules and repairs as the plain-torch decoder does, and tells the same."""

import copy
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from model.backends.base import Runnable
from model.backends.cpu.decoder import NativeDecoder
from model.backends.cpu.kernels.library import load
from model.backends.torch.backend import TorchRunnable
from model.batch import Batch
from model.budget import FAMILY_RULE, RoutingRule
from model.decoder import Decoder
from model.shapes.decoder import DecoderConfig
from model.shapes.mixtures import Dense, Router, TopK
from model.step import Observer
from tests.model.backends.cpu.test_decoder import LENGTH, in_chunks, sequences
from tests.model.tiny import PagedRun, decoder, gpt2_like, infinity, llama_like, topk
from weights.repair import give_tables, neutral_tables

ADAPTIVE = (RoutingRule(threshold=0.5), RoutingRule("kept", top_p=0.5, repair=True))
RULES = (FAMILY_RULE, RoutingRule("raw"), RoutingRule("kept", repair=True), RoutingRule(4))
BIASED = topk(
    router=Router("sigmoid", True, 2.5, selection_bias=True, eps=1e-20),
    trained=3,
    shared=Dense(12, "silu"),
    shared_gate=True,
)
ROUTERS = {
    "normalised": llama_like(topk(normalise=True, trained=3), topk(normalise=True, trained=3), head_width=16),
    "biased": llama_like(BIASED, BIASED, head_width=16),
    "plain": gpt2_like(topk(experts=20, trained=3), topk(experts=20, trained=3), head_width=16),
}
DRAWN = {
    "blocks": llama_like(infinity(block=16), infinity(block=16), head_width=16),
    "units": llama_like(infinity(block=1), infinity(block=1), width=32, head_width=16),
}
REPAIRS = (FAMILY_RULE, RoutingRule(repair=True), FAMILY_RULE, RoutingRule(repair=True))
CASES = [(name, rules) for name in ROUTERS for rules in (RULES, (*RULES[1:3], *ADAPTIVE))]
CASES += [(name, REPAIRS) for name in DRAWN]
KEPT = {
    "normalised": ([0, 2, 3, 5], [0, 1, 2, 4]),
    "biased": ([0, 2, 3, 5], [0, 1, 2, 4]),
    "plain": ([0, *range(3, 12)], [*range(1, 20, 2)]),
}  # experts by layer
SETS = {
    name: tuple("".join("01"[expert in layer] for expert in range(ROUTERS[name].experts.maximum)) for layer in layers)
    for name, layers in KEPT.items()
}
CASES += [
    (name, (FAMILY_RULE, RoutingRule(kept=kept), RoutingRule("kept", skip=1, kept=kept), RoutingRule(skip=2)))
    for name, kept in SETS.items()
]
each_case = pytest.mark.parametrize("name, rules", CASES, ids=str)


@pytest.fixture(autouse=True)
def kernels() -> Iterator[None]:
    if not load().native:
        pytest.skip(f"no native kernels: {load().reason}")
    yield


def repairable(config: DecoderConfig) -> Decoder:
    """A decoder with random statistics for its repair."""
    model, generator = decoder(config), torch.Generator().manual_seed(8)
    shape = (len(config.mixtures), config.experts.maximum + 1, config.width)
    scale_LKD = 1 + 0.3 * torch.randn(shape, generator=generator)
    give_tables(model, scale_LKD, 0.1 * torch.randn(shape, generator=generator))
    return model


def native(model: Decoder) -> NativeDecoder:
    return NativeDecoder(copy.deepcopy(model), LENGTH)


class RuledRun(PagedRun):
    """A run whose sequences have a rule each."""

    rules: tuple[RoutingRule, ...] = ()

    def _batch(self, parts: list[tuple[int, Tensor]]) -> Batch:
        batch = super()._batch(parts)
        rule_T = torch.cat([torch.full((len(at),), row) for row, at in parts])
        return replace(batch, budget=replace(batch.budget, rules=self.rules, rule_T=rule_T), routes=True)


def run_of(model: Decoder | Runnable, config: DecoderConfig, rules: tuple[RoutingRule, ...], size: int) -> RuledRun:
    """No count is above what its row's rule leaves."""
    rows, per_token = sequences(config, "mixed")
    for row, rule in enumerate(rules):
        left = min((layer.count("1") for layer in rule.kept), default=config.experts.maximum) - rule.skip
        per_token[row] = per_token[row].clamp(max=left)
    run = RuledRun(model, rows, per_token, block_size=size)
    run.rules = rules
    return run


@each_case
def test_logits_are_those_of_the_torch_decoder(name: str, rules: tuple[RoutingRule, ...]) -> None:
    config = (ROUTERS | DRAWN)[name]
    model = repairable(config)
    expected = in_chunks(run_of(model, config, rules, 4), 40)
    found = in_chunks(run_of(native(model), config, rules, 16), 40)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    plain = in_chunks(run_of(model, config, (FAMILY_RULE,) * 4, 4), 40)
    assert not torch.allclose(plain, expected, atol=1e-2)


@each_case
def test_logits_depend_on_no_chunk_and_on_no_rule_of_others(name: str, rules: tuple[RoutingRule, ...]) -> None:
    config = (ROUTERS | DRAWN)[name]
    made = native(repairable(config).to(torch.bfloat16))
    apart, together = (in_chunks(run_of(made, config, rules, size), most) for size, most in ((16, 1), (48, 50)))
    assert torch.equal(apart, together)
    rows, _ = sequences(config, "mixed")
    parts = together.split([len(row) for row in rows])
    for row, rule in enumerate(rules):
        alone = in_chunks(run_of(made, config, (rule,) * 4, 16), 20).split([len(ids) for ids in rows])
        assert torch.equal(alone[row], parts[row])


class Seen(Observer):
    """Observer that keeps what it was told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, int, object]] = []

    def routed(self, layer: int, pairs: int, load_E: Tensor, scores_TE: Tensor | None) -> None:
        self.told.append(("routed", layer, (pairs, load_E.tolist())))

    def used(self, layer: int, used_T: Tensor) -> None:
        assert used_T.dtype == torch.int64
        self.told.append(("used", layer, used_T.tolist()))

    def routes(self, layer: int, expert_TK: Tensor) -> None:
        assert expert_TK.dtype == torch.int32
        rows = [[expert for expert in row if expert >= 0] for row in expert_TK.tolist()]
        assert all(row[: len(kept)] == kept for row, kept in zip(expert_TK.tolist(), rows, strict=True))
        self.told.append(("routes", layer, rows))


@pytest.mark.parametrize("name, rules", [*CASES, ("plain", (*RULES[:3], RoutingRule("kept", reuse=3)))], ids=str)
def test_both_tell_the_same_of_their_work(name: str, rules: tuple[RoutingRule, ...]) -> None:
    config = (ROUTERS | DRAWN)[name]
    model, seen = repairable(config), []
    for made, size in ((TorchRunnable(model), 4), (native(model), 16)):
        observer, run = Seen(), run_of(made, config, rules, size)
        run.model = lambda batch, pages, made=made, observer=observer: made(batch, pages, observer)  # type: ignore[assignment]
        run.step({row: len(ids) for row, ids in enumerate(run.rows)})
        seen.append(sorted(observer.told, key=lambda one: one[:2]))
    assert seen[0] == seen[1]
    adaptive = any(rule.adaptive for rule in rules)
    assert [kind for kind, _, _ in seen[0]] == ["routed"] * 2 + ["routes"] * 2 + ["used"] * 2 * adaptive


@pytest.mark.parametrize("name", ROUTERS)
def test_kept_experts_are_a_smaller_decoder_bit_for_bit(name: str) -> None:
    config, rule = ROUTERS[name], RoutingRule(kept=SETS[name])
    model = decoder(config)
    topks = [shape for shape in config.feed_forward if isinstance(shape, TopK)]
    shapes = tuple(replace(shape, experts=len(KEPT[name][0])) for shape in topks)
    small = decoder(replace(config, feed_forward=shapes))
    for parameter, target in small.named_parameters():
        source: Tensor = model.get_parameter(parameter)
        if source.shape != target.shape:
            source = source[KEPT[name][int(parameter.split(".")[1])]]
        target.data = source.clone()
    whole = in_chunks(run_of(native(model), config, (rule,) * 4, 16), 40)
    run = run_of(native(small), config, (rule,) * 4, 16)
    run.rules = (FAMILY_RULE,) * 4
    assert torch.equal(in_chunks(run, 40), whole)


def test_what_is_written_to_the_tables_later_counts() -> None:
    config = ROUTERS["plain"]
    model, (scale_LKD, shift_LKD) = decoder(config), neutral_tables(config)
    give_tables(model, scale_LKD, shift_LKD)
    made = NativeDecoder(model, LENGTH)  # takes the layers over, with their tables
    neutral = in_chunks(run_of(made, config, RULES, 16), 40)
    shift_LKD += 0.5
    assert not torch.equal(in_chunks(run_of(made, config, RULES, 16), 40), neutral)


def test_repair_without_statistics_is_refused() -> None:
    config = ROUTERS["plain"]
    with pytest.raises(RuntimeError, match="are to be repaired, the tables have 0"):
        in_chunks(run_of(native(decoder(config)), config, RULES, 16), 40)
