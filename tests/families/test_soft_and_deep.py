"""Families whose mixtures are soft or deep: against their definitions in float64, in mixed batches, in chunks, in the
engine and over HTTP.
"""

import copy
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
from model.backends.torch.attend import WholeAttend
from model.budget import ExpertBudget
from model.decoder import Decoder
from model.encoder_decoder import decoder_of
from model.options import Options
from tests.e2e.live import serving
from tests.families import reference
from tests.families.test_engine import generate
from tests.model.moe.definitions import DeepDefinition, SegmentsDefinition, SoftDefinition, assert_near
from tests.model.tiny import PagedRun, randomise, whole_batch
from tests.weights.words import write_tokenizer
from weights.config import decoder_config
from weights.load import load_model
from weights.save import save_model

DEFINITIONS: dict[str, Any] = {
    "SoftMixture": SoftDefinition,
    "SegmentMixture": SegmentsDefinition,
    "DeepMixture": DeepDefinition,
}
FAMILIES = ("soft_moe", "deep_moe", "soft_t5")
CASES = [(family, number) for family in FAMILIES for number in (0, 1)]
each = pytest.mark.parametrize(("family", "number"), CASES)
each_family = pytest.mark.parametrize("family", FAMILIES)
END = 1  # of a T5's prompt


def raw(family: str, number: int, **changes: Any) -> dict[str, Any]:
    base = {} if family == "soft_t5" else reference.BASE
    return base | {"model_type": family, "dtype": "float32"} | reference.example_list(family)[number] | changes


@cache
def made(family: str, number: int, vocabulary: int = 61) -> Decoder:
    """A random model whose soft weights differ."""
    model = decoder_of(decoder_config(raw(family, number, vocab_size=vocabulary)))
    randomise(model)
    for name, parameter in model.named_parameters():
        if name.endswith("ffn.scale"):
            parameter.data.fill_(6.0)
    return model.eval().requires_grad_(False)


@cache
def defined(family: str, number: int) -> Decoder:
    """The same in float64, with the definitions in the place of its mixtures."""
    model = copy.deepcopy(made(family, number)).double()
    replaced = 0
    for layer in model.layers:
        if type(layer.ffn).__name__ in DEFINITIONS:
            layer.ffn = DEFINITIONS[type(layer.ffn).__name__](layer.ffn)
            replaced += 1
    assert replaced == len(model.config.mixtures) > 0
    return model


def logits(model: Decoder, ids: list[int], counts: list[int]) -> Tensor:
    """Of one sequence whole, [T, V]."""
    found: Tensor = model(whole_batch(ids, counts), WholeAttend(len(ids)))
    return found


def rows_of(family: str, number: int) -> list[list[int]]:
    """Four sequences; a T5's have a prompt of 5 to 8 tokens and an answer."""
    rng = random.Random(number)
    rows = [[rng.randrange(6, 61) for _ in range(length)] for length in (15, 9, 18, 11)]
    if family == "soft_t5":
        for number, row in enumerate(rows):
            row[4 + number] = END
    return rows


def counts_of(model: Decoder) -> list[list[int]]:
    """Of each of four sequences its own, and of each layer."""
    most, layers = model.config.experts.maximum, len(model.config.mixtures)
    return [[1] * layers, [most] * layers, [1 + layer for layer in range(layers)], [most - 1] * layers]


@each
def test_batches_of_mixed_counts_equal_the_definition(family: str, number: int) -> None:
    """Decoders in random chunks and company, as when decoding; a T5's prompts whole, at different steps."""
    model, rng = made(family, number), random.Random(number)
    rows, counts = rows_of(family, number), counts_of(model)
    run = PagedRun(model, rows, counts)
    parts: dict[int, list[Tensor]] = {row: [] for row in range(len(rows))}
    while todo := [row for row in parts if run.done[row] < len(rows[row])]:
        some = rng.sample(todo, min(3, len(todo)))
        least = {row: 6 + row if family == "soft_t5" and not run.done[row] else 1 for row in some}
        lengths = {row: min(least[row] + rng.randrange(4), len(rows[row]) - run.done[row]) for row in some}
        for row, part in run.step(lengths).items():
            parts[row].append(part)
    for row, ids in enumerate(rows):
        expected = logits(defined(family, number), ids, counts[row])
        assert expected[-1].std() > 0.1
        assert_near(torch.cat(parts[row]), expected)


@each
def test_counts_matter_and_the_largest_is_the_full_model(family: str, number: int) -> None:
    """At it the way of restriction is without effect, and below it with one."""
    model, other = made(family, number), copy.copy(made(family, number))
    default = "drop" if family == "soft_moe" else "renormalise"
    how = "renormalise" if raw(family, number).get("restriction", default) == "drop" else "drop"
    other = decoder_of(decoder_config(raw(family, number, restriction=how)))
    other.load_state_dict(model.state_dict())
    ids, layers, most = rows_of(family, number)[2], len(model.config.mixtures), model.config.experts.maximum
    found = [logits(model, ids, [count] * layers)[-1] for count in range(1, most + 1)]
    assert all((one - more).abs().max() > 1e-3 for one, more in pairwise(found))
    assert_near(logits(other, ids, [most] * layers)[-1], found[-1])
    assert (logits(other, ids, [1] * layers)[-1] - found[0]).abs().max() > 1e-3


