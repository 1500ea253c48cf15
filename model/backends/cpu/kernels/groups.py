"""How a grouped matrix lies in memory: panels of 64 outputs, each one stream of groups.

A panel of P outputs (64; the last one may have 16, 32 or 48) has for each group of inputs: P scales, float16 or bytes,
P minima where there are any, float16, then rows of P words. A word of 4-bit codes holds 8 inputs: byte j has input j in
its low half and input 4 + j in its high half, so that both halves of a word are 4 neighbouring inputs. Three words of
6-bit codes hold 16 inputs, in the order of `packed_codes`. A word of bytes holds 4 inputs, each plus 128: the kernels
multiply unsigned weights by signed inputs. The kernels' side is csrc/codes.h.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from model.grouped import Grouped, code_bits

PANEL, OUTPUTS = 64, 16  # outputs of a panel, and what those of the last one are a multiple of


@dataclass(frozen=True, slots=True)
class Layout:
    """One matrix as it is stored: `n` a multiple of 16, `k` one of the group."""

    n: int
    k: int
    group: int
    bits: int
    minima: bool
    byte_scales: bool

    @staticmethod
    def of(weight: Grouped) -> "Layout":
        """Of each of some matrices."""
        n, k = weight.shape[-2:]
        bits = code_bits(weight.values)
        byte_scales = weight.scales.dtype == torch.int8
        return Layout(n + -n % OUTPUTS, k, weight.group, bits, weight.minima is not None, byte_scales)

    @property
    def output_bytes(self) -> int:
        """Of one output."""
        return self.k // self.group * (sum(dtype.itemsize for dtype in self.header) + self.group * self.bits // 8)

    @property
    def header(self) -> list[torch.dtype]:
        """What lies before a group's words: its scales, maybe its minima."""
        return [torch.int8 if self.byte_scales else torch.float16] + [torch.float16] * self.minima

    @property
    def nbytes(self) -> int:
        return self.n * self.output_bytes

    def sections(self, stream_B: Tensor) -> Iterator[tuple[slice, list[Tensor]]]:
        """The outputs of panels of equal width, and views of their scales, minima and words, [panels, groups, W, P]."""
        whole = self.n // PANEL * PANEL
        for first, last, width in [(0, whole, PANEL), (whole, self.n, self.n - whole)]:
            if first == last:
                continue
            part_B = stream_B[first * self.output_bytes : last * self.output_bytes]
            panels_PGB = part_B.view((last - first) // width, self.k // self.group, -1)
            at, views = 0, []
            words = (torch.int32, self.group * self.bits // 32)
            for dtype, count in [*((dtype, 1) for dtype in self.header), words]:
                size = count * width * dtype.itemsize
                view_PGX = panels_PGB[..., at : at + size].view(dtype)
                views.append(view_PGX.unflatten(-1, (count, width)))
                at += size
            yield slice(first, last), views

    def write(self, parts: list[Tensor], stream_B: Tensor) -> None:
        """Put scales, minima and words, each [n, groups, W], in their places."""
        for outputs, views in self.sections(stream_B):
            for part_NGW, view_PGWN in zip(parts, views, strict=True):
                panels = part_NGW[outputs].unflatten(0, (len(view_PGWN), -1))
                view_PGWN.copy_(panels.permute(0, 2, 3, 1))

    def read(self, stream_B: Tensor) -> list[Tensor]:
        """What was written."""
        sections = [
            [view_PGWN.permute(0, 3, 1, 2).flatten(0, 1) for view_PGWN in views] for _, views in self.sections(stream_B)
        ]
        return [torch.cat(parts) for parts in zip(*sections, strict=True)]


def words_of(codes_NC: Tensor, layout: Layout) -> Tensor:
    """The codes of a `Grouped` as words, int32 [n, groups, W]."""
    bytes_NC = codes_NC.view(torch.uint8)
    if layout.bits == 8:
        words_NC = bytes_NC ^ 128
    elif layout.bits == 6:
        words_NC = bytes_NC
    else:
        # Two bytes with inputs 0 to 3 and two with 4 to 7 become four, each of one of the former and one of the latter.
        low_NX2, high_NX2 = bytes_NC.unflatten(-1, (-1, 2, 2)).unbind(-2)
        even, odd = (low_NX2 & 15) | high_NX2 << 4, low_NX2 >> 4 | (high_NX2 & 0xF0)
        words_NC = torch.stack([even, odd], dim=-1).flatten(1)
    return words_NC.contiguous().view(torch.int32).unflatten(-1, (layout.k // layout.group, -1))


def codes_of(words_NGW: Tensor, layout: Layout) -> Tensor:
    """The inverse of `words_of`."""
    bytes_NC = words_NGW.flatten(1).contiguous().view(torch.uint8)
    if layout.bits == 8:
        return (bytes_NC ^ 128).view(torch.int8)
    if layout.bits == 6:
        return bytes_NC
    even, odd = bytes_NC.unflatten(-1, (-1, 2, 2)).unbind(-1)
    low_NX2, high_NX2 = (even & 15) | odd << 4, even >> 4 | (odd & 0xF0)
    return torch.stack([low_NX2, high_NX2], dim=-2).flatten(1)
