"""Children's stories sampled on a GPU from a small Llama-layout teacher, thousands of rows in lockstep, and tokenised.

`cut_teacher` turns stories15M (llama2.c's layout) into a small safetensors file with the tokens that real stories use;
`sample` writes rows of endless text; `tokenise` cuts them into stories and encodes them in worker processes. What the
stories are for is not known here.
"""

import functools
import json
import math
import multiprocessing
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.pool import MapResult, Pool
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F

from training.corpus import END, ChatMaker, encode
from training.synthesise import STORY_CHARACTERS, WINDOW, ModelShape, halves_first, read_tensors
from training.teacher_vocabulary import read_tokens, used_vocabulary

BLOCK = 256  # positions sampled between two looks at the clock
Part = tuple[NDArray[np.uint16], int, int]  # token ids, characters, stories


def cut_teacher(model: Path, vocabulary_text: str, to: Path) -> int:
    """Write the teacher over the tokens that `vocabulary_text` uses, bfloat16, norms absorbed; returns their number."""
    blob = model.read_bytes()
    shape, tensors, offset = read_tensors(blob)
    pieces, scores = read_tokens(blob, offset, shape.vocabulary)
    kept_V = used_vocabulary(vocabulary_text, pieces, scores)
    state = _absorbed(tensors, shape, kept_V)
    stored = {name: value.bfloat16().contiguous() for name, value in state.items()}
    kept_pieces = [pieces[i].hex() for i in kept_V]
    save_file(stored, to, metadata={"pieces": json.dumps(kept_pieces), "heads": str(shape.heads)})
    return len(kept_V)


def _absorbed(tensors: dict[str, Tensor], shape: ModelShape, kept_V: list[int]) -> dict[str, Tensor]:
    """The teacher's weights with the gains of the norms inside, embeddings cut to the kept tokens."""
    queries_LDD, keys_LDD = halves_first(tensors["wq"], shape), halves_first(tensors["wk"], shape)
    qkv_LXD = torch.cat([queries_LDD, keys_LDD, tensors["wv"]], 1)
    gate_up_LXD = torch.cat([tensors["w1"], tensors["w3"]], 1)
    embed_VD = tensors["embedding"][kept_V]
    state = {"embed": embed_VD, "head": embed_VD * tensors["final_norm"]}
    state["qkv"] = qkv_LXD * tensors["attention_norm"][:, None]
    state["gate_up"] = gate_up_LXD * tensors["ffn_norm"][:, None]
    return state | {"out": tensors["wo"], "down": tensors["w2"]}


class Teacher:
    """The cut teacher on a device, with a ring of the last keys and values of every row."""

    def __init__(self, path: Path, rows: int, device: torch.device) -> None:
        with safe_open(path, framework="pt") as file:
            told = file.metadata()
            self.tensors = {name: file.get_tensor(name).to(device) for name in file.keys()}  # noqa: SIM118
        self.pieces = [bytes.fromhex(piece) for piece in json.loads(told["pieces"])]
        self.heads, self.rows, self.device = int(told["heads"]), rows, device
        self.width = self.tensors["embed"].shape[1] // self.heads
        shape = (len(self.tensors["qkv"]), 2, rows, self.heads, WINDOW, self.width)
        self.past = torch.zeros(shape, dtype=torch.bfloat16, device=device)
        pair_C = torch.arange(0, self.width, 2, dtype=torch.float64, device=device)
        self.frequency_C = 10000.0 ** -(pair_C / self.width)
        self.at = 0

    def step(self, ids_B: Tensor) -> Tensor:
        """Logits [B, V] of the next token; all rows are at the same position, which grows without end."""
        angle_C = self.at * self.frequency_C
        turn_2C = torch.stack([angle_C.cos(), angle_C.sin()]).float()
        x_BD = F.embedding(ids_B, self.tensors["embed"]).float()
        for layer in range(len(self.past)):
            x_BD = x_BD + self._attention(x_BD, layer, turn_2C)
            x_BD = x_BD + self._feed_forward(x_BD, layer)
        self.at += 1
        return F.linear(normed(x_BD), self.tensors["head"])

    def _feed_forward(self, x_BD: Tensor, layer: int) -> Tensor:
        gate_up_BX = F.linear(normed(x_BD), self.tensors["gate_up"][layer])
        gate_BF, up_BF = gate_up_BX.chunk(2, -1)
        return F.linear(F.silu(gate_BF) * up_BF, self.tensors["down"][layer])

    def _attention(self, x_BD: Tensor, layer: int, turn_2C: Tensor) -> Tensor:
        keys, values = self.past[layer]
        slot = self.at % WINDOW
        qkv_BX = F.linear(normed(x_BD), self.tensors["qkv"][layer])
        qkv_B3HC = qkv_BX.view(self.rows, 3, self.heads, self.width)
        q_BHC, k_BHC, v_BHC = qkv_B3HC.unbind(1)
        keys[:, :, slot] = turn(k_BHC.float(), *turn_2C).bfloat16()
        values[:, :, slot] = v_BHC
        turned_BHC = turn(q_BHC.float(), *turn_2C).bfloat16()
        mixed_BHC = attend(turned_BHC, keys, values, min(self.at, WINDOW - 1))
        return F.linear(mixed_BHC.flatten(1), self.tensors["out"][layer])


def normed(x_BD: Tensor) -> Tensor:
    """RMS norm without its weight, which the next matrix has absorbed."""
    return F.rms_norm(x_BD, (x_BD.shape[-1],), None, 1e-5).bfloat16()


