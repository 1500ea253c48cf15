"""Every family with an encoder gives the logits and the greedy answers of `transformers`: whole, step by step, with
neighbours of other lengths, after a preemption, and through the engine.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from calibration.opening import opened
from calibration.options import Options
from engine.build import build_engine
from engine.types import EngineSettings, Request, Sampling
from model.backends.cpu.kernels.library import load
from model.backends.cpu.refusal import refusal
from model.budget import ExpertBudget
from model.decoder import Decoder
from model.errors import CheckpointError, InvalidRequest
from model.options import Options as BackendOptions
from tests.families import seq2seq
from tests.families.seq2seq import ANSWER, prompts
from tests.families.test_engine import generate
from tests.model.tiny import PagedRun, whole_logits
from weights.load import load_model
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
    for prompt in prompts(family):
        expected = seq2seq.logits(reference, prompt, ANSWER)
        assert expected.std() > 0.1
        found = whole_logits(model, [*prompt, *ANSWER], trained(model))
        torch.testing.assert_close(found[len(prompt) - 1 :], expected, atol=1e-4, rtol=0)
        assert not found[: len(prompt) - 1].any()


@each
def test_other_counts_than_the_trained_one(family: str, number: int, tmp_path: Path) -> None:
    reference = seq2seq.build(family, number)
    model = seq2seq.loaded(reference, tmp_path)
    mixtures, prompt = model.config.mixtures, prompts(family)[0]
    if not mixtures:
        return
    seen = []
    for count in range(1, model.config.mixtures[0].maximum + 1):
        with seq2seq.counted(reference, count):
            expected = seq2seq.logits(reference, prompt, ANSWER)
        found = whole_logits(model, [*prompt, *ANSWER], [count] * len(mixtures))[len(prompt) - 1 :]
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
        seen.append(found)
    assert (seen[0] - seen[-1]).abs().max() > 1e-2
    layered = [1, *[2] * (len(mixtures) - 1)]
    other = whole_logits(model, [*prompt, *ANSWER], layered)[len(prompt) - 1 :]
    assert not torch.equal(other, seen[0]) and not torch.equal(other, seen[1])


@each
def test_a_prompt_without_an_end_is_read_whole(family: str, number: int, tmp_path: Path) -> None:
    reference = seq2seq.build(family, number)
    model = seq2seq.loaded(reference, tmp_path)
    for prompt in ([9], prompts(family)[0][:-1]):
        found = whole_logits(model, prompt, trained(model))
        torch.testing.assert_close(found[-1:], seq2seq.logits(reference, prompt, []), atol=1e-4, rtol=0)


@each
def test_steps_beside_others_equal_one_pass(family: str, number: int, tmp_path: Path) -> None:
    """Prompts start at different steps, one with the beginning of its answer, beside sequences that decode."""
    model = seq2seq.loaded(seq2seq.build(family, number), tmp_path)
    first, second, third = prompts(family)
    rows = [[*first, *ANSWER], [*second, *ANSWER[::-1]], [*third, *ANSWER[5:]]]
    counts = [[1 + row] * len(model.config.mixtures) for row in range(len(rows))]
    run = PagedRun(model, rows, counts)
    parts: dict[int, list[torch.Tensor]] = {row: [] for row in range(len(rows))}
    steps = [{0: len(first)}, {0: 1, 1: len(second)}, {1: 1, 0: 1}, {2: len(third) + 3, 1: 1}]
    for lengths in [*steps, *[{2: 1, 0: 1, 1: 1}] * 9, {1: 3, 0: 7}]:
        for row, part in run.step(lengths).items():
            parts[row].append(part)
    for row, ids in enumerate(rows):
        expected = whole_logits(model, ids, counts[row], seed=row)[: run.done[row]]
        torch.testing.assert_close(torch.cat(parts[row]), expected, atol=2e-5, rtol=1e-5)


def requests(model: Decoder, family: str) -> list[Request]:
    budget = ExpertBudget(tuple(trained(model)))
    sampling = Sampling(TOKENS, seed=0, temperature=0.0, stop_token_ids=(seq2seq.end(family),))
    return [Request(str(row), tuple(prompt), budget, sampling) for row, prompt in enumerate(prompts(family) * 2)]


@each
@pytest.mark.parametrize("blocks", [pytest.param(64, marks=pytest.mark.redundant), 12])
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
    for request in requests(model, family):
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
    expected = [seq2seq.generated(reference, prompt, TOKENS) for prompt in prompts(family)]
    assert list(found.values()) == expected * 2


def with_keys(folder: Path, **keys: Any) -> Decoder:
    """The checkpoint with more keys in its config.json."""
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | keys))
    return load_model(folder)[0]


DROPPING: list[tuple[str, dict[str, Any]]] = [
    ("switch_transformers", {"expert_capacity": 2}),
    ("nllb_moe", {"moe_eval_capacity_token_fraction": 0.25}),
    ("nllb_moe", {"moe_eval_capacity_token_fraction": -1.0, "expert_capacity": 3}),
    ("nllb_moe", {"moe_eval_capacity_token_fraction": 0.3, "batch_prioritized_routing": True}),
    ("nllb_moe", {"moe_eval_capacity_token_fraction": 0.2, "normalize_router_prob_before_dropping": True}),
]


@pytest.mark.parametrize(("family", "changes"), DROPPING)
def test_tokens_beyond_a_capacity_are_dropped_where_the_config_says_so(
    family: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    """As transformers drops them; without our key none is dropped. Neighbours of other sequences do not compete."""
    reference = seq2seq.build(family, 0, **changes)
    seq2seq.loaded(reference, tmp_path)
    expected = [seq2seq.logits(reference, prompt, ANSWER) for prompt in prompts(family)]
    model = with_keys(tmp_path, drop_tokens=True)
    rows = [[*prompt, *ANSWER] for prompt in prompts(family)]
    run = PagedRun(model, rows, [trained(model)] * len(rows))
    for row, found in run.step({row: len(ids) for row, ids in enumerate(rows)}).items():
        torch.testing.assert_close(found[len(rows[row]) - len(ANSWER) - 1 :], expected[row], atol=1e-4, rtol=0)
    dropless = whole_logits(with_keys(tmp_path, drop_tokens=False), rows[0], trained(model))
    assert (dropless[len(rows[0]) - len(ANSWER) - 1 :] - expected[0]).abs().max() > 1e-2


def test_second_experts_of_little_weight_do_not_run(tmp_path: Path) -> None:
    """At 0 all run; near 1 none, which is a count of one; between them some. Policies that draw are refused."""
    seq2seq.loaded(seq2seq.build("nllb_moe", 0), tmp_path)
    ids = [*prompts("nllb_moe")[0], *ANSWER]
    plain = load_model(tmp_path)[0]
    found = {}
    for threshold in (0.0, 0.2, 0.45, 0.999):
        model = with_keys(tmp_path, second_expert_policy="threshold", second_expert_threshold=threshold)
        found[threshold] = whole_logits(model, ids, trained(model))
    torch.testing.assert_close(found[0.0], whole_logits(plain, ids, trained(plain)))
    torch.testing.assert_close(found[0.999], whole_logits(plain, ids, [1] * len(plain.config.mixtures)))
    assert len({float(logits.sum()) for logits in found.values()}) == 4
    with pytest.raises(CheckpointError, match="second_expert_policy is 'random', but only 'all', 'threshold'"):
        with_keys(tmp_path, second_expert_policy="random")
    with pytest.raises(CheckpointError, match="second_expert_threshold must be at least 0 and below 1"):
        with_keys(tmp_path, second_expert_policy="threshold", second_expert_threshold=1.0)


@each
def test_a_forced_token_begins_every_answer_that_the_prompt_does_not(family: str, number: int, tmp_path: Path) -> None:
    seq2seq.loaded(seq2seq.build(family, number), tmp_path)
    plain, forced = with_keys(tmp_path), with_keys(tmp_path, forced_bos_token_id=17)
    prompt = prompts(family)[0]
    first = whole_logits(forced, prompt, trained(forced))[-1]
    assert first.softmax(0)[17] == 1 and first.isfinite().all()
    begun = [*prompt, 33, 20]
    assert torch.equal(whole_logits(forced, begun, trained(forced)), whole_logits(plain, begun, trained(plain)))
    run = PagedRun(forced, [begun], [trained(forced)])
    assert run.step({0: len(prompt)})[0][-1].argmax() == 17
    assert run.step({0: 1})[0].argmax() == whole_logits(plain, begun[:-1], trained(plain))[-1].argmax()


def test_an_embedding_of_one_stack_alone_is_refused(tmp_path: Path) -> None:
    seq2seq.loaded(seq2seq.build("t5", 0), tmp_path)
    file = next(path for path in tmp_path.glob("*.safetensors") if "shared.weight" in load_file(path))
    stored = load_file(file)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    index["weight_map"]["encoder.embed_tokens.weight"] = file.name
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file(stored | {"encoder.embed_tokens.weight": stored["shared.weight"].clone()}, file)
    load_model(tmp_path)
    save_file(stored | {"encoder.embed_tokens.weight": stored["shared.weight"] + 1}, file)
    with pytest.raises(CheckpointError, match=r"encoder.embed_tokens.weight is not the same as shared.weight"):
        load_model(tmp_path)


@pytest.mark.parametrize("count", [1, 2])
def test_work_is_counted_where_it_is_done(count: int, tmp_path: Path) -> None:
    """A prompt's tokens run the encoder's mixtures, and those of the answer the decoder's."""
    model = seq2seq.loaded(seq2seq.build("switch_transformers", 0), tmp_path)
    settings = EngineSettings(model=str(tmp_path), kv_cache_bytes=1 << 22, step_ms=0, allow_extrapolated_experts=True)
    engine, _ = build_engine(settings)
    budget, sampling = ExpertBudget((count,) * 4), Sampling(5, seed=0, temperature=0.0)
    asked = [Request(str(row), tuple(ids), budget, sampling) for row, ids in enumerate(prompts("switch_transformers"))]
    for request in asked:
        engine.add(request)
    steps, routed = [], {}
    while engine.has_work:
        report = engine.step()
        steps.append(report.stats)
        for event in report.events:
            if event.finish is not None and event.stats is not None:
                routed[event.request_id] = (event.stats.routed_pairs, event.stats.trained_pairs)
    first = sum(shape.num_experts > 0 for shape in model.config.feed_forward[:4])
    assert first == 2
    pairs = {request.id: 2 * len(request.prompt) + 2 * 5 for request in asked}
    assert routed == {id: (count * once, once) for id, once in pairs.items()}
    assert sum(step.routed_pairs for step in steps) == count * sum(step.trained_pairs for step in steps)
    assert sum(step.trained_pairs for step in steps) == sum(pairs.values())


