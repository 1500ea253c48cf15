"""Shazeer's noisy top-k and ST-MoE as values of the top-k kind: their routers by formula, with what they drop."""

from dataclasses import replace
from math import ceil
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.build import build_engine
from engine.types import EngineSettings, Request, Sampling
from model.activation import activate
from model.backends.torch.attend import WholeAttend
from model.budget import ExpertBudget
from model.decoder import Decoder
from model.errors import CheckpointError, InvalidRequest
from model.moe.topk import TopKMixture
from model.shapes.mixtures import TopK
from tests.e2e.live import serving
from tests.families import reference
from tests.families.test_engine import generate
from tests.model.tiny import randomise, use, whole_logits
from tests.weights.checkpoints import random_decoder
from tests.weights.words import write_tokenizer
from weights.config import decoder_config
from weights.load import load_model
from weights.save import save_model


def raw(number: int, **changes: Any) -> dict[str, Any]:
    example = reference.example_list("st_moe")[number]
    return reference.BASE | {"model_type": "st_moe", "dtype": "float32"} | example | changes


def mixture(number: int, **changes: Any) -> tuple[TopKMixture, TopK]:
    shape = decoder_config(raw(number, **changes)).mixtures[0]
    assert isinstance(shape, TopK)
    module = TopKMixture(32, shape)
    randomise(module)
    return module.requires_grad_(False), shape


def tokens(count: int) -> Tensor:
    return torch.randn(count, 32, generator=torch.Generator().manual_seed(4))


def expert(module: TopKMixture, number: int, x_D: Tensor) -> Tensor:
    """One expert of one token, float64."""
    gate, value = (module.gate_up[number].double() @ x_D).chunk(2)
    return module.down[number].double() @ (activate(gate, module.config.activation) * value)


@pytest.mark.parametrize("normalise", [True, False])
def test_the_weights_are_the_softmax_over_the_kept_logits(normalise: bool) -> None:
    """Shazeer et al. 2017, eq. 3 to 5 without the noise; or over all logits."""
    module, _ = mixture(0, norm_topk_prob=normalise)
    counts = [1, 4, 2, 6, 3, 5]
    x_TD = tokens(len(counts))
    y_TD = module(x_TD, use(counts))
    for x_D, y_D, count in zip(x_TD.double(), y_TD, counts, strict=True):
        logits_E = module.router.double() @ x_D
        top = logits_E.argsort(descending=True)[:count].tolist()
        total = (logits_E[top] if normalise else logits_E).exp().sum()
        expected = torch.stack([logits_E[e].exp() / total * expert(module, e, x_D) for e in top]).sum(0)
        torch.testing.assert_close(y_D.double(), expected, atol=1e-5, rtol=1e-4)


def st_moe(scores_TE: Tensor, factor: float, least: int, threshold: float) -> list[dict[int, float]]:
    """Of each token of one sequence, its two experts and their weights, by ST-MoE's rules."""
    count, experts = scores_TE.shape
    limit = max(least, ceil(factor / experts * count))
    chosen = []
    for row in scores_TE:
        first, second = row.argsort(descending=True)[:2].tolist()
        total = float(row[first] + row[second])
        chosen.append([(first, float(row[first]) / total), (second, float(row[second]) / total)])
    taken, left = [0] * experts, [dict[int, float]() for _ in chosen]
    for rank in (0, 1):
        for token in sorted(range(count), key=lambda t: -float(scores_TE[t].max())):
            number, weight = chosen[token][rank]
            if rank == 0 or weight > threshold:
                taken[number] += 1
                if taken[number] <= limit:
                    left[token][number] = weight
    return left


def test_first_choices_come_first_and_weak_second_experts_do_not_run() -> None:
    module, shape = mixture(1)
    assert shape.dropping is not None and shape.dropping.capacity(24) == 8 and shape.dropping.capacity(3) == 2
    x_TD = tokens(24)
    x_TD[:, 0] += 2.0  # some experts are wanted by many
    y_TD = module(x_TD, replace(use([2] * 24), past=WholeAttend(24)))
    x_TD = x_TD.double()
    rules = st_moe((x_TD @ module.router.double().T).softmax(-1), 1.25, 2, 0.2)
    assert {len(row) for row in rules} >= {1, 2} and sum(map(len, rules)) < 40
    for x_D, y_D, weights in zip(x_TD, y_TD, rules, strict=True):
        parts = [weight * expert(module, number, x_D) for number, weight in weights.items()]
        expected = torch.stack(parts).sum(0) if parts else torch.zeros(32, dtype=torch.float64)
        torch.testing.assert_close(y_D.double(), expected, atol=1e-5, rtol=1e-4)


