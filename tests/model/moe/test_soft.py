"""Soft and deep mixtures equal their definitions in float64, at every count and with both ways to restrict weights."""

from collections.abc import Iterator
from itertools import pairwise, product
from typing import Any

import pytest
import torch
from torch import Tensor

from model.backends.torch.attend import WholeAttend
from model.backends.torch.parts import PartAttend
from model.batch import LayerBudget, Part
from model.moe.deep import DeepMixture
from model.moe.soft import SoftMixture
from model.moe.soft_segments import SegmentMixture
from model.shapes.deep import DeepLevel
from model.shapes.soft import SoftSlots, segments
from model.step import LayerStep, Observer, Past
from tests.model.moe.definitions import DeepDefinition, SegmentsDefinition, SoftDefinition, assert_near
from tests.model.tiny import randomise

WIDTH, EXPERTS, TOKENS = 12, 5, 11


def soft(restriction: str = "renormalise", **changes: Any) -> Any:
    fields: dict[str, Any] = {"experts": EXPERTS, "slots": 2, "width": 7, "trained": EXPERTS}
    return ready(SoftMixture(WIDTH, SoftSlots(**fields | changes, restriction=restriction)))  # type: ignore[arg-type]


def segmented(restriction: str = "renormalise", **changes: Any) -> Any:
    fields: dict[str, Any] = {"experts": EXPERTS, "width": 7, "trained": EXPERTS, "segment": 4, "model_width": WIDTH}
    return ready(SegmentMixture(segments(**fields | changes, restriction=restriction)))


def deep(restriction: str = "renormalise", **changes: Any) -> Any:
    fields: dict[str, Any] = {"experts": EXPERTS, "width": 7, "gate_width": 6, "most": EXPERTS}
    return ready(DeepMixture(WIDTH, DeepLevel(**fields | changes, restriction=restriction)))  # type: ignore[arg-type]


def ready(module: Any) -> Any:
    """Random, and with logits that differ."""
    randomise(module)
    if hasattr(module, "scale"):
        module.scale.data.fill_(5.0)
    return module.requires_grad_(False)


KINDS = {soft: SoftDefinition, segmented: SegmentsDefinition, deep: DeepDefinition}
each = pytest.mark.parametrize(("kind", "restriction"), list(product(KINDS, ["renormalise", "drop"])))


def tokens(count: int = TOKENS, seed: int = 3) -> Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))


def use(counts: list[int], past: Past | None = None, **changes: Any) -> LayerStep:
    """Of one whole text, or of those that `past` says."""
    budget = LayerBudget(torch.tensor(counts), max(counts))
    length = len(counts)
    zeros_T = torch.zeros(length, dtype=torch.int64)
    return LayerStep(budget, zeros_T, torch.arange(length), past=past or WholeAttend(length), **changes)


@each
def test_every_count_is_the_definition(kind: Any, restriction: str) -> None:
    module, x_TD = kind(restriction), tokens()
    definition, outputs = KINDS[kind](module), []
    for count in range(1, EXPERTS + 1):
        counts = [count] * TOKENS
        outputs.append(module(x_TD, use(counts)))
        assert_near(outputs[-1].double(), definition.of(x_TD.double(), counts))
    assert all((one - other).abs().max() > 1e-3 for one, other in pairwise(outputs))


