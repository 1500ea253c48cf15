"""Whole decoders on the CUDA backend: the same bits alone, in a batch, at any chunking and under graph replay; every
family's tiny configs and the bundled models against plain torch.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.checkpoints import DEEPSEEK_900M
from benchmarks.gpu.decoders import MODELS, on_kernels, on_torch, random_decoder, toy
from benchmarks.gpu.part import Part
from model.backends.base import Runnable
from tests.families.examples import examples_of
from tests.model.tiny import PagedRun
from weights.config import families

PAGE = 64
ATOL = 2e-3  # of float32 logits of tiny decoders, which are about 1
MOST = 0.05  # relative error of a bundled model's bfloat16 logits
AGREEING = 0.95  # share of its best tokens


def run(part: Part) -> None:
    """All decoders, on a GPU side by side."""
    jobs: list[tuple[str, Callable[[], None]]] = []
    for name, raw in (MODELS | {"DeepSeek-V3, small": DEEPSEEK_900M}).items():
        jobs.append((f"bits of a decoder like {name}", partial(_bits, part, name, raw)))
        if part.dry:
            break
    jobs += [(f"text of {name}", partial(_bundled, part, name)) for name in ("topk-stories", "infinity-stories")]
    for family, number in _examples(part.dry):
        jobs.append((f"{family} {number}", partial(_family, part, family, number)))
    part.share(jobs)


def _examples(dry: bool) -> Iterator[tuple[str, int]]:
    """Every family's tiny configs; on a dry run one."""
    for family in ["gpt_oss"] if dry else families():
        yield from ((family, number) for number in range(1 if dry else len(examples_of(family))))


def _config(family: str, number: int) -> dict[str, Any]:
    """The config.json of a family's example. transformers is imported here, where processes are forked already: it may
    ask for a GPU."""
    from transformers import AutoConfig

    from tests.families import reference

    fields = reference.merged(reference.example_list(family)[number])
    config = AutoConfig.for_model(reference.SAME.get(family, family), **fields)
    raw: dict[str, Any] = json.loads(config.to_json_string())
    return raw


def _logits(
    model: Runnable, rows: list[list[int]], counts: list[list[int]], steps: list[dict[int, int]]
) -> list[Tensor]:
    """Logits [T, V] of each sequence, computed in these steps; a row's last step may stand for all that are left."""
    run = PagedRun(model, rows, counts, PAGE)
    parts: list[list[Tensor]] = [[] for _ in rows]
    for step in steps:
        for row, part in run.step(step).items():
            parts[row].append(part.clone())
    return [torch.cat(part) for part in parts]


def _ids(number: int, length: int, vocabulary: int) -> list[int]:
    generator = torch.Generator().manual_seed(number)
    return torch.randint(3, vocabulary, (length,), generator=generator).tolist()


def _bits(part: Part, name: str, raw: dict[str, Any]) -> None:
    """Two layers of a published shape. Decoding steps one by one are replays of a graph from the third on."""
    length, others = (4, 1) if part.dry else (90, 7)
    raw = toy(raw) if part.dry else raw | {"num_hidden_layers": 2, "vocab_size": 4096}
    dtype = torch.float32 if part.dry else torch.bfloat16
    decoder = random_decoder(raw, part.device, dtype)
    model, layers = on_kernels(decoder, 256), len(decoder.config.mixtures)
    trained, vocabulary = decoder.config.experts.trained, raw["vocab_size"]
    for count in (trained,) if part.dry else (1, 2, trained, trained + 1):
        rows = [_ids(number, length, vocabulary) for number in range(1 + others)]
        counts = [[count] * layers, *([1 + number % trained] * layers for number in range(others))]
        (whole,) = _logits(model, rows[:1], counts[:1], [{0: length}])
        last = 1 if part.dry else 20
        one_by_one = [{0: length - last}, *[{0: 1}] * last]
        beside = [{number: length for number in range(1, 1 + others)}]
        ways = {
            "in chunks": [{0: 3}, {0: length - 3}],
            "one token a step (graph replay)": one_by_one,
            "prompt beside others": [{0: length} | beside[0]],
            "decoded beside others": [{0: length - last} | {row: length - last for row in range(1, 1 + others)},
                                      *[dict.fromkeys(range(1 + others), 1)] * last],
        }  # fmt: skip
        for way, steps in list(ways.items())[-1 if part.dry else 0 :]:
            alone = way in ("in chunks", "one token a step (graph replay)")
            given = (rows[:1], counts[:1]) if alone else (rows, counts)
            found = _logits(model, *given, steps)[0]
            same = bool(torch.equal(found, whole))
            part.add("bits of a whole decoder", decoder=name, K=count, way=way,
                     largest=float((found - whole).abs().max()), equal=None if part.dry else same)  # fmt: skip