def test_routes_are_told_of_the_layers_that_a_token_runs(tmp_path: Path) -> None:
    seq2seq.loaded(seq2seq.build("nllb_moe", 0), tmp_path)
    engine, _ = build_engine(EngineSettings(model=str(tmp_path), kv_cache_bytes=1 << 22, step_ms=0))
    prompt = tuple(prompts("nllb_moe")[1])
    engine.add(Request("0", prompt, ExpertBudget((2,) * 3), Sampling(4, seed=0), return_routes=True))
    events = [event for _ in range(4) for event in engine.step().events]
    routes = events[-1].routes
    assert routes is not None and routes.shape == (len(prompt) + 3, 3, 2)
    found = np.frombuffer(routes.data, np.uint8).reshape(routes.shape)
    ran = (found != 255).all(-1)
    assert ran.tolist() == [[True, True, False]] * (len(prompt) - 1) + [[True] * 3] + [[False, False, True]] * 3


def test_what_an_encoder_cannot_do_is_refused_by_name(tmp_path: Path) -> None:
    model = seq2seq.loaded(seq2seq.build("switch_transformers", 0), tmp_path)
    assert refusal(model.config, BackendOptions()) == "a model with an encoder"
    settings = EngineSettings(model=str(tmp_path), kv_cache_bytes=1 << 22, step_ms=0, threads=1)
    engine, info = build_engine(settings)
    assert info.kernels_reason == (load().reason or "a model with an encoder")
    scored = Sampling(1, seed=0, prompt_logprobs=0)
    with pytest.raises(InvalidRequest, match="an encoder reads them, which predicts no tokens") as error:
        engine.add(Request("0", (1, 2), ExpertBudget((1,) * 4), scored))
    assert error.value.param == "prompt_logprobs"
    with pytest.raises(CheckpointError, match="speculate ngram: this model keeps states"):
        build_engine(EngineSettings(model=str(tmp_path), kv_cache_bytes=1 << 22, speculate="ngram"))
    calibration = opened(Options(model=str(tmp_path), output=tmp_path))
    with (
        pytest.raises(CheckpointError, match="cannot be calibrated by texts: an encoder reads them"),
        calibration,
    ):
        pass
    assert not model.config.chunkable and not model.config.prefix_reusable
    assert generate(engine, [Request("1", (5,), ExpertBudget((1,) * 4), Sampling(3, seed=0))])["1"]


@each
def test_what_was_loaded_comes_back_bit_for_bit(family: str, number: int, tmp_path: Path) -> None:
    model = seq2seq.loaded(seq2seq.build(family, number), tmp_path)
    written = {name: tensor for file in tmp_path.glob("*.safetensors") for name, tensor in load_file(file).items()}
    ours = tensors(model, family)
    assert {name for name in ours if name != "lm_head.weight"} == {name for name in written if name != "lm_head.weight"}
    assert all(torch.equal(ours[name], tensor) for name, tensor in written.items())
