"""Extracted checkpoints: they load as ordinary ones and compute what the whole model computes with masked experts."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from calibration.windows import window_batch
from model.backends.torch.attend import WholeAttend
from model.budget import FAMILY_RULE, ExpertBudget, RoutingRule
from model.decoder import Decoder
from model.errors import CheckpointError
from model.moe.topk import TopKMixture
from tests.weights.checkpoints import INFINITY, OLMOE, random_decoder, same, write
from tests.weights.quantised.test_fp8 import write as quantise
from weights.calibration import checkpoint_hash
from weights.expert_sets import ExpertSet, Loss
from weights.extract import extract, restricted
from weights.load import load_model

SHARED: dict[str, Any] = {name: value for name, value in OLMOE.items() if name not in ("norm_topk_prob", "num_experts")}
GLM: dict[str, Any] = SHARED | {
    "model_type": "glm4_moe",
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 12,
    "n_routed_experts": 6,
    "n_shared_experts": 1,
    "head_dim": 4,
}
MODELS: dict[str, dict[str, Any]] = {
    "softmax": OLMOE,
    "normalised": OLMOE | {"norm_topk_prob": True},
    "the default number": {name: value for name, value in OLMOE.items() if name != "num_experts"},
    "mixtral": SHARED | {"model_type": "mixtral", "num_local_experts": 6},
    "second experts by weight": SHARED
    | {"model_type": "st_moe", "num_experts": 6, "second_expert_policy": "threshold"},
    "gates": SHARED | {"model_type": "dynmoe", "num_experts": 6},
    "selection biases, shared experts, a dense layer": GLM,
}


def kept_experts(model: Decoder, kept: int = 3) -> list[list[int]]:
    """Different experts in every layer."""
    experts = model.config.mixtures[0].num_experts if model.config.mixtures else 0
    order = torch.Generator().manual_seed(3)
    return [sorted(torch.randperm(experts, generator=order)[:kept].tolist()) for _ in model.config.mixtures]


def masked(model: Decoder, experts: Sequence[Sequence[int]]) -> Decoder:
    """The same model, whose router logits of all other experts are minus infinity."""
    mixtures = [module for module in model.modules() if isinstance(module, TopKMixture)]
    for mixture, kept in zip(mixtures, experts, strict=True):
        left_E = torch.full((mixture.config.experts,), -torch.inf)
        left_E[list(kept)] = 0

        def logits(x_TD: Tensor, own: Any = mixture.logits, left_E: Tensor = left_E) -> Tensor:
            return own(x_TD) + left_E

        mixture.logits = logits  # type: ignore[method-assign]
        if mixture.config.router.selection_bias:
            mixture.selection_bias.data += left_E
    return model


@torch.inference_mode()
def logits_of(model: Decoder, count: int, rule: RoutingRule = FAMILY_RULE) -> Tensor:
    """Of two texts of tokens."""
    ids_BS = torch.arange(40).view(2, 20) * 7 % model.config.vocabulary
    budget = ExpertBudget((count,) * len(model.config.mixtures), rule=rule)
    model.config.experts.check(budget, "experts")
    return model(window_batch(ids_BS, [budget] * 2), WholeAttend(20))


def a_set(folder: Path, experts: Sequence[Sequence[int]], num_experts: int) -> ExpertSet:
    kept = tuple(tuple(each) for each in experts)
    return ExpertSet(1, "x", checkpoint_hash(folder), "x.txt", 1, num_experts, kept, (1.0,) * len(kept), Loss(1, 1))


@pytest.mark.parametrize("name", MODELS)
def test_an_extracted_checkpoint_is_the_masked_model(tmp_path: Path, name: str) -> None:
    model = write(tmp_path / "whole", MODELS[name])
    experts = kept_experts(model)
    found = a_set(tmp_path / "whole", experts, model.config.mixtures[0].num_experts)
    extract(tmp_path / "whole", found, tmp_path / "small")
    small, _ = load_model(tmp_path / "small")
    assert {shape.num_experts for shape in small.config.mixtures} == {3}
    rule = RoutingRule(kept=found.layers)
    for count in (1, 2, 3):
        torch.testing.assert_close(logits_of(small, count), logits_of(model, count, rule))
    reference = masked(load_model(tmp_path / "whole")[0], experts)
    for count in (1, 2, 3):
        torch.testing.assert_close(logits_of(small, count), logits_of(reference, count))
    assert not torch.allclose(logits_of(small, 2), logits_of(model, 2), atol=1e-2)


@pytest.mark.parametrize("name", MODELS)
def test_keeping_everything_changes_nothing(name: str) -> None:
    model = random_decoder(MODELS[name])
    small, raw = restricted(model, MODELS[name], kept_experts(model, model.config.mixtures[0].num_experts))
    assert small.config == model.config
    assert {**MODELS[name], **raw} == raw
    rule = RoutingRule(kept=("1" * model.config.experts.total,) * len(model.config.mixtures))
    assert torch.equal(logits_of(model, 2, rule), logits_of(model, 2))
    assert same(small.state_dict(), model.state_dict())


def test_tensors_keep_their_number_format_and_the_tokenizer_comes_along(tmp_path: Path) -> None:
    model = write(tmp_path / "whole", OLMOE | {"dtype": "bfloat16"})
    (tmp_path / "whole" / "config.json").write_text(json.dumps(OLMOE))  # a float32 model, stored in bfloat16
    (tmp_path / "whole" / "tokenizer.json").write_text("{}")
    (tmp_path / "whole" / "card.json").write_text("{}")
    (tmp_path / "whole" / "additional_chat_templates").mkdir()
    (tmp_path / "whole" / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    extract(tmp_path / "whole", a_set(tmp_path / "whole", kept_experts(model), 5), tmp_path / "small")
    assert {tensor.dtype for tensor in load_file(tmp_path / "small/model.safetensors").values()} == {torch.bfloat16}
    assert {path.name for path in (tmp_path / "small").iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "additional_chat_templates",
    }
    assert (tmp_path / "small" / "additional_chat_templates" / "tool_use.jinja").read_text() == "tools"


def test_a_chat_template_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    model = write(tmp_path / "whole", OLMOE)
    (tmp_path / "whole" / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match="whole: a chat template cannot be read"):
        extract(tmp_path / "whole", a_set(tmp_path / "whole", kept_experts(model), 5), tmp_path / "small")


def test_fp8_is_written_as_what_it_means(tmp_path: Path) -> None:
    write(tmp_path / "whole", OLMOE)
    quantise(tmp_path / "whole", load_file(tmp_path / "whole/model.safetensors"))
    model, _ = load_model(tmp_path / "whole")
    experts = kept_experts(model)
    extract(tmp_path / "whole", a_set(tmp_path / "whole", experts, 5), tmp_path / "small")
    small, raw = load_model(tmp_path / "small")
    assert "quantization_config" not in raw
    torch.testing.assert_close(logits_of(small, 2), logits_of(masked(model, experts), 2))


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    model = write(tmp_path, OLMOE)
    with pytest.raises(CheckpointError, match="exists; extract writes to a new folder"):
        extract(tmp_path, a_set(tmp_path, kept_experts(model), 5), tmp_path)


def test_a_set_of_another_size_is_refused(tmp_path: Path) -> None:
    model = write(tmp_path, OLMOE)
    with pytest.raises(CheckpointError, match="of 6 experts, the model has 5"):
        extract(tmp_path, a_set(tmp_path, kept_experts(model), 6), tmp_path / "small")
    with pytest.raises(CheckpointError, match="experts of 1 layers are given, but 2 have some"):
        extract(tmp_path, a_set(tmp_path, kept_experts(model)[:1], 5), tmp_path / "small")
    assert not (tmp_path / "small").exists()


def test_fewer_experts_than_a_token_runs_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"1 experts .* a token runs 2 \(the trained count\) of 5"):
        restricted(random_decoder(OLMOE), OLMOE, [[0], [1]])


DENSE: dict[str, Any] = {
    name: value for name, value in OLMOE.items() if name not in ("num_experts", "num_experts_per_tok", "norm_topk_prob")
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "infinity": (INFINITY, "mixtures are of the kind Infinity"),
    "dense": (DENSE | {"model_type": "llama"}, "no mixture-of-experts layers"),
    "capacity": (SHARED | {"model_type": "st_moe", "num_experts": 5, "drop_tokens": True}, "have a capacity"),
    "groups": (GLM | {"n_group": 2, "topk_group": 1}, "chooses among 2 groups"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_models_without_single_experts_are_refused_by_name(tmp_path: Path, name: str) -> None:
    raw, said = REFUSED[name]
    write(tmp_path, raw)
    with pytest.raises(CheckpointError, match=f"no expert sets: .*{said}"):
        extract(tmp_path, a_set(tmp_path, [[0], [1]], 5), tmp_path / "small")
