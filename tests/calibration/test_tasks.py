"""Multiple choice: how files are read, and that the answer with the highest log-likelihood is the one counted."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from calibration.partial import Partial
from calibration.progress import Progress
from calibration.tasks import CachedRunner, Task, accuracy, read_task
from engine.build import build_engine
from engine.runner import ModelRunner
from engine.types import EngineSettings
from model.budget import ExpertBudget
from model.errors import CheckpointError
from tests.calibration.checkpoints import two_experts, write_task
from tests.model.tiny import whole_logits
from weights.load import load_model
from weights.tokenizer import Tokenizer

COUNTS = (2, 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return two_experts(tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def task(folder: Path) -> Task:
    return read_task(write_task(folder / "riddles.v1.jsonl"), Tokenizer.load(folder), 64, 100)


def expected(folder: Path, task: Task) -> list[list[float]]:
    """Each choice's log-likelihood, computed by the whole decoder in one go."""
    model, _ = load_model(folder, "float32")
    found = []
    for question in task.questions:
        sums = []
        for choice in question.choices:
            logprobs = torch.log_softmax(whole_logits(model, choice.tokens, COUNTS), -1)
            places = range(choice.question, len(choice.tokens))
            sums.append(sum(float(logprobs[place - 1, choice.tokens[place]]) for place in places))
        found.append(sums)
    return found


def test_questions_and_choices_are_encoded_together(task: Task) -> None:
    assert task.name == "riddles"
    first, second, _ = task.questions
    assert [len(choice.tokens) - choice.question for choice in first.choices] == [1, 1]
    assert [len(choice.tokens) - choice.question for choice in second.choices] == [1, 3]
    assert second.answer == 1 and second.choices[1].characters == len("fox who liked")
    assert first.choices[0].tokens[0] == 0  # what begins every text


@pytest.mark.parametrize("blocks", [100, 1])
def test_the_likeliest_choice_is_the_answer(folder: Path, tmp_path: Path, task: Task, blocks: int) -> None:
    engine, _ = build_engine(EngineSettings(model=str(folder), step_ms=0, prefix_cache=False))
    assert isinstance(engine.runner, ModelRunner)
    cached = CachedRunner(engine.runner, blocks)  # with one block the choices are computed one after another
    rates = accuracy(cached, ExpertBudget(COUNTS), task, Partial(tmp_path / "partial", {}), Progress())
    right = normed = 0
    for sums, question in zip(expected(folder, task), task.questions, strict=True):
        means = [total / choice.characters for total, choice in zip(sums, question.choices, strict=True)]
        right += sums.index(max(sums)) == question.answer
        normed += means.index(max(means)) == question.answer
    assert rates == {"riddles acc": right / 3, "riddles acc_norm": normed / 3}


def test_the_two_rules_can_differ(folder: Path, task: Task) -> None:
    """Otherwise the test above could not tell them apart."""
    differ = []
    for sums, question in zip(expected(folder, task), task.questions, strict=True):
        means = [total / choice.characters for total, choice in zip(sums, question.choices, strict=True)]
        differ.append(sums.index(max(sums)) != means.index(max(means)))
    assert any(differ)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1 is no JSON"),
        ("[]", 'needs "prompt"'),
        ({"prompt": "a", "choices": ["b"], "answer": 0}, "at least two texts"),
        ({"prompt": "a", "choices": ["b", 3], "answer": 0}, "at least two texts"),
        ({"prompt": "a", "choices": ["b", "c"], "answer": 2}, r'needs "answer" \(or "gold"\), from 0 to 1, got 2'),
        ({"prompt": "a", "choices": ["b", "c"], "answer": True}, "got True"),
        ({"prompt": "a " * 70, "choices": ["b", "c"], "answer": 0}, "no question of at most 64 tokens"),
    ],
)
def test_a_line_that_is_no_question_is_refused_by_name(folder: Path, tmp_path: Path, line: Any, message: str) -> None:
    path = tmp_path / "task.jsonl"
    path.write_text(line if isinstance(line, str) else json.dumps(line))
    with pytest.raises(CheckpointError, match=message) as refused:
        read_task(path, Tokenizer.load(folder), 64, 100)
    assert str(path) in str(refused.value)
