"""Every family with an encoder gives the logits and the greedy answers of `transformers`: whole, step by step, with
neighbours of other lengths, after a preemption, and through the engine.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from engine.build import build_engine
from engine.types import EngineSettings, Request, Sampling
from model.backends.cpu.kernels.library import load
from model.backends.cpu.refusal import refusal
from model.budget import ExpertBudget
from model.decoder import Decoder
from model.errors import CheckpointError, InvalidRequest
from model.options import Options
from tests.families import seq2seq
from tests.families.seq2seq import ANSWER, PROMPTS
from tests.families.test_engine import generate
from tests.model.tiny import PagedRun, whole_logits
from weights.save import tensors

EXAMPLES = list(seq2seq.examples())
each = pytest.mark.parametrize(("family", "number"), EXAMPLES, ids=[f"{name}-{number}" for name, number in EXAMPLES])
TOKENS = 12


def trained(model: Decoder) -> list[int]:
    return [model.config.experts.trained] * len(model.config.mixtures)


@each
def test_a_prompt_and_an_answer_in_one_pass(family: str, number: int, tmp_path: Path) -> None:
    reference = seq2seq.build(family, number)
    model = seq2seq.loaded(reference, tmp_path)
    for prompt in PROMPTS:
        expected = seq2seq.logits(reference, prompt, ANSWER)
        assert expected.std() > 0.1
        found = whole_logits(model, [*prompt, *ANSWER], trained(model))
        torch.testing.assert_close(found[len(prompt) - 1 :], expected, atol=1e-4, rtol=0)
        assert not found[: len(prompt) - 1].any()


@each
def test_a_prompt_without_an_end_is_read_whole(family: str, number: int, tmp_path: Path) -> None:
    reference = seq2seq.build(family, number)
    model = seq2seq.loaded(reference, tmp_path)
    for prompt in ([9], PROMPTS[0][:-1]):
        found = whole_logits(model, prompt, trained(model))
        torch.testing.assert_close(found[-1:], seq2seq.logits(reference, prompt, []), atol=1e-4, rtol=0)


@each
def test_steps_beside_others_equal_one_pass(family: str, number: int, tmp_path: Path) -> None:
    """Prompts start at different steps, one with the beginning of its answer, beside sequences that decode."""
    model = seq2seq.loaded(seq2seq.build(family, number), tmp_path)
    rows = [[*PROMPTS[0], *ANSWER], [*PROMPTS[1], *ANSWER[::-1]], [*PROMPTS[2], *ANSWER[5:]]]
    run = PagedRun(model, rows, [trained(model)] * len(rows))
    parts: dict[int, list[torch.Tensor]] = {row: [] for row in range(len(rows))}
    steps = [{0: len(PROMPTS[0])}, {0: 1, 1: len(PROMPTS[1])}, {1: 1, 0: 1}, {2: len(PROMPTS[2]) + 3, 1: 1}]
    for lengths in [*steps, *[{2: 1, 0: 1, 1: 1}] * 9, {1: 3, 0: 7}]:
        for row, part in run.step(lengths).items():
            parts[row].append(part)
    for row, ids in enumerate(rows):
        expected = whole_logits(model, ids, trained(model), seed=row)[: run.done[row]]
        torch.testing.assert_close(torch.cat(parts[row]), expected, atol=2e-5, rtol=1e-5)


def requests(model: Decoder, ends: tuple[int, ...]) -> list[Request]:
    budget = ExpertBudget(tuple(trained(model)))
    sampling = Sampling(TOKENS, seed=0, temperature=0.0, stop_token_ids=ends)
    return [Request(str(row), tuple(prompt), budget, sampling) for row, prompt in enumerate(PROMPTS * 2)]


@each
@pytest.mark.parametrize("blocks", [64, 12])
def test_the_engine_answers_as_generate_does(family: str, number: int, blocks: int, tmp_path: Path) -> None:
    """With 12 blocks of four tokens sequences are preempted, and computed again."""
    reference = seq2seq.build(family, number)
    model = seq2seq.loaded(reference, tmp_path)
    per_block = sum(memory.per_token for memory in model.config.memory) * 4 * 4
    settings = EngineSettings(
        model=str(tmp_path),
        kv_cache_bytes=blocks * per_block + 64 * 4,
        block_size=4,
        max_running=4,
        max_step_tokens=16,
        max_model_len=40,
        step_ms=0,
        threads=1,
    )
    engine, info = build_engine(settings)
    assert (info.kv_blocks, info.kernels) == (min(blocks, 40), "torch")
    preempted = 0
    found: dict[str, list[int]] = {}
    for request in requests(model, (1,)):
        found[request.id] = []
        engine.add(request)
    while engine.has_work:
        report = engine.step()
        preempted += report.stats.preemptions
        for event in report.events:
            assert event.error is None, event.error
            if event.token is not None:
                found[event.request_id].append(event.token)
        engine.scheduler.check()
    assert (preempted > 0) == (blocks == 12)
    expected = [seq2seq.generated(reference, prompt, TOKENS) for prompt in PROMPTS]
    assert list(found.values()) == expected * 2


def test_what_an_encoder_cannot_do_is_refused_by_name(tmp_path: Path) -> None:
    model = seq2seq.loaded(seq2seq.build("t5", 0), tmp_path)
    assert refusal(model.config, Options()) == "a model with an encoder"
    settings = EngineSettings(model=str(tmp_path), kv_cache_bytes=1 << 22, step_ms=0, threads=1)
    engine, info = build_engine(settings)
    assert info.kernels_reason == (load().reason or "a model with an encoder")
    scored = Sampling(1, seed=0, prompt_logprobs=0)
    with pytest.raises(InvalidRequest, match="an encoder reads it, which predicts no tokens") as error:
        engine.add(Request("0", (1, 2), ExpertBudget(()), scored))
    assert error.value.param == "prompt_logprobs"
    with pytest.raises(CheckpointError, match="speculate ngram: this model keeps states"):
        build_engine(EngineSettings(model=str(tmp_path), kv_cache_bytes=1 << 22, speculate="ngram"))
    assert not model.config.chunkable and not model.config.prefix_reusable
    assert generate(engine, [Request("1", (5,), ExpertBudget(()), Sampling(3, seed=0))])["1"]


@each
def test_what_was_loaded_comes_back_bit_for_bit(family: str, number: int, tmp_path: Path) -> None:
    model = seq2seq.loaded(seq2seq.build(family, number), tmp_path)
    written = {name: tensor for file in tmp_path.glob("*.safetensors") for name, tensor in load_file(file).items()}
    ours = tensors(model, family)
    assert {name for name in ours if name != "lm_head.weight"} == {name for name in written if name != "lm_head.weight"}
    assert all(torch.equal(ours[name], tensor) for name, tensor in written.items())
