"""Random damage to quantised checkpoints of every format: `make fuzz-quantised`. A matrix is read, or refused with a
CheckpointError; nothing else may happen. A few hundred cases run with the tests
(`tests/weights/quantised/test_fuzz.py`).
"""

import random
import tempfile
from collections.abc import Mapping
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import torch
import typer
from torch import Tensor

from model.grouped import Grouped
from tests.fuzz_cases import refusals
from tests.weights.quantised.layouts import opened
from tests.weights.quantised.test_formats import CASES, FP8, named
from weights.forms import Form
from weights.groups import finite

SIZES = (24, 128)  # outputs and inputs; groups of up to 128
VALUES: tuple[Any, ...] = (None, True, -1, 0, 1, 3, 16, 2**63, 1.5, "", "x", "group", [], [0, 1], [[1]], {}, {"a": {}})
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.int8, torch.uint8)
ENDS = ("weight", "scales", "qzeros", "g_idx", "weight_scale", "weight_scale_2", "weight_scale_inv", "weight_blocks")


@cache
def written(name: str, inputs: int) -> dict[str, Tensor]:
    """The tensors of one matrix in a format of `CASES` or `FP8`."""
    return named((CASES | FP8)[name].write(SIZES[0], inputs, 0))


def sample(rng: random.Random) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A matrix and its config, not damaged."""
    name = rng.choice(sorted(CASES | FP8))
    inputs = 256 if "256" in name else SIZES[1]
    return dict(written(name, inputs)), deepcopy((CASES | FP8)[name].config)


def damage_tensor(stored: dict[str, Tensor], rng: random.Random) -> None:
    """Take a tensor away, rename it, or give it other values, another dtype or another shape."""
    name = rng.choice(sorted(stored))
    tensor = stored.pop(name)
    match rng.randrange(7):
        case 0:
            return
        case 1:
            name = f"a_proj.{rng.choice(ENDS)}"
        case 2:
            tensor = tensor.to(rng.choice(DTYPES))
        case 3:
            tensor = tensor.reshape(rng.choice([(-1,), (1, *tensor.shape), (*tensor.shape, 1)]))
        case 4 if tensor.dim():
            axis = rng.randrange(tensor.dim())
            tensor = tensor.narrow(axis, 0, rng.randrange(tensor.shape[axis] + 1))
        case 5 if tensor.dim():
            tensor = torch.cat([tensor, tensor], rng.randrange(tensor.dim()))
        case _:
            bytes_B = torch.frombuffer(bytearray(rng.randbytes(max(1, tensor.nbytes))), dtype=torch.uint8)
            tensor = bytes_B[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
    stored[name] = tensor


def damage_config(config: dict[str, Any], rng: random.Random) -> None:
    """Give a field of it, or of an object in it, another value, or take it away."""
    place = config
    while rng.random() < 0.6 and (inner := [each for each in place.values() if isinstance(each, dict) and each]):
        place = rng.choice(inner)
    name = rng.choice(sorted(place))
    if rng.random() < 0.2:
        del place[name]
    else:
        place[name] = rng.choice(VALUES)


def read_everything(folder: Path, stored: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Every tensor as floats, and in groups where it has such a form: with the shapes and the bytes that were said."""
    with opened(folder, stored, config) as tensors:
        for name, said in tensors.stored.items():
            values, grouped = tensors.read(name), tensors.grouped(name)
            assert values.shape == said.shape, name
            if grouped is not None and said.form is not None:
                assert grouped.shape == said.matrices, name
                most = said.grouped + unsaid(grouped, said.form)
                assert grouped.nbytes <= most or not finite(grouped), name  # which a load refuses


def unsaid(grouped: Grouped, form: Form) -> int:
    """The bytes of minima and factors where the config says that zeros are in the middle, and they are not."""
    if grouped.minima is None or form.minimum:
        return 0
    return grouped.minima.nbytes + (0 if form.factors else 4 * grouped.shape[:-1].numel())


def run(count: int, seed: int) -> int:
    """How many of `count` damaged matrices were refused."""
    with tempfile.TemporaryDirectory() as folder:

        def case(number: int, rng: random.Random) -> None:
            stored, config = sample(rng)
            for _ in range(rng.randint(1, 2)):
                if stored and rng.random() < 0.6:
                    damage_tensor(stored, rng)
                elif config:
                    damage_config(config, rng)
            read_everything(Path(folder), stored, config)

        return refusals(range(seed, seed + count), case)


def main(count: int = 10_000, seed: int = 0) -> None:
    """Damage `count` matrices, from `seed` on; the seed of a case that fails is printed."""
    torch.set_num_threads(1)
    print(f"{count} damaged matrices: {run(count, seed)} were refused, the others read")


if __name__ == "__main__":
    typer.run(main)
