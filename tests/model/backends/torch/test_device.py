"""Steps on a device that the host cannot read: no size follows from values, nothing is read back or made elsewhere.

torch's meta device stands for the GPU. It has shapes and no values, so that every read-back fails by itself; two modes
refuse what it would let pass: operands from two devices, and copies that are waited for. What the padded forms
compute is compared with the usual ones on the CPU.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine.expert_stats import ExpertStats
from model import devices
from model.backends.torch.attend import WholeAttend
from model.backends.torch.backend import TorchRunnable
from model.batch import Batch, LateIds, Pages
from model.budget import FAMILY_RULE, RoutingRule
from model.decoder import Decoder
from tests.families.test_parity import each, loaded
from tests.families.test_rules import NO_OTHER_RULE
from tests.model.tiny import PagedRun, decoder, infinity, llama_like
from weights.repair import give_tables, neutral_tables

META = torch.device("meta")
LENGTHS = ({0: 5, 1: 3}, {0: 1, 1: 4, 2: 9}, {0: 1, 1: 1, 2: 1})
ROWS = [[5, 1, 30, 8, 8, 2, 36], [0, 17, 11, 60, 59, 3, 3, 44], [21, 9, 1, 2, 3, 4, 5, 6, 7, 8]]
RULES = (FAMILY_RULE, RoutingRule("raw", threshold=0.3), RoutingRule("kept", top_p=0.9, repair=True, reuse=2))
INFINITIES = {
    "independent": infinity(),
    "new groups": infinity(replacement=False, keep_ratio=0.1),
    "points": infinity(draws="points", aggregate="norm"),
    "antithetic": infinity(draws="antithetic"),
}


class NothingWaits(TorchDispatchMode):
    """Fails where an operation takes tensors of both devices, or a copy to the device is waited for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.ndim]
        found = {tensor.device for tensor in tensors}
        if len(found) > 1:
            raise AssertionError(f"{func} takes tensors of {found}")
        moves = isinstance(result, Tensor) and result.device == META and found == {torch.device("cpu")}
        if moves and not kwargs.get("non_blocking"):
            raise AssertionError(f"{func} waits for the device")
        return result


class NothingMade(TorchFunctionMode):
    """Fails where a tensor of the host's values is made on the device: torch waits for that copy."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.tensor, torch.as_tensor, Tensor.new_tensor) and result.device == META:
            raise AssertionError(f"{func} waits for the device")
        return result


class OnDevice(TorchRunnable):
    """Gives logits without values where the decoder has none, as they are before they are brought to the CPU."""

    asked: tuple[RoutingRule, ...] = ()

    def __call__(self, batch: Batch, pages: Pages, observer: Any = None) -> Tensor:
        if self.asked:
            rule_T = torch.arange(len(batch.ids_T)) % len(self.asked)
            budget = batch.budget
            budget = type(budget)(budget.counts_LT, budget.k_max, budget.pairs_L, self.asked, rule_T)
            names = ("ids_T", "positions_T", "seeds_T", "rows_B")
            batch = Batch(**{name: getattr(batch, name) for name in names}, budget=budget, routes=True)
        return self.launch(batch, pages, ExpertStats())


def mixed_counts(model: Decoder) -> list[list[int]]:
    experts = model.config.experts
    choices = (1, experts.trained, experts.maximum) if experts.layers else (1, 1, 1)
    return [[count] * len(model.config.mixtures) for count in choices]


def logits(model: Decoder, rules: tuple[RoutingRule, ...] = ()) -> Iterator[Tensor]:
    """Of steps that prefill, mix and decode, at three counts."""
    runnable = OnDevice(model)
    runnable.asked = rules
    run = PagedRun(runnable, ROWS, mixed_counts(model))
    for lengths in LENGTHS:
        yield torch.cat(list(run.step(lengths).values()))


def with_tables(model: Decoder) -> Decoder:
    if model.config.mixtures:
        give_tables(model, *neutral_tables(model.config))
    return model


def rules_of(family: str, model: Decoder) -> tuple[tuple[RoutingRule, ...], ...]:
    """None, and where the family takes them all of `RULES`."""
    takes = bool(model.config.experts.layers) and family not in NO_OTHER_RULE
    return ((), RULES) if takes else ((),)


def check(model: Decoder, rules: tuple[RoutingRule, ...]) -> None:
    with torch.inference_mode(), NothingWaits(), NothingMade():
        assert [part.device for part in logits(model, rules)] == [META] * len(LENGTHS)


@each
def test_no_step_of_a_family_waits(family: str, number: int, tmp_path: Path) -> None:
    model = loaded(family, number, tmp_path).to(META)
    for rules in rules_of(family, model):
        check(with_tables(model), rules)


@pytest.mark.parametrize("kind", INFINITIES)
def test_no_step_of_an_infinity_moe_waits(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # it does not know the meta device
    check(decoder(llama_like(INFINITIES[kind], INFINITIES[kind])).to(META), ())


@each
@torch.inference_mode()
def test_padded_mixtures_equal_ragged_ones(
    family: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = with_tables(loaded(family, number, tmp_path))
    for rules in rules_of(family, model):
        with monkeypatch.context() as patch:
            ragged = list(logits(model, rules))
            patch.setattr(devices, "readable", lambda x: False)
            padded = list(logits(model, rules))
        torch.testing.assert_close(padded, ragged, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", INFINITIES)
@torch.inference_mode()
def test_padded_draws_equal_ragged_ones(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = decoder(llama_like(INFINITIES[kind], INFINITIES[kind]))
    ragged = list(logits(model))
    monkeypatch.setattr(devices, "readable", lambda x: False)
    torch.testing.assert_close(list(logits(model)), ragged, atol=1e-6, rtol=0)


def test_late_ids_are_not_waited_for() -> None:
    late = LateIds(torch.tensor([1, 2]), torch.tensor([0, 3]), torch.zeros(4, dtype=torch.int64, device=META))
    with NothingWaits(), NothingMade():
        assert late.put(torch.zeros(3, dtype=torch.int64, device=META)).shape == (3,)


def test_late_ids_take_their_places() -> None:
    late = LateIds(torch.tensor([2, 0]), torch.tensor([1, 3]), torch.tensor([5, 6, 7, 8]))
    assert late.put(torch.tensor([-1, 4, -1])).tolist() == [8, 4, 6]


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.cpu(),
        lambda x: x.nonzero(),
        lambda x: x.bincount(),
        lambda x: x.tolist(),
        lambda x: x.sum().item(),
        lambda x: x[x > 1],
        lambda x: x.new_tensor([1, 2]),
        lambda x: x + torch.ones(4, dtype=torch.int64),
        lambda x: torch.ones(4).to(META),
    ],
)
def test_what_waits_is_found(wait: Any) -> None:
    x = torch.ones(4, dtype=torch.int64, device=META)
    with NothingWaits(), NothingMade(), pytest.raises((AssertionError, NotImplementedError, RuntimeError)):
        wait(x)


def test_states_of_whole_sequences_are_made_on_their_device() -> None:
    states = WholeAttend(3, "meta").states(memory=0, rows=6, size=5)
    assert [state.device.type for _, state, _ in states] == ["meta", "meta"]
