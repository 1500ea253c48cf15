"""Weights as the kernels read them: panels of 64 outputs; a word holds 1, 2 or 4 neighbouring inputs of one output.

`Packed` remembers the logical shape. int8 has one scale per output: symmetric, the largest magnitude is 127. How
grouped matrices are laid out is in `groups`.
"""

from dataclasses import dataclass, fields, replace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from model.backends.cpu.kernels.groups import OUTPUTS, PANEL, Layout, codes_of, words_of
from model.backends.cpu.kernels.quantise import quantise_int4
from model.grouped import Grouped, Values, code_bits, code_table

# int8 and grouped: inputs are quantised too, row by row.
Kind = Literal["float", "bfloat16", "int8", "int8-weights", "grouped"]
GROUP = {"float": 1, "bfloat16": 2, "int8": 4, "int8-weights": 2}
DTYPE = {"float": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8, "int8-weights": torch.uint8}
WORD = {2: torch.int16, 4: torch.int32}  # by its bytes
INPUTS, HALF = 4, 32
AnyMatrix = TypeVar("AnyMatrix", Tensor, Grouped)


@dataclass(frozen=True, slots=True)
class Packed:
    """E matrices [n, k]; as stored, n is a multiple of 16, and k of 4 or of the group.

    Attributes:
        scales: int8: int32 [2, E·n], the scales' float32 bits, then what inputs shifted by 128 add to each sum;
            grouped: the factor of each output, float32 [E·n]; else None.
        group, values, minima, byte_scales: of grouped matrices, see `Grouped`: whether there are minima, whether
            scales are int8.
    """

    packed: Tensor
    scales: Tensor | None
    n: int
    k: int
    kind: Kind
    group: int = 0
    values: Values | None = None
    minima: bool = False
    byte_scales: bool = False

    @property
    def header(self) -> int:
        """Bytes of a group's scale and minimum."""
        return 2 - self.byte_scales + 2 * self.minima

    @property
    def table(self) -> Tensor | None:
        """What codes of 4 or 6 bits stand for, int8 [16] or [64]."""
        return None if self.values in (None, "bytes") else code_table(self.values)

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes + (0 if self.scales is None else self.scales.nbytes)


def kind_for(dtype: torch.dtype) -> Kind:
    """The kind that keeps a weight's values."""
    return "bfloat16" if dtype == torch.bfloat16 else "float"


def pack(weight: Tensor | Grouped, kind: Kind) -> Packed:
    """Pack [n, k] or [E, n, k]; outputs are padded with zeros to a multiple of 16, inputs to one of 4.

    A `Grouped` is packed as it is, whatever the kind.
    """
    if isinstance(weight, Grouped):
        return pack_grouped(weight)
    if kind == "grouped":
        return replace(pack_grouped(quantise_int4(weight)), k=weight.shape[-1])
    weight_ENK = weight if weight.dim() == 3 else weight[None]
    n, k = weight_ENK.shape[1:]
    padding = (0, -k % INPUTS, 0, -n % OUTPUTS)
    padded_ENK = F.pad(weight_ENK, padding) if any(padding) else weight_ENK  # F.pad copies, also where it adds nothing
    if kind in ("int8", "int8-weights"):
        values_ENK, scales = quantise(padded_ENK)
        return Packed(panels(values_ENK, kind), scales, n, k, kind)
    return Packed(panels(padded_ENK.to(DTYPE[kind]), kind), None, n, k, kind)


def pack_grouped(weight: Grouped) -> Packed:
    """Pack quantised matrices; their padding has scales of zero.

    Raises:
        ValueError: a scale, minimum or factor is not finite.
    """
    n, k = weight.shape[-2:]
    for part in (weight.scales, weight.minima, weight.factors):
        if part is not None and not part.isfinite().all():
            raise ValueError(f"a grouped matrix [{n}, {k}] has a scale, minimum or factor that is not finite")
    layout, experts = Layout.of(weight), weight.shape[:-2].numel()

    def each(part: Tensor) -> Tensor:
        """[E, stored n, columns]."""
        return F.pad(part.reshape(experts, n, -1), (0, 0, 0, -n % OUTPUTS))

    packed = torch.ops.moedial.allocate(experts * layout.nbytes, experts, layout.n)
    header = [weight.scales] if weight.minima is None else [weight.scales, weight.minima]
    header_ENG1 = [each(part)[..., None] for part in header]
    codes_ENC = weight.codes.reshape(experts, n, -1)
    for expert, stream_B in enumerate(packed.view(experts, -1)):
        codes_NC = F.pad(codes_ENC[expert], (0, 0, 0, -n % OUTPUTS))
        parts = [part_ENG1[expert] for part_ENG1 in header_ENG1]
        layout.write([*parts, words_of(codes_NC, layout)], stream_B)
    factors = torch.ones(experts * n) if weight.factors is None else weight.factors.float()
    how = (weight.group, weight.values, layout.minima, layout.byte_scales)
    return Packed(packed, each(factors).flatten(), n, k, "grouped", *how)


