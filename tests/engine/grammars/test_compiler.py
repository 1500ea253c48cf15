"""The grammar compiler on a real vocabulary: what grammars allow, how they end, and that only its own request fails."""

import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.grammars.compiler import GrammarCompiler, Matcher
from engine.grammars.validator import GrammarValidator, ValidationTimeout
from engine.sequence import Sequence
from engine.types import Request, Sampling
from model.budget import ExpertBudget
from model.errors import InvalidRequest
from tests.engine.sampling.ops import constrained, sample
from weights.folder import BUNDLED, DEFAULT
from weights.tokenizer import Tokenizer

FOLDER: Path = BUNDLED / DEFAULT
VOCABULARY, END = 4096, 0
TOKENIZER = Tokenizer.load(FOLDER)
GRAMMARS = GrammarCompiler(str(FOLDER), VOCABULARY, (END,))
AGE = 'start: "I am " /[0-9]{1,3}/ " years old"'


def sequence(grammar: str, **options: object) -> Sequence:
    sampling = Sampling(max_tokens=99, seed=1, grammar=grammar, stop_token_ids=(END,), **options)  # type: ignore[arg-type]
    return Sequence(Request("a", (5,), ExpertBudget(()), sampling), 0.0, GRAMMARS.compile(grammar))


def write(of: Sequence, logits_V: torch.Tensor, most: int = 99) -> str:
    """What is sampled, from the same logits each time, until the end."""
    for _ in range(most):
        (result,) = sample(logits_V[None], [of])
        assert result.error is None
        if result.token == END:
            break
        of.tokens.append(result.token)
        assert of.matcher is not None
        of.matcher.advance((result.token,))
    return TOKENIZER.decode(of.tokens[1:])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 1.0, 5.0]))
def test_whatever_the_model_says_the_answer_matches(seed: int, temperature: float) -> None:
    logits_V = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 5
    words = write(sequence(AGE, temperature=temperature), logits_V).split()
    assert words[:2] == ["I", "am"] and words[2].isdecimal() and words[3:] == ["years", "old"]


def test_masks_after_guesses_are_those_of_having_said_them() -> None:
    guesses = TOKENIZER.encode("I am 12", framed=False)
    matcher, other = GRAMMARS.compile(AGE), GRAMMARS.compile(AGE)
    masks = matcher.masks(guesses)
    for row, guess in zip(masks, guesses, strict=False):
        assert np.array_equal(row, other.masks()[0]) and row[guess]
        other.advance((guess,))
    assert np.array_equal(masks[-1], other.masks()[0])
    assert np.array_equal(matcher.masks()[0], masks[0]), "asking changes nothing"
    wrong = matcher.masks((guesses[0], guesses[0], guesses[1]))
    assert not wrong[2].any() and not wrong[3].any(), "nobody gets past a guess that is forbidden"


def test_only_the_end_may_follow_the_end_of_a_grammar() -> None:
    of = sequence('start: "a"', min_tokens=50)
    assert write(of, torch.zeros(VOCABULARY)) == "a", "the grammar wins over a minimum length"
    assert of.matcher is not None and of.matcher.masks()[0].nonzero()[0].tolist() == [END]


def test_a_grammar_touches_its_own_row_alone() -> None:
    logits_BV = torch.randn(3, VOCABULARY)
    plain = [Sequence(Request(str(i), (5,), ExpertBudget(()), Sampling(9, seed=i)), 0.0) for i in range(2)]
    rows = [plain[0], sequence(AGE), plain[1]]
    assert sample(logits_BV, rows)[0] == sample(logits_BV[:1], plain[:1])[0]
    assert sample(logits_BV, rows)[2] == sample(logits_BV[2:], plain[1:])[0]
    masked_BV, faults = constrained(logits_BV, logits_BV, rows, None)
    assert not faults and torch.equal(masked_BV[::2], logits_BV[::2]) and not torch.equal(masked_BV[1], logits_BV[1])


