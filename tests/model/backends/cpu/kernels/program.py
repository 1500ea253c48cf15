"""A small program and a step of it, and what is refused when one argument of the step, or of the program, is wrong.

That it computes what the torch decoder does is `tests/model/backends/cpu/test_decoder.py`'s.
"""

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from model.backends.cpu.decoder import NO_SLOTS, NativeDecoder
from model.backends.cpu.kernels.rules import NO_RULES, rule_arguments
from model.batch import LayerBudget
from model.budget import RoutingRule
from tests.model.tiny import decoder, gpt2_like, infinity, topk

TOKENS, WIDTH = 3, 32


@cache
def program() -> tuple[NativeDecoder, list[Tensor]]:
    """Two layers of mixtures, learned positions, and caches of four blocks."""
    config = gpt2_like(topk(), topk(), width=WIDTH, heads=2, kv_heads=2, head_width=16)
    model = NativeDecoder(decoder(config), 64)
    return model, model.cache(4, 16).layers


def step() -> dict[str, Any]:
    """Valid arguments of `Program.run` in their order: one sequence of three tokens."""
    model, caches = program()
    layers = len(model.config.mixtures)
    return {
        "ids": torch.arange(TOKENS),
        "positions": torch.arange(TOKENS),
        "seeds": torch.zeros(TOKENS, dtype=torch.int64),
        "counts": torch.ones(layers, TOKENS, dtype=torch.int64),
        "k_max": 1,
        "rules": NO_RULES[0],
        "rule_of": NO_RULES[1],
        "allowed": NO_RULES[2],
        "rows": torch.tensor([TOKENS - 1]),
        "caches": caches,
        "spans": torch.tensor([[0, TOKENS, TOKENS]]),
        "tables": torch.tensor([[2]]),
        "slots": NO_SLOTS,
        "snapshots": NO_SLOTS,
        "block_size": 16,
        "routes": False,
    }


def ruled(*rules: RoutingRule) -> dict[str, Any]:
    """What a step is given where its three tokens have these rules in turn."""
    rule_T = torch.arange(TOKENS) % len(rules)
    return dict(
        zip(("rules", "rule_of", "allowed"), rule_arguments(LayerBudget(rule_T, 1, rules, rule_T)), strict=True)
    )


def run(given: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor | None, list[Tensor]]:
    """Logits, loads, experts that each token ran, and which, of a step."""
    logits_BV, load_N, used_LT, expert_LTK = program()[0]._run(*given.values())
    return logits_BV, load_N, used_LT, expert_LTK


def refused(argument: str, change: Callable[[Any], Any]) -> str:
    """What is said of a step with one argument changed; the program then runs as before."""
    expected, given = run(step())[0], step()
    given[argument] = change(given[argument])
    with pytest.raises(RuntimeError) as error:
        run(given)
    assert torch.equal(run(step())[0], expected)
    return str(error.value)


def rule_refused(numbers: list[float], model: NativeDecoder | None = None) -> str:
    """What is said of a step all of whose tokens have the rule of these six numbers."""
    given = step() | {"rules": torch.tensor([numbers], dtype=torch.float64), "rule_of": torch.zeros(TOKENS).long()}
    with pytest.raises(RuntimeError) as error:
        (model or program()[0])._run(*given.values())
    return str(error.value)


@cache
def drawing_program() -> NativeDecoder:
    """The same with an ∞-MoE for its second mixture."""
    config = gpt2_like(topk(), infinity(), width=WIDTH, heads=2, kv_heads=2, head_width=16)
    return NativeDecoder(decoder(config), 64)


def headless() -> str:
    """What is said of a step of a program without a head."""
    program = torch.classes.moedial.Program(WIDTH, torch.zeros(5, WIDTH), 1.0, None)
    with pytest.raises(RuntimeError) as error:
        program.run(*step().values())
    return str(error.value)


