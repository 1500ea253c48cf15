"""Rotary tables against those of transformers, for every scaling, inside and beyond the original context."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from model.attention.rope import rotary_tables, rotate
from model.config_reader import ConfigReader, rope
from model.shapes.rope import Rope

WIDTH, ORIGINAL, LONGEST = 16, 32, 128
LONG = {
    "short_factor": [1.0 + 0.1 * i for i in range(WIDTH // 2)],
    "long_factor": [2.0 + 0.3 * i for i in range(WIDTH // 2)],
    "original_max_position_embeddings": ORIGINAL,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": ORIGINAL}
SCALINGS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "yarn": YARN,
    "yarn of DeepSeek": YARN | {"mscale": 0.7, "mscale_all_dim": 1.0, "beta_fast": 16.0, "beta_slow": 2.0},
    "yarn of gpt-oss": YARN | {"truncate": False},
    "yarn with its factor": YARN | {"attention_factor": 1.3},
    "llama3": LLAMA3 | {"rope_type": "llama3", "factor": 8.0},
    "longrope": LONG | {"rope_type": "longrope", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
}


def config(parameters: dict[str, Any]) -> dict[str, Any]:
    largest = ORIGINAL if parameters["rope_type"] == "dynamic" else LONGEST
    sizes = {"hidden_size": 4 * WIDTH, "num_attention_heads": 4, "max_position_embeddings": largest}
    return sizes | {"rope_parameters": parameters | {"rope_theta": 500.0}}


def theirs(parameters: dict[str, Any], positions: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    module = LlamaRotaryEmbedding(LlamaConfig(**config(parameters)))
    cos, sin = module(torch.zeros(1), torch.tensor([positions]))
    return cos[0, :, None], sin[0, :, None]


@pytest.mark.parametrize("name", SCALINGS)
def test_tables_are_those_of_transformers(name: str) -> None:
    """Within the original context at once, and beyond it token by token, which is how their two length-dependent kinds
    are decoded."""
    ours = rope(ConfigReader(config(SCALINGS[name])), WIDTH)
    steps = [list(range(ORIGINAL)), [ORIGINAL], [ORIGINAL + 1], [LONGEST - 1]]
    for positions in steps:
        found = rotary_tables(torch.tensor(positions), ours)
        for our, their in zip(found, theirs(SCALINGS[name], positions), strict=True):
            torch.testing.assert_close(our, their, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", SCALINGS)
def test_a_token_turns_alike_in_any_chunk(name: str) -> None:
    ours, positions = rope(ConfigReader(config(SCALINGS[name])), WIDTH), torch.arange(LONGEST)
    whole = rotary_tables(positions, ours)
    parts = [rotary_tables(part, ours) for part in positions.split(7)]
    assert all(torch.equal(torch.cat([p[i] for p in parts]), whole[i]) for i in range(2))


@pytest.mark.parametrize("interleaved", [False, True])
def test_a_part_of_a_head_is_turned_and_lengths_are_kept(interleaved: bool) -> None:
    shape = Rope(8, interleaved=interleaved)
    x_THC = torch.randn(5, 2, 12, generator=torch.Generator().manual_seed(0))
    y_THC = rotate(x_THC, rotary_tables(torch.arange(5), shape), shape)
    assert torch.equal(y_THC[..., 8:], x_THC[..., 8:]) and torch.equal(y_THC[0], x_THC[0])
    torch.testing.assert_close(y_THC.norm(dim=-1), x_THC.norm(dim=-1))
    assert (y_THC[1:, :, :8] - x_THC[1:, :, :8]).abs().max() > 0.1
