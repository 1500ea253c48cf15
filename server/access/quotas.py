"""What one API key may use: requests and tokens per minute, as token buckets."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from server.errors import RateLimited

MINUTE = 60.0
LimitKind = Literal["requests", "tokens"]
Clock = Callable[[], float]


@dataclass(frozen=True, slots=True)
class KeyLimits:
    """None: no limit. `share_of_places`: of the sequences that the server holds at once, running and waiting."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    share_of_places: float | None = None


class RemainingLimit(NamedTuple):
    """What is left of a limit: whole units, and seconds until all of them are back."""

    kind: LimitKind
    limit: int
    remaining: int
    reset: float


class Bucket:
    """Holds a minute's worth of units and refills evenly.

    Units that are counted after their use may overdraw it; requests then wait until the debt is paid, so that the rate
    holds on average.

    At 60 a minute: after 60 units at once `wait()` is 1 second, after 90 units 31 seconds.
    """

    def __init__(self, per_minute: int, clock: Clock) -> None:
        self.limit, self._clock = per_minute, clock
        self._level, self._at = float(per_minute), clock()

    @property
    def level(self) -> float:
        """Units that are available now; negative: the debt."""
        now = self._clock()
        refilled = self._level + (now - self._at) * self.limit / MINUTE
        self._level, self._at = min(float(self.limit), refilled), now
        return self._level

    def spend(self, units: int) -> None:
        """Take units, even where fewer are available."""
        self._level = self.level - units

    def wait(self) -> float:
        """Seconds until one unit is available; 0 if it is now."""
        return max(0.0, 1 - self.level) * MINUTE / self.limit

    def reset(self) -> float:
        """Seconds until the bucket is full."""
        return (self.limit - self.level) * MINUTE / self.limit


class Account:
    """The buckets of one key.

    Tokens are counted when they are known: a key that has overdrawn them is refused at its next request, while its
    running requests go on.
    """

    def __init__(self, name: str, limits: KeyLimits, clock: Clock = time.monotonic) -> None:
        self.name, self.limits = name, limits
        self._requests = None if limits.requests_per_minute is None else Bucket(limits.requests_per_minute, clock)
        self._tokens = None if limits.tokens_per_minute is None else Bucket(limits.tokens_per_minute, clock)

    def admit(self) -> None:
        """Count one request; one that is refused does not count.

        Raises:
            RateLimited: the requests or the tokens of this minute are used up.
        """
        for kind, bucket in self._buckets():
            if wait := bucket.wait():
                seconds = math.ceil(wait)
                raise RateLimited(
                    f"this key is limited to {bucket.limit} {kind} per minute, which are used up; try again in"
                    f" {seconds} s",
                    kind,
                    seconds,
                )
        if self._requests is not None:
            self._requests.spend(1)

    def spend_tokens(self, count: int) -> None:
        """Count tokens, of a prompt or generated."""
        if self._tokens is not None:
            self._tokens.spend(count)

    def remaining(self) -> list[RemainingLimit]:
        """What is left of each limit that this key has."""
        limits = []
        for kind, bucket in self._buckets():
            units = max(0, int(bucket.level))
            limits.append(RemainingLimit(kind, bucket.limit, units, bucket.reset()))
        return limits

    def _buckets(self) -> Iterator[tuple[LimitKind, Bucket]]:
        if self._requests is not None:
            yield "requests", self._requests
        if self._tokens is not None:
            yield "tokens", self._tokens
