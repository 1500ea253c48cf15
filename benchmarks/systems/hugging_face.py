"""`transformers` as one of the systems: a plain greedy loop over its model with its dynamic cache and `grouped_mm`
experts, in this process. The expert count is fixed at load, so each session loads it again. It does not use moedial. It
is asked for the families that llama.cpp has too."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.systems.llamacpp import FAMILIES
from benchmarks.systems.system import Rates, Weights
from benchmarks.workload import OUTPUT, PROMPT, prompts


class Transformers:
    """transformers in bfloat16."""

    name = "transformers"
    weights: Weights = "bf16"
    file = ""

    def version(self) -> str:
        return f"{version('transformers')}, grouped_mm"

    def refuses(self, config: dict[str, Any]) -> str | None:
        try:
            version("transformers")
        except PackageNotFoundError:
            return "not installed"
        return None if config["model_type"] in FAMILIES else f"it does not know {config['model_type']}"

    @contextmanager
    def open(self, folder: Path, count: int) -> Iterator["TransformersSession"]:
        from transformers import AutoModelForCausalLM
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, num_experts_per_tok=count, experts_implementation="grouped_mm"
        )
        yield TransformersSession(model.eval())


@dataclass(frozen=True, slots=True)
class TransformersSession:
    """A loaded model."""

    model: Any

    def warm_up(self) -> None:
        self._run(1)

    def run(self, batches: Sequence[int]) -> dict[int, Rates]:
        return {batch: self._run(batch) for batch in batches}

    @torch.inference_mode()
    def _run(self, batch: int) -> Rates:
        ids = torch.tensor(prompts(batch, self.model.config.vocab_size))
        started = time.perf_counter()
        out = self.model(ids, use_cache=True, logits_to_keep=1)
        token = out.logits[:, -1].argmax(-1, keepdim=True)
        first = time.perf_counter()
        for _ in range(OUTPUT - 1):
            out = self.model(token, past_key_values=out.past_key_values, use_cache=True)
            token = out.logits[:, -1].argmax(-1, keepdim=True)
        decode = batch * (OUTPUT - 1) / (time.perf_counter() - first)
        return Rates(batch * PROMPT / (first - started), decode)