def made(number: int) -> Decoder:
    return random_decoder(raw(number))


def test_weights_of_the_noise_are_not_needed(tmp_path: Path) -> None:
    """A checkpoint as trained has them; what it computes is the same without."""
    saved = made(0)
    save_model(saved, raw(0), tmp_path, torch.float32)
    file = next(tmp_path.glob("*.safetensors"))
    noise = {f"model.layers.{layer}.mlp.gate.noise.weight": torch.ones(6, 32) for layer in range(2)}
    save_file(load_file(file) | noise, file)
    loaded, _ = load_model(tmp_path)
    ids = reference.PROMPT
    assert torch.equal(whole_logits(loaded, ids, [4, 4]), whole_logits(saved, ids, [4, 4]))


def test_a_later_token_changes_no_earlier_logit_or_a_prompt_has_no_scores(tmp_path: Path) -> None:
    """Tokens of a prompt that compete for a capacity do see each other."""
    ids = list(range(1, 25))
    for number, changes in ((0, {}), (1, {"drop_tokens": False}), (1, {})):
        content = raw(number, **changes)
        model = random_decoder(content)
        before, after = (whole_logits(model, [*ids[:-4], last, *ids[-3:]], [2, 2])[:-4] for last in (21, 50))
        causal = torch.allclose(before, after, atol=1e-6, rtol=0)
        assert causal == (model.config.score_refusal == "") == (model.config.mixtures[0].token_local)
    save_model(model, content, tmp_path, torch.float32)
    engine, _ = build_engine(EngineSettings(model=str(tmp_path), kv_cache_bytes=1 << 20, threads=1))
    with pytest.raises(InvalidRequest, match="later tokens change what is predicted before them") as error:
        engine.add(Request("0", (1, 2), ExpertBudget((1, 1)), Sampling(1, seed=0, prompt_logprobs=0)))
    assert error.value.param == "prompt_logprobs"


@pytest.mark.parametrize("number", [0, 1])
def test_the_engine_serves_it(number: int, tmp_path: Path) -> None:
    """With a capacity a prompt is computed whole, and no prefix of it is shared."""
    saved = made(number)
    save_model(saved, raw(number), tmp_path, torch.float32)
    settings = EngineSettings(model=str(tmp_path), kv_cache_bytes=1 << 20, step_ms=0, threads=1)
    engine, info = build_engine(settings)
    assert info.token_local == info.prefix_cache == info.chunked == (number == 0)
    counts = [(1, 1), (2, 2), (4, 3)]
    requests = [
        Request(str(row), tuple(range(1, 20 + row)), ExpertBudget(own), Sampling(1, seed=0, temperature=0.0))
        for row, own in enumerate(counts)
    ]
    for request, produced in zip(requests, generate(engine, requests).values(), strict=True):
        last = whole_logits(saved, list(request.prompt), list(request.budget.per_layer))[-1]
        assert len(produced) == 1 and last.max() - last[produced[0]] < 1e-4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"second_expert_policy": "random"}, "second_expert_policy is 'random', but only 'all', 'threshold'"),
        ({"eval_capacity_factor": 0}, "eval_capacity_factor must be above 0, got 0"),
        ({"min_expert_capacity": -1}, "min_expert_capacity must be a whole number"),
    ],
)
def test_what_is_not_served_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        decoder_config(raw(1, **changes))


@pytest.mark.slow
@pytest.mark.redundant  # a server of its own: others have shown the same path
def test_a_request_chooses_its_count_over_http(tmp_path: Path) -> None:
    """Of a model that drops: what ran is counted, and /v1/models says that tokens compete."""
    write_tokenizer(tmp_path)
    changed = raw(1, vocab_size=512)
    save_model(random_decoder(changed), changed, tmp_path, torch.float32)
    with serving("--model", str(tmp_path), "--served-name", "tiny", "--threads", "1") as live:
        meta = httpx.get(f"{live.url}/v1/models/tiny").json()["meta"]
        assert meta["moe"]["max"] == 4 and not meta["moe"]["token_local"] and not meta["execution"]["prefix_cache"]
        pairs = []
        for count in (1, 2, 4):
            body = {"prompt": "Once upon a time", "max_tokens": 6, "ignore_eos": True, "num_experts": count}
            usage = httpx.post(f"{live.url}/v1/completions", json=body, timeout=60).raise_for_status().json()["usage"]
            assert usage["completion_tokens"] == 6
            pairs.append(usage["routed_pairs"])
        assert 0 < pairs[0] < pairs[1] < pairs[2]
