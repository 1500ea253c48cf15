"""µMoE decoders: as checkpoints, in mixed batches and chunks, in the engine and over HTTP."""

import random
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from torch import Tensor

from engine.build import build_engine
from engine.types import EngineSettings, Request, Sampling
from model.backends.cpu import refusal as cpu
from model.backends.cuda import refusal as cuda
from model.budget import ExpertBudget, RoutingRule
from model.decoder import Decoder
from model.errors import CheckpointError, InvalidRequest
from model.options import Options
from tests.e2e.live import serving
from tests.families import reference
from tests.families.test_engine import generate
from tests.model.tiny import PagedRun, whole_logits
from tests.weights.checkpoints import random_decoder
from tests.weights.words import write_tokenizer
from weights.config import decoder_config
from weights.load import load_model
from weights.save import save_model

each = pytest.mark.parametrize("number", [0, 1])


def raw(number: int, **changes: Any) -> dict[str, Any]:
    example = reference.example_list("mu_moe")[number]
    return reference.BASE | {"model_type": "mu_moe", "dtype": "float32"} | example | changes


@cache
def made(number: int, vocabulary: int = 61) -> Decoder:
    """A random model whose experts are like each other, as published ones are at first."""
    model = random_decoder(raw(number, vocab_size=vocabulary))
    for name, parameter in model.named_parameters():
        if name.endswith(".experts"):
            parameter.data += 1.0
    return model


def write(folder: Path, number: int, vocabulary: int = 61) -> Decoder:
    model = made(number, vocabulary)
    save_model(model, raw(number, vocab_size=vocabulary), folder, torch.float32)
    return model


@each
def test_a_checkpoint_loads_as_it_was_saved(number: int, tmp_path: Path) -> None:
    saved = write(tmp_path, number)
    loaded, _ = load_model(tmp_path)
    assert loaded.config == saved.config and loaded.config.experts.adaptive
    assert all(torch.equal(loaded.get_parameter(name), p) for name, p in saved.named_parameters())


@each
def test_counts_and_chunks_in_one_batch_equal_running_alone(number: int) -> None:
    model, rng = made(number), random.Random(number)
    most = model.config.experts.maximum
    rows = [[rng.randrange(61) for _ in range(length)] for length in (13, 9, 17, 6)]
    counts = [[1, 1], [most, most], [2, most - 1], [3, 1]]
    run = PagedRun(model, rows, counts)
    parts: dict[int, list[Tensor]] = {row: [] for row in range(len(rows))}
    while todo := [row for row in parts if run.done[row] < len(rows[row])]:
        some = rng.sample(todo, min(3, len(todo)))
        lengths = {row: min(rng.randint(1, 6), len(rows[row]) - run.done[row]) for row in some}
        for row, part in run.step(lengths).items():
            parts[row].append(part)
    for row, ids in enumerate(rows):
        torch.testing.assert_close(torch.cat(parts[row]), whole_logits(model, ids, counts[row]), atol=2e-5, rtol=1e-5)


@each
def test_counts_matter_and_a_later_token_changes_no_earlier_logit(number: int) -> None:
    model, ids = made(number), reference.PROMPT
    found = [whole_logits(model, ids, [count] * 2) for count in (1, 2, model.config.experts.maximum)]
    assert all((one - more).abs().max() > 1e-3 for one, more in pairwise(found))
    after = whole_logits(model, [*ids[:-1], (ids[-1] + 1) % 61], [model.config.experts.maximum] * 2)
    torch.testing.assert_close(found[-1][:-1], after[:-1], atol=1e-6, rtol=0)
    assert not torch.allclose(found[-1][-1], after[-1], atol=1e-3)


@each
def test_no_kernels_take_such_a_model_and_rules_are_refused_by_name(number: int) -> None:
    config = decoder_config(raw(number, head_dim=16))
    assert "MuMoE" in (cpu.refusal(config, Options()) or "")
    assert "depends on the token" in (cuda.refusal(config, Options()) or "")
    for rule in (RoutingRule("raw"), RoutingRule(threshold=0.5), RoutingRule(gate_offset=0.5), RoutingRule(reuse=1)):
        with pytest.raises(InvalidRequest, match="is refused: a µMoE takes counts alone"):
            config.experts.check_rule(rule, "experts")


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"ranks": 20}, "ranks must be a list, got 20"), ({"hierarchy": 2}, "hierarchy is 2, but only 1 is supported")],
)
def test_what_is_not_served_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        decoder_config(raw(0, **changes))


@each
def test_the_engine_serves_it_with_chunks_and_a_prefix_cache(number: int, tmp_path: Path) -> None:
    saved = write(tmp_path, number)
    settings = EngineSettings(
        model=str(tmp_path), kv_cache_bytes=1 << 20, max_running=8, max_step_tokens=16, step_ms=0, threads=1
    )
    engine, info = build_engine(settings)
    assert info.kernels == "torch" and info.token_local and info.prefix_cache and info.chunked
    prompt = tuple(range(1, 40))
    counts = [(1, 1), (saved.config.experts.maximum,) * 2, (2, 3)]
    requests = [
        Request(str(row), prompt[: 39 - row], ExpertBudget(own), Sampling(6, seed=0, temperature=0.0))
        for row, own in enumerate(counts)
    ]
    for request, produced in zip(requests, generate(engine, requests).values(), strict=True):
        ids = [*request.prompt, *produced]
        rows = whole_logits(saved, ids[:-1], request.budget.per_layer)[len(request.prompt) - 1 :]
        assert all(row.max() - row[token] < 1e-4 for row, token in zip(rows, produced, strict=True))


@pytest.mark.slow
@pytest.mark.redundant  # a server of its own: others have shown the same path
def test_a_request_chooses_its_count_over_http(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    most = write(tmp_path, 0, vocabulary=512).config.experts.maximum
    with serving("--model", str(tmp_path), "--served-name", "tiny", "--threads", "1") as live:
        meta = httpx.get(f"{live.url}/v1/models/tiny").json()["meta"]
        assert meta["moe"]["max"] == most and meta["moe"]["token_local"] and meta["execution"]["prefix_cache"]
        means = []
        for count in (1, 2, most):
            body = {"prompt": "Once upon a time", "max_tokens": 6, "ignore_eos": True, "num_experts": count}
            usage = httpx.post(f"{live.url}/v1/completions", json=body, timeout=60).raise_for_status().json()["usage"]
            means.append(usage["num_experts"])
        assert means[0] == 1 and 1 < means[1] <= 2 and means[1] < means[2] < most
        refused = httpx.post(f"{live.url}/v1/completions", json=body | {"num_experts": most + 1})
        assert refused.status_code == 400 and f"between 1 and {most}" in refused.json()["error"]["message"]
