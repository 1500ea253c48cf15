"""Tiny random encoder–decoders of `transformers`, one per example of a family, and what they make of a prompt at any
expert count.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
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

BODIES = (
    [5, 30, 8, 8, 26, 36, 17, 11, 60, 59, 3, 3, 44, 21, 9, 4, 7],
    [41, 6, 6, 29],
    [12, 33, 20, 19, 50, 51, 25, 8],
)
ANSWER = [7, 30, 31, 9, 9, 12, 40, 33, 22, 11, 6, 25, 5, 60, 59, 3, 44, 21]  # longer than the distances of the examples


def examples() -> Iterator[tuple[str, int]]:
    """Every family with an encoder, and the numbers of its examples."""
    for family in ENCODERS:
        yield from ((family, number) for number in range(len(examples_of(family))))


def end(family: str) -> int:
    """The token that ends a text."""
    return int(examples_of(family)[0]["eos_token_id"])


def prompts(family: str) -> list[list[int]]:
    """Three, of different lengths, with their ends."""
    return [[*body, end(family)] for body in BODIES]


def build(family: str, number: int, **changes: Any) -> PreTrainedModel:
    """A random float32 model of the family's example."""
    torch.manual_seed(0)
    given = {"model_type": family} | examples_of(family)[number] | changes
    config = AutoConfig.for_model(**given)
    model = AutoModelForSeq2SeqLM.from_config(config, attn_implementation="eager").eval().float()
    randomise(model)
    model.tie_weights()
    model.set_input_embeddings(model.get_input_embeddings())  # of both stacks, also where the head has its own
    for module in model.modules():
        if type(module).__name__ == "NllbMoeExperts":
            module.forward = partial(_weighted, module)
    return model


def _weighted(experts: Any, x_TD: Tensor, _: Tensor, weight_TE: Tensor) -> Tensor:
    """What fairseq computes and transformers 4 did: every expert with a weight. In transformers 5.23 the mask of first
    choices is made one-hot once more, so that experts 0 and 1 run for all tokens."""
    outputs = [experts[f"expert_{number}"](x_TD) for number in range(experts.num_experts)]
    y_TD = torch.stack(outputs, dim=-1) @ weight_TE[..., None]
    return y_TD[..., 0] * (1 - experts.moe_token_dropout)


@contextmanager
def counted(model: PreTrainedModel, count: int) -> Iterator[None]:
    """Have every mixture run so many experts: by each family's formula, since transformers knows one count alone."""
    mixtures = [m for m in model.modules() if type(m).__name__ in ("SwitchTransformersSparseMLP", "NllbMoeSparseMLP")]
    for mixture in mixtures:
        mixture.forward = partial(_best, mixture, count)
    yield
    for mixture in mixtures:
        del mixture.forward


def _best(mixture: Any, count: int, x_BTD: Tensor, *_: Tensor) -> Tensor:
    """Σ of the `count` best experts: raw probabilities (Switch), or over their sum and scaled (NLLB)."""
    probability_BTE = mixture.router.classifier(x_BTD).softmax(-1)
    best = probability_BTE.topk(count, dim=-1)
    weight_BTK = best.values
    if type(mixture).__name__ == "NllbMoeSparseMLP":
        weight_BTK = weight_BTK / weight_BTK.sum(-1, keepdim=True) * (1 - mixture.experts.moe_token_dropout)
    outputs = torch.stack([mixture.experts[f"expert_{e}"](x_BTD) for e in range(probability_BTE.shape[-1])], dim=-2)
    chosen_BTKD = outputs.gather(-2, best.indices[..., None].expand(*best.indices.shape, outputs.shape[-1]))
    return (chosen_BTKD * weight_BTK[..., None]).sum(-2)


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
