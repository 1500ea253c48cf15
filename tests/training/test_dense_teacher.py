"""The dense teacher: its tokens, its tokenizer, and that the decoder computes what the checkpoint says."""

from pathlib import Path

import pytest
import torch

from model.backends.torch.attend import WholeAttend
from tests.training.gpu.tiny import WORDS, reference_logits, write_llama2
from training.corpus import END
from training.dense_teacher import BYTES, kept_tokens, read_teacher
from training.step import make_batch
from training.synthesise import read_tensors
from training.teacher_vocabulary import BOS, encode_word, read_tokens

TEXT = " ".join(WORDS[:6])
Tokens = tuple[list[bytes], list[float]]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_llama2(tmp_path / "llama2.data")
    return tmp_path / "llama2.data"


@pytest.fixture
def tokens(path: Path) -> Tokens:
    blob = path.read_bytes()
    shape, _, offset = read_tensors(blob)
    return read_tokens(blob, offset, shape.vocabulary)


def test_every_kept_token_is_merged_from_kept_tokens(tokens: Tokens) -> None:
    pieces, scores = tokens
    kept = kept_tokens(TEXT, pieces, scores)
    assert kept[0] == BOS and kept[1:] == sorted({*kept[1:]}) and {*BYTES} <= {*kept}
    texts = {pieces[i] for i in kept if i not in BYTES and i != BOS}
    assert {f" {word}".encode() for word in TEXT.split()} <= texts
    assert b" house" not in texts
    for piece in texts:
        cuts = range(1, len(piece))
        assert len(piece) == 1 or any({piece[:cut], piece[cut:]} <= texts for cut in cuts), piece


def test_texts_are_encoded_as_by_the_teacher(path: Path, tokens: Tokens) -> None:
    pieces, scores = tokens
    ids = {piece: i for i, piece in enumerate(pieces) if i not in BYTES}
    kept = kept_tokens(TEXT, pieces, scores)
    _, _, tokenizer = read_teacher(path, TEXT)
    for text in (TEXT, "cat", "dog ran happy"):
        encoded = tokenizer.encode(text).ids
        words = [f" {word}" for word in text.split()]
        assert [kept[i] for i in encoded] == [BOS, *(i for word in words for i in encode_word(word, ids, scores))]
        assert tokenizer.decode(encoded) == text


def test_any_text_can_be_encoded(path: Path) -> None:
    _, raw, tokenizer = read_teacher(path, TEXT)
    text = "dog\n“Zwölf” 犬"
    encoded = tokenizer.encode(text).ids
    assert tokenizer.decode(encoded) == text and max(encoded) < raw["vocab_size"] == tokenizer.get_vocab_size()
    assert tokenizer.token_to_id(END) == 0


def test_the_decoder_computes_what_the_checkpoint_says(path: Path, tokens: Tokens) -> None:
    model, _, _ = read_teacher(path, TEXT)
    kept = kept_tokens(TEXT, *tokens)
    ids = [0, 3, 260, 1, 7, 265]
    expected = reference_logits(path, kept, ids)
    found = model(make_batch(torch.tensor([ids]), [], 0), WholeAttend(len(ids)))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
