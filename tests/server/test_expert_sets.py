"""Requests that name an expert set: by its name or an alias, next to counts and rules, and what is refused."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from starlette.testclient import TestClient

from model.budget import ExpertBudget, RoutingRule
from server.experts.sets import ServedSets, load_sets
from tests.server.fakes import INFO, FakeEngine
from tests.server.harness import COMPLETIONS, in_memory
from weights.calibration import cache_folder, checkpoint_hash
from weights.expert_sets import FOLDER, ExpertSet, Loss, write

RANGE = replace(INFO.experts, total=8)
STORIES = ExpertSet(
    format=1,
    name="stories",
    checkpoint="0" * 64,
    text="stories.txt",
    tokens=1000,
    num_experts=8,
    experts=((0, 1, 2, 3, 7), (1, 2, 3, 4, 5), (0, 2, 4, 6, 7)),
    mass=(0.9, 0.8, 0.85),
    task=Loss(1.4, 1.45),
    other=Loss(4.0, 4.2),
)
KEPT = ("11110001", "01111100", "10101011")
SMALL = msgspec.structs.replace(STORIES, name="small", experts=((0, 1, 2),) * 3)
SETS = ServedSets({one.name: one for one in (STORIES, SMALL, msgspec.structs.replace(STORIES, name="k4"))})


@pytest.fixture(scope="module")
def engine() -> FakeEngine:
    engine = FakeEngine()
    engine.info = replace(INFO, experts=RANGE)
    return engine


@pytest.fixture(scope="module")
def client(engine: FakeEngine) -> Iterator[TestClient]:
    with in_memory(engine, sets=SETS) as client:
        yield client


def budget_of(client: TestClient, engine: FakeEngine, **fields: Any) -> ExpertBudget:
    answer = client.post(COMPLETIONS, json={"prompt": "hello", "max_tokens": 2} | fields)
    assert answer.status_code == 200, answer.text
    return engine.seen[-1].budget


def refusal(client: TestClient, **fields: Any) -> tuple[str, str]:
    answer = client.post(COMPLETIONS, json={"prompt": "hello"} | fields)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    return error["param"], error["message"]


def test_a_set_joins_counts_and_rules(client: TestClient, engine: FakeEngine) -> None:
    kept = RoutingRule(kept=KEPT)
    assert budget_of(client, engine, experts={"set": "stories"}) == ExpertBudget((4,) * 3, rule=kept)
    assert budget_of(client, engine, experts={"set": "stories"}, num_experts=5) == ExpertBudget((5,) * 3, rule=kept)
    ruled = budget_of(client, engine, experts={"set": "stories", "count": 2, "threshold": 0.5})
    assert ruled == ExpertBudget((2,) * 3, rule=RoutingRule(threshold=0.5, kept=KEPT))


def test_a_model_alias_names_a_set(client: TestClient, engine: FakeEngine) -> None:
    kept = RoutingRule(kept=KEPT)
    assert budget_of(client, engine, model="tiny@stories") == ExpertBudget((4,) * 3, rule=kept)
    same = {"experts": {"set": "stories", "count": 1}}
    assert budget_of(client, engine, model="tiny@stories", **same) == ExpertBudget((1,) * 3, rule=kept)
    assert budget_of(client, engine, model="tiny@k4") == ExpertBudget((4,) * 3), "a count's alias wins"
    param, message = refusal(client, model="tiny@stories", experts={"set": "k4"})
    assert param == "experts.set" and "must agree" in message and "'stories'" in message


def test_models_list_the_sets(client: TestClient) -> None:
    cards = {card["id"]: card["meta"]["moe"] for card in client.get("/v1/models").json()["data"]}
    stories, k4 = cards["tiny"]["expert_sets"]
    assert (stories["name"], stories["kept"], k4["name"]) == ("stories", 5, "k4")
    assert stories["loss"] == {"task": {"all": 1.4, "kept": 1.45}, "other": {"all": 4.0, "kept": 4.2}}
    assert cards["tiny@stories"]["expert_set"] == "stories"
    assert client.get("/v1/models/tiny@stories").json()["parent"] == "tiny"


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"experts": {"set": "storys"}}, "experts.set", "did you mean 'stories'?"),
        ({"experts": {"set": "xyz"}}, "experts.set", "is not an expert set of this model; it has stories, k4"),
        ({"experts": {"set": "small"}}, "experts.set", "keeps 3 experts of a layer, fewer than the trained count 4"),
        ({"experts": {"set": "stories", "count": 6}}, "experts.set", "5 experts of a layer, fewer than the count 6"),
        ({"experts": {"set": "stories", "count": [4, 4, 6]}}, "experts.set", "fewer than the count 6"),
        ({"experts": {"set": "stories", "normaliser": "k2=6"}}, "experts.normaliser", "more than the 5 experts"),
        ({"experts": {"set": "stories", "auto": {"min_quality": 0.9}}}, "experts", "exclude each other"),
    ],
)  # fmt: skip
def test_what_a_set_cannot_be_is_refused_by_name(
    client: TestClient, fields: dict[str, Any], param: str, said: str
) -> None:
    found, message = refusal(client, **fields)
    assert found == param and said in message


def test_without_sets_a_request_is_told_how_they_are_made() -> None:
    with in_memory() as plain:
        assert (
            "it has none; the operator makes one with `moedial expert-set`"
            in refusal(plain, experts={"set": "stories"})[1]
        )


def test_sets_are_read_from_beside_the_weights_and_from_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "secret" / "tiny"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    assert load_sets(folder) == ServedSets()
    own = msgspec.structs.replace(STORIES, checkpoint=checkpoint_hash(folder))
    write(own, folder)
    write(msgspec.structs.replace(own, name="cached"), cache_folder(folder))
    write(msgspec.structs.replace(own, name="foreign", checkpoint="1" * 64), folder)
    (folder / FOLDER / "broken.json").write_text("{")
    (folder / FOLDER / "Not a name.json").write_text("{")
    found = load_sets(folder)
    assert set(found.sets) == {"stories", "cached"} and found.sets["stories"] == own
    assert set(found.refused) == {"foreign", "broken"}
    assert "belongs to another checkpoint" in found.refused["foreign"]
    assert not any("secret" in reason for reason in found.refused.values())
