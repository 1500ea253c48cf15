"""The engine inside a Python program, without HTTP: python examples/embed_engine.py [MODEL] [PROMPT].

One thread owns the engine: `add` queues requests, each `step` computes at most one token of every running one, and
the events say what came out. Three counts run in the same steps here.
"""

import sys

from engine.build import build_engine
from engine.types import EngineSettings, Request, Sampling
from weights.folder import resolve_model
from weights.tokenizer import Tokenizer


def main(model: str = "topk-stories", prompt: str = "Once upon a time") -> None:
    folder = resolve_model(model)  # a folder, a hub id, or the name of a bundled model
    engine, info = build_engine(EngineSettings(model=str(folder), kv_cache_bytes=1 << 26))
    tokenizer = Tokenizer.load(folder)
    print(f"{info.family}, {info.parameters / 1e6:.1f} M parameters, {info.kernels}")

    ids = tuple(tokenizer.encode(prompt))
    for count in (1, 4, 8):
        sampling = Sampling(max_tokens=48, seed=1, temperature=0.7, stop_token_ids=tokenizer.eos_ids)
        engine.add(Request(f"K = {count}", ids, info.experts.budget(count), sampling))

    generated: dict[str, list[int]] = {}
    while engine.has_work:
        for event in engine.step().events:
            if event.token is not None:
                generated.setdefault(event.request_id, []).append(event.token)
            if event.finish is not None:
                answer = tokenizer.decode(generated.get(event.request_id, []))
                print(f"{event.request_id}: {prompt}{answer} [{event.finish}]")


if __name__ == "__main__":
    main(*sys.argv[1:])