@pytest.mark.parametrize(
    "bad",
    [
        "start: nobody",
        "start: /(/",
        'start: %json {"type": "nonsense"}',
        "",
        "{}",
        'start: %json {"format": "x"}',
    ],
)
def test_a_bad_grammar_is_refused(bad: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        GRAMMARS.compile(bad)
    assert caught.value.code == "invalid_grammar" and "<state>" not in caught.value.message


EITHER = {"allOf": [{"anyOf": [{"required": [f"a{i}"]}, {"required": [f"b{i}"]}]} for i in range(30)]}
BOMBS = {
    "counts": "start: /(((a{1,1000}){1,1000}){1,1000}){1,1000}/",
    "alternatives": "start: /(.*a.{300}){20}/",
    "choices": "start: %json " + json.dumps(EITHER),
    "enum": "start: %json " + json.dumps({"enum": [f"value {i}" for i in range(4000)]}),
    "deep": "start: %json " + '{"items": ' * 60 + "{}" + "}" * 60,
    "ambiguous": "start: start start | /a*/ | start /[ab]*/",
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_bounded(name: str) -> None:
    """Refused or served, within seconds of a busy machine, and so is each step."""
    began = time.monotonic()
    try:
        matcher: Matcher | None = GRAMMARS.compile(BOMBS[name])
    except InvalidRequest:
        matcher = None
    for _ in range(30):
        if matcher is None or matcher.error:
            break
        allowed = np.flatnonzero(matcher.masks()[0])
        if matcher.error or not len(allowed) or allowed[-1] == END:
            break
        matcher.advance((int(allowed[-1]),))
    assert time.monotonic() - began < 30


def test_what_takes_too_long_is_refused_and_others_go_on() -> None:
    """Whether such a conjunction is empty takes the library hours, and no limit of its own stops it."""
    patterns = [{"type": "string", "pattern": f"a.{{{i}}}b"} for i in range(1, 40)]
    began = time.monotonic()
    for _ in range(2):
        with pytest.raises(InvalidRequest, match="not compiled within 1 s"):
            GRAMMARS.compile("start: %json " + json.dumps({"allOf": patterns}))
    GRAMMARS.compile('start: "cat" | "dog"')
    assert time.monotonic() - began < 30


def test_what_needs_too_much_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    judge = GrammarValidator(str(FOLDER), VOCABULARY, [END])
    assert judge.validate("start: /a/") == ""
    assert judge._process is not None
    judge._process.kill()
    with pytest.raises(ValidationTimeout):  # it has died, as it does beyond its bound of memory
        judge.validate("start: /a/")
    assert judge.validate("start: /a/") == ""


def test_what_only_took_too_long_is_tried_again_and_no_fault_gets_out(monkeypatch: pytest.MonkeyPatch) -> None:
    grammars = GrammarCompiler(str(FOLDER), VOCABULARY, (END,))
    faults: list[Exception] = [ValidationTimeout("busy"), ValueError("a bug")]
    asked: list[str] = []

    def validate(grammar: str) -> str:
        asked.append(grammar)
        if faults:
            raise faults.pop(0)
        return ""

    monkeypatch.setattr(grammars._validator, "validate", validate)
    monkeypatch.setattr("engine.grammars.compiler.RETRY_SECONDS", 0.1)
    for words in ("busy", "busy"):
        with pytest.raises(InvalidRequest, match=words):
            grammars.compile(AGE)
    assert len(asked) == 1, "for a while it is not tried again"
    time.sleep(0.15)
    with pytest.raises(InvalidRequest, match=r"failed \(ValueError\)"):
        grammars.compile(AGE)
    assert grammars.compile(AGE).masks().any()


def test_a_grammar_that_was_asked_for_of_late_is_copied_fresh() -> None:
    GRAMMARS.compile(AGE).advance(TOKENIZER.encode("I am 1", framed=False))
    fresh = GrammarCompiler(str(FOLDER), VOCABULARY, (END,)).compile(AGE)
    assert np.array_equal(GRAMMARS.compile(AGE).masks(), fresh.masks())
