"""The models that ship: whole files, cards that hold what was promised, and a twin that transformers reads alike."""

import hashlib
from itertools import pairwise
from typing import Any

import pytest
import torch

from model.backends.torch.attend import WholeAttend
from training.demos.recipes import RECIPES
from training.step import make_batch
from weights import calibration
from weights.chat import ChatTemplate
from weights.folder import DEFAULT, bundled_models, compared_models, read_card, resolve_model
from weights.load import load_model
from weights.tokenizer import Tokenizer

PROMPT = "Once upon a time, there was a little dog named Max."


def losses(name: str) -> dict[int, float]:
    return {row["num_experts"]: row["loss"] for row in read_card(resolve_model(name))["quality"]}


def logits(name: str, count: int) -> Any:
    model, _ = load_model(resolve_model(name), "float32")
    ids_1S = torch.tensor([Tokenizer.load(resolve_model(name)).encode(PROMPT)])
    counts = [count] * len(model.config.mixtures)
    return ids_1S, model(make_batch(ids_1S, counts, 0), WholeAttend(ids_1S.shape[1]))


def test_two_models_are_compared_and_the_others_show_kinds_of_mixtures() -> None:
    assert compared_models() == ["infinity-stories", "topk-stories"] and DEFAULT in compared_models()
    assert set(bundled_models()) <= {*compared_models(), *RECIPES}


@pytest.mark.parametrize("name", compared_models())
def test_a_card_has_a_loss_for_each_promised_count(name: str) -> None:
    assert losses(name).keys() >= {1, 2, 4, 8}


@pytest.mark.parametrize("name, felt", [("infinity-stories", 0.05), ("topk-stories", 0.03)])
def test_more_experts_never_lose_and_fewer_cost_something(name: str, felt: float) -> None:
    """In nats; between 6 and 8 draws the ∞-MoE is level within a thousandth."""
    loss = losses(name)
    assert all(loss[more] <= loss[less] + 0.002 for less, more in pairwise(sorted(loss)))
    assert loss[1] - loss[8] > felt


@pytest.mark.parametrize("name", compared_models())
def test_a_calibration_of_these_very_weights_ships(name: str) -> None:
    folder = resolve_model(name)
    found = calibration.read(folder / calibration.FILE, calibration.checkpoint_hash(folder))
    assert {f"k{count}" for count in (1, 2, 4, 8)} <= {option.name for option in found.options}
    if found.repaired:
        stored = (folder / calibration.REPAIR_FILE).read_bytes()
        assert hashlib.sha256(stored).hexdigest() == found.repair_hash


@pytest.mark.parametrize("name", compared_models())
def test_text_like_the_training_text_is_likely(name: str) -> None:
    ids_1S, logits_TV = logits(name, 4)
    loss = torch.nn.functional.cross_entropy(logits_TV[:-1], ids_1S[0, 1:])
    assert loss < 3.0, "a random model has 8.3"


@pytest.mark.parametrize("count", [1, 4, 8])
def test_transformers_reads_the_twin_and_agrees(count: int) -> None:
    from transformers import AutoTokenizer, OlmoeForCausalLM

    folder = resolve_model("topk-stories")
    ids_1S, ours_TV = logits("topk-stories", count)
    theirs = OlmoeForCausalLM.from_pretrained(folder, dtype=torch.float32, num_experts_per_tok=count).eval()
    with torch.inference_mode():
        assert (theirs(ids_1S).logits[0] - ours_TV).abs().max() < 1e-3  # logits of size 10, and bfloat16 weights
    assert AutoTokenizer.from_pretrained(folder)(PROMPT).input_ids == ids_1S[0].tolist()


def test_the_chat_template_is_that_of_the_training_text() -> None:
    chat = ChatTemplate.load(resolve_model(DEFAULT))
    assert chat is not None
    text = chat.render([{"role": "user", "content": "Tell me a story."}])
    assert text == "<|endoftext|><|user|>Tell me a story.<|assistant|>"
    assert Tokenizer.load(resolve_model(DEFAULT)).encode_chat(text)[:2] == [0, 1]
