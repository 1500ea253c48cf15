"""Runs vLLM on prompts that come line by line as JSON: `python vllm_driver.py '{"folder": ..., "count": ..., ...}'`.

Run by the interpreter of vLLM's own venv; imports nothing of ours. The answer to {"prompts": [[id, ...], ...]} is
{"prefill": seconds, "all": seconds}: one run for a single new token each, one for all of them, so that decoding is the
difference. Prompts are token ids, so no tokenizer is loaded, and nothing is cached between runs.
"""

import json
import sys
import time
from typing import Any

MARK = "RESULT "  # vLLM logs to the same stream


def load(folder: str, count: int, context: int, sequences: int, step_tokens: int, eager: bool) -> Any:
    """An offline engine in this very process, at one expert count."""
    from vllm import LLM

    return LLM(
        model=folder,
        dtype="bfloat16",
        skip_tokenizer_init=True,
        hf_overrides={"num_experts_per_tok": count},
        enforce_eager=eager,
        max_model_len=context,
        max_num_seqs=sequences,
        max_num_batched_tokens=step_tokens,
        enable_prefix_caching=False,
        kv_cache_memory_bytes=1 << 30,
        disable_log_stats=True,
    )


def seconds(engine: Any, prompts: list[list[int]], output: int) -> float:
    """One greedy run of all prompts."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True, detokenize=False)
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    started = time.perf_counter()
    outputs = engine.generate(inputs, sampling, use_tqdm=False)
    took = time.perf_counter() - started
    if any(len(one.outputs[0].token_ids) != output for one in outputs):
        raise RuntimeError("a sequence stopped early")
    return took


def main(settings: dict[str, Any]) -> None:
    """Load, say so, answer until the input ends."""
    output = settings.pop("output")
    engine = load(**settings)
    print(MARK + "{}", flush=True)
    for line in sys.stdin:
        prompts = json.loads(line)["prompts"]
        answer = {"prefill": seconds(engine, prompts, 1), "all": seconds(engine, prompts, output)}
        print(MARK + json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
