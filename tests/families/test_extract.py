"""Checkpoints of every family, in the files that transformers writes: without an expert of each layer they give the
logits of the whole model with this expert masked, or are refused by name."""

from pathlib import Path

import pytest
import torch

from model.budget import RoutingRule
from model.errors import CheckpointError
from tests.families import reference
from tests.weights.test_extract import a_set, kept_experts, logits_of, masked
from weights.config import read_config
from weights.extract import extract
from weights.load import load_model

FAMILIES = sorted({family for family, _ in reference.examples()})
REFUSED = {family: "groups" for family in ("deepseek_v2", "deepseek_v3", "dots1", "glm4_moe")}
REFUSED |= {family: "no mixture-of-experts layers" for family in ("gpt2", "llama", "qwen3")}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_extracted_or_refused(family: str, tmp_path: Path) -> None:
    whole, small = tmp_path / "whole", tmp_path / "small"
    reference.save(reference.build(family, 0), whole, family)
    model, _ = load_model(whole, "float32")
    experts = model.config.mixtures[0].num_experts if model.config.mixtures else 2
    kept = kept_experts(model, experts - 1) or [[0]]
    if family in REFUSED:
        with pytest.raises(CheckpointError, match=REFUSED[family]):
            extract(whole, a_set(whole, kept, experts), small)
        return
    extract(whole, a_set(whole, kept, experts), small)
    found, _ = load_model(small, "float32")
    trained, rule = model.config.experts.trained, RoutingRule(kept=a_set(whole, kept, experts).layers)
    of_rule = logits_of(model, trained, rule)
    expected = logits_of(masked(model, kept), trained)
    for logits_TV in (of_rule, logits_of(found, trained)):
        torch.testing.assert_close(logits_TV, expected, atol=1e-5, rtol=1e-4)
    assert {shape.num_experts for shape in read_config(small)[0].mixtures} == {experts - 1}
