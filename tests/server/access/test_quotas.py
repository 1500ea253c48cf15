"""Buckets with a clock of the test's own: rates hold on average, debts are paid, what is refused is not counted."""

import pytest

from server.access.quotas import Account, Bucket, KeyLimits
from server.errors import RateLimited


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_a_bucket_holds_one_minute_and_refills_evenly(clock: Clock) -> None:
    bucket = Bucket(60, clock)
    assert (bucket.wait(), bucket.reset()) == (0, 0)
    bucket.spend(60)
    assert (bucket.wait(), bucket.reset()) == (1, 60)
    clock.now += 1.5
    assert bucket.wait() == 0 and bucket.level == 1.5
    clock.now += 1e6
    assert bucket.level == 60


def test_what_is_counted_late_makes_a_debt(clock: Clock) -> None:
    bucket = Bucket(60, clock)
    for _ in range(90):
        bucket.spend(1)
    assert bucket.wait() == 31
    clock.now += 31
    assert bucket.wait() == 0


def test_spending_at_the_rate_never_runs_dry(clock: Clock) -> None:
    bucket = Bucket(600, clock)
    for _ in range(10_000):
        clock.now += 0.2
        bucket.spend(1)
        assert bucket.level >= 598


def test_a_refused_request_is_not_counted_and_says_when_to_come_back(clock: Clock) -> None:
    account = Account("alice", KeyLimits(requests_per_minute=2), clock)
    account.admit()
    account.admit()
    for _ in range(5):
        with pytest.raises(RateLimited, match="2 requests per minute") as caught:
            account.admit()
        assert (caught.value.limit, caught.value.retry_after) == ("requests", 30)
    clock.now += 30
    account.admit()


def test_tokens_are_refused_at_the_next_request_only(clock: Clock) -> None:
    account = Account("alice", KeyLimits(requests_per_minute=10, tokens_per_minute=100), clock)
    account.admit()
    account.spend_tokens(150)
    account.spend_tokens(10)
    with pytest.raises(RateLimited, match="100 tokens per minute") as caught:
        account.admit()
    assert (caught.value.limit, caught.value.retry_after) == ("tokens", 37)
    assert [(limit.kind, limit.remaining) for limit in account.remaining()] == [("requests", 9), ("tokens", 0)]
    clock.now += 37
    account.admit()


def test_without_limits_nothing_is_refused(clock: Clock) -> None:
    account = Account("alice", KeyLimits(), clock)
    for _ in range(1000):
        account.admit()
        account.spend_tokens(1_000_000)
    assert account.remaining() == []
