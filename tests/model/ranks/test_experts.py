"""Experts on several ranks give the same bits as in one process, and only routed pairs travel."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from model.decoder import Decoder
from model.moe.base import RoutedPairs, sort_pairs
from model.ranks.experts import RUN
from model.ranks.transport import Transport
from tests.model.ranks.threads import EXPERTS, checkpoint, divided
from tests.model.tiny import PagedRun
from weights.load import load_model
from weights.share import mixtures_of

ROWS = [[5, 1, 30, 8, 2, 36, 0, 17], [11, 60, 59, 3, 44], [9]]
COUNTS = [[1, 3], [7, 2], [2, 7]]  # of each sequence, per layer
Divided = tuple[Decoder, Transport, Decoder]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module", params=[(2, "float32"), (4, "bfloat16")], ids=lambda param: f"{param[0]}-{param[1]}")
def model(request: pytest.FixtureRequest, folder: Path) -> Iterator[Divided]:
    """The model on ranks, rank 0's transport, and the same model in one process."""
    ranks, dtype = request.param
    with divided(folder, ranks, dtype) as (decoder, transport):
        yield decoder, transport, load_model(folder, dtype)[0]


def asked(transport: Transport, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, list[int]]]:
    """What is sent from now on: ranks, and sizes."""
    seen: list[tuple[int, list[int]]] = []
    send = transport.send_sizes

    def record(peer: int, sizes: list[int]) -> None:
        seen.append((peer, sizes))
        send(peer, sizes)

    monkeypatch.setattr(transport, "send_sizes", record)
    return seen


def test_mixed_counts_give_the_same_bits_as_in_one_process(model: Divided) -> None:
    decoder, _, whole = model
    runs = [PagedRun(each, ROWS, COUNTS) for each in (decoder, whole)]
    for lengths in ({0: 3}, {0: 1, 1: 5, 2: 1}, {0: 4}):
        found, expected = (run.step(lengths) for run in runs)
        for row, logits in expected.items():
            assert torch.equal(found[row], logits)


def test_each_row_travels_once_to_a_rank_and_pairs_are_the_routed_ones(
    model: Divided, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder, transport, _ = model
    mixture = mixtures_of(decoder)[0]
    token_R, expert_R = torch.tensor([0, 0, 0, 1, 2]), torch.tensor([0, 5, 6, 6, 6])
    seen = asked(transport, monkeypatch)
    assert mixture.execute is not None
    mixture.execute(rows(mixture.down), sort_pairs(token_R, expert_R, torch.ones(5), EXPERTS))
    assert seen == [(transport.ranks - 1, [RUN, 0, 3, 4])]


@pytest.mark.parametrize("expert", range(EXPERTS))
def test_ranks_without_pairs_hear_nothing(model: Divided, expert: int, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, transport, whole = model
    here, there = mixtures_of(decoder)[1], mixtures_of(whole)[1]
    pairs = sort_pairs(torch.arange(4), torch.full((4,), expert), torch.rand(4), EXPERTS)
    seen = asked(transport, monkeypatch)
    assert here.execute is not None
    x_TD = rows(here.down)
    assert torch.equal(here.execute(x_TD, pairs), there.run_ragged(x_TD, pairs))
    assert len(seen) == (0 if expert < len(here.down) else 1)


def test_no_pairs_at_all(model: Divided) -> None:
    mixture = mixtures_of(model[0])[0]
    none = torch.empty(0, dtype=torch.int64)
    assert mixture.execute is not None
    pairs = RoutedPairs(none, none, torch.empty(0), torch.zeros(EXPERTS, dtype=torch.int64))
    assert not mixture.execute(rows(mixture.down), pairs).any()


def rows(like: torch.Tensor) -> torch.Tensor:
    """Four rows of input."""
    return torch.randn(4, like.shape[1], generator=torch.Generator().manual_seed(2)).to(like.dtype)
