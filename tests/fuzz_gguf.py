"""Random damage to GGUF files: `make fuzz-gguf`. A file is read, or refused with a CheckpointError, in bounded time
and memory; nothing else may happen. A few hundred cases run with the tests (`tests/weights/gguf/test_fuzz.py`).
"""

import random
import struct
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
import typer

from tests.fuzz_cases import refusals
from tests.weights.checkpoints import random_decoder
from tests.weights.gguf.architectures import RAW, converted, metadata_of, raw_of
from tests.weights.gguf.quantisers import mixed
from tests.weights.gguf.writer import Blob, blob, gguf_bytes
from weights.config import decoder_config
from weights.gguf.families import raw_config
from weights.gguf.names import tensor_parts
from weights.gguf.reader import GgufFile
from weights.gguf.tensors import GgufTensors
from weights.load import load_model
from weights.small_files import MADE, small_files

EDGES = (0, 1, 2, 3, 31, 32, 255, 256, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1)


def sample() -> bytes:
    """A small file of every block type, with what a decoder needs."""
    metadata: dict[str, Any] = {
        "general.architecture": "qwen3moe",
        "general.alignment": 32,
        "qwen3moe.block_count": 1,
        "qwen3moe.embedding_length": 32,
        "qwen3moe.context_length": 64,
        "qwen3moe.attention.head_count": 2,
        "qwen3moe.attention.head_count_kv": 1,
        "qwen3moe.attention.key_length": 16,
        "qwen3moe.attention.layer_norm_rms_epsilon": 1e-6,
        "qwen3moe.rope.freq_base": 10000.0,
        "qwen3moe.feed_forward_length": 64,
        "qwen3moe.expert_count": 2,
        "qwen3moe.expert_used_count": 1,
        "qwen3moe.expert_feed_forward_length": 32,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": ["a", "b", "ab"],
        "tokenizer.ggml.token_type": [1, 1, 1],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.eos_token_id": 2,
    }
    tensors: Mapping[str, Blob] = {
        "token_embd.weight": blob("Q8_0", (3, 32)),
        "blk.0.attn_q.weight": blob("Q4_0", (32, 32)),
        "blk.0.attn_k_norm.weight": blob("F32", (16,)),
        "blk.0.ffn_gate_inp.weight": blob("F16", (2, 32)),
        "blk.0.ffn_gate_exps.weight": blob("MXFP4", (2, 32, 32)),
        "blk.0.ffn_up_exps.weight": blob("Q5_1", (2, 32, 32)),
        "blk.0.ffn_down_exps.weight": blob("Q6_K", (2, 1, 256)),
        "output_norm.weight": blob("BF16", (32,)),
    }
    return gguf_bytes(metadata, tensors)


@cache
def model(name: str) -> bytes:
    """A whole one of an architecture, with blocks of three types."""
    return gguf_bytes(metadata_of(name), converted(name, random_decoder(raw_of(name)), mixed))


def damaged(data: bytes, header: int, rng: random.Random) -> bytes:
    """With one to three changes in the first `header` bytes: bytes, lengths, pieces taken out, doubled, moved, or the
    end cut off."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(min(header, len(changed)) or 1)
        size = rng.randint(1, 64)
        match rng.randrange(6):
            case 0:
                changed[at : at + 1] = rng.randbytes(1)
            case 1:
                changed[at : at + 8] = struct.pack("<Q", rng.choice(EDGES))
            case 2:
                changed[at : at + 4] = struct.pack("<I", rng.choice(EDGES) & 0xFFFFFFFF)
            case 3:
                del changed[at : at + size]
            case 4:
                changed[at:at] = changed[at : at + size]
            case 5:
                del changed[rng.randrange(len(changed) or 1) :]
    return bytes(changed)


def read_everything(path: Path) -> None:
    """What a server does with a file, but for the loader's comparison of shapes, which would end most cases."""
    with GgufFile(path) as file:
        raw = raw_config(file)
        parts = tensor_parts(file, raw)
        tensors = GgufTensors(file, parts)
        decoder_config(raw)
        for name, stored in tensors.stored.items():
            values = tensors.read(name)
            assert (values.shape, values.dtype) == (stored.shape, stored.dtype), name
            grouped = tensors.grouped(name)
            assert grouped is None or grouped.nbytes == stored.grouped, name
    files = small_files(path)
    for name in MADE:
        if files.has(name):
            files.json(name)


def load(path: Path) -> None:
    """The model, and nothing else."""
    load_model(path, "float32")


def run(count: int, seed: int) -> int:
    """How many of `count` damaged files were refused: every second one is a whole model."""
    names = sorted(RAW)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.gguf"

        def case(number: int, rng: random.Random) -> None:
            data, read = (model(rng.choice(names)), load) if number % 2 else (sample(), read_everything)
            path.write_bytes(damaged(data, data.rindex(b".weight") + 50, rng))
            read(path)

        return refusals(range(seed, seed + count), case)


def main(count: int = 10_000, seed: int = 0) -> None:
    torch.set_num_threads(1)
    print(f"{count} files: {run(count, seed)} refused, the others read")


if __name__ == "__main__":
    typer.run(main)