@each
def test_tokens_may_have_different_counts(kind: Any, restriction: str) -> None:
    module, x_TD = kind(restriction), tokens()
    counts = [1 + t % EXPERTS for t in range(TOKENS)]
    expected = KINDS[kind](module).of(x_TD.double(), counts)
    assert_near(module(x_TD, use(counts)), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_at_all_experts_nothing_is_restricted(kind: Any) -> None:
    """The way to restrict makes a difference below that."""
    x_TD = tokens()
    for count in (EXPERTS, 2):
        one, other = (kind(restriction)(x_TD, use([count] * TOKENS)) for restriction in ("renormalise", "drop"))
        assert torch.allclose(one, other, atol=1e-6) == (count == EXPERTS)


@pytest.mark.parametrize(
    "made",
    [soft(slots=1, gated=True, activation="silu"), segmented(gated=False, activation="relu"), deep(bias=False)],
    ids=["soft", "segmented", "deep"],
)
def test_other_experts(made: Any) -> None:
    definition = {SoftMixture: SoftDefinition, SegmentMixture: SegmentsDefinition, DeepMixture: DeepDefinition}
    x_TD, counts = tokens(), [3] * TOKENS
    expected = definition[type(made)](made).of(x_TD.double(), counts)
    assert_near(made(x_TD, use(counts)), expected)


class Told(Observer):
    """What a mixture tells."""

    def routed(self, layer: int, pairs: int, load_E: Tensor, scores_TE: Tensor | None) -> None:
        self.pairs, self.load_E, self.scores_TE = pairs, load_E, scores_TE

    def used(self, layer: int, used_T: Tensor) -> None:
        self.used_T = used_T

    def routes(self, layer: int, expert_TK: Tensor) -> None:
        self.expert_TK = expert_TK


@pytest.mark.parametrize("kind", KINDS)
def test_the_experts_of_a_count_are_the_first_of_a_larger_one(kind: Any) -> None:
    module, x_TD = kind(), tokens()
    seen = []
    for count in range(1, EXPERTS + 1):
        told = Told()
        module(x_TD, use([count] * TOKENS, observer=told, routes=True))
        assert told.pairs == count * TOKENS == int(told.load_E.sum())
        assert told.scores_TE is not None and torch.allclose(told.scores_TE.sum(1), torch.ones(TOKENS))
        seen.append(told.expert_TK)
    for fewer, more in pairwise(seen):
        assert torch.equal(fewer, more[:, : fewer.shape[1]])
    assert (seen[-1].sort().values == torch.arange(EXPERTS)).all()


def texts(*lengths: int) -> Iterator[Part]:
    for number, length in enumerate(lengths):
        yield Part(number, length, 0, length, 0, 0, length)


def test_texts_of_one_step_do_not_mix() -> None:
    """Each has experts of its own, as if it were alone."""
    module, lengths, counts = soft(), (3, 7, 1), (2, 1, 4)
    rows = [tokens(length, seed) for seed, length in enumerate(lengths)]
    together = use(
        [k for k, n in zip(counts, lengths, strict=True) for _ in range(n)], PartAttend(list(texts(*lengths)))
    )
    found = module(torch.cat(rows), together).split(lengths)
    for row, count, part in zip(rows, counts, found, strict=True):
        torch.testing.assert_close(part, module(row, use([count] * len(row))), atol=1e-6, rtol=1e-5)


def test_what_soft_slots_see() -> None:
    """A later token changes earlier ones: so it is an encoder's layer; and no routing rule applies."""
    module, x_TD = soft(), tokens()
    other_TD = torch.cat([x_TD[:-1], -x_TD[-1:]])
    counts = [EXPERTS] * TOKENS
    assert ((module(x_TD, use(counts)) - module(other_TD, use(counts)))[:-1].abs().amax(1) > 1e-4).all()
    assert not module.shape.token_local and module.shape.memory is None


def test_segments_see_the_segment_before() -> None:
    """Weights change at the bounds of segments alone, and a token of the segment before changes them."""
    module, x_TD = segmented(), tokens(12)
    logits_TE = module.segment_logits(x_TD, use([1] * 12))
    shared = [logits_TE[first : first + 4] for first in (0, 4, 8)]
    assert all((part == part[0]).all() for part in shared)
    assert (shared[0][0] - shared[1][0]).abs().max() > 1e-2 < (shared[1][0] - shared[2][0]).abs().max()
    x_TD[3] *= -1
    moved = module.segment_logits(x_TD, use([1] * 12)) - logits_TE
    assert not moved[:4].any() and (moved[4:8].abs().amax(1) > 1e-3).all() and not moved[8:].any()


def test_a_count_above_a_levels_experts_means_all_of_them() -> None:
    module, told, x_TD = deep(most=9, even=False), Told(), tokens()
    found = module(x_TD, use([9] * TOKENS, observer=told))
    assert torch.equal(found, module(x_TD, use([EXPERTS] * TOKENS)))
    assert (told.used_T == EXPERTS).all() and told.pairs == EXPERTS * TOKENS
    mixed = [9, 1, *[EXPERTS] * (TOKENS - 2)]
    expected = KINDS[deep](module).of(x_TD.double(), [min(EXPERTS, count) for count in mixed])
    assert_near(module(x_TD, use(mixed)), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_that_cannot_be_are_refused(kind: Any) -> None:
    with pytest.raises(ValueError, match="restriction 'clip' is not known, only renormalise, drop"):
        kind("clip")
    with pytest.raises(ValueError, match="must be at most 8192, got 9000"):
        kind(experts=9000, trained=1) if kind is not deep else kind(experts=9000, most=9000)


def test_gradients_reach_routers_and_experts() -> None:
    for module in (soft(), segmented(), deep()):
        module.requires_grad_(True)
        module(tokens(), use([2] * TOKENS)).square().sum().backward()
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in module.parameters())
