"""The text that a calibration scores: files, or what the model writes itself, as windows of token ids in two parts.

A quarter of each text is for decisions, the rest for reports. It runs no model: see `calibration/sampled.py`.
"""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from calibration.scoring import Windows
from model.errors import CheckpointError
from weights.folder import read_text
from weights.tokenizer import Tokenizer

MAX_BYTES = 256 << 20  # of one file
SEPARATOR = "<|endoftext|>"  # between the documents of a file, as is the checkpoint's own end of text
DECIDING = 4  # one window in so many, the first of each text


def read_texts(paths: Sequence[Path], tokenizer: Tokenizer, length: int, tokens: int) -> list[list[tuple[int, ...]]]:
    """The windows of each file, together about so many tokens: the first of each, as many as its share.

    Raises:
        CheckpointError: a file cannot be read, or has no two windows.
    """
    share = tokens // len(paths)
    return [_windows(path, tokenizer, length, share) for path in paths]


def split(texts: Sequence[Sequence[tuple[int, ...]]]) -> tuple[Windows, Windows]:
    """The windows to decide by, and those to report on."""
    decide: list[tuple[int, ...]] = []
    report: list[tuple[int, ...]] = []
    for windows in texts:
        first = max(1, len(windows) // DECIDING)
        decide += windows[:first]
        report += windows[first:]
    return Windows("decisions", tuple(decide)), Windows("report", tuple(report))


def hash_of(paths: Sequence[Path]) -> str:
    """SHA-256 of the contents of files."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _windows(path: Path, tokenizer: Tokenizer, length: int, tokens: int) -> list[tuple[int, ...]]:
    try:
        text = read_text(path, MAX_BYTES)
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"--text {path} cannot be read: {error}") from None
    ids: list[int] = []
    for document in documents(text, tokenizer):
        ids += tokenizer.encode(document)
        if len(ids) > max(tokens, 2 * length):
            break
    rows = max(2, tokens // length)
    windows = [tuple(ids[start : start + length + 1]) for start in range(0, len(ids) - length, length)]
    if len(windows) < 2:
        raise CheckpointError(f"--text {path} has {len(ids)} tokens; at least {2 * length + 1} are needed")
    return windows[:rows]


def documents(text: str, tokenizer: Tokenizer) -> Iterator[str]:
    """The documents of a file, stripped, without empty ones."""
    separator = tokenizer.named.get("eos_token", SEPARATOR)
    for document in text.split(separator if separator in text else SEPARATOR):
        if stripped := document.strip():
            yield stripped
