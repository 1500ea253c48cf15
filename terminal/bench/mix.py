"""Which request uses which expert count: the weights of --mix turned into whole numbers. Pure; it knows no request."""

import re
from dataclasses import dataclass
from fractions import Fraction

from terminal.counts import Count, label, parse_count
from terminal.errors import BadOption
from terminal.sanitize import one_line

COUNT = re.compile(r"[1-9][0-9]{0,8}(:[1-9][0-9]{0,8})?|default")


@dataclass(frozen=True, slots=True)
class MixEntry:
    """One expert count of a mix and its relative weight."""

    count: Count | None  # None: the request sets none
    weight: Fraction


def parse_mix(text: str) -> tuple[MixEntry, ...]:
    """The entries of a mix such as `1:0.5,4:0.3,8:2:0.1,default:0.1`, the weight last.

    Weights are relative: 1:1,8:1 is half and half.

    Raises:
        BadOption: not of that form, a count twice, or a weight that is not positive.
    """
    entries = tuple(_entry(word.strip()) for word in text.split(","))
    counts = [entry.count for entry in entries]
    if twice := [label(count) for count in counts if counts.count(count) > 1]:
        raise BadOption(f"--mix names the count {twice[0]} twice")
    return entries


def _entry(word: str) -> MixEntry:
    count, _, weight = word.rpartition(":")
    known = COUNT.fullmatch(count) and re.fullmatch(r"[0-9./]{1,16}", weight)
    try:
        entry = MixEntry(parse_count(count), Fraction(weight)) if known else None
    except (ValueError, ZeroDivisionError):
        entry = None
    if entry is None or entry.weight <= 0:
        pairs = "count:share pairs, such as 1:0.5,8:2:0.5 or default:1"
        raise BadOption(f"--mix takes {pairs}, got {one_line(repr(word))}")
    return entry


def apportion(entries: tuple[MixEntry, ...], total: int) -> list[Count | None]:
    """`total` counts, each entry less than one request from its exact part (largest remainders, ties to the first)."""
    whole = sum(entry.weight for entry in entries)
    exact = [entry.weight * total / whole for entry in entries]
    numbers = [int(part) for part in exact]
    excess = [number - part for number, part in zip(numbers, exact, strict=True)]
    by_remainder = sorted(range(len(entries)), key=excess.__getitem__)
    for i in by_remainder[: total - sum(numbers)]:
        numbers[i] += 1
    return [entry.count for entry, number in zip(entries, numbers, strict=True) for _ in range(number)]
