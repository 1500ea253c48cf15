"""The decoder under every layout: a paged cache filled in random chunks gives what one pass over the sequence gives."""

import random
from dataclasses import replace

import pytest
import torch

from model.backends.torch.attend import WholeAttend
from model.decoder import Decoder, parameter_count
from model.shapes.decoder import DecoderConfig
from model.shapes.mixtures import Dense
from tests.model.tiny import (
    VOCABULARY,
    PagedRun,
    decoder,
    gpt2_like,
    infinity,
    llama_like,
    topk,
    whole_batch,
    whole_logits,
)

DENSE = Dense(20, "gelu_tanh", gated=False, bias=True)
LAYOUTS: dict[str, DecoderConfig] = {
    "gpt2-dense": gpt2_like(DENSE, DENSE),
    "gpt2-infinity": gpt2_like(infinity(block=1), infinity(block=1)),
    "gpt2-mixed": gpt2_like(DENSE, topk(), infinity()),
    "llama-dense": llama_like(Dense(20, "silu"), Dense(20, "silu")),
    "llama-topk": llama_like(topk(), topk(normalise=True)),
    "llama-infinity": llama_like(infinity(), infinity(draws="antithetic")),
    "olmoe": llama_like(topk(), topk(), qk_norm="full", clip=0.8, kv_heads=4),
    "one-group": llama_like(topk(), infinity(), kv_heads=1, qk_norm="full"),
}


def sequences(layers: int, number: int = 5) -> tuple[list[list[int]], list[list[int]]]:
    """Random rows of ids and their counts per MoE layer."""
    rng = random.Random(2)
    rows = [[rng.randrange(VOCABULARY) for _ in range(rng.randint(9, 30))] for _ in range(number)]
    return rows, [[rng.randint(1, 6) for _ in range(layers)] for _ in range(number)]


@pytest.mark.parametrize("name", LAYOUTS)
def test_random_chunks_over_pages_equal_one_pass(name: str) -> None:
    model = decoder(LAYOUTS[name])
    rows, counts = sequences(len(model.config.mixtures))
    run, rng = PagedRun(model, rows, counts), random.Random(4)
    parts: dict[int, list[torch.Tensor]] = {row: [] for row in range(len(rows))}
    while open_rows := [row for row in parts if run.done[row] < len(rows[row])]:
        some = rng.sample(open_rows, rng.randint(1, len(open_rows)))
        lengths = {row: min(rng.choice([1, 1, 1, 2, 5, 9]), len(rows[row]) - run.done[row]) for row in some}
        for row, logits in run.step(lengths).items():
            parts[row].append(logits)
    for row, ids in enumerate(rows):
        expected = whole_logits(model, ids, counts[row], seed=row)
        assert expected.std() > 0.1
        torch.testing.assert_close(torch.cat(parts[row]), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_future_changes_nothing(name: str) -> None:
    model = decoder(LAYOUTS[name])
    ids, counts = list(range(20)), [2] * len(model.config.mixtures)
    first, second = whole_logits(model, ids, counts), whole_logits(model, [*ids[:12], *range(30, 38)], counts)
    torch.testing.assert_close(first[:12], second[:12], atol=1e-6, rtol=1e-5)
    assert not torch.allclose(first[12:], second[12:], atol=1e-3)


@pytest.mark.parametrize("name", LAYOUTS)
def test_order_matters(name: str) -> None:
    """Positions reach the result: a model without them would see a set of earlier tokens."""
    model = decoder(LAYOUTS[name])
    counts = [2] * len(model.config.mixtures)
    one, other = (whole_logits(model, [*ids, 5], counts)[-1] for ids in ([1, 2, 3, 4], [4, 3, 2, 1]))
    assert not torch.allclose(one, other, atol=1e-3)


def test_what_is_not_finite_in_the_cache_harms_nobody_who_did_not_write_it() -> None:
    """Slots beyond a sequence's context are read as padding; what an earlier, failed request left there is masked."""
    model = decoder(LAYOUTS["llama-topk"])
    rows, counts = sequences(2, number=3)
    run = PagedRun(model, rows, counts)
    for layer in run.cache.layers:
        layer.fill_(torch.nan)
    run.step({0: 7, 1: 2})  # from here on the contexts differ, so that the shorter ones are padded
    for _ in range(2):
        logits = run.step({0: 1, 1: 1, 2: 1})
    for row, length in enumerate((9, 4, 2)):
        expected = whole_logits(model, rows[row][:length], counts[row], seed=row)[-1:]
        torch.testing.assert_close(logits[row], expected, atol=1e-5, rtol=0)


def test_only_the_wanted_rows_get_logits() -> None:
    model = decoder(LAYOUTS["llama-topk"])
    batch = whole_batch([3, 1, 4, 1, 5], [2, 3])
    few = model(replace(batch, rows_B=torch.tensor([3, 1])), WholeAttend(5))
    assert few.shape == (2, VOCABULARY)
    torch.testing.assert_close(few, model(batch, WholeAttend(5))[[3, 1]], atol=1e-6, rtol=1e-5)


def test_a_tied_head_is_counted_once() -> None:
    tied, untied = (Decoder(llama_like(topk(), tied=tied)) for tied in (True, False))
    assert parameter_count(untied) - parameter_count(tied) == VOCABULARY * 24


def test_the_range_of_counts_is_what_every_layer_can_run() -> None:
    experts = llama_like(Dense(8, "silu"), topk(experts=6), infinity(maximum=4)).experts
    assert (experts.layers, experts.trained, experts.minimum, experts.maximum) == (2, 2, 1, 4)
    assert llama_like(infinity()).draws_noise and not llama_like(topk()).draws_noise
