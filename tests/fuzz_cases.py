"""Numbered random cases for what reads foreign data: each is read or refused with a CheckpointError, else its number is
printed. It knows no format."""

import random
from collections.abc import Callable, Iterable

from model.errors import CheckpointError


def refusals(numbers: Iterable[int], read: Callable[[int, random.Random], None]) -> int:
    """How many of the cases were refused. Each has a number and a random generator that starts from it."""
    refused = 0
    for number in numbers:
        try:
            read(number, random.Random(number))
        except CheckpointError:
            refused += 1
        except BaseException:
            print(f"seed {number}", flush=True)
            raise
    return refused
