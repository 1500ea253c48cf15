"""The demo models over real HTTP: each kind writes words, and does less work where a request asks for less."""

import re
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.live import Live, serving

PROMPT = "Once upon a time, there was a little girl named Lily. She"
WORDS = set(re.findall("[a-z]+", (Path(__file__).parent / "stories.txt").read_text().lower()))
TOKENS = 40
# Model, trained count, and a request for less (None: one for more). Those that are like another one are redundant.
ASKED = [
    ("soft-stories", 8, {"count": 1}),
    # `test_encoder_decoders.py` asks another Switch Transformer for more than its count.
    pytest.param("switch-stories", 1, None, marks=pytest.mark.redundant),
    pytest.param("moe-plus-plus-stories", 2, {"free_bias": 3.0}, marks=pytest.mark.redundant),
    pytest.param("deep-stories", 8, {"count": 1}, marks=pytest.mark.redundant),
    pytest.param("remoe-stories", 8, {"gate_offset": -0.5}, marks=pytest.mark.redundant),
    pytest.param("soft-t5-stories", 8, {"count": 1}, marks=pytest.mark.redundant),
    pytest.param("dynmoe-stories", 8, {"gate_offset": -0.5}, marks=pytest.mark.redundant),
    pytest.param("mu-stories", 32, {"count": 1}, marks=pytest.mark.redundant),
    pytest.param("st-moe-stories", 2, {"count": 1}, marks=pytest.mark.redundant),
]
pytestmark = pytest.mark.slow


def written(live: Live, experts: dict[str, Any] | None) -> tuple[str, dict[str, Any]]:
    """A greedy answer and its usage."""
    body: dict[str, Any] = {"prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
    body |= {"experts": experts} if experts else {}
    answer = httpx.post(f"{live.url}/v1/completions", json=body, timeout=60).raise_for_status().json()
    return answer["choices"][0]["text"], answer["usage"]


@pytest.mark.parametrize("name, trained, less", ASKED)
def test_a_demo_writes_words_and_its_count_is_what_runs(name: str, trained: int, less: dict[str, Any] | None) -> None:
    with serving("--model", name, "--threads", "1", "--allow-extrapolated-experts") as live:
        model = httpx.get(f"{live.url}/v1/models/{name}").raise_for_status().json()
        assert model["id"] == name and model["meta"]["moe"]["quality"], "the card's figures"
        plain, usage = written(live, None)
        words = re.findall("[a-z]+", plain.lower())
        assert len(words) > 15 and sum(word in WORDS for word in words) > 0.7 * len(words), plain
        same, _ = written(live, {"count": trained})
        assert same == plain, "a silent request gets the trained count"
        other, moved = written(live, less or {"count": 2})
        few, many = sorted((usage, moved), key=lambda one: one["routed_pairs"])
        assert few is (moved if less else usage) and few["num_experts"] < many["num_experts"], (usage, moved)
        assert usage["completion_tokens"] == moved["completion_tokens"] == TOKENS and other
