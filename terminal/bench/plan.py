"""What is going to be asked, and when: every request of a run, from the seed alone. Pure; it knows no server.

Counts, lengths, places and arrivals come from streams of their own: runs that differ in one of them share the others.
"""

import math
import random
from dataclasses import dataclass

from terminal.bench.mix import Share, apportion
from terminal.counts import Count
from terminal.errors import BadOption
from terminal.sanitize import one_line


@dataclass(frozen=True, slots=True)
class Lengths:
    """Prompt tokens, uniform from `low` to `high`, both included."""

    low: int
    high: int


@dataclass(frozen=True, slots=True)
class Job:
    number: int
    count: Count | None
    length: int | None  # prompt tokens; None: a prompt as it is
    places: int  # seed of where in the text the tokens come from
    at: float | None  # seconds after the start; None: as soon as there is room
    seed: int


def parse_lengths(text: str) -> Lengths:
    """`128` or `16-256`.

    Raises:
        BadOption: not of that form, or an empty range.
    """
    low, dash, high = text.partition("-")
    words = (low, high if dash else low)
    if not all(word.isascii() and word.isdecimal() and len(word) < 8 for word in words):
        raise BadOption(f"--prompt-tokens takes N or LOW-HIGH, such as 128 or 16-256, got {one_line(repr(text))}")
    lengths = Lengths(*map(int, words))
    if not 1 <= lengths.low <= lengths.high:
        raise BadOption(f"--prompt-tokens needs 1 or more, low before high, got {text}")
    return lengths


def plan(
    shares: tuple[Share, ...], total: int, seed: int, lengths: Lengths | None, rate: float | None, stage: str = "run"
) -> list[Job]:
    """All requests in the order in which they start; `rate` in requests per second makes them arrive by themselves."""
    counts = apportion(shares, total)
    random.Random(f"{seed}/{stage}/counts").shuffle(counts)
    sizes, places = random.Random(f"{seed}/{stage}/lengths"), random.Random(f"{seed}/{stage}/places")
    arrivals, at = random.Random(f"{seed}/{stage}/arrivals"), 0.0
    jobs = []
    for number, count in enumerate(counts):
        length = sizes.randint(lengths.low, lengths.high) if lengths else None
        jobs.append(Job(number, count, length, places.getrandbits(32), at if rate else None, seed + number))
        at += arrivals.expovariate(rate) if rate else 0.0
    return jobs


def check_rate(rate: float | None, concurrency: int | None) -> None:
    if rate is not None and concurrency is not None:
        raise BadOption("--rate and --concurrency exclude each other: arrivals wait for nobody")
    if rate is not None and not (math.isfinite(rate) and rate > 0):
        raise BadOption(f"--rate must be more than 0 requests per second, got {rate:g}")
