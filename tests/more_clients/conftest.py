"""One running server for every client, and proof of the count it used. Without the clients, no test is collected."""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib.util import find_spec

import httpx
import pytest

from tests.clients.running import serving

collect_ignore_glob = [] if find_spec("instructor") else ["test_*.py"]  # `make test-more-clients` has them
FINISHED = re.compile(r'^moedial:request_success_total\{.*num_experts="(\w+)".*\} ([\d.]+)$', re.MULTILINE)


@pytest.fixture(scope="session")
def address() -> Iterator[str]:
    with serving() as url:
        yield url


@pytest.fixture
def base(address: str) -> str:
    """What clients call the base URL."""
    return f"{address}/v1"


@pytest.fixture
def only(address: str) -> Callable[[int], AbstractContextManager[None]]:
    """A block whose every request the server answers with one count, whatever the client shows of it."""

    @contextmanager
    def block(count: int) -> Iterator[None]:
        before = _finished(address)
        yield
        assert set(_finished(address) - before) == {str(count)}

    return block


def _finished(address: str) -> Counter[str]:
    """The sequences that the server finished, by expert count."""
    found: Counter[str] = Counter()
    for count, number in FINISHED.findall(httpx.get(f"{address}/metrics").text):
        found[count] += int(float(number))
    return found
