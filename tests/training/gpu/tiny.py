"""Tiny networks of both twins' kinds, and a made-up teacher in llama2.c's layout."""

import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from training.gpu.network import Infinity, Network, Shape
from training.gpu.recipes import TWINS

WORDS = ["dog", "cat", "tree", "ran", "happy", "little", "jumped", "over", "house", "with", "blue", "story"]


def shape(name: str, **changes: object) -> Shape:
    """A twin's shape made tiny; its choices stay."""
    small = replace(TWINS[name][0], width=32, layers=2, heads=4, kv_heads=2, vocabulary=50, context=32, block=8)
    return replace(small, **changes)  # type: ignore[arg-type]


def network(of: Shape, seed: int = 1) -> Network:
    """A network whose draws have a spread of their own in every direction."""
    torch.manual_seed(seed)
    net = Network(of)
    for block in net.stack():
        if isinstance(block.ffn, Infinity):
            block.ffn.router.data[of.space :] = torch.randn(of.space, of.width) * 0.1
    return net


def write_llama2(path: Path, seed: int = 1, width: int = 16, layers: int = 2) -> str:
    """Write a random llama2.c checkpoint with its tokenizer, and return a text that uses all of its words."""
    pieces = [b"<unk>", b"<s>", b"</s>", *(b"<0x%02X>" % byte for byte in range(256))]
    pieces += [b" ", *(bytes([letter]) for letter in range(ord("a"), ord("z") + 1))]
    pieces += sorted({f" {word}"[:end].encode() for word in WORDS for end in range(2, len(word) + 2)})
    hidden, heads, context = 24, 2, 8
    sizes = [len(pieces) * width, layers * width, *[layers * width * width] * 4, layers * width]
    sizes += [*[layers * hidden * width] * 3, width, context * width // heads]
    generator = np.random.default_rng(seed)
    parts = [generator.normal(0, 0.3, size).astype("<f4") for size in sizes]
    parts[1] += 4  # norms that make attention choose
    blob = struct.pack("<7i", width, hidden, layers, heads, heads, len(pieces), context)
    blob += np.concatenate(parts).tobytes()
    blob += struct.pack("<i", max(map(len, pieces)))
    blob += b"".join(struct.pack("<fi", float(len(piece)), len(piece)) + piece for piece in pieces)
    path.write_bytes(blob)
    return " ".join(WORDS)