def _family(part: Part, family: str, number: int) -> None:
    """Kernels against plain torch on the same device, in float32, at one expert, as trained, and at most. Families
    that transformers does not know, and those with an encoder, have no kernels."""
    from tests.families import reference

    if family in (*reference.OWN, *reference.ENCODERS):
        return
    decoder = random_decoder(_config(family, number), part.device, torch.float32)
    decoder.config = replace(decoder.config, extrapolates=True)
    model, plain = on_kernels(decoder, 64), on_torch(decoder)
    experts, layers = decoder.config.experts, len(decoder.config.mixtures)
    ids, steps = _ids(1, 12, decoder.config.vocabulary), [{0: 9}, {0: 1}, {0: 1}, {0: 1}]
    counts_of = sorted({1, experts.trained, experts.maximum}) if layers else [1]
    if part.dry:
        steps, counts_of = [{0: 3}, {0: 1}], counts_of[1:2]
    for count in counts_of:
        counts = [[count] * layers]
        found, wanted = (_logits(one, [ids], counts, steps)[0].float() for one in (model, plain))
        error = float((found - wanted).abs().max())
        part.add("families against plain torch", config=f"{family} {number}", kernels=model.kernels, K=count,
                 largest=error, most=ATOL, holds=error <= ATOL)  # fmt: skip


def _bundled(part: Part, name: str) -> None:
    """A bundled model in bfloat16 on kernels against float32 in plain torch on the CPU, over its own greedy text."""
    from weights.folder import resolve_model
    from weights.load import load_model

    folder, tokens = resolve_model(name), 4 if part.dry else 64
    plain, _ = load_model(folder, "float32")
    experts, layers = plain.config.experts, len(plain.config.mixtures)
    prompt = _ids(5, 8, plain.config.vocabulary)
    counts = [[experts.trained] * layers]
    wanted, text = _greedy(on_torch(plain), prompt, counts, tokens)
    if part.dry:
        part.add("bundled models", model=name, tokens=tokens, error=None, most=MOST, agreeing=None, holds=None)
        return
    decoder, _ = load_model(folder, "bfloat16", device=str(part.device))
    (found,) = _logits(on_kernels(decoder, len(text)), [text], counts, [{0: len(wanted)}])
    error = float((found - wanted).square().mean().sqrt() / wanted.std())
    agreeing = float((found.argmax(-1) == wanted.argmax(-1)).float().mean())
    part.add("bundled models", model=name, tokens=tokens, error=error, most=MOST, agreeing=agreeing,
             holds=error <= MOST and agreeing >= AGREEING)  # fmt: skip


def _greedy(model: Runnable, prompt: list[int], counts: list[list[int]], tokens: int) -> tuple[Tensor, list[int]]:
    """Logits of all positions, and the ids with so many more that follow greedily."""
    ids = [*prompt, *[0] * tokens]
    run = PagedRun(model, [ids], counts, PAGE)
    parts = [run.step({0: len(prompt)})[0].float()]
    ids[len(prompt)] = int(parts[-1][-1].argmax())
    for at in range(len(prompt) + 1, len(ids)):
        parts.append(run.step({0: 1})[0].float())
        ids[at] = int(parts[-1][-1].argmax())
    return torch.cat(parts), ids
