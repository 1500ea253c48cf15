"""OLMoE checkpoints give the logits of `transformers`, whole and token by token, at every expert count."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import OlmoeConfig, OlmoeForCausalLM

from model.decoder import Decoder
from tests.model.tiny import PagedRun, randomise, whole_logits
from tests.weights.checkpoints import OLMOE, write
from weights.load import load_model

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "normalised": {"norm_topk_prob": True},
    "tied": {"tie_word_embeddings": True, "norm_topk_prob": True},
    "grouped": {"num_key_value_heads": 2},
    "clipped": {"clip_qkv": 0.5, "num_key_value_heads": 1},
    "biased": {"attention_bias": True, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
}
PROMPT = [5, 1, 30, 8, 8, 2, 36, 0, 17, 11]


def reference(changes: dict[str, Any], folder: Path, shard: str = "50GB") -> OlmoeForCausalLM:
    """A random transformers model, saved to `folder`."""
    fields = {name: value for name, value in OLMOE.items() if name not in ("model_type", "architectures")}
    config = OlmoeConfig(**fields | changes, pad_token_id=0, bos_token_id=0, eos_token_id=0)
    model = OlmoeForCausalLM(config).eval()
    randomise(model)
    model.tie_weights()
    model.save_pretrained(folder, max_shard_size=shard)
    return model


@torch.no_grad()
def their_logits(model: OlmoeForCausalLM, ids: list[int], count: int) -> Tensor:
    for module in model.modules():
        if hasattr(module, "top_k"):
            module.top_k = count
    model.config.num_experts_per_tok = count
    logits: Tensor = model(torch.tensor([ids])).logits[0]
    return logits


def assert_equal(ours: Decoder, theirs: OlmoeForCausalLM, count: int) -> None:
    expected = their_logits(theirs, PROMPT, count)
    assert expected.std() > 0.1
    torch.testing.assert_close(whole_logits(ours, PROMPT, [count] * 2), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_equal_at_every_count(name: str, tmp_path: Path) -> None:
    theirs = reference(VARIANTS[name], tmp_path)
    ours, raw = load_model(tmp_path)
    assert raw["model_type"] == "olmoe" and ours.config.experts.trained == 2
    for count in range(1, OLMOE["num_experts"] + 1):
        assert_equal(ours, theirs, count)


def test_the_counts_differ(tmp_path: Path) -> None:
    """Else equality at every count would say nothing."""
    theirs = reference({}, tmp_path)
    logits = [their_logits(theirs, PROMPT, count) for count in range(1, 6)]
    assert all((a - b).abs().max() > 1e-2 for a, b in pairwise(logits))


@pytest.mark.parametrize("count", [1, 2, 5])
def test_prefill_and_sixteen_greedy_steps_over_pages(count: int, tmp_path: Path) -> None:
    theirs = reference(VARIANTS["grouped"], tmp_path)
    ours, _ = load_model(tmp_path)
    ids = list(PROMPT)
    for _ in range(16):
        ids.append(int(their_logits(theirs, ids, count)[-1].argmax()))
    run = PagedRun(ours, [ids], [[count] * 2])
    logits = [run.step({0: len(PROMPT)})[0]] + [run.step({0: 1})[0] for _ in range(15)]
    assert [int(step[-1].argmax()) for step in logits] == ids[len(PROMPT) :]
    torch.testing.assert_close(torch.cat(logits), their_logits(theirs, ids[:-1], count), atol=1e-4, rtol=0)


def test_sharded_checkpoints_load(tmp_path: Path) -> None:
    theirs = reference(VARIANTS["normalised"], tmp_path, shard="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1 and not (tmp_path / "model.safetensors").exists()
    assert_equal(load_model(tmp_path)[0], theirs, 3)


def test_experts_fused_in_one_tensor_load(tmp_path: Path) -> None:
    """transformers 5 keeps all experts in one tensor in memory, and some checkpoints keep them so on disk."""
    theirs = reference({}, tmp_path)
    state = {name: value.contiguous() for name, value in theirs.state_dict().items()}
    assert "model.layers.0.mlp.experts.gate_up_proj" in state
    save_file(state, tmp_path / "model.safetensors")
    assert_equal(load_model(tmp_path)[0], theirs, 4)


@pytest.mark.parametrize("name", ["plain", "tied", "grouped"])
def test_what_we_write_transformers_reads(name: str, tmp_path: Path) -> None:
    ours = write(tmp_path, OLMOE | VARIANTS[name])
    theirs, report = OlmoeForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for count in (1, 2, 5):
        assert_equal(ours, theirs.eval(), count)