def joined(first: Packed, second: Packed, count: int) -> Packed | None:
    """The matrices of both, one after the other, `count` in all; None if they differ in form."""
    parts: dict[str, Any] = {}
    for field in fields(Packed):
        one, other = getattr(first, field.name), getattr(second, field.name)
        if isinstance(one, Tensor) and isinstance(other, Tensor):
            if one.dtype != other.dtype or one.shape[:-1] != other.shape[:-1]:
                return None
            parts[field.name] = torch.cat([one, other], dim=-1)
        elif one is not other and one != other:
            return None
    both = parts["packed"]
    stored = first.n + -first.n % OUTPUTS
    parts["packed"] = torch.ops.moedial.allocate(both.nbytes, count, stored).view(both.dtype).copy_(both)
    return replace(first, **parts)


def quantise(weight_ENK: Tensor) -> tuple[Tensor, Tensor]:
    """int8 values, and their scales and offsets as `Packed` keeps them."""
    scale_EN = weight_ENK.float().abs().amax(-1) / 127
    divisor_EN1 = scale_EN.clamp(min=1e-30)[..., None]
    values_ENK = (weight_ENK.float() / divisor_EN1).round().to(torch.int8)
    offset_EN = values_ENK.sum(-1, dtype=torch.int32) * 128
    scale_bits_EN = scale_EN.contiguous().view(torch.int32)
    return values_ENK, torch.stack([scale_bits_EN.flatten(), offset_EN.flatten()])


def panels(values_ENK: Tensor, kind: Kind) -> Tensor:
    """The values in the order of the kernels, flat, in memory of their own."""
    experts, n, _ = values_ENK.shape
    raw = torch.ops.moedial.allocate(values_ENK.numel() * values_ENK.element_size(), experts, n)
    word = WORD[GROUP[kind] * values_ENK.element_size()]  # copied whole, in a third of the time of its values
    words_ENW = values_ENK.contiguous().view(word)
    width, out = words_ENW.shape[-1], raw.view(word).view(experts, -1)
    whole = n // PANEL * PANEL
    for first, rows, outputs in [(0, whole, PANEL), (whole, n - whole, n - whole)]:
        if rows:
            tiles = words_ENW[:, first : first + rows].unflatten(1, (-1, outputs))
            out[:, first * width : (first + rows) * width].view(experts, -1, width, outputs).copy_(tiles.mT)
    return raw if kind == "int8-weights" else raw.view(values_ENK.dtype)


def interleave(gate_up: AnyMatrix) -> AnyMatrix:
    """[..., 2F, k] gates over ups to the kernels' order: 32 gates, then their 32 ups, and so on; F padded to 16."""
    if isinstance(gate_up, Grouped):
        return gate_up.over_outputs(interleave)
    gate, up = gate_up.chunk(2, dim=-2)
    pad = (0, 0, 0, -gate.shape[-2] % OUTPUTS)
    gate, up = F.pad(gate, pad), F.pad(up, pad)
    pairs = zip(gate.split(HALF, -2), up.split(HALF, -2), strict=True)
    parts = [part for pair in pairs for part in pair]
    return torch.cat(parts, dim=-2)


def unpack(packed: Packed, experts: int = 1) -> Tensor:
    """The matrices [E, n, k] in float32, as the kernels see their values (for tests and the reference)."""
    n = packed.n + -packed.n % OUTPUTS
    if packed.kind == "grouped":
        return unpack_grouped(packed, experts).dense()[:, : packed.n, : packed.k]
    k = packed.k + -packed.k % INPUTS
    group = GROUP[packed.kind]
    stored = packed.packed.view(torch.int8) if packed.kind == "int8-weights" else packed.packed
    parts = []
    for first, width in [(0, PANEL), (n // PANEL * PANEL, n % PANEL)]:
        rows = n // PANEL * PANEL if width == PANEL else width
        if rows:
            last = first + rows
            part = stored.view(experts, -1)[:, first * k : last * k]
            grouped = part.reshape(experts, -1, k // group, width, group)
            parts.append(grouped.permute(0, 1, 3, 2, 4).reshape(experts, rows, k))
    values_ENK = torch.cat(parts, dim=1).float()
    if packed.scales is not None:
        values_ENK = values_ENK * packed.scales[0].view(torch.float32).view(experts, n, 1)
    return values_ENK[:, : packed.n, : packed.k]


def unpack_grouped(packed: Packed, experts: int = 1) -> Grouped:
    """The grouped matrices [E, n, k] as they are stored, n padded to a multiple of 16 and k to one of the group."""
    assert packed.values is not None and packed.scales is not None
    factors_EN = packed.scales.view(experts, -1)
    bits = code_bits(packed.values)
    stored_k = packed.k + -packed.k % packed.group
    layout = Layout(factors_EN.shape[1], stored_k, packed.group, bits, packed.minima, packed.byte_scales)
    each = [layout.read(stream_B) for stream_B in packed.packed.view(experts, -1)]
    codes_ENC = torch.stack([codes_of(words_NGW, layout) for *_, words_NGW in each])
    headers = [[part_NG1[..., 0] for part_NG1 in parts[:-1]] for parts in each]
    scales_ENG, *minima = (torch.stack(part) for part in zip(*headers, strict=True))
    least_ENG = minima[0] if packed.minima else None
    return Grouped(codes_ENC, scales_ENG, packed.group, packed.values, least_ENG, factors_EN)