def turn(x_BHC: Tensor, cos_C: Tensor, sin_C: Tensor) -> Tensor:
    """Rotary positions, half against half."""
    first, second = x_BHC.chunk(2, -1)
    turned_first = first * cos_C - second * sin_C
    turned_second = second * cos_C + first * sin_C
    return torch.cat([turned_first, turned_second], -1)


def attend(q_BHC: Tensor, k_BHWC: Tensor, v_BHWC: Tensor, last: int) -> Tensor:
    """One query per row and head over the slots 0..last; [B, H, C]."""
    if q_BHC.is_cuda:
        from training.gpu import triton_kernels

        return triton_kernels.attend(q_BHC, k_BHWC, v_BHWC, last)
    k_BHwC = k_BHWC[:, :, : last + 1].float()
    v_BHwC = v_BHWC[:, :, : last + 1].float()
    scale = q_BHC.shape[-1] ** -0.5
    score_BHw = torch.einsum("bhc,bhwc->bhw", q_BHC.float(), k_BHwC) * scale
    return torch.einsum("bhw,bhwc->bhc", score_BHw.softmax(-1), v_BHwC).to(q_BHC.dtype)


@torch.inference_mode()
def sample(teacher: Teacher, temperatures: tuple[float, ...], seconds: float, most: int) -> Iterator[NDArray[np.int16]]:
    """Yield blocks of new ids [rows, 256] until so many seconds or tokens; temperatures alternate from row to row."""
    if teacher.rows % len(temperatures):
        raise ValueError(f"{teacher.rows} rows cannot be shared evenly by {len(temperatures)} temperatures")
    heat_B = torch.tensor(temperatures, device=teacher.device).repeat(teacher.rows // len(temperatures))
    ids_B = torch.zeros(teacher.rows, dtype=torch.long, device=teacher.device)
    began, tokens = time.monotonic(), 0
    while time.monotonic() - began < seconds and tokens < most:
        block_SB = sample_block(teacher, ids_B, heat_B[:, None])
        ids_B = block_SB[-1].long()
        tokens += block_SB.numel()
        yield block_SB.T.cpu().numpy()


def sample_block(teacher: Teacher, ids_B: Tensor, heat_B1: Tensor) -> Tensor:
    """The 256 ids [S, B] that follow `ids_B`, int16."""
    block_SB = torch.empty(BLOCK, teacher.rows, dtype=torch.int16, device=teacher.device)
    for place in range(BLOCK):
        logits_BV = teacher.step(ids_B).float() / heat_B1
        noise_BV = torch.empty_like(logits_BV).exponential_().log_()  # its negative is Gumbel noise
        ids_B = (logits_BV - noise_BV).argmax(-1)
        block_SB[place] = ids_B
    return block_SB


def stories_of(row: NDArray[np.int16], pieces: list[bytes]) -> list[str]:
    """The complete, acceptable stories of one row's stream; id 0 ends a story."""
    found, start = [], 0
    for end in np.flatnonzero(row == 0).tolist():
        ids = row[start:end].tolist()
        text = b"".join([pieces[i] for i in ids]).decode(errors="replace").strip()
        start = end + 1
        if acceptable(text):
            found.append(text)
    return found


def acceptable(story: str) -> bool:
    """True for printable text of a story's length without a broken character or a separator."""
    plain = story.replace("\n", "").isprintable() and "\N{REPLACEMENT CHARACTER}" not in story
    return plain and END not in story and len(story) in STORY_CHARACTERS


@dataclass(frozen=True, slots=True)
class Rows:
    """Sampled rows for one worker, and what it needs to encode them."""

    ids_BS: NDArray[np.int16]
    pieces: list[bytes]
    tokenizer: str
    common: set[str]
    known: set[str]
    seed: int


@functools.cache
def _tokenizer(path: str) -> Tokenizer:
    return Tokenizer.from_file(path)


def _encode_rows(rows: Rows) -> Part:
    maker = ChatMaker([], rows.seed)
    maker.common, maker.known = rows.common, rows.known
    found = [story for row in rows.ids_BS for story in stories_of(row, rows.pieces)]
    stories = list(dict.fromkeys(found))
    if not stories:
        return np.zeros(0, np.uint16), 0, 0
    ids = encode(_tokenizer(rows.tokenizer), map(maker, stories))
    return ids, sum(map(len, stories)), len(stories)


def workers(count: int = 0) -> Pool:
    """A pool for `tokenise`; make it before the first use of a GPU, since its processes are forked."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    return multiprocessing.get_context("fork").Pool(count or max(1, (os.cpu_count() or 1) - 2))


def tokenise(pool: Pool, ids_BS: NDArray[np.int16], pieces: list[bytes], tokenizer: Path, seed: int) -> MapResult[Part]:
    """Start to encode all stories of the rows; `collect` waits for it. A 64th of the rows tells the common words."""
    some_BS = ids_BS[: max(1, len(ids_BS) // 64)]
    counted = [story for row in some_BS for story in stories_of(row, pieces)]
    maker = ChatMaker(counted, seed)
    known = maker.known or set(maker.common)
    job = functools.partial(Rows, pieces=pieces, tokenizer=str(tokenizer), common=maker.common, known=known)
    parts = np.array_split(ids_BS, max(1, math.ceil(len(ids_BS) / 64)))
    jobs = [job(ids_BS=part_BS, seed=number) for number, part_BS in enumerate(parts, seed * 1000)]
    return pool.map_async(_encode_rows, jobs, chunksize=1)


def collect(started: MapResult[Part]) -> Part:
    """Token ids of all stories in one array, their characters and their number."""
    ids, characters, stories = zip(*started.get(), strict=True)
    return np.concatenate(ids), sum(characters), sum(stories)
