"""The training network computes what the decoder serves."""

from typing import Any

import pytest
import torch

from model.backends.torch.attend import WholeAttend
from model.decoder import Decoder
from tests.training.gpu.tiny import network, shape
from training.export_twin import checkpoint_config
from training.gpu.kernels import Layout
from training.gpu.network import Dense, Infinity, Network, decoder_state
from training.gpu.recipes import TWINS
from training.gpu.study_sets import SETS
from training.step import make_batch
from weights.config import decoder_config

IDS = torch.randint(0, 50, (3, 16), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def logits(net: Network, counts: list[int]) -> torch.Tensor:
    return net.logits(IDS, Layout.of(counts, IDS.shape[1], IDS.device))


@pytest.mark.parametrize("name", TWINS)
@torch.no_grad()
def test_network_and_decoder_have_the_same_logits(name: str) -> None:
    net = network(shape(name)).eval()
    decoder = Decoder(decoder_config(checkpoint_config(net.shape)))
    decoder.load_state_dict(decoder_state(net))
    for count in (1, 3, 8):
        expected = decoder(make_batch(IDS, [count] * 2, 0), WholeAttend(16))
        torch.testing.assert_close(logits(net, [count] * 3).flatten(0, 1), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", TWINS)
def test_a_row_does_not_depend_on_the_counts_of_others(name: str) -> None:
    net = network(shape(name)).eval()
    mixed = logits(net, [8, 3, 1])
    for row, count in enumerate((8, 3, 1)):
        torch.testing.assert_close(mixed[row], logits(net, [count] * 3)[row], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits(net, [8] * 3), logits(net, [1] * 3), atol=1e-3)


CHOICES: list[dict[str, Any]] = [
    {"aggregate": "sum"},
    {"aggregate": "unit"},
    {"aggregate": "mean", "replacement": True, "draws": "random"},
    {"values": "softmax", "draws": "mean"},
    {"values": "relu"},
    {"draws": "learned"},
]


@pytest.mark.parametrize("choice", CHOICES, ids=lambda choice: "-".join(map(str, choice.values())))
def test_every_choice_of_the_study_trains_all_its_parameters(choice: dict[str, Any]) -> None:
    net = network(shape("infinity", **choice))
    net.logits(IDS, Layout.of([8, 3, 1], 16, IDS.device)).square().mean().backward()
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.any(), name


def test_aggregates_differ_by_a_factor_of_each_token() -> None:
    sum_TB, square_T1, counts_T1 = torch.randn(4, 96), torch.full((4, 1), 12.0), torch.full((4, 1), 3.0)
    mixtures = {name: Infinity(shape("infinity", aggregate=name)) for name in ("sum", "mean", "unit", "norm")}
    made = {name: mixture.aggregate(sum_TB, square_T1, counts_T1) for name, mixture in mixtures.items()}
    torch.testing.assert_close(made["mean"] * 3, made["sum"])
    torch.testing.assert_close(made["unit"].norm(dim=1), torch.ones(4))
    torch.testing.assert_close(made["norm"].norm(dim=1), torch.full((4,), 2.0))  # the root of 12 / 3


def test_normalised_weights_sum_to_one() -> None:
    net = network(shape("topk", normalise=True))
    _, masks = net.hidden(IDS, Layout.of([8, 3, 1], 16, IDS.device))
    for mask_TE in masks:
        assert mask_TE is not None
        torch.testing.assert_close(mask_TE.sum(1), torch.ones(48))
        assert (mask_TE != 0).sum(1).tolist() == [8] * 16 + [3] * 16 + [1] * 16


def test_a_dense_network_runs_and_is_not_exported() -> None:
    net = network(shape("infinity", kind="dense", largest=1))
    assert all(isinstance(block.ffn, Dense) for block in net.stack())
    assert torch.isfinite(logits(net, [1] * 3)).all()
    with pytest.raises(ValueError, match="not exported"):
        decoder_state(net)


def test_all_shapes_fit_the_kernels_and_their_counts() -> None:
    """Rows of the study as well: blocks of a power of two, multiples of 8, and never more draws than blocks."""
    shapes = [made for made, _ in TWINS.values()] + [run.shape for runs in SETS.values() for run in runs]
    for made in shapes:
        if made.kind == "dense":
            continue
        assert made.blocks % 8 == 0 and made.block.bit_count() == 1
        assert made.kind == "topk" or made.replacement or made.largest * made.kept <= made.blocks
