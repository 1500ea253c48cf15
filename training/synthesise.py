"""Samples children's stories from a small Llama-layout model, many rows in lockstep, into one plain text file.

Everything from the weight file to the finished stories lives here, tuned for a CPU; one without bfloat16 arithmetic
wants `--dtype float32`, which is eight times as fast there. Keys and values are bfloat16 in either case.
It does not know who trains on the stories, with which tokenizer, or how they are split.
"""

import argparse
import itertools
import lzma
import math
import multiprocessing
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from training.teacher_vocabulary import SEPARATOR, read_tokens, used_vocabulary

CHECKPOINT_NAME = "llama2.data"
WINDOW = 192  # positions attended to; on real stories as good as rebuilding a 256 context from its last 128
BLOCK = 32  # consecutive positions of a key channel stored together: one cache line
NOISE_ENTRIES = 1 << 25
STORY_CHARACTERS = range(200, 4001)


KeysValues = list[tuple[Tensor, Tensor]]  # by layer
Stories: TypeAlias = "multiprocessing.Queue[tuple[int, list[str]]]"  # which cannot be subscripted when it runs


@dataclass(frozen=True)
class ModelShape:
    width: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    context: int

    @property
    def head_width(self) -> int:
        return self.width // self.heads


@dataclass(frozen=True)
class SamplingOptions:
    model: Path
    vocabulary_text: Path
    rows: int
    temperature: float
    seed: int
    dtype: torch.dtype


def read_tensors(blob: bytes) -> tuple[ModelShape, dict[str, Tensor], int]:
    """The float32 tensors in file order, and the offset at which the tokeniser begins."""
    shape = ModelShape(*struct.unpack_from("<7i", blob))
    if shape.vocabulary <= 0 or shape.kv_heads != shape.heads:
        raise ValueError("only checkpoints with a shared classifier and one key head per query head are read")
    L, D, H = shape.layers, shape.width, shape.hidden
    square = (L, D, D)
    wide, narrow = (L, H, D), (L, D, H)
    sizes: dict[str, tuple[int, ...]] = {"embedding": (shape.vocabulary, D)}
    sizes |= {"attention_norm": (L, D), "wq": square, "wk": square, "wv": square, "wo": square}
    sizes |= {"ffn_norm": (L, D), "w1": wide, "w2": narrow, "w3": wide, "final_norm": (D,)}
    offset, tensors = struct.calcsize("<7i"), {}
    for name, size in sizes.items():
        values = np.frombuffer(blob, "<f4", math.prod(size), offset)
        tensors[name] = torch.from_numpy(values.reshape(size).copy())
        offset += tensors[name].nbytes
    return shape, tensors, offset + shape.context * shape.head_width * 4  # rotary tables, not needed


