"""Random shapes for every native op, and wrong arguments: `make fuzz`. pytest does not collect it: it takes minutes.

Values are compared loosely (a choice near a tie may fall to the other side), bits between batches exactly. Under the
checks of a sanitized build a read or write out of range ends the process; the seed printed last says where.
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import typer
from torch import Tensor

from model.backends.cpu.kernels.library import load
from model.backends.cpu.kernels.pack import Kind, pack
from model.backends.cpu.kernels.params import ACTIVATIONS, UNGATED
from model.grouped import CODES, GROUPS
from model.shapes.attention import GatedDeltaNet
from model.shapes.mixtures import Router
from model.shapes.rope import Rope
from tests.model.backends.cpu.kernels import (
    cases,
    delta_cases,
    latent_cases,
    mixture_cases,
    pages,
    program,
    rule_cases,
)
from tests.model.backends.cpu.kernels.arguments import OPS, arguments, run
from tests.model.backends.cpu.kernels.cases import KINDS, NORMS, Case, Make, ops
from tests.model.tiny import gpt2_like, infinity, llama_like

AWKWARD = (1, 1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 80, 95, 96, 97, 127, 128, 129)
DTYPES = (torch.float32, torch.bfloat16, torch.int8, torch.uint8, torch.int32, torch.int64)


def size(make: Make, most: int) -> int:
    """Mostly at the edges of tiles and panels."""
    return make.rng.choice([n for n in AWKWARD if n <= most] + [make.rng.randint(1, most)] * 3)


def rows(make: Make) -> int:
    """Now and then more than one piece of work takes."""
    return make.rng.choice([size(make, 40)] * 8 + [size(make, 130), make.rng.randint(700, 900)])


def layer(make: Make) -> dict[str, Any]:
    gated = make.rng.random() < 0.5
    return {
        "activation": make.rng.choice([*(ACTIVATIONS if gated else UNGATED)]),
        "gated": gated,
        "bias": make.rng.random() < 0.5,
    }


def linear(make: Make, kind: Kind) -> Case:
    norm, bias = make.rng.choice(NORMS), make.rng.random() < 0.5
    return cases.linear_case(make, rows(make), size(make, 200), size(make, 300), kind, norm, bias)


def grouped_linear(make: Make, kind: Kind) -> Case:
    """A product with any codes in any groups."""
    values, group = make.rng.choice([*CODES, "bytes"]), make.rng.choice(GROUPS)
    k = group * size(make, 1 + 600 // group)
    weight = cases.grouped(make, size(make, 200), k, group, values, make.rng.random() < 0.5)
    return cases.LinearCase(make.normal(rows(make), k), cases.Norm(), pack(weight, "grouped"), None)


def argmax(make: Make, kind: Kind) -> Case:
    return cases.argmax_case(make, rows(make), size(make, 300))


def constrain(make: Make, kind: Kind) -> Case:
    return cases.constrain_case(make, rows(make), size(make, 300), make.rng.random())


def experts(make: Make, kind: Kind) -> Case:
    chosen_TE = cases.chosen(make, rows(make), size(make, 12), make.rng.random())
    return cases.experts_case(make, chosen_TE, size(make, 130), size(make, 130), kind, **layer(make))


def ffn(make: Make, kind: Kind) -> Case:
    return cases.ffn_case(
        make, rows(make), size(make, 130), size(make, 200), kind, make.rng.choice(NORMS), **layer(make)
    )


def random_router(make: Make, experts: int) -> Router:
    """Any but a sparse mixer."""
    groups = make.rng.choice([n for n in (1, 1, 2, 3, 4) if experts % n == 0 and 2 * n <= experts] or [1])
    return Router(
        make.rng.choice(["softmax", "sigmoid"]),
        normalise=make.rng.random() < 0.5,
        scale=make.rng.choice([1.0, 2.5]),
        selection_bias=make.rng.random() < 0.5,
        groups=groups,
        kept_groups=make.rng.randint(1, groups),
        group_score=make.rng.choice(["max", "top2"]),
        eps=make.rng.choice([0.0, 1e-20, 0.3]),
        clamp_sum=make.rng.random() < 0.5,
    )


def route(make: Make, kind: Kind) -> Case:
    experts, ties = size(make, 130), make.rng.random() < 0.5
    router = random_router(make, experts)
    most = experts // router.groups * router.kept_groups
    return mixture_cases.route_case(make, rows(make), experts, router, ties, most)


def ruled_route(make: Make, kind: Kind) -> Case:
    return rule_cases.ruled_route_case(make, rows(make), size(make, 130), Router(normalise=make.rng.random() < 0.5))


def reuse(make: Make, kind: Kind) -> Case:
    """Rows depend on each other: all of them are one."""
    return rule_cases.TogetherCase(
        rule_cases.ruled_route_case(
            make, rows(make), size(make, 130), Router(normalise=make.rng.random() < 0.5), reuse=True
        )
    )


def random_infinity(make: Make) -> Any:
    block = make.rng.choice([1, 1, 2, 3, 5, 8, 16, 32, 48, 64])
    config = infinity(
        units=block * size(make, max(1, 300 // block)),
        block=block,
        latent_dim=size(make, 40),
        keep_ratio=make.rng.choice([0.01, 0.1, 0.25, 0.6, 1.0]),
        activation=make.rng.choice([*UNGATED]),
        draws=make.rng.choice(["independent", "antithetic"]),
        sigma_link=make.rng.choice(["exp", "softplus"]),
        aggregate=make.rng.choice(["mean", "norm"]),
    )
    largest = config.maximum
    if make.rng.random() < 0.3 and config.points >= largest:
        config = replace(config, draws="points")
    if make.rng.random() < 0.3 and config.kept * largest <= config.blocks:
        config = replace(config, replacement=False)
    return config


def draw(make: Make, kind: Kind) -> Case:
    return mixture_cases.draw_case(make, rows(make), random_infinity(make))


def masks(make: Make, kind: Kind) -> Case:
    scores = size(make, 130)
    return mixture_cases.masks_case(make, rows(make), scores, make.rng.randint(1, scores), make.rng.random() < 0.5)


def topk(make: Make, kind: Kind) -> Case:
    shape, norm = (rows(make), size(make, 130), size(make, 100), size(make, 33)), make.rng.choice(NORMS)
    rest = {"activation": make.rng.choice([*ACTIVATIONS]), "router": Router(normalise=make.rng.random() < 0.5)}
    topk_case = make.rng.choice([mixture_cases.topk_case, rule_cases.ruled_topk_case])
    return topk_case(make, *shape, kind, norm, **rest)


def infinity_layer(make: Make, kind: Kind) -> Case:
    config = random_infinity(make)
    run = next(n for n in range(config.block, 10_000, config.block) if n % 16 == 0)
    run *= make.rng.choice([1, 1, 2])
    width = make.rng.choice([size(make, 130), 16 * size(make, 8)])
    infinity_case = make.rng.choice([mixture_cases.infinity_case, rule_cases.repaired_infinity_case])
    case = infinity_case(make, min(rows(make), 200), width, config, run, kind, make.rng.choice(NORMS))
    case.crossover_rows = make.rng.choice([0, make.rng.randint(0, 2000), 1 << 40])
    return case


def lengths(make: Make) -> list[int]:
    return make.rng.choice([[size(make, 129) for _ in range(make.rng.randint(1, 5))]] * 30 + [[1, 1030, 3], [2100]])


def rules(make: Make) -> dict[str, Any]:
    window, chunk = make.rng.choice([0, 0, 1, 7, 64, 130]), make.rng.choice([0, 0, 1, 9, 48, 200])
    sizes = {"window": window, "chunk": chunk, "block_size": 16 * size(make, 4)}
    return sizes | {"softcap": make.rng.choice([0.0, 0.0, 2.0]), "sinks": make.rng.random() < 0.3}


def attend(make: Make, kind: Kind) -> pages.AttendCase:
    kv_heads, per, head = size(make, 4), make.rng.choice([1, 2, 3, 7, 16, 32, 45]), 16 * size(make, 9)
    dtype = make.rng.choice([torch.float32, torch.bfloat16, torch.int8])
    values = 0 if dtype == torch.int8 else make.rng.choice([0, 32 * make.rng.randint(0, head // 32)])
    return pages.attend_case(make, lengths(make), kv_heads * per, kv_heads, head, dtype, values=values, **rules(make))


def latent(make: Make, kind: Kind) -> latent_cases.LatentCase:
    sizes = {"heads": size(make, 40), "query_rank": make.rng.choice([0, size(make, 40)]), "width": size(make, 60)}
    sizes |= {"rank": 32 * size(make, 3), "turned": 16 * size(make, 2), "values": 16 * size(make, 3)}
    sizes |= {"plain": size(make, 40), "block_size": 16 * size(make, 4)}
    return latent_cases.latent_case(make, lengths(make), kind, make.rng.random() < 0.5, **sizes)


def attention(make: Make, kind: Kind) -> pages.AttentionCase:
    kv_heads, like = size(make, 3), make.rng.choice([gpt2_like, llama_like])
    head_width = 16 * size(make, 4)
    config = like(
        infinity(),
        width=size(make, 80),
        kv_heads=kv_heads,
        heads=kv_heads * make.rng.choice([1, 2, 5]),
        head_width=head_width,
        rope=make.rng.choice([None, Rope(head_width), Rope(2 * make.rng.randint(1, head_width // 2))]),
        qk_norm=make.rng.choice(["none", "full", "unit"]),
        clip=make.rng.choice([None, 0.7]),
        gated=make.rng.random() < 0.3,
        floor_scale=make.rng.choice([None, 3.0]),
        attn_scale=0.3,
    )
    return pages.attention_case(make, lengths(make), config, kind, make.rng.random() < 0.5, **rules(make))


def delta(make: Make, kind: Kind) -> delta_cases.DeltaCase:
    key_heads, shared = size(make, 3), make.rng.choice([1, 2, 5, 17])
    widths, taps = (16 * size(make, 9) for _ in range(2)), make.rng.choice([1, 2, 4, 16])
    shape = GatedDeltaNet(key_heads, key_heads * shared, *widths, taps)
    return delta_cases.delta_case(make, [min(length, 64) for length in lengths(make)], shape, kind, size(make, 80))


ROWS = [
    argmax,
    constrain,
    linear,
    grouped_linear,
    experts,
    ffn,
    route,
    ruled_route,
    reuse,
    draw,
    masks,
    topk,
    infinity_layer,
]
PAGED = [attend, attention, latent, delta]


def near(got: Tensor, want: Tensor) -> None:
    """Most rows are close; some may have met a tie."""
    assert got.shape == want.shape and got.isfinite().all()
    if not want.numel():
        return
    size = want.double().square().mean().sqrt().clamp(min=1e-6)
    error_R = ((got.double() - want).abs() / size).flatten(1).amax(1)
    assert int((error_R > 5e-2).sum()) <= 2 + len(want) // 4, f"errors: {error_R.sort().values}"


def by_rows(make: Make, case: Case) -> None:
    full = case.run(torch.arange(case.rows))
    near(full, case.expected())
    some = make.whole(0, case.rows - 1, make.rng.randint(1, 7))
    ops.set_threads(make.rng.randint(1, 3))
    assert torch.equal(case.run(some), full[some]), "a row depends on its batch"


PagedCase = pages.AttendCase | pages.AttentionCase | latent_cases.LatentCase | delta_cases.DeltaCase


def by_chunks(make: Make, case: PagedCase) -> None:
    whole = case.run(case.layout.whole())
    near(whole, case.expected())
    ops.set_threads(make.rng.randint(1, 3))
    assert torch.equal(case.run(case.layout.chunks(make, 60)), whole), "a row depends on its chunk"


def wrong_value(make: Make, value: Any) -> Any:
    """Something else than what was there: cut, turned, of another kind, or other numbers."""
    if not isinstance(value, Tensor):
        return make.rng.choice([0, 1, -1, 2, 3, 16, 17, 24, 1000, -(2**31), 2**31])
    changes: list[Callable[[Tensor], Any]] = [
        lambda t: t[:0],
        lambda t: t[:-1].contiguous(),
        lambda t: t[..., :-1].contiguous(),
        lambda t: torch.cat([t, t]),
        lambda t: t.mT if t.ndim > 1 else t[::2],
        lambda t: t.flatten(),
        lambda t: t[None],
        lambda t: t.to(make.rng.choice(DTYPES)),
        lambda t: make.whole(-3, 40, *t.shape).to(t.dtype),
        lambda t: None,
    ]
    return make.rng.choice(changes)(value)


def refused_or_run(make: Make, kind: Kind) -> None:
    """One or two wrong arguments: an error, or a result that nobody looks at. Never a crash."""
    op = make.rng.choice(OPS)
    given = arguments(op, kind)
    spoiled(make, given, lambda: run(op, given))


def program_refused_or_run(make: Make, kind: Kind) -> None:
    """The same for a step of a whole decoder."""
    given = program.step()
    given["caches"] = [cache.clone() for cache in given["caches"]]
    if make.rng.random() < 0.5:
        given |= program.ruled(*(rule_cases.random_rule(make, 6, reuse=True) for _ in range(2))) | {"routes": True}
    spoiled(make, given, lambda: program.run(given))


def spoiled(make: Make, given: dict[str, Any], call: Callable[[], object]) -> None:
    """Run with one or two arguments changed; any error that Python can catch will do."""
    names = [name for name, value in given.items() if not isinstance(value, list)]
    for name in make.rng.sample(names, min(len(names), make.rng.randint(1, 2))):
        given[name] = wrong_value(make, given[name])
    try:
        call()
    except (RuntimeError, IndexError, TypeError, ValueError, MemoryError):
        return


def one(seed: int) -> str:
    """Run the case of a seed and name it."""
    make = Make(seed)
    kind: Kind = make.rng.choice(KINDS)
    ops.set_threads(make.rng.randint(1, 3))
    made = make.rng.choice([*ROWS, *PAGED, refused_or_run, program_refused_or_run])
    print(f"\rseed {seed}: {made.__name__}, {kind}".ljust(50), end="", file=sys.stderr, flush=True)
    if made in ROWS:
        by_rows(make, made(make, kind))
    elif made in PAGED:
        by_chunks(make, made(make, kind))
    else:
        made(make, kind)
    return made.__name__


def main(count: int = 10_000, seed: int = 0) -> None:
    """Run `count` cases from `seed` on."""
    torch.set_num_threads(1)  # of the references
    kernels = load()
    if not kernels.native:
        raise SystemExit(f"no native kernels: {kernels.reason}")
    seen: dict[str, int] = {}
    for number in range(seed, seed + count):
        name = one(number)
        seen[name] = seen.get(name, 0) + 1
    print(f"\n{count} cases on {kernels.name}: {', '.join(f'{n} {name}' for name, n in sorted(seen.items()))}")


if __name__ == "__main__":
    typer.run(main)
