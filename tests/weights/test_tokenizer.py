"""Text to ids and back: nothing a user types is special, and a stream shows what the whole would."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.errors import CheckpointError
from tests.weights.words import ASSISTANT, END, SPECIALS, USER, write_tokenizer
from weights.generation import read_eos_ids
from weights.small_files import small_files
from weights.special_tokens import escape_specials
from weights.tokenizer import Tokenizer

texts = st.text(st.characters(exclude_categories=("Cs", "Cn")), max_size=40)
awkward = st.lists(st.one_of(texts, st.sampled_from([*SPECIALS, "<|", "|>", "<|user", "assistant|>", "<<|user|>"])))
typed = awkward.map("".join)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def test_a_prompt_begins_as_every_training_document_does(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("Once upon a time")
    assert ids[0] == 0 and tokenizer.eos_ids == (0,)
    assert tokenizer.decode(ids) == "Once upon a time"
    assert set(tokenizer.specials) == set(SPECIALS)
    assert max(ids) < tokenizer.vocabulary


@settings(deadline=None, max_examples=60)
@given(text=typed)
def test_specials_that_a_user_types_in_a_prompt_are_plain(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert ids[0] == 0 and not set(ids[1:]) & {0, 1, 2}
    assert tokenizer.decode(ids) == text


@settings(deadline=None, max_examples=60)
@given(text=typed)
def test_specials_that_a_user_types_in_a_chat_are_plain(tokenizer: Tokenizer, text: str) -> None:
    rendered = END + USER + escape_specials(text, tokenizer.specials) + ASSISTANT
    ids = tokenizer.encode_chat(rendered)
    assert [id for id in ids if id in (0, 1, 2)] == [0, 1, 2]
    assert ids[:2] == [0, 1] and ids[-1] == 2
    assert tokenizer.decode(ids) == text


def test_a_template_without_marks_is_encoded_as_it_is(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode_chat(f"{END}{USER}The dog{ASSISTANT}")[2:-1] == tokenizer.encode("The dog")[1:]


def streamed(tokenizer: Tokenizer, ids: list[int]) -> str:
    stream = tokenizer.stream()
    return "".join(stream.push(id) for id in ids) + stream.flush()


@settings(deadline=None, max_examples=100)
@given(text=st.one_of(texts, st.text("é日😀\ufffd\u200d👩 a", max_size=30)))
def test_a_stream_of_text_is_the_text(tokenizer: Tokenizer, text: str) -> None:
    assert streamed(tokenizer, tokenizer.encode(text)) == text


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_a_stream_of_any_ids_is_what_they_decode_to(tokenizer: Tokenizer, data: st.DataObject) -> None:
    """A model may write halves of characters in any order."""
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocabulary - 1), max_size=40))
    assert streamed(tokenizer, ids) == tokenizer.decode(ids)


def test_a_character_comes_out_once_all_its_bytes_are_there(tokenizer: Tokenizer) -> None:
    stream = tokenizer.stream()
    pieces = [stream.push(id) for id in tokenizer.encode("x🦊y")[1:]]
    assert "".join(pieces) == "x🦊y"
    assert all("\ufffd" not in piece for piece in pieces) and "" in pieces


def test_half_a_character_at_the_end_is_flushed(tokenizer: Tokenizer) -> None:
    stream = tokenizer.stream()
    ids = tokenizer.encode("x🦊")[1:-1]
    assert "".join(stream.push(id) for id in ids) == "x"
    assert stream.flush() == tokenizer.decode(ids)[1:] != ""
    assert stream.flush() == ""


@settings(deadline=None, max_examples=60)
@given(text=texts)
def test_the_bytes_of_tokens_are_the_bytes_of_the_text(tokenizer: Tokenizer, text: str) -> None:
    assert b"".join(tokenizer.token_bytes(id) for id in tokenizer.encode(text)[1:]) == text.encode()


def test_bytes_of_special_and_unused_ids(tokenizer: Tokenizer) -> None:
    assert tokenizer.token_bytes(1) == USER.encode()
    assert tokenizer.token_bytes(tokenizer.vocabulary + 5) == b""


def test_end_ids_of_all_files_end_a_generation(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, eos_token={"content": USER})
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 0]}))
    assert Tokenizer.load(tmp_path).eos_ids == (5, 0, 1)
    assert Tokenizer.load(tmp_path, generation_config=False).eos_ids == (0, 1)


def test_end_ids(tmp_path: Path) -> None:
    assert read_eos_ids(small_files(tmp_path)) == ()
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 3}))
    assert read_eos_ids(small_files(tmp_path)) == (3,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [4, 5]}))
    assert read_eos_ids(small_files(tmp_path)) == (4, 5)
    assert read_eos_ids(small_files(tmp_path), generation_config=False) == (3,)


@pytest.mark.parametrize("text", [None, "", "{", "{}", "[1]"])
def test_a_damaged_tokenizer_is_one_clear_error(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("config", ["{", "[1]", '{"eos_token_id": "x"}', '{"eos_token_id": [true]}'])
def test_damaged_end_ids_are_one_clear_error(config: str, tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "generation_config.json").write_text(config)
    with pytest.raises(CheckpointError):
        Tokenizer.load(tmp_path)