def halves_first(weight_LDD: Tensor, shape: ModelShape) -> Tensor:
    """Reorders each head's rows so that rotary pairs (2i, 2i+1) lie half a head apart, where vectors can reach them."""
    rows = weight_LDD.view(shape.layers, shape.heads, shape.head_width // 2, 2, shape.width)
    return rows.transpose(2, 3).reshape(weight_LDD.shape)


def held(weight_LXX: Tensor, dtype: torch.dtype) -> nn.ParameterList:
    """Per-layer weights become separate parameters, so that the compiler may pack each for its own product."""
    return nn.ParameterList(nn.Parameter(w.to(dtype).contiguous(), requires_grad=False) for w in weight_LXX)


def rotate(x_BHC: Tensor, cos_C: Tensor, sin_C: Tensor) -> Tensor:
    even, odd = x_BHC.float().chunk(2, -1)
    turned_even = even * cos_C - odd * sin_C
    turned_odd = odd * cos_C + even * sin_C
    return torch.cat([turned_even, turned_odd], -1)


def normalise(x_BD: Tensor, dtype: torch.dtype) -> Tensor:
    """RMS norm without its gain, which the following weight has absorbed."""
    return (x_BD * torch.rsqrt(x_BD.square().mean(-1, keepdim=True) + 1e-5)).to(dtype)


def attend(q_BHC: Tensor, k_BHC: Tensor, v_BHC: Tensor, mask_T: Tensor, past: tuple[Tensor, Tensor]) -> Tensor:
    """Attention to the past and to the token itself, as sums that fuse: one query per head is bound by memory."""
    keys_BHNCS, values_BHCT = past
    products_BHNCS = keys_BHNCS.float() * q_BHC[:, :, None, :, None]
    past_BHT = products_BHNCS.sum(3).flatten(2) + mask_T
    itself_BH1 = (q_BHC * k_BHC.float()).sum(-1, keepdim=True)
    weights = torch.cat([past_BHT, itself_BH1], -1).softmax(-1)
    mixed_BHC = (weights[:, :, None, :-1] * values_BHCT.float()).sum(3)
    return mixed_BHC + weights[..., -1:] * v_BHC.float()


class Teacher(nn.Module):
    """The network over the cut vocabulary; `kept_V` maps its ids to the checkpoint's."""

    def __init__(self, shape: ModelShape, t: dict[str, Tensor], kept_V: list[int], dtype: torch.dtype) -> None:
        super().__init__()
        self.shape, self.dtype = shape, dtype
        wq_LDD = halves_first(t["wq"], shape) * shape.head_width**-0.5
        qkv_LXD = torch.cat([wq_LDD, halves_first(t["wk"], shape), t["wv"]], 1)
        gate_up_LXD = torch.cat([t["w1"], t["w3"]], 1)
        self.qkv = held(qkv_LXD * t["attention_norm"][:, None], dtype)
        self.out = held(t["wo"], dtype)
        self.gate_up = held(gate_up_LXD * t["ffn_norm"][:, None], dtype)
        self.down = held(t["w2"], dtype)
        embedding_VD = t["embedding"][kept_V]
        self.ends = held(torch.stack([embedding_VD, embedding_VD * t["final_norm"]]), dtype)

    def feed_forward(self, x_BD: Tensor, layer: int) -> Tensor:
        gate_up = F.linear(normalise(x_BD, self.dtype), self.gate_up[layer]).float()
        gate, up = gate_up.chunk(2, -1)
        mixed = (F.silu(gate) * up).to(self.dtype)
        return x_BD + F.linear(mixed, self.down[layer])

    def forward(self, ids_B: Tensor, turn_2C: Tensor, mask_T: Tensor, past: KeysValues) -> tuple[Tensor, KeysValues]:
        """Logits, and each layer's key and value. The caller stores them: the compiled code must not copy the past."""
        x_BD, fresh = F.embedding(ids_B, self.ends[0]).float(), []
        for layer in range(self.shape.layers):
            qkv = F.linear(normalise(x_BD, self.dtype), self.qkv[layer])
            parts = qkv.view(len(ids_B), 3, self.shape.heads, -1)
            q_BHC, k_BHC, v_BHC = parts.unbind(1)
            q_BHC, k_BHC = rotate(q_BHC, *turn_2C), rotate(k_BHC, *turn_2C).bfloat16()
            mixed_BHC = attend(q_BHC, k_BHC, v_BHC, mask_T, past[layer])
            attended_BD = F.linear(mixed_BHC.flatten(1).to(self.dtype), self.out[layer])
            x_BD = self.feed_forward(x_BD + attended_BD, layer)
            fresh.append((k_BHC, v_BHC))
        return F.linear(normalise(x_BD, self.dtype), self.ends[1]), fresh


class Sampler:
    """Rows of endless text: each goes on with its next story when one ends, all at the same position."""

    def __init__(self, model: Teacher, sampling: SamplingOptions) -> None:
        self.shape, self.rows = model.shape, sampling.rows
        self.generator = torch.Generator().manual_seed(sampling.seed)
        # Scaling the noise instead of the logits saves a pass; a table saves two logarithms per candidate.
        uniform = torch.rand(NOISE_ENTRIES, generator=self.generator).clamp_(1e-12, 1 - 6e-8)
        self.noise = uniform.log_().neg_().log_().mul_(-sampling.temperature)
        # A layer's last keys and values, in N blocks or whole, so that the sum over each reads memory in order.
        rows_and_heads, C = (self.rows, self.shape.heads), self.shape.head_width
        keys = (*rows_and_heads, WINDOW // BLOCK, C, BLOCK)
        values = (*rows_and_heads, C, WINDOW)
        zeros = partial(torch.zeros, dtype=torch.bfloat16)
        self.past = [(zeros(keys), zeros(values)) for _ in model.qkv]
        self.compiled = torch.compile(model, dynamic=False, options={"freezing": True})

    def turn(self, at: int) -> Tensor:
        """The rotation of a position, which grows without end: only differences of positions matter."""
        pair_C = torch.arange(0, self.shape.head_width, 2, dtype=torch.float64)
        angle_C = at * 10000.0 ** -(pair_C / self.shape.head_width)
        return torch.stack([angle_C.cos(), angle_C.sin()]).float()

    def pick(self, logits_BV: Tensor) -> Tensor:
        span = logits_BV.numel()
        start = int(torch.randint(NOISE_ENTRIES - span, (), generator=self.generator))
        noise_BV = self.noise[start : start + span].view_as(logits_BV)
        return (logits_BV + noise_BV).argmax(-1)

    def step(self, ids_B: Tensor, at: int) -> Tensor:
        mask_T = torch.where(torch.arange(WINDOW) < at, 0.0, -torch.inf)
        logits_BV, fresh = self.compiled(ids_B, self.turn(at), mask_T, self.past)
        slot = at % WINDOW
        for (keys_BHNCS, values_BHCT), (k_BHC, v_BHC) in zip(self.past, fresh, strict=True):
            keys_BHNCS[:, :, slot // BLOCK, :, slot % BLOCK] = k_BHC
            values_BHCT[..., slot] = v_BHC
        return self.pick(logits_BV)

    def blocks(self) -> Iterator[Tensor]:
        """Newly sampled ids as [rows, positions], forever; the first is preceded by BOS in every row."""
        ids_B = torch.zeros(self.rows, dtype=torch.long)  # BOS is id 0 of the cut vocabulary
        for start in itertools.count(step=BLOCK):
            block = []
            for at in range(start, start + BLOCK):
                ids_B = self.step(ids_B, at)
                block.append(ids_B)
            yield torch.stack(block, 1)


def cut(blocks: Iterator[Tensor], pieces_V: list[bytes], rows: int) -> Iterator[tuple[int, list[str]]]:
    """Cuts each row's stream at BOS, block by block: how many tokens were sampled, and which stories they ended."""
    unfinished = [b""] * rows
    for block_BT in blocks:
        ended = []
        for row, ids in enumerate(block_BT.tolist()):
            stream = unfinished[row] + b"".join([pieces_V[i] for i in ids])
            *complete, unfinished[row] = stream.split(pieces_V[0])
            ended += [story.decode(errors="replace").strip() for story in complete]
        yield block_BT.numel(), ended


class StoryFile:
    """The output file. It keeps each acceptable story once and counts those that it already holds."""

    def __init__(self, out: Path) -> None:
        before = out.read_text(encoding="utf-8") if out.exists() else ""
        self.seen = set(map(hash, before.split(f"\n{SEPARATOR}\n")[:-1]))
        self.file = out.open("ab")
        self.size, self.rejected = self.file.tell(), 0

    def accepts(self, story: str) -> bool:
        if not story.replace("\n", "").isprintable() or "\N{REPLACEMENT CHARACTER}" in story:
            return False
        return SEPARATOR not in story and hash(story) not in self.seen and len(story) in STORY_CHARACTERS

    def add(self, stories: list[str]) -> None:
        for story in stories:
            if self.accepts(story):
                self.seen.add(hash(story))
                self.size += self.file.write(f"{story}\n{SEPARATOR}\n".encode())
            else:
                self.rejected += 1
        self.file.flush()


def load(model: Path, vocabulary_text: Path, dtype: torch.dtype) -> tuple[Teacher, list[bytes]]:
    blob = (model / CHECKPOINT_NAME if model.is_dir() else model).read_bytes()
    shape, tensors, offset = read_tensors(blob)
    pieces, scores = read_tokens(blob, offset, shape.vocabulary)
    text = vocabulary_text.read_bytes()
    text = lzma.decompress(text) if vocabulary_text.suffix == ".xz" else text
    kept_V = used_vocabulary(text.decode(), pieces, scores)
    return Teacher(shape, tensors, kept_V, dtype), [pieces[i] for i in kept_V]


@torch.no_grad()
def sample_forever(sampling: SamplingOptions, queue: Stories) -> None:
    """Sample in a process of its own, one per core: threads of one process wait for each other on a busy machine."""
    torch.set_num_threads(1)
    model, pieces_V = load(sampling.model, sampling.vocabulary_text, sampling.dtype)
    for counted_stories in cut(Sampler(model, sampling).blocks(), pieces_V, sampling.rows):
        queue.put(counted_stories)


def write_stories(story_file: StoryFile, queue: Stories, target: int) -> None:
    sampled, began = 0, time.monotonic()
    with tqdm(total=target, initial=story_file.size, unit="B", unit_scale=True, mininterval=5) as bar:
        while story_file.size < target:
            count, stories = queue.get(timeout=600)  # samplers that died must not be waited for
            story_file.add(stories)
            sampled += count
            rate = int(sampled / (time.monotonic() - began))
            bar.set_postfix(stories=len(story_file.seen), rejected=story_file.rejected, tokens_s=rate, refresh=False)
            bar.update(story_file.size - bar.n)


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help=f"{CHECKPOINT_NAME}, or its folder")
    parser.add_argument("--out", type=Path, required=True, help="appended to, if it exists")
    parser.add_argument("--megabytes", type=float, default=48)
    parser.add_argument("--rows", type=int, default=256, help="stories written at once by each thread")
    parser.add_argument("--temperature", type=float, default=0.9)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of matrix products")
    parser.add_argument("--vocabulary-text", type=Path, required=True, help="real stories, whose tokens are kept")
    return parser.parse_args()


def main() -> None:
    given, context = read_arguments(), multiprocessing.get_context("spawn")
    story_file, queue = StoryFile(given.out), context.Queue(maxsize=64)
    seed = given.seed * 1_000_003 + len(story_file.seen) * given.threads  # what an earlier run wrote is not repeated
    for worker in range(given.threads):
        dtype = torch.float32 if given.dtype == "float32" else torch.bfloat16
        options = given.model, given.vocabulary_text, given.rows, given.temperature, seed + worker, dtype
        sampling = SamplingOptions(*options)
        context.Process(target=sample_forever, args=(sampling, queue), daemon=True).start()
    write_stories(story_file, queue, int(given.megabytes * 1e6))


if __name__ == "__main__":
    main()
