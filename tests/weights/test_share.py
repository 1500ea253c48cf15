"""A rank's part of a checkpoint is the same numbers as in the whole, and about its share of the bytes."""

from pathlib import Path

import pytest
import torch

from model.errors import CheckpointError
from model.ranks.share import Share
from tests.model.ranks.threads import RAW, checkpoint
from tests.model.tiny import decoder
from weights.config import decoder_config
from weights.load import load_model
from weights.rules import TensorPart
from weights.save import save_model
from weights.share import STACKS, _moved, expert_bytes, mixtures_of

STACKED = {  # experts in one tensor, turned, with biases
    "model_type": "gpt_oss",
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
    "head_dim": 6,
    "sliding_window": 5,
    "layer_types": ["full_attention", "sliding_attention"],
    "rope_theta": 1000.0,
    "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
}


@pytest.fixture(params=["olmoe", "gpt_oss"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param == "olmoe":
        return checkpoint(tmp_path)
    raw = {key: value for key, value in RAW.items() if key not in ("num_experts", "norm_topk_prob")} | STACKED
    save_model(decoder(decoder_config(raw)), raw, tmp_path, torch.float32)
    return tmp_path


@pytest.mark.parametrize("ranks", [2, 4])
def test_parts_are_the_whole(folder: Path, ranks: int) -> None:
    whole = load_model(folder)[0]
    parts = [load_model(folder, share=Share(rank, ranks))[0] for rank in range(ranks)]
    for name, parameter in whole.named_parameters():
        if name.rpartition(".")[2] in STACKS and ".ffn." in name:
            assert torch.equal(torch.cat([part.get_parameter(name) for part in parts]), parameter), name
        else:
            assert torch.equal(parts[0].get_parameter(name), parameter)
            assert all(name not in dict(part.named_parameters()) for part in parts[1:])
    held = [expert_bytes(part) for part in parts]
    one = expert_bytes(whole) // mixtures_of(whole)[0].config.experts
    assert sum(held) == expert_bytes(whole) and max(held) - min(held) <= one
    assert all(sum(p.nbytes for p in part.parameters()) == size for part, size in zip(parts[1:], held[1:], strict=True))


def test_rows_of_several_experts_are_refused() -> None:
    with pytest.raises(CheckpointError, match="several experts, which ranks cannot divide"):
        _moved(TensorPart("experts", (slice(0, 4),)), range(2))
