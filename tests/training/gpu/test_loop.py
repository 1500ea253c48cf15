"""The order of windows, the loss, and that runs learn, repeat and end when they should."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tests.training.gpu.tiny import network, shape
from training.gpu.kernels import Layout
from training.gpu.loop import Trainer, Windows, cross_entropy, distilled, train
from training.gpu.plan import Plan

CPU = torch.device("cpu")
PLAN = Plan(steps=12, rows=4, length=16, warmup=2, muon_lr=0.05, by_block=False)
TOKENS = np.tile(np.arange(10, dtype=np.uint16), 60)


def windows(seed: int = 1, tokens: np.ndarray = TOKENS) -> Windows:
    return Windows(tokens, 16, seed, CPU)


def test_every_window_comes_once_an_epoch_in_an_order_of_the_seed() -> None:
    tokens = np.arange(81, dtype=np.uint16)
    made = Windows(tokens, 10, 1, CPU)
    epochs = [[window.tolist() for _ in range(4) for window in made(2)] for _ in range(2)]
    whole = [list(range(start, start + 11)) for start in range(0, 80, 10)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == whole
    assert epochs[0] != epochs[1]
    again = Windows(tokens, 10, 1, CPU)
    assert [window.tolist() for window in again(8)] == epochs[0]
    assert [window.tolist() for window in Windows(tokens, 10, 2, CPU)(8)] != epochs[0]


def test_no_window_comes_twice_where_steps_do_not_divide_the_epoch() -> None:
    made = Windows(np.arange(81, dtype=np.uint16), 10, 1, CPU)
    for _ in range(3):
        epoch = [int(window[0]) for _ in range(2) for window in made(3)]
        assert len(set(epoch)) == 6


def test_a_text_of_fewer_windows_than_a_step_is_refused() -> None:
    with pytest.raises(ValueError, match="a step of 9 windows needs as many of 10 tokens, the text has 8"):
        Windows(np.arange(81, dtype=np.uint16), 10, 1, CPU)(9)


def test_the_loss_is_the_cross_entropy_of_the_next_token() -> None:
    net, window_NS = network(shape("infinity")), windows()(4)
    layout = Layout.of([5, 3, 2, 1], 16, CPU)
    expected = F.cross_entropy(net.logits(window_NS[:, :-1], layout).flatten(0, 1), window_NS[:, 1:].flatten())
    torch.testing.assert_close(cross_entropy(net, window_NS[:, :-1], window_NS[:, 1:], layout), expected)


def test_distillation_without_weight_is_the_mean_of_both_losses() -> None:
    net, window_NS = network(shape("infinity")), windows()(2)
    both = Layout.of([16, 16, 2, 1], 16, CPU)
    loss, shown = distilled(net, window_NS, both, 0.0)
    torch.testing.assert_close(loss, shown)
    twice_NS = torch.cat([window_NS, window_NS])
    torch.testing.assert_close(loss, cross_entropy(net, twice_NS[:, :-1], twice_NS[:, 1:], both))
    same = Layout.of([16] * 4, 16, CPU)
    loss, shown = distilled(net, window_NS, same, 1.0)  # the small network is the large one: nothing diverges
    torch.testing.assert_close(loss, 0.5 * shown, atol=1e-5, rtol=0)


CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("infinity", {}, {}),
    ("topk", {}, {"by_block": True}),
    ("infinity", {"draws": "learned"}, {"distil": 0.5}),
    ("infinity", {"kind": "dense", "largest": 1}, {"counts": "1"}),
]


@pytest.mark.parametrize(("name", "choice", "changes"), CASES)
def test_a_run_learns_and_repeats(name: str, choice: dict[str, Any], changes: dict[str, Any]) -> None:
    plan = replace(PLAN, **changes)
    said: list[str] = []
    runs = [Trainer(network(shape(name, **choice)), windows(), plan, said.append) for _ in range(2)]
    losses = [float(runs[0].step()) for _ in range(plan.steps)]
    assert losses[-1] < losses[0] - 0.5
    result = runs[1].run(0)
    assert result["curve"] == [(12, round(losses[-1], 4))]
    assert result["steps"] == result["plan_steps"] == 12
    assert result["tokens"] == 12 * 16 * (2 if plan.distil else 4)
    assert len(said) == 1 and said[0].startswith("step 12 loss ")
    for one, other in zip(runs[0].net.parameters(), runs[1].net.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_balance_of_experts_is_part_of_the_loss() -> None:
    weights = []
    for balance in (0.0, 1.0):
        run = Trainer(network(shape("topk")), windows(), replace(PLAN, balance=balance), print)
        run.step()
        weights.append(next(run.net.stack()).ffn.router)
    assert not torch.equal(*weights)  # type: ignore[arg-type]


def test_a_time_limit_sets_the_steps_from_the_measured_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100))
    monkeypatch.setattr("training.gpu.loop.MEASURED", (1, 3))
    monkeypatch.setattr("training.gpu.loop.time.monotonic", lambda: next(clock))
    said: list[str] = []
    tiny = replace(PLAN, steps=1 << 30)
    result = train(network(shape("topk", layers=1)), windows(), tiny, said.append, seconds=10)
    assert result["steps"] == result["plan_steps"] == 3 + 8 * 2  # two seconds gone, half a second each
    assert "500.0 ms per step" in said[0] and "19 steps" in said[0]
