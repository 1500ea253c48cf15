"""Tiny random models of `transformers`, one per example of a family, and their logits at any expert count."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from tests.families.examples import examples_of
from tests.model.tiny import randomise
from weights.config import families

BASE: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "intermediate_size": 24,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
COUNTS = ("top_k", "num_experts_per_tok", "topk", "num_experts_per_token")  # what routers call K
ENCODERS = ("nllb_moe", "switch_transformers", "t5", "umt5")  # see `seq2seq.py`
# That transformers does not know.
OWN = ("deep_moe", "dynmoe", "infinity_moe", "moe_plus_plus", "mu_moe", "remoe", "soft_moe", "soft_t5", "st_moe")
SAME = {"kimi_k2": "deepseek_v3"}  # what transformers does not know, and the family that it is
BIASES = ("e_score_correction_bias",)  # buffers that a trained checkpoint fills
PROMPT = [5, 1, 30, 8, 8, 2, 36, 0, 17, 11, 60, 59, 3, 3, 44, 21, 9]
STEPS = 16


def examples() -> Iterator[tuple[str, int]]:
    """Every family without an encoder that transformers knows, and the numbers of its examples."""
    for family in families():
        if family not in ENCODERS and family not in OWN:
            yield from ((family, number) for number in range(len(example_list(family))))


def example_list(family: str) -> tuple[dict[str, Any], ...]:
    """The family's tiny configs: at least two, that differ in what matters."""
    return examples_of(family)


def merged(example: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """The example over the base, with changes; both are the text part's where there are others."""
    if "text_config" in example:
        return example | {"text_config": BASE | example["text_config"] | changes}
    return BASE | example | changes


def build(family: str, number: int, **changes: Any) -> PreTrainedModel:
    """A random float32 model of the family's example."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(SAME.get(family, family), **merged(example_list(family)[number], **changes))
    config._experts_implementation = "eager"
    kind = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
    model = kind.from_config(config, attn_implementation="eager").eval().float()
    randomise(model)
    generator = torch.Generator().manual_seed(1)
    for name, buffer in model.named_buffers():
        if name.endswith(BIASES):
            buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.1)
    model.tie_weights()
    for module in model.modules():
        if type(module).__name__ == "PhimoeTopKRouter":
            module.register_forward_hook(_first)
    return model


def _first(router: Any, _: object, found: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """transformers' sparse mixer gives two experts whatever the count; fewer are the first of them."""
    logits, weights, experts = found
    return logits, weights[:, : router.top_k], experts[:, : router.top_k]


def save(model: PreTrainedModel, folder: Path, family: str = "") -> None:
    """As a checkpoint of several small files."""
    model.save_pretrained(folder, max_shard_size="20KB")
    if family in SAME:
        config = folder / "config.json"
        config.write_text(config.read_text().replace(f'"{SAME[family]}"', f'"{family}"'))


@torch.no_grad()
def logits(model: PreTrainedModel, ids: list[int], count: int | None) -> Tensor:
    """[T, V] of one sequence at an expert count."""
    if count is not None:
        set_count(model, count)
    found: Tensor = model(torch.tensor([ids]), use_cache=False).logits[0]
    return found


def set_count(model: PreTrainedModel, count: int) -> None:
    """Have every router choose so many experts."""
    for holder in [model.config, *model.modules()]:
        for name in COUNTS:
            if isinstance(getattr(holder, name, None), int):
                setattr(holder, name, count)


def continued(
    family: str, number: int, trained: int | None, counts: list[int | None]
) -> tuple[list[int], list[Tensor]]:
    """The prompt and sixteen tokens, greedy at the trained count, and the logits before each of them at every count."""
    model, ids = build(family, number), list(PROMPT)
    for _ in range(STEPS):
        ids.append(int(logits(model, ids, trained)[-1].argmax()))
    return ids, [logits(model, ids[:-1], count) for count in counts]
