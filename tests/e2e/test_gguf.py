"""A model in a GGUF file, served over real HTTP, answers as the same model in a folder does."""

from pathlib import Path
from typing import Any

import httpx
import pytest

from engine.build import build_engine
from engine.engine import Engine
from engine.types import EngineSettings, Request, Sampling
from model.budget import ExpertBudget
from tests.e2e.live import serving
from tests.weights.gguf.twins import write_twins
from weights.chat import ChatTemplate
from weights.tokenizer import Tokenizer

pytestmark = pytest.mark.slow
TOKENS, LAYERS = 12, 2
SAID = [{"role": "user", "content": "a <think> dog"}]
SCHEMA = {"name": "x", "schema": {"enum": ["a dog", "cats"]}, "strict": True}


def written(engine: Engine, tokenizer: Tokenizer, prompt: list[int], experts: int) -> str:
    """What the engine writes at temperature 0."""
    budget = ExpertBudget((experts,) * LAYERS)
    sampling = Sampling(max_tokens=TOKENS, seed=0, temperature=0.0, stop_token_ids=tokenizer.eos_ids)
    engine.add(Request(f"{experts} {prompt}", tuple(prompt), budget, sampling))
    ids: list[int] = []
    while engine.has_work:
        ids += [event.token for event in engine.step().events if event.token is not None]
    return tokenizer.decode(ids)


def test_a_file_answers_as_its_folder_does(tmp_path: Path) -> None:
    folder, file = write_twins(tmp_path)
    tokenizer, chat = Tokenizer.load(folder), ChatTemplate.load(folder)
    assert chat is not None
    engine, _ = build_engine(EngineSettings(str(folder), threads=1, kv_cache_bytes=1 << 22, step_ms=0))
    plain = written(engine, tokenizer, tokenizer.encode("Once upon a time"), 2)
    fewer = written(engine, tokenizer, tokenizer.encode("    12 日本"), 1)
    reply = written(engine, tokenizer, tokenizer.encode_chat(chat.render(SAID)), 2)
    assert min(map(len, (plain, fewer, reply))) > 3

    fixed: dict[str, Any] = {"max_tokens": TOKENS, "temperature": 0}
    with serving("--model", str(file), "--threads", "1", "--kv-cache-bytes", str(1 << 22)) as live:
        client, model = live.client, live.client.models.list().data[0].id
        assert model == "twin-F32"
        details = httpx.post(f"{live.url}/api/show", json={"model": model}).json()["details"]
        assert (details["format"], details["quantization_level"]) == ("gguf", "F32")
        complete, converse = client.completions.create, client.chat.completions.create
        assert complete(model=model, prompt="Once upon a time", **fixed).choices[0].text == plain
        one: dict[str, Any] = {"extra_body": {"num_experts": 1}}
        assert complete(model=model, prompt="    12 日本", **fixed, **one).choices[0].text == fewer
        said: Any = SAID
        assert converse(model=model, messages=said, **fixed).choices[0].message.content == reply
        form: Any = {"type": "json_schema", "json_schema": SCHEMA}
        shaped = converse(model=model, messages=said, response_format=form, **fixed).choices[0].message.content
        assert shaped in ('"a dog"', '"cats"')
