"""The least number of tokens of a text is never more than it has, whatever its tokenizer does to it."""

import json
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from tests.weights.pieces import KINDS, pieces
from tests.weights.words import TEXTS
from weights.special_tokens import MARK
from weights.token_count_bound import NO_BOUND, TokenCountBound, bound_of

ODD = "ΆK\u1112\u1161\u11ab\U0001d400\ufb03\u3000\u0301e" + MARK
texts = st.text(st.one_of(st.characters(exclude_categories=("Cs",)), st.sampled_from(ODD + "  \n\tab")), max_size=60)
NORMALIZERS = {
    "none": None,
    "NFC": normalizers.NFC(),
    "NFD": normalizers.NFD(),
    "NFKC": normalizers.NFKC(),
    "NFKD": normalizers.NFKD(),
    "lower": normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()]),
    "strip": normalizers.Sequence([normalizers.NFC(), normalizers.Strip()]),
    "longer": normalizers.Replace("a", "aa"),
}


def byte_level(name: str, added: AddedToken | None = None) -> Tokenizer:
    """A tokenizer over bytes, behind a normalizer."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(TEXTS, trainer)
    if NORMALIZERS[name] is not None:
        made.normalizer = NORMALIZERS[name]
    if added is not None:
        made.add_tokens([added])
    return made


def bounded(tokenizer: Tokenizer) -> TokenCountBound:
    return bound_of(json.loads(tokenizer.to_str()))


def holds(tokenizer: Tokenizer, text: str) -> bool:
    return bounded(tokenizer).least_tokens(text) <= len(tokenizer.encode(text, add_special_tokens=False))


@pytest.mark.parametrize("name", NORMALIZERS)
def test_over_bytes_behind_every_normalizer(name: str) -> None:
    tokenizer = byte_level(name)
    bound = bounded(tokenizer)
    assert bound.longest and bound.least_tokens("ab" * 1000) >= 2000 // bound.longest

    @settings(deadline=None, max_examples=150)
    @given(text=texts)
    def check(text: str) -> None:
        assert bound.least_tokens(text) <= len(tokenizer.encode(text, add_special_tokens=False))

    check()
    assert all(holds(tokenizer, text * 50) for text in (*ODD, ODD, "e\u0301", "\u1112\u1161\u11ab", "\U0001d400", " "))


@pytest.mark.parametrize("kind", KINDS)
def test_over_pieces_with_bytes_to_fall_back_on(kind: str) -> None:
    tokenizer = pieces(kind)
    assert bounded(tokenizer).longest
    assert all(holds(tokenizer, text * 50) for text in (*ODD, *TEXTS, " ", "<role>", "\u2581", "日本"))


def test_added_tokens_may_be_long_and_swallow_blanks() -> None:
    for strip in (False, True):
        tokenizer = byte_level("none", AddedToken("<a token of great length>", rstrip=strip, normalized=False))
        for text in ("<a token of great length>" * 20, ("<a token of great length>" + " " * 200 + "\u3000") * 9):
            assert holds(tokenizer, text)
        assert bounded(tokenizer).least_tokens("x" * 2500) == 100


@pytest.mark.parametrize("form", ["NFC", "NFD", "NFKC", "NFKD"])
def test_what_normal_forms_shorten(form: str) -> None:
    """Of every character, and of what composes to one."""
    tokenizer = byte_level(form)
    shrink = bounded(tokenizer).shrink
    for code in range(0x80, 0x30000):
        if 0xD800 <= code < 0xE000:
            continue
        character = chr(code)
        whole = len(unicodedata.normalize(form, character).encode())
        assert len(character.encode()) <= shrink * whole
        apart = len(unicodedata.normalize("NFD", character).encode())
        assert apart <= shrink * len(unicodedata.normalize(form, character).encode())


def test_nothing_is_known_where_text_is_lost() -> None:
    lossy = [
        {"normalizer": normalizers.StripAccents()},
        {"normalizer": normalizers.Replace("aa", "a")},
        {"normalizer": normalizers.BertNormalizer()},
        {"pre_tokenizer": pre_tokenizers.Split("x", "removed")},
        {"pre_tokenizer": pre_tokenizers.BertPreTokenizer()},
    ]
    for parts in lossy:
        tokenizer = byte_level("none")
        for name, part in parts.items():
            setattr(tokenizer, name, part)
        assert bounded(tokenizer).least_tokens("ab" * 1000) == 0
    words = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    assert bounded(words) == bounded(Tokenizer(models.BPE({"a": 0}, []))) == NO_BOUND


def test_it_is_known_at_once_for_the_bundled_model() -> None:
    data = json.loads(Path("weights/bundled/infinity-stories/tokenizer.json").read_text())
    bound = bound_of(data)
    assert bound.longest < 40 and bound.least_tokens("x " * 4_000_000) > 200_000
