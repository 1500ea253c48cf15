"""On the native kernels, every family gives the logits of `transformers` too.

The examples are those of `test_parity.py` with heads of 16, which the kernels want. A family that is refused fails.
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
from tests.families.test_parity import EXAMPLES, LOOSE, counts, each
from tests.model.tiny import PagedRun
from weights.config import families
from weights.load import load_model

OWN = set(reference.OWN)  # transformers does not know them; tests of their mixtures have their definitions


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
def test_the_kernels_equal_transformers(family: str, number: int, tmp_path: Path) -> None:
    """Whole, and in chunks of several sequences with mixed counts; at one expert, as trained, and at the most."""
    theirs, ids = reference.build(family, number, **wide(family)), reference.PROMPT
    reference.save(theirs, tmp_path, family)
    model, _ = load_model(tmp_path)
    assert refusal(model.config, Options()) is None
    layers, choices = len(model.config.mixtures), counts(model)
    logits = [reference.logits(theirs, ids, count) for count in choices]
    assert logits[0].std() > 0.1
    native = CpuBackend().prepare(model, Options())
    rows, chosen = [ids] * len(choices), [[count or 1] * layers for count in choices]
    whole = PagedRun(native, rows, chosen, block_size=16).step({row: len(ids) for row in range(len(rows))})
    run = PagedRun(native, rows, chosen, block_size=16)
    steps = [run.step(dict.fromkeys(whole, length)) for length in (5, 1, 1, len(ids) - 7)]
    for row, whole_TV in whole.items():
        torch.testing.assert_close(whole_TV, logits[row], atol=LOOSE.get(family, 1e-4), rtol=0)
        assert torch.equal(torch.cat([step[row] for step in steps]), whole_TV)


def test_every_family_is_compared() -> None:
    compared = {family for family, _ in EXAMPLES}
    assert compared | OWN | set(reference.ENCODERS) == set(families())
