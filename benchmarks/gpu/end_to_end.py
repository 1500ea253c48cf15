"""Whole random models of published shapes through the real engine: expert count × batch against the floor that memory
sets, mixed counts against the larger one for all, prefill, and `transformers` in the same run.
"""

import time
from collections.abc import Sequence
from math import prod
from typing import Any

import torch

from benchmarks.gpu.decoders import MODELS, toy
from benchmarks.gpu.engines import Loaded, Speed, Workload, loaded
from benchmarks.gpu.layers import Ceiling
from benchmarks.gpu.part import Part
from benchmarks.gpu.timing import forget
from benchmarks.touched import expert_weights, shared_weights
from model.shapes.decoder import DecoderConfig

BATCHES = (1, 8, 32, 128)
COUNTS = (8, 2, 1)
TARGETS = {1: 0.55, 32: 0.75}  # of the floor, by batch
MIXED = {"OLMoE-1B-7B": {8: 1.25, 32: 1.05}, "Qwen3-30B-A3B": {8: 1.4, 32: 1.2}}  # over the larger count for all
TIMES_TRANSFORMERS = 5.0  # at batch 1, over its default path
WAYS = (None, "grouped_mm", "eager")  # of transformers; None: what it chooses
LOAD = Workload(prompt=128, output=64)


def run(part: Part) -> None:
    """One model after the other: both together do not fit a card."""
    ceiling = Ceiling.of(part)
    for name, raw in list(MODELS.items())[: 1 if part.dry else None]:
        speeds: dict[tuple[int, int], Speed] = {}
        with part.tried(f"{name} in our engine"), torch.inference_mode():
            _ours(part, name, raw, ceiling, speeds)
        forget()
        for way in WAYS[:1] if part.dry else WAYS:
            what = f"{name} in transformers, {way or 'as it chooses'}"
            if part.enough(what, 25):
                with part.tried(what), torch.inference_mode():
                    _transformers(part, name, raw, way, speeds)
            forget()


def _ours(part: Part, name: str, raw: dict[str, Any], ceiling: Ceiling, speeds: dict[tuple[int, int], Speed]) -> None:
    """All batches and counts, then mixed counts."""
    made = loaded(raw, part)
    load, batches = (Workload(5, 3), (2,)) if part.dry else (LOAD, BATCHES)
    trained = made.config.experts.trained
    for batch in batches:
        for count in (trained, 1) if part.dry else COUNTS:
            if not part.enough(f"{name}, batch {batch}, K = {count}", 3):
                continue
            with part.tried(f"{name}, batch {batch}, K = {count}"):
                speed = _measured(made, [count] * batch, load)
                speeds[batch, count] = speed
                _row(part, name, made, [count] * batch, speed, ceiling, load)
    for batch in batches if part.dry else batches[1:]:
        mixed = [trained if number % 2 == 0 else max(1, trained // 4) for number in range(batch)]
        if (batch, trained) in speeds and part.enough(f"{name}, batch {batch}, mixed", 3):
            with part.tried(f"{name}, batch {batch}, mixed"):
                speed, all_large = _measured(made, mixed, load), speeds[batch, trained]
                _row(part, name, made, mixed, speed, ceiling, load)
                part.add("mixed counts over the larger for all", model=name, batch=batch,
                         decode=None if part.dry else speed.decode / all_large.decode,
                         prefill=None if part.dry else speed.prefill / all_large.prefill,
                         target=MIXED[name].get(batch, "–"))  # fmt: skip


def _measured(made: Loaded, counts: Sequence[int], load: Workload) -> Speed:
    """After two rounds that compile kernels and record graphs."""
    for _ in range(2):
        made.run(counts, Workload(load.prompt, 4))
    return made.run(counts, load)


def _row(
    part: Part, name: str, made: Loaded, counts: list[int], speed: Speed, ceiling: Ceiling, load: Workload
) -> None:
    batch = len(counts)
    moved = step_bytes(made.config, counts, load.prompt + load.output / 2)
    step = ceiling.micro(moved)
    floor = None if step is None else batch / step * 1e6
    shown = str(counts[0]) if len({*counts}) == 1 else f"{max(counts)} / {min(counts)} mixed"
    part.add("engine, tokens/s", model=name, backend=made.backend, batch=batch, K=shown,
             prefill=None if part.dry else speed.prefill, decode=None if part.dry else speed.decode, gb=moved / 1e9,
             floor=floor, share=None if floor is None or part.dry else speed.decode / floor,
             target=TARGETS.get(batch, "–"))  # fmt: skip


def step_bytes(config: DecoderConfig, counts: Sequence[int], context: float) -> float:
    """Bytes in bfloat16 that a decoding step of tokens with these counts must read.

    Random routers choose evenly, so that of E experts E · (1 - Π (1 - K / E)) are read.
    """
    touched = 0.0
    for shape in config.mixtures:
        touched += shape.num_experts * (1 - prod(1 - count / shape.num_experts for count in counts))
    keys = 0.0
    for kind in config.memory:
        keys += kind.per_token * context * len(counts)
    return 2 * (shared_weights(config) + touched * expert_weights(config) + keys)


def _transformers(
    part: Part, name: str, raw: dict[str, Any], way: str | None, speeds: dict[tuple[int, int], Speed]
) -> None:
    """A plain greedy loop at the trained count, with its dynamic cache."""
    from transformers import AutoConfig, AutoModelForCausalLM

    raw = toy(raw) if part.dry else raw
    fields = {key: value for key, value in raw.items() if key not in ("model_type", "architectures", "dtype")}
    config = AutoConfig.for_model(raw["model_type"], **fields)
    if way is not None:
        config._experts_implementation = way
    with part.device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32 if part.dry else torch.bfloat16).eval()
    load, batches = (Workload(5, 3), (2,)) if part.dry else (Workload(LOAD.prompt, 32), (1, 32))
    chosen = getattr(model.config, "_experts_implementation", None)
    for batch in batches:
        if not part.enough(f"{name} in transformers, {way}, batch {batch}", 5):
            return
        _transformers_speed(model, batch, Workload(load.prompt, 3), part.device)
        theirs = _transformers_speed(model, batch, load, part.device)
        ours = speeds.get((batch, raw["num_experts_per_tok"]))
        ratio = None if ours is None or part.dry else ours.decode / theirs.decode
        prefill = None if ours is None or part.dry else ours.prefill / theirs.prefill
        part.add("transformers, tokens/s", model=name, experts=str(chosen), asked=way or "–", batch=batch,
                 prefill=None if part.dry else theirs.prefill, decode=None if part.dry else theirs.decode,
                 ours_over_it_prefill=prefill, ours_over_it_decode=ratio,
                 target=TIMES_TRANSFORMERS if batch == 1 and way is None else "–")  # fmt: skip


def _transformers_speed(model: Any, batch: int, load: Workload, device: torch.device) -> Speed:
    generator = torch.Generator().manual_seed(7)
    ids_BT = torch.randint(3, model.config.vocab_size, (batch, load.prompt), generator=generator).to(device)
    began = time.perf_counter()
    out = model(ids_BT, use_cache=True, logits_to_keep=1)
    token_B1 = out.logits[:, -1].argmax(-1, keepdim=True)
    token_B1.tolist()  # waits
    first = time.perf_counter()
    for _ in range(load.output - 1):
        out = model(token_B1, past_key_values=out.past_key_values, use_cache=True)
        token_B1 = out.logits[:, -1].argmax(-1, keepdim=True)
    token_B1.tolist()
    ended = time.perf_counter()
    return Speed(batch * load.prompt / (first - began), batch * (load.output - 1) / (ended - first))
