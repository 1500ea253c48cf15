"""Runs llama.cpp at long contexts: `python long_driver.py '{"file": ..., "contexts": [...], ...}'`, settings as
`main` reads them; prints a line of JSON for each context and batch.

Run by the interpreter of llama.cpp's own venv; imports nothing of ours. It calls the library that its tools use, by the
declarations that llama-cpp-python ships. One prompt is computed from length to length; at each, its cache is copied for
the other sequences (each has its own copy, as `llama-batched-bench -pps` makes them), and some random tokens are
decoded with one and with several sequences. Everything else is the library's default.
"""

import importlib
import json
import os
import random
import sys
import time
import types
from statistics import median
from typing import Any


def bindings(source: str, libraries: str) -> Any:
    """The declarations alone: their package would import more than is installed."""
    os.environ["LLAMA_CPP_LIB_PATH"] = libraries
    package = types.ModuleType("llama_cpp")
    package.__path__ = [f"{source}/llama_cpp"]
    sys.modules["llama_cpp"] = package
    return importlib.import_module("llama_cpp.llama_cpp")


def load(api: Any, file: str, experts: dict[str, int]) -> Any:
    """The model, read into memory, with integer keys of the file overridden."""
    overrides = (api.llama_model_kv_override * (len(experts) + 1))()  # the last one's empty key ends the list
    for override, (key, value) in zip(overrides, experts.items(), strict=False):
        override.tag, override.key = api.LLAMA_KV_OVERRIDE_TYPE_INT, key.encode()
        override.value.val_i64 = value
    params = api.llama_model_default_params()
    params.kv_overrides, params.load_mode = overrides, api.LLAMA_LOAD_MODE_NONE
    return api.llama_model_load_from_file(file.encode(), params) or sys.exit("the file was not loaded")


class Run:
    """A context with room for all sequences."""

    def __init__(self, api: Any, model: Any, length: int, batch: int, threads: int) -> None:
        params = api.llama_context_default_params()
        params.n_ctx, params.n_seq_max = batch * -(-length // 256) * 256, batch
        params.n_threads = params.n_threads_batch = threads
        self.context = api.llama_init_from_model(model, params) or sys.exit(f"no context for {batch} sequences")
        self.vocabulary = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
        self.memory, self.api, self.room = api.llama_get_memory(self.context), api, int(params.n_batch)

    def decode(self, rows: list[tuple[int, int]]) -> float:
        """Seconds of one call with a random token for each (sequence, position); logits of each sequence's last."""
        batch = self.api.llama_batch_init(len(rows), 0, 1)
        last = {sequence: row for row, (sequence, _) in enumerate(rows)}
        batch.n_tokens = len(rows)
        for row, (sequence, position) in enumerate(rows):
            batch.token[row], batch.pos[row] = random.randrange(3, self.vocabulary), position
            batch.n_seq_id[row], batch.seq_id[row][0] = 1, sequence
            batch.logits[row] = last[sequence] == row
        started = time.perf_counter()
        failed = self.api.llama_decode(self.context, batch)
        self.api.llama_synchronize(self.context)
        took = time.perf_counter() - started
        self.api.llama_batch_free(batch)
        if failed:
            sys.exit(f"llama_decode returned {failed}")
        return took

    def prefill(self, start: int, end: int) -> float:
        """Seconds of the first sequence's prompt from one length to another."""
        parts = range(start, end, self.room)
        return sum(self.decode([(0, at) for at in range(part, min(part + self.room, end))]) for part in parts)

    def copy(self, batch: int, end: int) -> None:
        """Give all others the first one's cache; one token more has the library do it."""
        for sequence in range(1, batch):
            self.api.llama_memory_seq_rm(self.memory, sequence, -1, -1)
            self.api.llama_memory_seq_cp(self.memory, 0, sequence, -1, -1)
        self.decode([(0, end)])
        self.cut(1, end)

    def cut(self, batch: int, end: int) -> None:
        """Forget what was decoded after the prompt."""
        for sequence in range(batch):
            self.api.llama_memory_seq_rm(self.memory, sequence, end, -1)


def main(settings: dict[str, Any]) -> None:
    """Load, and measure every length in turn."""
    random.seed(7)
    api = bindings(settings["source"], settings["libraries"])
    api.llama_backend_init()
    contexts, batches, steps = sorted(settings["contexts"]), settings["batches"], settings["steps"]
    model = load(api, settings["file"], settings["experts"])
    run = Run(api, model, contexts[-1] + steps + 1, max(batches), settings["threads"])
    run.prefill(0, min(128, *contexts))  # warms up
    run.cut(1, 0)
    done, spent = 0, 0.0
    for context in contexts:
        spent += run.prefill(done, context)
        run.copy(max(batches), context)
        done = context
        for batch in batches:
            steps_s = [run.decode([(each, context + step) for each in range(batch)]) for step in range(steps)]
            run.cut(batch, context)
            speeds = {"prefill": context / spent, "decode": batch / median(steps_s)}
            print(json.dumps({"context": context, "batch": batch} | speeds), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
