"""Tokenizers with SentencePiece's habits: streams, broken bytes, typed token strings, and what the config adds."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.weights.pieces import BLANK, KINDS, ROLE, SPECIALS, THINK, pieces, write_pieces
from weights.special_tokens import escape_specials
from weights.tokenizer import Tokenizer

WORDS = (
    "Once",
    " dog",
    "  ",
    " ",
    "\n",
    BLANK,
    "é",
    "日本",
    "😀",
    "\u200d",
    "\ufffd",
    "<0x41>",
    *SPECIALS,
    ROLE,
    THINK,
)
texts = st.lists(st.sampled_from(WORDS) | st.text(st.characters(exclude_categories=("Cs", "Cn")), max_size=4)).map(
    "".join
)


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(write_pieces(tmp_path_factory.mktemp(request.param), request.param))


def streamed(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    stream = tokenizer.stream()
    return [*map(stream.push, ids), stream.flush()]


@settings(deadline=None, max_examples=150)
@given(text=texts)
def test_a_stream_is_what_the_library_decodes(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    shown = streamed(tokenizer, ids)
    assert "".join(shown) == tokenizer.decode(ids)
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in shown)


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_any_ids_make_a_stream(tokenizer: Tokenizer, data: st.DataObject) -> None:
    """Where a byte is broken the library gives up the whole run of bytes around it, and its own stream fails."""
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocabulary + 3), max_size=30))
    shown, whole = "".join(streamed(tokenizer, ids)), tokenizer.decode(ids)
    assert shown == whole or ("\ufffd" in shown and "\ufffd" in whole)


@pytest.mark.parametrize("kind", ["prepend", "replace"])
@pytest.mark.parametrize("text", ["", " ", "  a  b ", "\n", "x</s> y", "é日😀\ufffd", "Once upon <s><s>"])
def test_a_round_trip_keeps_the_text(kind: str, text: str, tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(write_pieces(tmp_path, kind))
    assert "".join(streamed(tokenizer, tokenizer.encode(text))) == text


def test_a_text_that_goes_on_keeps_its_first_space(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(write_pieces(tmp_path, "prepend"))
    ids = tokenizer.encode("a b")
    begun = tokenizer.stream(continues=True)
    assert "".join(begun.push(id) for id in ids) + begun.flush() == " a b"


def test_a_broken_byte_leaves_its_neighbours_alone(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(write_pieces(tmp_path, "prepend"))
    ids = [3 + byte for byte in b"A\xffB\xf0\x9f\x98\x80"]
    assert streamed(tokenizer, ids) == ["A", "\ufffd", "B", "", "", "", "😀", ""]


@pytest.mark.timeout(20)
def test_bytes_that_never_become_text_cost_no_more_than_others(tmp_path: Path) -> None:
    """A stream that decoded all it held again with each id would need minutes."""
    tokenizer = Tokenizer.load(write_pieces(tmp_path, "replace"))
    assert "".join(streamed(tokenizer, [3 + 0x80] * 50_000)) == "\ufffd" * 50_000


@settings(deadline=None, max_examples=80)
@given(text=texts)
def test_typed_tokens_are_encoded_as_one_plain_text(tokenizer: Tokenizer, text: str) -> None:
    """Just as if the tokenizer had none of them: nothing is cut, no blank is added."""
    tokens = (*tokenizer.specials, ROLE, THINK)
    bare = json.loads(tokenizer._backend.to_str())
    bare["added_tokens"] = [token for token in bare["added_tokens"] if token["content"] == "<unk>"]
    wanted = tokenizer._backend.from_str(json.dumps(bare))
    wanted.encode_special_tokens = True
    assert tokenizer.encode_chat(escape_specials(text, tokens)) == wanted.encode(text, add_special_tokens=False).ids


def test_overlapping_tokens_are_all_broken() -> None:
    assert escape_specials("abcab", ("ab", "bc")) == "a\ufdd0b\ufdd0ca\ufdd0b"
    assert escape_specials("abc", ()) == escape_specials("abc", ("", "x")) == "abc"


@pytest.mark.parametrize(
    ("config", "before", "after"),
    [
        ({}, [], []),
        ({"add_bos_token": True}, [1], []),
        ({"add_bos_token": True, "add_eos_token": True}, [1], [2]),
        ({"add_bos_token": True, "bos_token": {"content": "</s>"}}, [2], []),
        ({"add_bos_token": True, "bos_token": None}, [], []),
        ({"add_bos_token": True, "bos_token": "<unknown>"}, [], []),
    ],
)
def test_the_config_frames_a_prompt(
    config: dict[str, Any], before: list[int], after: list[int], tmp_path: Path
) -> None:
    bare = pieces("prepend").encode("A dog", add_special_tokens=False).ids
    tokenizer = Tokenizer.load(write_pieces(tmp_path, "prepend", **config))
    assert tokenizer.encode("A dog") == [*before, *bare, *after]
    assert tokenizer.encode_chat("A dog") == bare
    typed = tokenizer.encode("A </s> dog")
    assert typed[: len(before)] == before and typed.count(2) == (before + after).count(2)


def test_cutting_and_padding_left_in_the_file_do_nothing(tmp_path: Path) -> None:
    made = pieces("prepend")
    made.enable_truncation(3)
    made.enable_padding(length=50)
    write_pieces(tmp_path, "prepend")
    made.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.load(tmp_path).encode("Once upon a time") == pieces("prepend").encode("Once upon a time").ids