@pytest.mark.parametrize(("family", "number"), [case for case in CASES if case[0] != "soft_t5"])
def test_a_later_token_changes_no_earlier_logit(family: str, number: int) -> None:
    model, ids = made(family, number), rows_of(family, number)[2]
    counts = counts_of(model)[3]
    before = logits(model, ids, counts)
    for changed in (len(ids) - 1, 7, 3):
        other = [*ids[:changed], (ids[changed] + 1) % 61, *ids[changed + 1 :]]
        after = logits(model, other, counts)
        torch.testing.assert_close(before[:changed], after[:changed], atol=1e-6, rtol=0)
        assert not torch.allclose(before[changed:], after[changed:], atol=1e-3)


@pytest.mark.parametrize("number", [0, 1])
def test_in_a_t5_every_token_of_a_prompt_counts_and_no_later_one_of_its_answer(number: int) -> None:
    model, ids = made("soft_t5", number), rows_of("soft_t5", number)[2]
    counts, end = counts_of(model)[3], ids.index(END)
    before = logits(model, ids, counts)
    for changed in (0, end - 1, end + 4):
        after = logits(model, [*ids[:changed], (ids[changed] + 1) % 50 + 6, *ids[changed + 1 :]], counts)
        same = max(changed, end) if changed > end else end
        torch.testing.assert_close(before[:same], after[:same], atol=1e-6, rtol=0)
        assert not torch.allclose(before[same], after[same], atol=1e-4)


@each
def test_no_kernels_take_such_a_model(family: str, number: int) -> None:
    for refusal in (cpu.refusal, cuda.refusal):
        assert refusal(decoder_config(raw(family, number)), Options()) is not None


def write(folder: Path, family: str, vocabulary: int = 61) -> Decoder:
    model = made(family, 1, vocabulary)
    save_model(model, raw(family, 1, vocab_size=vocabulary), folder, torch.float32)
    return model


@each_family
def test_the_engine_serves_it(family: str, tmp_path: Path) -> None:
    """A checkpoint loads as it was saved; requests of several counts together give what each gives alone."""
    saved = write(tmp_path, family)
    loaded, _ = load_model(tmp_path)
    assert loaded.config == saved.config
    assert all(torch.equal(loaded.get_parameter(name), p) for name, p in saved.named_parameters())
    settings = EngineSettings(
        model=str(tmp_path),
        kv_cache_bytes=1 << 20,
        max_running=8,
        max_step_tokens=16,
        max_model_len=48,
        step_ms=0,
        threads=1,
    )
    engine, info = build_engine(settings)
    token_local = family == "deep_moe"
    assert info.kernels == "torch"
    assert (info.token_local, info.prefix_cache, info.chunked) == (token_local, token_local, family != "soft_t5")
    requests = []
    for row, (ids, counts) in enumerate(zip(rows_of(family, 1), counts_of(saved), strict=True)):
        prompt = tuple(ids[: 5 + row]) if family == "soft_t5" else tuple(ids)
        requests.append(Request(str(row), prompt, ExpertBudget(tuple(counts)), Sampling(6, seed=0, temperature=0.0)))
    for request, tokens in zip(requests, generate(engine, requests).values(), strict=True):
        ids = [*request.prompt, *tokens]
        rows = logits(saved, ids[:-1], list(request.budget.per_layer))[len(request.prompt) - 1 :]
        assert tokens and all(row.max() - row[token] < 1e-4 for row, token in zip(rows, tokens, strict=True))


# `tests/e2e/test_demos.py` asks the demo model of soft_moe the same; what engines tell of the others is tested above.
@pytest.mark.slow
@pytest.mark.redundant
@pytest.mark.parametrize("family", ["soft_moe", "deep_moe", "soft_t5"])
def test_a_request_chooses_its_count_over_http(family: str, tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    model = write(tmp_path, family, vocabulary=512)
    most = model.config.experts.maximum
    with serving("--model", str(tmp_path), "--served-name", "tiny", "--threads", "1") as live:
        meta = httpx.get(f"{live.url}/v1/models/tiny").json()["meta"]
        assert meta["moe"]["token_local"] == meta["execution"]["prefix_cache"] == (family == "deep_moe")
        assert meta["execution"]["chunked_prefill"] == (family != "soft_t5") and meta["moe"]["max"] == most
        for count in (1, most):
            body = {"prompt": "Once upon a time", "max_tokens": 4, "ignore_eos": True, "num_experts": count}
            answer = httpx.post(f"{live.url}/v1/completions", json=body, timeout=60).raise_for_status().json()
            assert answer["usage"]["completion_tokens"] == 4 and answer["usage"]["routed_pairs"] > 0
        refused = httpx.post(f"{live.url}/v1/completions", json=body | {"num_experts": most + 1})
        assert refused.status_code == 400 and f"between 1 and {most}" in refused.json()["error"]["message"]
