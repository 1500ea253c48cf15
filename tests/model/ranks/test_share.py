"""Which experts a rank holds, and what cannot be divided."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.backends.choose import choose
from model.backends.torch.backend import TorchBackend
from model.errors import CheckpointError
from model.options import Options
from model.ranks.share import Share, refusal
from model.shapes.mixtures import Dense
from tests.model.tiny import infinity, llama_like, topk


@given(st.integers(1, 300), st.integers(1, 16))
def test_every_expert_is_on_one_rank_and_parts_differ_by_at_most_one(experts: int, ranks: int) -> None:
    parts = [Share(rank, ranks).experts(experts) for rank in range(ranks)]
    assert [expert for part in parts for expert in part] == list(range(experts))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize(
    "config, said",
    [
        (llama_like(topk(), infinity()), "2 ranks: layers of the kind Infinity run in one process"),
        (llama_like(Dense(20, "gelu")), "no layer has experts"),
        (llama_like(replace(topk(), experts=2), Dense(20, "gelu")), ""),
        (llama_like(Dense(20, "gelu"), topk()), ""),
    ],
)
def test_what_has_no_pairs_of_experts_is_refused_by_name(config: object, said: str) -> None:
    reason = refusal(config, 2)  # type: ignore[arg-type]
    assert said in (reason or "") and bool(reason) == bool(said)


def test_more_ranks_than_experts_are_refused() -> None:
    assert refusal(llama_like(topk()), 6) is None
    assert refusal(llama_like(topk()), 7) == "7 ranks: a layer has 6 experts, fewer than ranks"


def test_divided_experts_run_in_plain_torch_and_the_start_says_so() -> None:
    backend, reason = choose(llama_like(topk()), Options(ranks=2))
    assert isinstance(backend, TorchBackend) and reason == "experts on 2 ranks run in plain torch"
    with pytest.raises(CheckpointError, match=r"kind Infinity run in one process.*: experts on 2 ranks"):
        choose(llama_like(infinity()), Options(ranks=2))
    with pytest.raises(CheckpointError, match="quantize int8 needs the native kernels: experts on 2 ranks"):
        choose(llama_like(topk()), Options(ranks=2, quantize="int8"))
