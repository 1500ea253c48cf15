"""Valid arguments of every op by name, recorded from the cases: what refusals and fakes start from."""

from functools import cache
from typing import Any
from unittest.mock import patch

import torch

from model.backends.cpu.kernels.pack import Kind
from model.grouped import code_table
from model.shapes.attention import GatedDeltaNet
from model.shapes.mixtures import Router
from tests.model.backends.cpu.kernels.cases import (
    Make,
    argmax_case,
    chosen,
    constrain_case,
    experts_case,
    ffn_case,
    linear_case,
)
from tests.model.backends.cpu.kernels.delta_cases import delta_case
from tests.model.backends.cpu.kernels.latent_cases import latent_case
from tests.model.backends.cpu.kernels.mixture_cases import draw_case, masks_case
from tests.model.backends.cpu.kernels.pages import attend_case, attention_case
from tests.model.backends.cpu.kernels.rule_cases import repaired_infinity_case, ruled_route_case, ruled_topk_case
from tests.model.tiny import infinity, llama_like

OPS = (
    *(
        "argmax",
        "constrain",
        "draw_tokens",
        "quantise",
        "linear",
        "experts",
        "route",
        "write_cache",
        "attend",
        "draw",
        "masks",
    ),
    *("attention_block", "latent_block", "delta_block", "topk_block", "infinity_block", "ffn_block"),
)
Arguments = dict[str, Any]


class Recorder:
    """Stands in for `torch.ops.moedial` and remembers each op's last arguments as they were before it ran."""

    def __init__(self) -> None:
        self.seen: dict[str, Arguments] = {}

    def __getattr__(self, name: str) -> Any:
        op = getattr(torch.ops.moedial, name)

        def call(*given: Any) -> Any:
            names = [argument.name for argument in op.default._schema.arguments]
            self.seen[name] = {key: copied(value) for key, value in zip(names, given, strict=True)}
            return op(*given)

        return call


def copied(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value


@cache
def recorded(kind: Kind) -> dict[str, Arguments]:
    """Of every op, with weights of this kind."""
    recorder, make = Recorder(), Make(1)
    modules = ("cases", "delta_cases", "latent_cases", "mixture_cases", "pages")
    patches = [patch(f"tests.model.backends.cpu.kernels.{module}.ops", recorder) for module in modules]
    rows = torch.arange(5)
    for one in patches:
        one.start()
    try:
        argmax_case(make, 5, 20).run(rows)
        linear_case(make, 5, 20, 16, kind, "layer", True).run(rows)
        experts_case(make, chosen(make, 5, 3, 0.7), 16, 20, kind).run(rows)
        ffn_case(make, 5, 16, 20, kind, "layer", bias=True).run(rows)
        ruled_topk_case(make, 5, 16, 20, 4, kind).run(rows)
        repaired_infinity_case(make, 5, 16, infinity(), 48, kind).run(rows)
        ruled_route_case(make, 5, 6, Router(normalise=True)).run(rows)
        draw_case(make, 5, infinity()).run(rows)
        masks_case(make, 5, 9, 3).run(rows)
        dtype = torch.float32 if kind == "float" else torch.bfloat16
        for case in (
            attend_case(make, [3, 20], 4, 2, 16, dtype, sinks=True),
            attention_case(make, [3, 20], LAYER, kind),
            delta_case(make, [3, 20], GatedDeltaNet(2, 4, 16, 32, 4), kind),
            latent_case(make, [3, 20], kind, bias=True),
        ):
            case.run(case.layout.whole())
        constrain_case(make, 5, 70).run(rows)
        recorder.draw_tokens(
            make.normal(5, 20), torch.tensor([4, 1]), torch.tensor([[0.8, 20, 0.9, 0, 0.5]] * 2).double()
        )
        recorder.quantise(make.weight(5, 32), code_table("table6"), 32)
    finally:
        for one in patches:
            one.stop()
    assert recorder.seen.keys() == set(OPS)
    return recorder.seen


LAYER = llama_like(infinity(), head_width=16, qk_norm="full", bias=True, floor_scale=4.0, attn_scale=0.1)


def arguments(op: str, kind: Kind = "float") -> Arguments:
    """Fresh copies, in the order of the op's schema."""
    return {name: copied(value) for name, value in recorded(kind)[op].items()}


def run(op: str, given: Arguments) -> Any:
    return getattr(torch.ops.moedial, op)(*given.values())
