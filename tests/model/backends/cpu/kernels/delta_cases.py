"""Random gated delta nets over sequences whose rows come in any chunks, and what must come out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.backends.cpu.kernels import reference_delta
from model.backends.cpu.kernels.attention_params import DeltaParams
from model.backends.cpu.kernels.pack import Kind, Packed, pack
from model.backends.cpu.kernels.reference import Norm, Weight
from model.backends.cpu.kernels.reference_delta import DeltaBlock, States
from model.shapes.attention import GatedDeltaNet
from tests.model.backends.cpu.kernels.cases import Make, norm_params, ops
from tests.model.backends.cpu.kernels.pages import Layout, Step


@dataclass
class DeltaCase:
    """x += gated delta net(norm(x)). States without a value yet are NaN."""

    layout: Layout
    slots: list[int]  # of each sequence
    x_TD: Tensor
    shape: GatedDeltaNet
    block: DeltaBlock
    packed: tuple[Packed, Packed, Packed]  # project, rates, out

    def params(self) -> DeltaParams:
        b, shape = self.block, self.shape
        project, rates, out = self.packed
        assert b.rates.bias is not None and b.head_norm.weight is not None
        return DeltaParams(
            norm=norm_params(b.norm),
            project=project,
            rates=rates,
            rates_bias=b.rates.bias,
            convolution=b.convolution_JC,
            decay=b.decay_H,
            head_norm=b.head_norm.weight,
            out=out,
            key_heads=shape.key_heads,
            value_heads=shape.value_heads,
            key_width=shape.key_width,
            value_width=shape.value_width,
        )

    def slots_of(self, step: Step) -> Tensor:
        return torch.tensor([self.slots[s] for s, _, _ in step], dtype=torch.int64)

    def states(self, more: int = 0) -> Tensor:
        return torch.full((len(self.slots) + 1 + more, self.shape.memory.size), torch.nan)

    def run(
        self, schedule: list[Step], states: Tensor | None = None, snapshots: Mapping[int, list[list[int]]] | None = None
    ) -> Tensor:
        """Each row as it came out in its step. `snapshots`: by the number of a step, those to take in it."""
        states = self.states() if states is None else states
        out, given = torch.zeros_like(self.x_TD), self.params().arguments()
        for number, step in enumerate(schedule):
            taken = torch.tensor((snapshots or {}).get(number, []), dtype=torch.int64)
            rows, spans, _ = self.layout.step(step)
            x_TD = self.x_TD[rows]
            ops.delta_block(x_TD, states, spans, self.slots_of(step), taken, *given)
            out[rows] = x_TD
        return out

    def expected(self) -> Tensor:
        (whole,) = self.layout.whole()
        rows, spans, _ = self.layout.step(whole)
        return reference_delta.delta_block(self.x_TD[rows], States(), spans, self.slots_of(whole), self.block)


def delta_case(make: Make, lengths: Sequence[int], shape: GatedDeltaNet, kind: Kind, width: int = 24) -> DeltaCase:
    """The rates are of another kind where their weights are not rounded."""
    heads, values = -(-shape.value_heads // 16) * 16, shape.value_heads * shape.value_width
    project = pack(make.weight(shape.channels + values, width), kind)
    rates = pack(make.weight(2 * heads, width), "float" if kind == "float" else "bfloat16")
    out = pack(make.weight(width, values), kind)
    bias = torch.cat([torch.zeros(heads), make.normal(heads)])
    block = DeltaBlock(
        make.norm("rms", width),
        Weight.of(project),
        Weight.of(rates, 1, bias),
        make.normal(shape.kernel, shape.channels, scale=shape.kernel**-0.5),
        -make.normal(heads).exp(),
        Norm(1 + make.normal(shape.value_width, scale=0.1), None, 1e-5),
        Weight.of(out),
        shape.key_heads,
        shape.value_heads,
        shape.key_width,
        shape.value_width,
    )
    slots = make.rng.sample(range(len(lengths) + 1), len(lengths))
    layout = Layout(make, lengths)
    return DeltaCase(layout, slots, make.normal(sum(lengths), width), shape, block, (project, rates, out))
