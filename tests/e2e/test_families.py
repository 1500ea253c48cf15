"""Checkpoints that transformers wrote, served over real HTTP: counts per layer, dense models, what a family loses."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import openai
import pytest

from tests.e2e.live import Live, serving
from tests.families import reference
from tests.weights.words import write_tokenizer

pytestmark = pytest.mark.slow
QUESTION = {"prompt": "Once upon a time", "max_tokens": 4, "temperature": 0}


@contextmanager
def served(family: str, number: int, folder: Path, *flags: str) -> Iterator[Live]:
    """A tiny model of the family, with a tokenizer whose ids it has."""
    write_tokenizer(folder)
    reference.save(reference.build(family, number, vocab_size=512), folder, family)
    with serving("--model", str(folder), "--served-name", "tiny", "--threads", "1", *flags) as live:
        yield live


def test_a_count_per_moe_layer(tmp_path: Path) -> None:
    """Of four layers, the last and the second are mixtures; the card says how many counts there are."""
    with served("qwen3_moe", 1, tmp_path) as live:
        card = live.client.models.retrieve("tiny").model_extra
        assert card is not None and card["meta"]["moe"]["layers"] == 2
        answer = live.client.completions.create(model="tiny", **QUESTION, extra_body={"experts": {"count": [1, 3]}})
        assert answer.usage is not None and answer.usage.model_extra is not None
        assert answer.usage.model_extra["num_experts"] == 2
        with pytest.raises(openai.BadRequestError, match="experts has 4 entries; this model has 2 MoE layers"):
            live.client.completions.create(model="tiny", **QUESTION, extra_body={"experts": {"count": [1, 1, 1, 1]}})


@pytest.mark.redundant  # tests/families/test_engine.py refuses the count, in one process
def test_a_dense_model_answers_and_refuses_a_count(tmp_path: Path) -> None:
    with served("gpt2", 0, tmp_path) as live:
        assert live.client.completions.create(model="tiny", **QUESTION).choices[0].text is not None
        with pytest.raises(openai.BadRequestError, match="this model has no mixture-of-experts layers"):
            live.client.completions.create(model="tiny", **QUESTION, extra_body={"num_experts": 1})


@pytest.mark.parametrize("consent", [False, pytest.param(True, marks=pytest.mark.redundant)])
def test_a_router_made_for_one_count(consent: bool, tmp_path: Path) -> None:
    flags = ["--allow-extrapolated-experts"] if consent else []
    with served("llama4_text", 0, tmp_path, *flags) as live:
        ask = {"model": "tiny", **QUESTION, "extra_body": {"num_experts": 2}}
        if consent:
            assert live.client.completions.create(**ask).usage is not None  # type: ignore[call-overload]
        else:
            with pytest.raises(openai.BadRequestError, match="can only be 1, the trained count"):
                live.client.completions.create(**ask)  # type: ignore[call-overload]


def test_recurrent_layers_serve_with_a_prefix_cache(tmp_path: Path) -> None:
    """The second answer starts behind the prompt's last full block, of which there is a copy of the states."""
    with served("qwen3_next", 0, tmp_path, "--prefix-snapshot-tokens", "256") as live:
        ask = {"model": "tiny", "prompt": list(range(5, 45)), "max_tokens": 6, "temperature": 0}
        answers = [live.client.completions.create(**ask) for _ in range(2)]  # type: ignore[call-overload]
        assert answers[0].choices[0].text == answers[1].choices[0].text
        assert [answer.usage.prompt_tokens_details.cached_tokens for answer in answers] == [0, 32]
        assert live.metric("prefix_cache_hits_total") == 32
        card = live.client.models.retrieve("tiny").model_extra
        assert card is not None and card["meta"]["execution"]["prefix_cache"]
