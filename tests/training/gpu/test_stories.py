"""The teacher cut to a vocabulary, sampled, its streams cut into stories and encoded."""

from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tests.training.gpu.tiny import WORDS, reference_logits, write_llama2
from training.corpus import ASSISTANT, END, train_tokenizer
from training.gpu import stories
from training.gpu.stories import Teacher, attend, collect, cut_teacher, sample, stories_of, tokenise
from training.synthesise import WINDOW, read_tensors

CPU = torch.device("cpu")


def teacher(folder: Path, rows: int) -> Teacher:
    text = write_llama2(folder / "llama2.data")
    cut_teacher(folder / "llama2.data", text, folder / "teacher.safetensors")
    return Teacher(folder / "teacher.safetensors", rows, CPU)


def test_cutting_keeps_the_tokens_that_the_text_uses(tmp_path: Path) -> None:
    made = teacher(tmp_path, 1)
    assert made.pieces[0] == b"<s>"
    assert sorted(made.pieces[1:]) == sorted(f" {word}".encode() for word in WORDS)
    assert len(made.tensors["embed"]) == len(made.tensors["head"]) == 13
    assert all(value.dtype == torch.bfloat16 for value in made.tensors.values())


def test_the_teacher_computes_what_its_checkpoint_says(tmp_path: Path) -> None:
    made = teacher(tmp_path, 2)
    with torch.inference_mode():
        found = torch.stack([made.step(torch.tensor([token, 0]))[0] for token in (0, 3, 5, 1, 7, 7)])
    shape, tensors, _ = read_tensors((tmp_path / "llama2.data").read_bytes())
    embedding = tensors["embedding"].bfloat16()
    kept = [(embedding == row).all(1).nonzero().item() for row in made.tensors["embed"]]
    expected = reference_logits(tmp_path / "llama2.data", kept, [0, 3, 5, 1, 7, 7])
    assert shape.layers == 2
    torch.testing.assert_close(found.float(), expected, atol=0.08, rtol=0)  # in bfloat16


def test_a_row_attends_to_the_last_positions_only() -> None:
    generator = torch.Generator().manual_seed(1)
    q_BHC = torch.randn(2, 3, 4, generator=generator)
    k_BHWC, v_BHWC = torch.randn(2, 2, 3, WINDOW, 4, generator=generator)
    expected = F.scaled_dot_product_attention(q_BHC[:, :, None], k_BHWC[:, :, :6], v_BHWC[:, :, :6])[:, :, 0]
    torch.testing.assert_close(attend(q_BHC, k_BHWC, v_BHWC, 5), expected)


def test_sampling_stops_at_so_many_tokens_and_repeats_with_the_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stories, "BLOCK", 16)
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(list(sample(teacher(tmp_path, 4), (0.9, 1.0), 600, 100)))
    assert [block.shape for block in runs[0]] == [(4, 16)] * 2
    assert all(np.array_equal(one, other) for one, other in zip(runs[0], runs[1], strict=True))
    assert not np.array_equal(runs[0][0], runs[2][0])
    assert runs[0][0].max() < 13


def test_temperatures_alternate_from_row_to_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stories, "BLOCK", 16)
    torch.manual_seed(1)
    ids_BS = next(sample(teacher(tmp_path, 4), (1e-4, 5.0), 600, 1))
    assert np.array_equal(ids_BS[0], ids_BS[2])  # no chance is left
    assert not np.array_equal(ids_BS[1], ids_BS[3])
    with pytest.raises(ValueError, match="3 rows cannot be shared evenly by 2 temperatures"):
        next(sample(teacher(tmp_path, 3), (0.9, 1.0), 600, 1))


def stream(*texts: str) -> tuple[np.ndarray, list[bytes]]:
    """Ids of letters, each text ended by id 0."""
    pieces = [b"<s>", *sorted({letter.encode() for text in texts for letter in text})]
    ids = [pieces.index(letter.encode()) if letter else 0 for text in texts for letter in [*text, ""]]
    return np.array(ids, dtype=np.int16), pieces


def test_streams_are_cut_into_acceptable_stories() -> None:
    good, other = "a dog ran. " * 20, "the cat sat. " * 20
    row, pieces = stream(f" {good}", "too short", other, f"{good}{END}", f"{good}\t")
    assert stories_of(row, pieces) == [good.strip(), other.strip(), good.strip()]  # a tab at the end is stripped
    assert stories_of(row[:-1], pieces) == [good.strip(), other.strip()]  # the last has no end
    assert stories_of(*stream(f"{good}\x07x", "x" * 4001)) == []


def test_encoding_keeps_each_story_once_and_wraps_some_as_chats(tmp_path: Path) -> None:
    texts = [f"{word} and the {other} dog ran home. " * 8 for word in WORDS for other in WORDS]
    row, pieces = stream(*texts, texts[0])
    tokenizer = train_tokenizer(texts, 400)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with ThreadPool(1) as pool:  # instead of `workers`: tests fork no processes
        started = tokenise(pool, row[None], pieces, tmp_path / "tokenizer.json", seed=1)
        tokens, characters, count = collect(started)
    assert count == len(texts) == 144 and characters == sum(len(text.strip()) for text in texts)
    assert (tokens == 0).sum() == count and tokens[0] == 0  # each begins with the end of text
    decoded = tokenizer.decode(tokens.tolist(), skip_special_tokens=False)
    documents = decoded.split(END)[1:]
    assert [document.rpartition(ASSISTANT)[2] for document in documents] == [text.strip() for text in texts]
    assert 15 < decoded.count(ASSISTANT) < 45


def test_rows_without_a_story_give_no_tokens(tmp_path: Path) -> None:
    train_tokenizer(["a dog"], 300).save(str(tmp_path / "tokenizer.json"))
    with ThreadPool(1) as pool:
        started = tokenise(pool, np.ones((2, 50), np.int16), [b"<s>", b"a"], tmp_path / "tokenizer.json", seed=1)
        tokens, characters, count = collect(started)
    assert (len(tokens), characters, count) == (0, 0, 0)
