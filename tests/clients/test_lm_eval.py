"""lm-evaluation-harness against a real server, with the server's own tokenizer and no hub."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.clients.running import CONTEXT, MODEL, ROOT
from tests.clients.tasks import CHOOSE, CONTINUE, write_tasks

OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1", "OPENAI_API_KEY": "unused"}


def evaluated(base: str, folder: Path, *options: str, **arguments: object) -> dict[str, Any]:
    """Run both tasks with the command; returns the report, with every sample by task."""
    write_tasks(folder / "tasks")
    values = {"base_url": f"{base}/completions", "max_length": CONTEXT} | arguments
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "local-completions", "--log_samples"]
    command += ["--model_args", ",".join(f"{name}={value}" for name, value in values.items())]
    command += [
        "--tasks",
        "stories_continue,stories_choose",
        "--include_path",
        "tasks",
        "--output_path",
        "out",
        *options,
    ]
    done = subprocess.run(
        command, cwd=folder, env=os.environ | OFFLINE | {"HF_HOME": str(folder)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (report,) = folder.glob("out/**/results_*.json")
    samples = {task: rows for task in ("stories_continue", "stories_choose") if (rows := _samples(folder, task))}
    return json.loads(report.read_text()) | {"samples": samples}


def _samples(folder: Path, task: str) -> list[dict[str, Any]]:
    (path,) = folder.glob(f"out/**/samples_{task}_*.jsonl")
    return sorted(map(json.loads, path.read_text().splitlines()), key=lambda row: row["doc_id"])


def scored(base: str, model: str, context: str, continuation: str, begun: bool = False) -> float:
    """The same log-likelihood, requested directly: the same tokens, and no answer at all.

    `begun`: the token that begins a text stands before every context, and not before an empty one alone.
    """
    first = tokens(base, "<|endoftext|>") if begun or not context else []
    before = first + (tokens(base, context) if context else [])
    after = (first + tokens(base, context + continuation))[len(before) :]
    body = {"model": model, "prompt": before + after, "max_tokens": 0, "echo": True, "logprobs": 1}
    answer = httpx.post(f"{base}/completions", json=body | {"temperature": 0, "seed": 1234}).json()
    return sum(answer["choices"][0]["logprobs"]["token_logprobs"][len(before) :])


def tokens(base: str, text: str) -> list[int]:
    body = {"prompt": text, "add_special_tokens": False}
    return httpx.post(f"{base.removesuffix('/v1')}/tokenize", json=body).json()["tokens"]


@pytest.mark.parametrize("count", [1, 8])
def test_both_kinds_of_task(base: str, tmp_path: Path, count: int) -> None:
    model = f"{MODEL}@k{count}"
    many = ("--batch_size", "2")
    report = evaluated(base, tmp_path, *many, model=model, tokenizer_backend="remote", num_concurrent=2)
    assert report["results"]["stories_choose"]["acc,none"] >= 0.5
    assert all(row["resps"][0][0] for row in report["samples"]["stories_continue"])
    assert len(report["samples"]["stories_continue"]) == len(CONTINUE)
    for row in report["samples"]["stories_choose"]:
        for asked, answer in zip(row["arguments"].values(), row["resps"], strict=True):
            expected = scored(base, model, asked["arg_0"], asked["arg_1"])
            assert float(answer[0][0]) == pytest.approx(expected, rel=1e-4), asked
    assert len(report["samples"]["stories_choose"]) == len(CHOOSE)


def test_texts_begin_with_the_token_that_begins_a_text(base: str, tmp_path: Path) -> None:
    """As docs/clients.md tells it; each token that is scored is one that the server itself makes of the text."""
    folder = str(ROOT / "weights" / "bundled" / MODEL)
    own = {"tokenizer_backend": "huggingface", "tokenizer": folder, "add_bos_token": "true"}
    report = evaluated(base, tmp_path, "--batch_size", "2", model=f"{MODEL}@k8", **own)
    for row in report["samples"]["stories_choose"]:
        for asked, answer in zip(row["arguments"].values(), row["resps"], strict=True):
            expected = scored(base, f"{MODEL}@k8", asked["arg_0"], asked["arg_1"], begun=True)
            assert float(answer[0][0]) == pytest.approx(expected, rel=1e-4), asked


def test_a_count_by_generation_arguments(base: str, tmp_path: Path) -> None:
    """One by one, tokenizer found by asking; only tasks that generate can add a field."""
    report = evaluated(base, tmp_path, "--gen_kwargs", "num_experts=2", model=MODEL)
    assert all(
        row["arguments"]["gen_args_0"]["arg_1"]["num_experts"] == 2 for row in report["samples"]["stories_continue"]
    )
