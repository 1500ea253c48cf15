"""Tiny random encoder–decoders of `transformers`, one per example of a family, and what they make of a prompt."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForSeq2SeqLM, PreTrainedModel

from model.decoder import Decoder
from tests.families.examples import examples_of
from tests.families.reference import ENCODERS
from tests.model.tiny import randomise
from weights.load import load_model

PROMPTS = (
    [5, 30, 8, 8, 2, 36, 17, 11, 60, 59, 3, 3, 44, 21, 9, 4, 7, 1],
    [41, 6, 6, 29, 1],
    [12, 33, 20, 19, 50, 51, 2, 8, 1],
)
ANSWER = [7, 30, 31, 9, 9, 12, 40, 33, 22, 11, 6, 2, 5, 60, 59, 3, 44, 21]  # longer than the distances of the examples


def examples() -> Iterator[tuple[str, int]]:
    """Every family with an encoder, and the numbers of its examples."""
    for family in ENCODERS:
        yield from ((family, number) for number in range(len(examples_of(family))))


def build(family: str, number: int) -> PreTrainedModel:
    """A random float32 model of the family's example."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **examples_of(family)[number])
    model = AutoModelForSeq2SeqLM.from_config(config, attn_implementation="eager").eval().float()
    randomise(model)
    model.tie_weights()
    return model


def loaded(model: PreTrainedModel, folder: Path) -> Decoder:
    """Ours, from transformers' files."""
    model.save_pretrained(folder, max_shard_size="20KB")
    return load_model(folder)[0]


@torch.no_grad()
def logits(model: PreTrainedModel, prompt: list[int], answer: list[int]) -> Tensor:
    """[1 + answer, V]: of the answer's first token, and of those after each of its tokens."""
    start = model.config.decoder_start_token_id
    ids = {"input_ids": torch.tensor([prompt]), "decoder_input_ids": torch.tensor([[start, *answer]])}
    found: Tensor = model(**ids).logits[0]
    return found


def generated(model: PreTrainedModel, prompt: list[int], most: int) -> list[int]:
    """The greedy answer, with the token that ends it."""
    # Without its cache, which in transformers 5.23 has as many layers as the encoder.
    generate: Any = model.generate
    ids = generate(torch.tensor([prompt]), max_new_tokens=most, do_sample=False, num_beams=1, use_cache=False)
    answer: list[int] = ids[0, 1:].tolist()
    return answer