def made(argument: str, change: Callable[[Any], Any]) -> str:
    """What is said of a program whose embeddings are wrong."""
    given: dict[str, Any] = {"width": WIDTH, "embeddings": torch.zeros(5, WIDTH), "scale": 1.0}
    given |= {"position_embeddings": None}
    given[argument] = change(given[argument])
    with pytest.raises(RuntimeError) as error:
        torch.classes.moedial.Program(*given.values())
    return str(error.value)


PROGRAM_REFUSALS: list[tuple[str, Callable[[Any], Any], str]] = [
    ("positions", lambda p: p[:2], "a step needs ids, positions and seeds of each token"),
    ("seeds", lambda s: s[:2], "a step needs ids, positions and seeds of each token"),
    ("seeds", Tensor.int, "seeds has the wrong dtype, Int"),
    ("counts", lambda c: c[0], "counts must be [L, 3], got [3]"),
    ("counts", lambda c: c[:1], "counts are for 1 mixtures, the decoder has more"),
    ("counts", lambda c: c + 1, "count 2 is not between 1 and 1"),
    ("counts", lambda c: c - 1, "count 0 is not between 1 and 1"),
    ("k_max", lambda _: 99, "counts up to 99 do not fit"),
    ("rules", lambda _: torch.zeros(1, 6).double(), "rules must be [R, 6], with one of them for each of 3 tokens, got"),
    ("rule_of", lambda _: torch.zeros(3).long(), "rule 0 is not one of 0"),
    ("allowed", lambda _: torch.ones(1, 12).byte(), "experts may run by no rule"),
    ("ids", lambda ids: ids - 1, "token -1 is not between 0 and"),
    ("ids", lambda ids: ids + 10**6, "token 1000000 is not between 0 and"),
    ("positions", lambda p: p + 10**6, "position 1000000 is not between 0 and"),
    ("rows", lambda r: r + 1, "row 3 is not between 0 and 2"),
    ("caches", lambda c: c[:1], "there are 1 caches, the decoder has more layers"),
    ("caches", lambda c: [one.double() for one in c], "the cache is Double"),
    ("tables", lambda t: t + 2, "block 4 is not in the cache"),
    ("spans", lambda s: s + torch.tensor([[0, 1, 1]]), "spans cover 4 rows of 3"),
]
RULE_REFUSALS: list[tuple[list[float], str]] = [
    ([-3, 0, 0, 0, 0, 0], "there is no rule -3, 0, 0, 0, 0"),
    ([1.5, 0, 0, 0, 0, 0], "there is no rule 1.5"),
    ([math.nan, 0, 0, 0, 0, 0], "there is no rule nan"),
    ([0, -0.1, 0, 0, 0, 0], "there is no rule 0, -0.1"),
    ([0, 1.1, 0, 0, 0, 0], "there is no rule 0, 1.1"),
    ([0, 0, 2, 0, 0, 0], "there is no rule 0, 0, 2"),
    ([0, 0, 0, 2, 0, 0], "there is no rule 0, 0, 0, 2"),
    ([0, 0, 0, 0, -1, 0], "there is no rule 0, 0, 0, 0, -1"),
    ([0, 0, 0, 0, math.inf, 0], "there is no rule 0, 0, 0, 0, inf"),
    ([7, 0, 0, 0, 0, 0], "a rule of 7 experts does not fit 6"),
    ([0, 0, 0, 0, 0, -1], "there is no rule 0, 0, 0, 0, 0, -1"),
    ([0, 0, 0, 0, 0, 1.5], "there is no rule 0, 0, 0, 0, 0, 1.5"),
    ([0, 0, 0, 0, 0, 6], "a count of 1 after 6 skipped experts does not fit 6"),
    ([0, 0, 0, 0, 7, 0], "a rule of 7 experts does not fit 6"),
    ([-1, 0, 0, 1, 0, 0], "counts up to 1 are to be repaired, the tables have 0"),
]
MADE: list[tuple[str, Callable[[Any], Any], str]] = [
    ("embeddings", lambda w: w[:, :5], "embeddings must be [count, 32]"),
    ("embeddings", Tensor.half, "embeddings cannot be Half"),
    ("position_embeddings", lambda _: torch.zeros(5), "position embeddings must be [count, 32]"),
]
