"""The stored tensors that a quantised one consists of, checked. It does not depend on a format."""

from collections.abc import Mapping

import torch

from model.errors import CheckpointError
from weights.files import Stored

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def part(
    stored: Mapping[str, Stored],
    base: str,
    name: str,
    dtypes: torch.dtype | tuple[torch.dtype, ...],
    dimensions: int = -1,
) -> Stored:
    """The tensor `base + name`.

    Raises:
        CheckpointError: it is missing, or has another dtype or, where that is given, another number of dimensions.
    """
    found = stored.get(base + name)
    if found is None:
        raise CheckpointError(f"{base.removesuffix('.')} is quantised, but {base}{name} is missing")
    dtypes = dtypes if isinstance(dtypes, tuple) else (dtypes,)
    if found.dtype not in dtypes:
        raise misshapen(base + name, found, " or ".join(map(str, dtypes)))
    if dimensions not in (-1, len(found.shape)):
        raise misshapen(base + name, found, f"{dimensions} dimensions")
    return found


def misshapen(name: str, found: Stored, wanted: str) -> CheckpointError:
    """The error of a part that is not as wanted."""
    return CheckpointError(f"{name} has shape {found.shape} of {found.dtype}, not {wanted}")
