"""The plan of a run: every request and when it starts, from the seed only. Pure; it knows no server.

Counts, lengths, text positions and arrivals have random streams of their own, so that runs that differ in one of them
share the others.
"""

import math
import random
from dataclasses import dataclass

from terminal.bench.mix import MixEntry, apportion
from terminal.counts import Count
from terminal.errors import BadOption
from terminal.sanitize import one_line


@dataclass(frozen=True, slots=True)
class PromptLengths:
    """Prompt tokens, uniform from `low` to `high`, both included."""

    low: int
    high: int


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    """One request of the plan."""

    number: int
    count: Count | None
    length: int | None  # prompt tokens; None: the prompt is not cut
    text_seed: int  # of the positions in the text that the tokens come from
    at: float | None  # seconds after the start; None: as soon as another one ends
    seed: int


def parse_lengths(text: str) -> PromptLengths:
    """The lengths in a text such as `128` or `16-256`.

    Raises:
        BadOption: not of that form, or an empty range.
    """
    low, dash, high = text.partition("-")
    words = (low, high if dash else low)
    if not all(word.isascii() and word.isdecimal() and len(word) < 8 for word in words):
        raise BadOption(f"--prompt-tokens takes N or LOW-HIGH, such as 128 or 16-256, got {one_line(repr(text))}")
    lengths = PromptLengths(*map(int, words))
    if not 1 <= lengths.low <= lengths.high:
        raise BadOption(f"--prompt-tokens needs 1 or more, low before high, got {text}")
    return lengths


def plan(
    mix: tuple[MixEntry, ...],
    total: int,
    seed: int,
    lengths: PromptLengths | None,
    rate: float | None,
    stage: str = "run",
) -> list[PlannedRequest]:
    """All requests in the order in which they start; with a `rate` they arrive at that many per second."""
    counts = apportion(mix, total)
    random.Random(f"{seed}/{stage}/counts").shuffle(counts)
    lengths_random = random.Random(f"{seed}/{stage}/lengths")
    text_random = random.Random(f"{seed}/{stage}/places")
    arrivals = random.Random(f"{seed}/{stage}/arrivals")
    at = 0.0
    requests = []
    for number, count in enumerate(counts):
        length = lengths_random.randint(lengths.low, lengths.high) if lengths else None
        text_seed, planned = text_random.getrandbits(32), at if rate else None
        requests.append(PlannedRequest(number, count, length, text_seed, planned, seed + number))
        at += arrivals.expovariate(rate) if rate else 0.0
    return requests


def check_rate(rate: float | None, concurrency: int | None) -> None:
    """Raises BadOption for a rate that is invalid, or given with a concurrency."""
    if rate is not None and concurrency is not None:
        raise BadOption("--rate and --concurrency exclude each other: arrivals wait for nobody")
    if rate is not None and not (math.isfinite(rate) and rate > 0):
        raise BadOption(f"--rate must be more than 0 requests per second, got {rate:g}")
