"""Runs ik_llama.cpp on a GGUF file: `python ik_driver.py '{"file": ..., "experts": ..., ...}'`, settings as `main`
reads them; prints a line of JSON per batch, with the keys of llama.cpp's `llama-batched-bench`.

Run by the interpreter of ik_llama.cpp's own venv; imports nothing of ours. It calls the library as that tool does:
different random prompts in one batch, then one token of every sequence in each step, random instead of picked. The
library's fast paths are on: weights repacked at load, gate and up of experts fused, flash attention.
"""

import json
import random
import sys
import time
from typing import Any

from ik_llama_cpp import _ctypes_api as api

INTEGER = 0  # the tag of an overridden integer key


def load(file: str, experts: dict[str, int], repack: bool) -> int:
    """The model, read into memory, with integer keys of the file overridden."""
    overrides = (api.llama_model_kv_override * (len(experts) + 1))()  # the last one's empty key ends the list
    for override, (key, value) in zip(overrides, experts.items(), strict=False):
        override.tag, override.key, override.value.val_i64 = INTEGER, key.encode(), value
    params = api.llama_model_default_params()
    params.kv_overrides = overrides
    params.use_mmap, params.repack_tensors = False, repack
    model: int | None = api.llama_model_load_from_file(file.encode(), params)
    if not model:
        raise SystemExit("the file was not loaded")
    return model


def context(model: int, batch: int, length: int, threads: int) -> int:
    """A cache of `batch` sequences; prompts are computed in parts of at most 2,048 tokens, as its authors advise for
    mixtures."""
    params = api.llama_context_default_params()
    params.n_ctx, params.n_seq_max = batch * length, batch
    params.n_batch = params.n_ubatch = 2048
    params.n_threads = params.n_threads_batch = threads
    made: int | None = api.llama_init_from_model(model, params)
    if not made:
        raise SystemExit(f"no context for {batch} sequences")
    return made


def decode(context: int, rows: list[tuple[int, int]], vocabulary: int) -> None:
    """One call with a random token for each (sequence, position); the logits of each sequence's last are computed."""
    batch = api.llama_batch_init(len(rows), 0, 1)
    last = {sequence: row for row, (sequence, _) in enumerate(rows)}
    batch.n_tokens = len(rows)
    for row, (sequence, position) in enumerate(rows):
        batch.token[row], batch.pos[row] = random.randrange(3, vocabulary), position
        batch.n_seq_id[row], batch.seq_id[row][0] = 1, sequence
        batch.logits[row] = last[sequence] == row
    failed = api.llama_decode(context, batch)
    api.llama_get_logits_ith(context, last[rows[0][0]])  # waits for the result
    api.llama_batch_free(batch)
    if failed:
        raise SystemExit(f"llama_decode returned {failed}")


def prefill(context: int, batch: int, prompt: int, vocabulary: int) -> None:
    """All prompts, in calls of at most 2,048 tokens."""
    rows = [(sequence, position) for sequence in range(batch) for position in range(prompt)]
    for start in range(0, len(rows), 2048):
        decode(context, rows[start : start + 2048], vocabulary)


def measure(model: int, batch: int, prompt: int, output: int, threads: int) -> dict[str, float]:
    """Tokens per second of one batch."""
    vocabulary = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
    cache = context(model, batch, prompt + output, threads)
    started = time.perf_counter()
    prefill(cache, batch, prompt, vocabulary)
    first = time.perf_counter()
    for position in range(prompt, prompt + output):
        decode(cache, [(sequence, position) for sequence in range(batch)], vocabulary)
    ended = time.perf_counter()
    api.llama_free(cache)
    return {
        "pl": batch,
        "speed_pp": batch * prompt / (first - started),
        "speed_tg": batch * output / (ended - first),
    }


def main(settings: dict[str, Any]) -> None:
    """Load once, measure every batch in turn."""
    random.seed(7)
    api.llama_backend_init()
    model = load(settings["file"], settings["experts"], settings["repack"])
    for batch in settings["batches"]:
        print(
            json.dumps(measure(model, batch, settings["prompt"], settings["output"], settings["threads"])), flush=True
        )


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
