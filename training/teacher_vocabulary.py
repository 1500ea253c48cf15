"""The tokens of the teacher model that `training/synthesise.py` samples from, and the part of them that stories use.

It reads the tokenizer's bytes from a file in llama2.c's format. It does not depend on weights.
"""

import itertools
import re
import struct

BOS = 1
SEPARATOR = "<|endoftext|>"


def read_tokens(blob: bytes, offset: int, count: int) -> tuple[list[bytes], list[float]]:
    """Each token's bytes, and its merge score."""
    offset, pieces, scores = offset + 4, [], []  # past the longest piece's length
    for _ in range(count):
        score, length = struct.unpack_from("<fi", blob, offset)
        piece = blob[offset + 8 : offset + 8 + length]
        if re.fullmatch(rb"<0x[0-9A-F]{2}>", piece):
            piece = bytes.fromhex(piece[3:5].decode())
        pieces.append(piece)
        scores.append(score)
        offset += 8 + length
    return pieces, scores


def encode_word(word: str, ids: dict[bytes, int], scores: list[float]) -> list[int]:
    """Merge the best-scored neighbouring pair until none is left; unknown characters fall back to bytes."""
    parts: list[bytes] = []
    for character in word:
        encoded = character.encode()
        parts += [encoded] if encoded in ids else [bytes([byte]) for byte in encoded]
    while True:
        pairs = _mergeable(parts, ids, scores)
        if not pairs:
            return [ids[part] for part in parts]
        at = -max(pairs)[1]
        parts[at] += parts.pop(at + 1)


def _mergeable(parts: list[bytes], ids: dict[bytes, int], scores: list[float]) -> list[tuple[float, int]]:
    """For each neighbouring pair that is a token: its score, and its place, negated so that the first wins a tie."""
    found = []
    for place, (first, second) in enumerate(itertools.pairwise(parts)):
        if (joined := first + second) in ids:
            found.append((scores[ids[joined]], -place))
    return found


def used_vocabulary(text: str, pieces: list[bytes], scores: list[float]) -> list[int]:
    """The ids that occur in the text, with BOS first; a story is encoded as if a space came before it."""
    ids = {piece: i for i, piece in reversed(list(enumerate(pieces)))}
    for i, piece in enumerate(pieces):
        if i > 258 and len(piece) == 1:  # text before raw bytes
            ids[piece] = i
    words: set[str] = set()
    for story in text.split(SEPARATOR):
        words.update(re.findall(r" +[^ ]*", " " + story.strip()))
    used = {i for word in words for i in encode_word(word, ids, scores)}
    return [BOS, *sorted(used - {BOS})]
