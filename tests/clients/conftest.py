"""One running server for all clients. Where the clients are not installed, none of these tests is collected."""

from collections.abc import Iterator
from importlib.util import find_spec

import pytest

from tests.clients.running import serving

collect_ignore_glob = [] if find_spec("litellm") else ["test_*.py"]  # `make test-clients` has them


@pytest.fixture(scope="session")
def address() -> Iterator[str]:
    with serving() as url:
        yield url


@pytest.fixture
def base(address: str) -> str:
    """The base URL of clients."""
    return f"{address}/v1"
