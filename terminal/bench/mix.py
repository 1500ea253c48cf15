"""Which request asks for which count: shares as they are typed, made whole numbers. Pure; it knows no request."""

import re
from dataclasses import dataclass
from fractions import Fraction

from terminal.counts import Count, label, parse_count
from terminal.errors import BadOption
from terminal.sanitize import one_line

COUNT = re.compile(r"[1-9][0-9]{0,8}(:[1-9][0-9]{0,8})?|default")


@dataclass(frozen=True, slots=True)
class Share:
    count: Count | None  # None: the request does not say
    weight: Fraction


def parse_mix(text: str) -> tuple[Share, ...]:
    """`1:0.5,4:0.3,8:2:0.1,default:0.1`, the share last. Weights are relative, so that 1:1,8:1 is half and half.

    Raises:
        BadOption: not of that form, a count twice, or a weight that is not positive.
    """
    shares = tuple(_share(word.strip()) for word in text.split(","))
    counts = [share.count for share in shares]
    if twice := [label(count) for count in counts if counts.count(count) > 1]:
        raise BadOption(f"--mix names the count {twice[0]} twice")
    return shares


def _share(word: str) -> Share:
    count, _, weight = word.rpartition(":")
    known = COUNT.fullmatch(count) and re.fullmatch(r"[0-9./]{1,16}", weight)
    try:
        share = Share(parse_count(count), Fraction(weight)) if known else None
    except (ValueError, ZeroDivisionError):
        share = None
    if share is None or share.weight <= 0:
        raise BadOption(
            f"--mix takes count:share pairs, such as 1:0.5,8:2:0.5 or default:1, got {one_line(repr(word))}"
        )
    return share


def apportion(shares: tuple[Share, ...], total: int) -> list[Count | None]:
    """`total` counts, each share less than one request from its exact part (largest remainders, ties to the first)."""
    whole = sum(share.weight for share in shares)
    exact = [share.weight * total / whole for share in shares]
    numbers = [int(part) for part in exact]
    by_remainder = sorted(range(len(shares)), key=lambda i: numbers[i] - exact[i])
    for i in by_remainder[: total - sum(numbers)]:
        numbers[i] += 1
    return [share.count for share, number in zip(shares, numbers, strict=True) for _ in range(number)]
