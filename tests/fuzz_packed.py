"""Random damage to packed models: `make fuzz-packed`. A folder is refused with a CheckpointError that names the file,
or read; nothing else may happen. Where the damage is to a file's header or length, not to values, a folder that is
read answers as before. Sixty cases run with the tests (`tests/engine/test_packed_fuzz.py`).

A read out of range ends the process, and so does a case of more than five minutes: the number printed last is its seed.
"""

import faulthandler
import json
import os
import random
import resource
import struct
import tempfile
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import typer

from engine.build import build_engine
from engine.packing import pack_model
from engine.types import EngineSettings, Request, Sampling, TokenEvent
from model.budget import ExpertBudget
from model.errors import CheckpointError, InvalidRequest
from tests.fuzz_cases import refusals
from tests.fuzz_gguf import damaged
from tests.weights.checkpoints import INFINITY, OLMOE, write
from tests.weights.gguf.architectures import raw_of
from weights.folder import PACKED
from weights.small_files import CONFIG

SETTINGS = EngineSettings(model="", kv_cache_bytes=1 << 20, max_running=2, max_step_tokens=16, step_ms=0, threads=1)
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # config.json, and how it is packed
    "topk": (OLMOE | {"hidden_size": 64, "num_hidden_layers": 1}, {}),
    "topk in 4 bits": (OLMOE | {"hidden_size": 64}, {"quantize": "int4", "quantize_layers": "all"}),
    "infinity": (INFINITY | {"hidden_size": 64, "mask_block": 1}, {"dtype": "bfloat16"}),
    "rotary tables and sinks": (raw_of("gpt-oss"), {"quantize": "int8"}),
    "latent attention": (raw_of("deepseek2") | {"qk_rope_head_dim": 16, "v_head_dim": 16}, {"quantize": "int8"}),
    "delta rule": (raw_of("qwen3next") | {"linear_key_head_dim": 16}, {}),
}
VALUES: tuple[Any, ...] = (None, True, False, -1, 0, 1, 2, 3, 5, 16, 64, 1 << 20, 1 << 26, 1 << 27, 2**63, 2**64)
VALUES += (0.0, 0.5, -1.5, 1e-30, 1e30, "", "x", "add_topk", "../x", [], [0], {}, {"part": 0, "tensor": "embeddings"})
TYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "U16", "", 3)
MAX_SECONDS, MAX_GROWTH = 300, 1 << 29  # of one case, in seconds and bytes of memory
Damage = Callable[[Path, random.Random], Path]  # of a folder: which file has it


@cache
def packed(name: str) -> tuple[tempfile.TemporaryDirectory[str], str]:
    """One of `MODELS`, packed, and what it answers."""
    kept = tempfile.TemporaryDirectory()
    raw, options = MODELS[name]
    folder = Path(kept.name)
    write(folder / "checkpoint", raw)
    pack_model(str(folder / "checkpoint"), folder / "packed", **options)
    return kept, answer(folder / "packed", name)


def answer(folder: Path, name: str) -> str:
    """Tokens of an engine over a folder, and their log-probabilities to the last bit; or the error of the request."""
    options = MODELS[name][1]
    asked = {field: value for field, value in options.items() if field != "dtype" or value == "bfloat16"}
    engine, info = build_engine(replace(SETTINGS, model=str(folder), **asked))
    budget = ExpertBudget((info.experts.trained,) * info.experts.layers)
    try:
        engine.add(Request("a", tuple(range(20)), budget, Sampling(max_tokens=3, seed=3, temperature=0.0, logprobs=2)))
    except InvalidRequest as error:  # it is longer than the context of a damaged config
        return str(error)
    events: list[TokenEvent] = []
    while engine.has_work:
        events += engine.step().events
    return repr([(event.token, event.logprob, event.error) for event in events])


def part_of(folder: Path, rng: random.Random) -> Path:
    """One of the files with tensors."""
    return rng.choice(sorted(folder.glob("part-*.safetensors")))


def replace_file(path: Path, data: bytes) -> Path:
    """Other bytes in the place of a link."""
    path.unlink()
    path.write_bytes(data)
    return path


def header_of(data: bytes | bytearray) -> int:
    """Where the tensors of a safetensors file begin."""
    return 8 + int(struct.unpack("<Q", data[:8])[0])


def damage_bytes(folder: Path, rng: random.Random) -> Path:
    """Changed, doubled or lost bytes in a header, or an end that is cut off."""
    path = part_of(folder, rng)
    data = path.read_bytes()
    text = len(data[: header_of(data)].rstrip())
    return replace_file(path, damaged(data, text, rng))


def damage_entry(folder: Path, rng: random.Random) -> Path:
    """Another dtype, shape or place of a tensor."""
    path = part_of(folder, rng)
    data = path.read_bytes()
    start = header_of(data)
    header = json.loads(data[8:start])
    entry = header[rng.choice(sorted(header))]
    match rng.randrange(4):
        case 0:
            entry["dtype"] = rng.choice(TYPES)
        case 1:
            change_within(entry["shape"], rng)
        case 2:
            change_within(entry["data_offsets"], rng)
        case 3:
            change_within(entry, rng)
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % rng.choice((1, 8, 4096)))
    return replace_file(path, struct.pack("<Q", len(text)) + text + data[start:])


