"""Multiple-choice tasks: which choice has the highest log-likelihood after the question, as lm-evaluation-harness asks.

`acc` compares the sums of the choices' log-probabilities, `acc_norm` the sums over the choices' lengths in characters.
A choice follows its question after one space.
"""

import json
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from calibration.partial import Partial
from calibration.progress import Progress
from calibration.scoring import sequence_of
from engine.expert_stats import ExpertStats
from engine.plan import Chunk
from engine.runner import ModelRunner
from engine.types import Logprob
from model.budget import ExpertBudget
from model.errors import CheckpointError
from weights.folder import read_text
from weights.tokenizer import Tokenizer

MAX_BYTES = 64 << 20
MAX_ROWS = 16  # choices in one step
UNSCORED = Logprob(0.0)  # stands for a token of the question, so that the runner makes no logits for it


@dataclass(frozen=True, slots=True)
class Choice:
    """One choice: its question's and its own tokens, and how many of them are the question's."""

    tokens: tuple[int, ...]
    question: int
    characters: int


@dataclass(frozen=True, slots=True)
class Question:
    """Choices, and which of them is right."""

    choices: tuple[Choice, ...]
    answer: int


@dataclass(frozen=True, slots=True)
class Task:
    """A file of questions."""

    name: str
    questions: tuple[Question, ...]


@dataclass(frozen=True, slots=True)
class CachedRunner:
    """A runner, and the number of blocks of its cache."""

    runner: ModelRunner
    blocks: int


def read_task(path: Path, tokenizer: Tokenizer, length: int, most: int) -> Task:
    """The first `most` questions of a file that fit `length` tokens.

    Raises:
        CheckpointError: a line is no such question; or none fits.
    """
    try:
        lines = [line for line in read_text(path, MAX_BYTES).splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"--tasks {path} cannot be read: {error}") from None
    questions: list[Question] = []
    for number, line in enumerate(lines, 1):
        question = _question(line, f"--tasks {path}, line {number}", tokenizer)
        if all(len(choice.tokens) <= length for choice in question.choices):
            questions.append(question)
        if len(questions) == most:
            break
    if not questions:
        raise CheckpointError(f"--tasks {path} has no question of at most {length} tokens")
    return Task(path.name.partition(".")[0], tuple(questions))


def _question(line: str, where: str, tokenizer: Tokenizer) -> Question:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise CheckpointError(f"{where} is no JSON: {error}") from None
    value = value if isinstance(value, dict) else {}
    prompt = value.get("prompt", value.get("query"))
    choices = _texts(value.get("choices"))
    answer = value.get("answer", value.get("gold"))
    if not isinstance(prompt, str) or len(choices) < 2:
        raise CheckpointError(f'{where} needs "prompt" (or "query"), a text, and "choices", at least two texts')
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        raise CheckpointError(f'{where} needs "answer" (or "gold"), from 0 to {len(choices) - 1}, got {answer!r:.40}')
    return Question(tuple(_choice(prompt, text, tokenizer) for text in choices), answer)


def _texts(choices: Any) -> list[str]:
    """The choices; none, where one of them is no text."""
    texts = choices if isinstance(choices, list) else []
    return texts if all(isinstance(text, str) and text for text in texts) else []


def _choice(prompt: str, text: str, tokenizer: Tokenizer) -> Choice:
    """Question and choice are encoded together, so that tokens are those of running text; blanks at the end of the
    question belong to the choice."""
    start = tokenizer.encode("")[:1]  # what begins every text, if anything does
    question = start + tokenizer.encode(prompt.rstrip(), framed=False)
    whole = start + tokenizer.encode(f"{prompt} {text}", framed=False)
    return Choice(tuple(whole), max(1, min(len(question), len(whole) - 1)), len(text))


def accuracy(
    cached: CachedRunner, budget: ExpertBudget, task: Task, partial: Partial, progress: Progress
) -> dict[str, float]:
    """Shares of questions answered rightly by either rule: "NAME acc" and "NAME acc_norm"."""
    key = f"task {task.name} {budget!r}"
    done: dict[str, int] = partial.get(key) or {"questions": 0, "acc": 0, "acc_norm": 0}
    with progress.stage(task.name, len(task.questions)) as stage:
        for number, question in enumerate(task.questions):
            computed = number >= done["questions"]
            if computed:
                sums = _log_likelihoods(cached, budget, question)
                means = [total / choice.characters for total, choice in zip(sums, question.choices, strict=True)]
                done = {
                    "questions": number + 1,
                    "acc": done["acc"] + (sums.index(max(sums)) == question.answer),
                    "acc_norm": done["acc_norm"] + (means.index(max(means)) == question.answer),
                }
                partial.put(key, done)
            stage.advance(computed)
    return {f"{task.name} {rule}": done[rule] / done["questions"] for rule in ("acc", "acc_norm")}


@torch.inference_mode()
def _log_likelihoods(cached: CachedRunner, budget: ExpertBudget, question: Question) -> list[float]:
    """Of each choice, the sum over its tokens. All choices are computed in one step, unless the cache is too small."""
    found: list[float] = []
    for batch in _batches(question.choices, cached):
        chunks, first_block = [], 0
        for row, choice in enumerate(batch):
            sequence = sequence_of(choice.tokens, budget, cached.runner, row, first_block)
            sequence.prompt_logprobs = [UNSCORED] * (choice.question - 1)
            chunks.append(Chunk(sequence, 0, len(choice.tokens) - 1))
            first_block += len(sequence.blocks)
        logits_RV = cached.runner.forward(tuple(chunks), ExpertStats()).float()
        next_R = torch.tensor([token for choice in batch for token in choice.tokens[choice.question :]])
        logprob_R = logits_RV.gather(-1, next_R[:, None])[:, 0] - logits_RV.logsumexp(-1)
        sizes = [len(choice.tokens) - choice.question for choice in batch]
        found += [float(part.double().sum()) for part in logprob_R.split(sizes)]
    return found


def _batches(choices: Seq[Choice], cached: CachedRunner) -> list[list[Choice]]:
    """The choices as many at a time as the cache has blocks for."""
    batches: list[list[Choice]] = [[]]
    taken = 0
    for choice in choices:
        blocks = -(-len(choice.tokens) // cached.runner.cache.block_size)
        if batches[-1] and (taken + blocks > cached.blocks or len(batches[-1]) == MAX_ROWS):
            batches.append([])
            taken = 0
        batches[-1].append(choice)
        taken += blocks
    return batches
