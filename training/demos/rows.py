"""Training rows: windows of a text for decoders, beginnings and what follows them for encoder–decoders.

The rows of a step follow from the seed and the step's number, so that a run which goes on later reads the same.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from training.corpus import encode
from training.demos.recipes import LENGTH
from training.train import Windows

PROMPTS = (8, 48)  # tokens of a beginning, the end token not counted
NONE = -100  # the target of a token that has none
Draw = Callable[[int, int], tuple[Tensor, Tensor]]  # step, rows → tokens [B, S] and targets [B, S]


def windows(tokenizer: Tokenizer, texts: Sequence[str], seed: int) -> Draw:
    """Rows of `LENGTH` tokens of all texts, one after the other, and the token after each."""
    drawn = Windows(encode(tokenizer, texts), LENGTH, seed)

    def draw(step: int, rows: int) -> tuple[Tensor, Tensor]:
        window_BS = drawn(step, rows)
        return window_BS[:, :-1], window_BS[:, 1:]

    return draw


class Beginnings:
    """Parts of stories, every other one up to the story's end: a beginning, its end token and what follows."""

    def __init__(self, tokenizer: Tokenizer, texts: Sequence[str], seed: int) -> None:
        encoded = tokenizer.encode_batch(list(texts), add_special_tokens=False)
        self.stories = [one.ids for one in encoded if len(one.ids) >= LENGTH]
        self.seed = seed

    def __call__(self, step: int, rows: int) -> tuple[Tensor, Tensor]:
        """Tokens and targets [B, `LENGTH`]; a prompt's tokens have no target."""
        random = np.random.default_rng([self.seed, step])
        prompt = int(random.integers(PROMPTS[0], PROMPTS[1] + 1))  # of all alike, which is faster
        ids, targets = zip(*(self._row(random, prompt) for _ in range(rows)), strict=True)
        return torch.tensor(ids), torch.tensor(targets)

    def _row(self, random: np.random.Generator, prompt: int) -> tuple[list[int], list[int]]:
        story = self.stories[int(random.integers(len(self.stories)))]
        last = len(story) - LENGTH + 1
        start = last if random.integers(2) else int(random.integers(last + 1))
        text = [*story, 0][start : start + LENGTH]
        # The decoder's first token shares the row of the prompt's end: what it predicts is the text after the prompt.
        return [*text[:prompt], 0, *text[prompt:-1]], [*[NONE] * prompt, *text[prompt:]]
