"""On the native kernels, every family gives the logits of `transformers` too, or is refused for a reason named here.

The examples are those of `test_parity.py` with heads of 16, which the kernels want. A family that loses its refusal,
gains one, or has neither a comparison nor a refusal fails.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from model.backends.cpu.backend import CpuBackend
from model.backends.cpu.kernels.library import load
from model.backends.cpu.refusal import refusal
from model.options import Options
from tests.families import reference
from tests.families.examples.phimoe import LONGROPE
from tests.families.test_parity import EXAMPLES, counts, each
from tests.model.tiny import PagedRun
from weights.config import families
from weights.load import load_model

ROUTED = "a router other than softmax, or experts with a shared part"
REFUSED = {  # by family, for all of its examples, or by family and number
    "deepseek_v2": ROUTED,
    "deepseek_v3": ROUTED,
    "dots1": f"{ROUTED} (Router.score is 'sigmoid')",
    "ernie4_5_moe": ROUTED,
    "glm4_moe": ROUTED,
    "gpt_oss": f"{ROUTED} (Router.logit_bias is True)",
    "granitemoeshared-0": f"{ROUTED} (TopK.shared is Dense",
    "kimi_k2": ROUTED,
    "llama4": ROUTED,
    "llama4_text": ROUTED,
    "minimax_m2": ROUTED,
    "phimoe": f"{ROUTED} (Router.score is 'sparse_mixer')",
    "qwen2_moe": f"{ROUTED} (TopK.shared is Dense",
    "qwen3_next": f"{ROUTED} (TopK.shared is Dense",
}
OWN = set(reference.OWN)  # transformers does not know them; tests of their mixtures have their definitions


def reason_for(family: str, number: int) -> str | None:
    """Why the example is refused, as this file has it."""
    return REFUSED.get(family) or REFUSED.get(f"{family}-{number}")


def wide(family: str) -> dict[str, Any]:
    """What makes an example's heads as wide as the kernels want them."""
    if family in ("gpt2", "olmoe"):
        return {"hidden_size": 64}
    changes: dict[str, Any] = {"hidden_size": 64, "head_dim": 16}
    if family == "qwen3_next":
        changes |= {"linear_key_head_dim": 16, "linear_value_head_dim": 32}
    if family in ("deepseek_v2", "deepseek_v3", "kimi_k2"):  # latents and values, too
        changes |= {"kv_lora_rank": 32, "qk_rope_head_dim": 16, "v_head_dim": 16}
    if family == "phimoe":  # as many factors as a head has pairs
        factors = {name: LONGROPE[name] * 2 for name in ("short_factor", "long_factor")}
        changes["rope_parameters"] = LONGROPE | factors
    return changes


@each
@pytest.mark.skipif(not load().native, reason="native kernels are not loaded")
def test_the_kernels_equal_transformers_or_say_why_not(family: str, number: int, tmp_path: Path) -> None:
    """Whole, and in chunks of several sequences with mixed counts; at one expert, as trained, and at the most."""
    theirs, ids = reference.build(family, number, **wide(family)), reference.PROMPT
    reference.save(theirs, tmp_path, family)
    model, _ = load_model(tmp_path)
    found, expected = refusal(model.config, Options()), reason_for(family, number)
    if expected is not None:
        assert found is not None and found.startswith(expected)
        return
    assert found is None
    layers, choices = len(model.config.mixtures), counts(model)
    logits = [reference.logits(theirs, ids, count) for count in choices]
    assert logits[0].std() > 0.1
    native = CpuBackend().prepare(model, Options())
    rows, chosen = [ids] * len(choices), [[count or 1] * layers for count in choices]
    whole = PagedRun(native, rows, chosen, block_size=16).step({row: len(ids) for row in range(len(rows))})
    run = PagedRun(native, rows, chosen, block_size=16)
    steps = [run.step(dict.fromkeys(whole, length)) for length in (5, 1, 1, len(ids) - 7)]
    for row, whole_TV in whole.items():
        torch.testing.assert_close(whole_TV, logits[row], atol=1e-4, rtol=0)
        assert torch.equal(torch.cat([step[row] for step in steps]), whole_TV)


def test_every_family_is_compared_or_refused() -> None:
    compared = {family for family, number in EXAMPLES if reason_for(family, number) is None}
    refused = {name.rpartition("-")[0] or name for name in REFUSED}
    assert compared | refused | OWN | set(reference.ENCODERS) == set(families())
    assert compared == {"gpt2", "granitemoe", "granitemoeshared", "llama", "mixtral", "olmoe", "qwen3", "qwen3_moe"}
