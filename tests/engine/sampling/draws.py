"""Sequences, and tokens sampled for them, for the tests of sampling."""

import math
from collections import Counter
from typing import Any

import torch
from torch import Tensor

from engine.plan import Sampled
from engine.sequence import Sequence
from engine.types import Request, Sampling
from model.budget import ExpertBudget
from tests.engine.sampling.ops import sample

LOGITS = [2.0, 0.5, 1.0, -1.0, 0.0, 3.0, -2.0, 0.25]


def sequence(prompt: tuple[int, ...] = (1, 2), output: tuple[int, ...] = (), **options: Any) -> Sequence:
    given_options = {"max_tokens": 99, "seed": 7} | options
    made = Sequence(Request("r", prompt, ExpertBudget((1,)), Sampling(**given_options)), 0.0)
    made.tokens += output
    return made


def one(logits: list[float] | Tensor, **options: Any) -> Sampled:
    return sample(torch.as_tensor(logits)[None], [sequence(**options)])[0]


def best(logits: list[float], **options: Any) -> int:
    return one(logits, temperature=0, **options).token


def frequencies(logits: list[float] | Tensor, draws: int = 10_000, **options: Any) -> Counter[int]:
    """How often each token comes out over many seeds."""
    rows = torch.as_tensor(logits)[None].expand(draws, -1)
    return Counter(s.token for s in sample(rows, [sequence(seed=seed, **options) for seed in range(draws)]))


def softmax(logits: list[float], temperature: float = 1.0) -> list[float]:
    exps = [math.exp(value / temperature) for value in logits]
    return [value / sum(exps) for value in exps]
