"""Tiny networks of both twins' kinds, and a made-up teacher in llama2.c's layout."""

import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from training.gpu.network import Infinity, Network, Shape
from training.gpu.recipes import TWINS
from training.synthesise import read_tensors

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


def reference_logits(path: Path, kept: list[int], ids: list[int]) -> torch.Tensor:
    """llama2.c's forward pass in float32: rotary pairs are neighbours, and norms have weights."""
    shape, t, _ = read_tensors(path.read_bytes())
    length, pair = len(ids), torch.arange(0, shape.head_width, 2)
    angle_S1C = torch.arange(length)[:, None, None] * 10000.0 ** -(pair / shape.head_width)
    turn_S1C = torch.polar(torch.ones_like(angle_S1C), angle_S1C)

    def heads(x_SD: torch.Tensor, turned: bool) -> torch.Tensor:
        x_SHC = x_SD.view(length, shape.heads, shape.head_width)
        if turned:
            pairs = torch.view_as_complex(x_SHC.unflatten(-1, (-1, 2)).contiguous())
            x_SHC = torch.view_as_real(pairs * turn_S1C).flatten(2)
        return x_SHC.transpose(0, 1)

    x_SD = t["embedding"][kept][ids]
    for layer in range(shape.layers):
        y_SD = F.rms_norm(x_SD, (shape.width,), t["attention_norm"][layer], 1e-5)
        q, k, v = (heads(y_SD @ t[name][layer].T, name != "wv") for name in ("wq", "wk", "wv"))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x_SD = x_SD + mixed.transpose(0, 1).flatten(1) @ t["wo"][layer].T
        y_SD = F.rms_norm(x_SD, (shape.width,), t["ffn_norm"][layer], 1e-5)
        x_SD = x_SD + (F.silu(y_SD @ t["w1"][layer].T) * (y_SD @ t["w3"][layer].T)) @ t["w2"][layer].T
    return F.rms_norm(x_SD, (shape.width,), t["final_norm"], 1e-5) @ t["embedding"][kept].T