def damage_file(folder: Path, rng: random.Random) -> Path:
    """Another file, no file, or something that is no file."""
    path = part_of(folder, rng)
    data = path.read_bytes()
    match rng.randrange(6):
        case 0:
            return replace_file(path, data[: rng.randrange(len(data))])
        case 1:
            return replace_file(path, data + rng.randbytes(rng.randint(1, 5000)))
        case 2:
            return replace_file(path, rng.randbytes(rng.randint(0, 100)))
        case 3:
            path.unlink()
            path.mkdir()
        case 4:
            path.unlink()
            os.mkfifo(path)
        case 5:
            path.unlink()
    return path


def damage_calls(folder: Path, rng: random.Random) -> Path:
    """Other numbers and tensors of a call, or other calls."""
    index = json.loads((folder / PACKED).read_text())
    for _ in range(rng.randint(1, 2)):
        change_within(index["calls"], rng)
    return replace_file(folder / PACKED, json.dumps(index).encode())


def damage_index(folder: Path, rng: random.Random) -> Path:
    """Another field of packed.json beside its calls, or bytes of it."""
    data = (folder / PACKED).read_bytes()
    if rng.random() < 0.5:
        return replace_file(folder / PACKED, damaged(data, len(data), rng))
    index = json.loads(data)
    calls = index.pop("calls")
    change_within(index, rng)
    return replace_file(folder / PACKED, json.dumps(index | {"calls": calls}).encode())


def damage_config(folder: Path, rng: random.Random) -> Path:
    """Another value in config.json."""
    config = json.loads((folder / CONFIG).read_text())
    change_within(config, rng)
    return replace_file(folder / CONFIG, json.dumps(config).encode())


def damage_values(folder: Path, rng: random.Random) -> Path:
    """Other numbers in the tensors."""
    path = part_of(folder, rng)
    data = bytearray(path.read_bytes())
    start = header_of(data)
    for _ in range(rng.randint(1, 20) if len(data) > start else 0):
        at, size = rng.randrange(start, len(data)), rng.choice((1, 2, 4, 64))
        new = rng.choice((rng.randbytes(size), bytes(size), bytes(size), b"\x01" * size, b"\xff" * size))
        data[at : at + size] = new[: len(data) - at]
    return replace_file(path, bytes(data))


def change_within(place: Any, rng: random.Random) -> None:
    """Change one value in an object or a list, however deep."""
    while inner := [each for each in members(place).values() if isinstance(each, dict | list) and each]:
        if rng.random() < 0.3:
            break
        place = rng.choice(inner)
    keys = sorted(members(place))
    key = rng.choice(keys)
    match rng.randrange(5):
        case 0:
            del place[key]
        case 1:
            other = rng.choice(keys)
            place[key], place[other] = place[other], place[key]
        case 2 if isinstance(place, list):
            place.insert(key, deepcopy(place[key]))
        case 3 if type(place[key]) is int:
            place[key] = rng.choice((place[key] - 1, place[key] + 1, 2 * place[key], place[key] // 2, -place[key]))
        case _:
            place[key] = deepcopy(rng.choice(VALUES))


def members(place: dict[str, Any] | list[Any]) -> dict[Any, Any]:
    """The values of an object or a list by where they are."""
    return place if isinstance(place, dict) else dict(enumerate(place))


# Of what holds the tensors, and of what they and the model are.
HOLDERS: tuple[Damage, ...] = (damage_bytes, damage_entry, damage_file)
CONTENTS: tuple[Damage, ...] = (damage_calls, damage_calls, damage_index, damage_config, damage_values)


def read_damaged(name: str, folder: Path, rng: random.Random) -> None:
    """One case, in an empty folder.

    Raises:
        CheckpointError: it is refused.
        AssertionError: it is neither refused as it should nor read as it should.
    """
    kept, expected = packed(name)
    for file in (Path(kept.name) / "packed").iterdir():
        (folder / file.name).symlink_to(file)
    damage = rng.choice(HOLDERS + CONTENTS)
    path = damage(folder, rng)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        found = answer(folder, name)
    except CheckpointError as error:
        text = str(error)
        assert damage not in HOLDERS or path.name in text or PACKED in text, text
        raise
    finally:
        grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        assert grown < MAX_GROWTH, f"{grown} bytes of memory"
    assert damage not in HOLDERS or found == expected, path


def run(count: int, seed: int, names: Sequence[str] = tuple(MODELS), show: bool = False) -> int:
    """How many of `count` damaged folders were refused."""

    def case(number: int, rng: random.Random) -> None:
        if show:
            print(f"\r{number}", end=" ", flush=True)
        faulthandler.dump_traceback_later(MAX_SECONDS, exit=True)
        with tempfile.TemporaryDirectory() as folder:
            read_damaged(rng.choice(names), Path(folder), rng)

    for name in names:
        packed(name)  # an undamaged one is read
    try:
        return refusals(range(seed, seed + count), case)
    finally:
        faulthandler.cancel_dump_traceback_later()


def main(count: int = 10_000, seed: int = 0) -> None:
    """Damage `count` packed models, from `seed` on."""
    torch.set_num_threads(1)
    print(f"\n{count} packed models: {run(count, seed, show=True)} refused, the others read")


if __name__ == "__main__":
    typer.run(main)
