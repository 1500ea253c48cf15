"""The tokens of the teacher model that `training/synthesise.py` samples from, and the part of them that stories use.

It reads the tokenizer's bytes from a file in llama2.c's format. It knows no weights.
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
        pieces.append(bytes.fromhex(piece[3:5].decode()) if re.fullmatch(rb"<0x[0-9A-F]{2}>", piece) else piece)
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
        pairs = [(scores[ids[a + b]], -i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in ids]
        if not pairs:
            return [ids[part] for part in parts]
        at = -max(pairs)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


def used_vocabulary(text: str, pieces: list[bytes], scores: list[float]) -> list[int]:
    """The ids that occur in the text, with BOS first; a story is encoded as if a space came before it."""
    ids = {piece: i for i, piece in reversed(list(enumerate(pieces)))}
    ids |= {piece: i for i, piece in enumerate(pieces) if i > 258 and len(piece) == 1}  # text before raw bytes
    words = {w for story in text.split(SEPARATOR) for w in re.findall(r" +[^ ]*", " " + story.strip())}
    return [BOS, *sorted({i for word in words for i in encode_word(word, ids, scores)} - {BOS})]
