"""The rows of a step: what they ask for, and that they are the same when a run goes on."""

import pytest
import torch

from training.corpus import train_tokenizer
from training.demos import rows
from training.demos.rows import Beginnings, windows

TEXTS = ["Once upon a time there was a big red dog. It ran to the sea, and it saw a small boat. " * 2] * 4


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "LENGTH", 24)
    monkeypatch.setattr(rows, "PROMPTS", (3, 9))


def test_a_window_s_targets_are_the_tokens_after_it() -> None:
    draw = windows(train_tokenizer(TEXTS, 300), TEXTS, seed=1)
    ids_BS, target_BS = draw(0, 3)
    assert ids_BS.shape == (3, 24) and torch.equal(ids_BS[:, 1:], target_BS[:, :-1])
    assert torch.equal(draw(5, 3)[0], windows(train_tokenizer(TEXTS, 300), TEXTS, seed=1)(5, 3)[0])


def test_a_row_for_an_encoder_is_a_beginning_its_end_and_what_follows() -> None:
    tokenizer = train_tokenizer(TEXTS, 300)
    story = [*tokenizer.encode(TEXTS[0], add_special_tokens=False).ids, 0]
    draw = Beginnings(tokenizer, TEXTS, seed=1)
    ids_BS, target_BS = (torch.cat(parts) for parts in zip(*(draw(step, 5) for step in range(10)), strict=True))
    ends = 0
    for ids, targets in zip(ids_BS.tolist(), target_BS.tolist(), strict=True):
        prompt = ids.index(0)
        assert 3 <= prompt <= 9 and 0 not in ids[prompt + 1 :] and len(ids) == len(targets) == 24
        assert set(targets[:prompt]) == {rows.NONE} and ids[prompt + 1 :] == targets[prompt:-1]
        text = [*ids[:prompt], *targets[prompt:]]
        assert any(story[start : start + 24] == text for start in range(len(story) - 23))
        ends += targets[-1] == 0
    assert 10 < ends < 45
    assert torch.equal(draw(3, 5)[0], Beginnings(tokenizer, TEXTS, seed=1)(3, 5)[0]), "the same when a run goes on"
