"""Schemathesis reads the contract and asks what it allows, and what it does not: no 5xx, and every refusal in the shape
of its API.

The engine is a fake behind a real port; `FUZZED_URL=http://localhost:8000 pytest THIS` asks a running server instead.
It knows no field of the API but `model`: nearly every text would be the name of a model that is not there.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, assume, given, settings
from schemathesis import APIOperation, Case, GenerationMode, Response
from schemathesis.openapi.loaders import from_dict

from server.http.openapi import ERRORS
from server.schemas.answers import Error
from tests.server.calibrations import calibration
from tests.server.fakes import FakeEngine
from tests.server.harness import app_of, on_loopback

EXAMPLES = 40  # of each route, of what is allowed and of what is not
FEW = 5  # of routes whose bodies are those of other routes in another form
OTHER_FORMS = ("/v1/messages", "/api/")
SECONDS = 10.0  # for one answer
CONTRACT: dict[str, Any] = app_of(FakeEngine()).openapi()
OPERATIONS: dict[str, APIOperation] = {r.ok().label: r.ok() for r in from_dict(CONTRACT).get_all_operations()}
BODIES = [label for label in OPERATIONS if label.startswith("POST")]
AS_MESSAGES = "POST /v1/messages/count_tokens"  # the same body, nearly


def reproducible(label: str) -> settings:
    """Settings of the tests of one route."""
    return settings(
        max_examples=FEW if label.split()[1].startswith(OTHER_FORMS) else EXAMPLES,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    if url := os.environ.get("FUZZED_URL"):
        yield url
        return
    with on_loopback(FakeEngine(), calibration=calibration()) as (url, _):
        yield url


def test_the_contract_is_whole() -> None:
    """A reference that leads nowhere makes readers drop the whole body."""
    for name in re.findall(r'"#/components/schemas/([^"]+)"', json.dumps(CONTRACT)):
        assert name in CONTRACT["components"]["schemas"], name
    assert [label for label in BODIES if not OPERATIONS[label].body] == []


def answer(case: Case, address: str) -> Response:
    """A 501 counts as broken, too: what the contract names has to be there."""
    response = case.call(base_url=address, timeout=SECONDS)
    told = f"{response.status_code} {response.text:.500}\n{case.as_curl_command()}"
    assert response.status_code < 500, told
    if response.status_code >= 400:
        ERRORS.get(case.path, Error).model_validate_json(response.text, strict=True)
    return response


def once(labels: Iterable[str]) -> list[Any]:
    """The labels as parameters of a test; those that repeat another are redundant."""
    return [pytest.param(one, marks=[pytest.mark.redundant] * (one == AS_MESSAGES)) for one in labels]


@pytest.mark.parametrize("label", once(OPERATIONS))
def test_what_the_contract_allows(label: str, address: str) -> None:
    seen: Counter[int] = Counter()

    @reproducible(label)
    @given(case=OPERATIONS[label].as_strategy(generation_mode=GenerationMode.POSITIVE))
    def ask(case: Case) -> None:
        if isinstance(case.body, dict):
            case.body.pop("model", None)
        seen[answer(case, address).status_code] += 1

    ask()
    print(label, dict(seen))
    assert seen[200] or "{" in label, "nothing was ever accepted, so next to nothing was tried"


@pytest.mark.parametrize("label", once(BODIES))
def test_what_the_contract_forbids(label: str, address: str) -> None:
    @reproducible(label)
    @given(case=OPERATIONS[label].as_strategy(generation_mode=GenerationMode.NEGATIVE))
    def ask(case: Case) -> None:
        assume(case.body is not None)
        answer(case, address)

    ask()
