"""What parity cannot show of these families: files as they were first published, windows that make no sense, and that
the dense ones have no count to choose.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.errors import CheckpointError
from model.shapes.attention import Attention
from tests.families import reference
from tests.model.tiny import whole_logits
from weights.config import decoder_config
from weights.load import load_model

SHAPE: dict[str, Any] = {**reference.BASE, "num_hidden_layers": 3, "sliding_window": 8}
QWEN2_MOE = {**SHAPE, "model_type": "qwen2_moe", "use_sliding_window": True}
QWEN3 = {**SHAPE, "model_type": "qwen3", "use_sliding_window": True, "max_window_layers": 1}
DOTS1 = {**SHAPE, "model_type": "dots1", "n_routed_experts": 4, "num_experts_per_tok": 2, "max_window_layers": 2}


def windows(raw: dict[str, Any]) -> list[int]:
    return [shape.window for shape in decoder_config(raw).attention if isinstance(shape, Attention)]


def test_gpt2_as_first_published_loads_as_well(tmp_path: Path) -> None:
    """Without the prefix, with causal masks, and with a tied head stored once more."""
    saved, published = tmp_path / "saved", tmp_path / "published"
    reference.save(reference.build("gpt2", 0), saved)
    stored = {name: tensor for file in saved.glob("*.safetensors") for name, tensor in load_file(file).items()}
    renamed = {name.removeprefix("transformer."): tensor for name, tensor in stored.items()}
    masks = {"h.0.attn.bias": torch.ones(1, 1, 4, 4), "h.1.attn.masked_bias": torch.tensor(-1e4)}
    published.mkdir()
    save_file(renamed | masks | {"lm_head.weight": renamed["wte.weight"].clone()}, published / "model.safetensors")
    (published / "config.json").write_text((saved / "config.json").read_text())
    ours, theirs = (load_model(folder)[0] for folder in (published, saved))
    assert torch.equal(*(whole_logits(model, reference.PROMPT, []) for model in (ours, theirs)))


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
def test_dense_families_have_no_count(family: str, tmp_path: Path) -> None:
    reference.save(reference.build(family, 0), tmp_path)
    config = load_model(tmp_path)[0].config
    assert config.experts.layers == 0 and not config.mixtures


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (QWEN2_MOE, [8, 0, 8]),
        (QWEN2_MOE | {"max_window_layers": 1}, [8, 0, 0]),
        (QWEN2_MOE | {"use_sliding_window": False}, [0, 0, 0]),
        (QWEN3, [0, 8, 8]),
        (QWEN3 | {"use_sliding_window": False}, [0, 0, 0]),
        (DOTS1, [0, 0, 8]),
        (DOTS1 | {"sliding_window": None}, [0, 0, 0]),
        (DOTS1 | {"layer_types": ["sliding_attention", "full_attention", "full_attention"]}, [8, 0, 0]),
    ],
)
def test_which_layers_slide(raw: dict[str, Any], expected: list[int]) -> None:
    assert windows(raw) == expected


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"layer_types": ["full_attention"]}, "layer_types must say"),
        ({"layer_types": ["linear_attention"] * 3}, "layer_types must say"),
        ({"layer_types": ["sliding_attention"] * 3, "sliding_window": None}, "no sliding_window"),
        ({"scoring_func": "softmax"}, "scoring_func"),
    ],
)
def test_what_cannot_be_served_is_named(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        decoder_config(DOTS1 | changes)
