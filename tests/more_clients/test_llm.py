"""The command `llm` against a real server, which its own file of extra models names."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from tests.clients.inputs import DrawAnimal
from tests.clients.running import MODEL

Only = Callable[[int], AbstractContextManager[None]]
Ask = Callable[..., str]
SURE = ("-o", "temperature", "0", "-o", "seed", "1", "-o", "max_tokens")


@pytest.fixture
def ask(base: str, tmp_path: Path) -> Ask:
    """Runs `llm` in a home of its own; what it prints."""
    models = [
        {"model_id": "stories", "model_name": f"{MODEL}@k2", "supports_schema": True},
        {"model_id": "header", "model_name": MODEL, "headers": {"X-Num-Experts": "2"}},
        {"model_id": "text", "model_name": f"{MODEL}@k2", "completion": True},
    ]
    lines = [json.dumps(model | {"api_base": base}) for model in models]
    (tmp_path / "extra-openai-models.yaml").write_text("".join(f"- {line}\n" for line in lines))

    def asked(*words: str) -> str:
        command = [sys.executable, "-m", "llm", *words]
        environment = os.environ | {"LLM_USER_PATH": str(tmp_path)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return asked


def test_prompt_and_stream(ask: Ask, only: Only) -> None:
    with only(2):
        streamed = ask("-m", "stories", "Tell me a story.", *SURE, "12")
        whole = ask("-m", "stories", "--no-stream", "Tell me a story.", *SURE, "12")
        header = ask("-m", "header", "Tell me a story.", *SURE, "12")
    assert streamed.strip() and streamed == whole == header
    first, *_ = json.loads(ask("logs", "--json", "-n", "0"))
    assert first["output_tokens"] == 12 and first["token_details"] is not None


def test_a_conversation(ask: Ask, only: Only) -> None:
    with only(2):
        ask("-m", "stories", "Tell me a story.", *SURE, "12")
        assert ask("-c", "And then?", *SURE, "12").strip()


def test_a_completion(ask: Ask, only: Only) -> None:
    with only(2):
        assert ask("-m", "text", "Once upon a time", *SURE, "12").strip()


@pytest.mark.parametrize("flag", [(), ("--no-stream",)], ids=["streamed", "whole"])
def test_a_shape(ask: Ask, only: Only, flag: tuple[str, ...]) -> None:
    schema = json.dumps(DrawAnimal.model_json_schema())
    with only(2):
        answer = ask("-m", "stories", *flag, "--schema", schema, "Draw.", *SURE, "60")
    assert DrawAnimal.model_validate_json(answer)
