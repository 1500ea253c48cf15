"""How matrices of experts lie in memory before they are packed: in tiles of units, or unit by unit.

It depends on shapes and padding, not on parameters of ops.
"""

import torch
from torch import Tensor, nn

from model.backends.cpu.kernels.groups import OUTPUTS
from model.backends.cpu.kernels.pack import INPUTS, AnyMatrix
from model.grouped import Grouped
from model.layers import DenseFFN
from model.moe.infinity import InfinityMixture
from model.shapes.mixtures import Infinity

GROUPED_UNITS = 64  # a mixture whose groups are narrower is run in tiles of so many units


def padded(down: AnyMatrix) -> AnyMatrix:
    """Down [..., D, F], or a bias [..., D], with as many values in its last dimension as a packed matrix has outputs: a
    multiple of 16, as whole groups always are."""
    if isinstance(down, Grouped):
        return down
    return nn.functional.pad(down, (0, -down.shape[-1] % OUTPUTS))


def parted(gate_up: AnyMatrix) -> AnyMatrix:
    """[..., 2F, k] with a gate and its up in turn, as all gates over all ups."""
    if isinstance(gate_up, Grouped):
        return gate_up.over_outputs(parted)
    return torch.cat([gate_up[..., 0::2, :], gate_up[..., 1::2, :]], dim=-2)


def rows_of(weight: AnyMatrix, rows: Tensor) -> AnyMatrix:
    """The outputs `rows` of a matrix, in this order."""
    if torch.equal(rows, torch.arange(weight.shape[0])):
        return weight
    return weight.rows(rows) if isinstance(weight, Grouped) else weight[rows]


def pieces_of(layer: DenseFFN, units: int) -> tuple[Tensor, Tensor]:
    """Up [P, 2 units, D], gates over ups, and down [P, D, units] of a gated layer that is cut into P pieces; units that
    are missing in the last are zero."""
    pad = -layer.config.width % units
    gate, up = (nn.functional.pad(half, (0, 0, 0, pad)).unflatten(0, (-1, units)) for half in layer.up.weight.chunk(2))
    down = nn.functional.pad(layer.down.weight, (0, pad)).unflatten(1, (-1, units)).transpose(0, 1)
    return torch.cat([gate, up], dim=1), down


def unit_rows(module: InfinityMixture) -> tuple[Tensor, Tensor]:
    """Up [F, D'] and down [F, D], unit by unit, D' padded to what the kernels read."""
    width = module.up.shape[1]
    up = nn.functional.pad(module.up, (0, -width % INPUTS))
    return up.contiguous(), module.down.T.contiguous()


def grouped_units(config: Infinity) -> int:
    """Units of a tile: the smallest multiple of 16 and of the group's units that is at least `GROUPED_UNITS`."""
    units = config.block
    while units % 16 or units < GROUPED_UNITS:
        units += config.block
    return units


def tiles_of(module: InfinityMixture, units: int) -> tuple[Tensor, Tensor]:
    """Up [N, units, D] and down [N, D, units] of the N tiles of `units` units, the last padded with zeros."""
    pad = -module.config.units % units
    up = nn.functional.pad(module.up, (0, 0, 0, pad))
    down = nn.functional.pad(module.down, (0, pad))
    return up.unflatten(0, (-1, units)), down.unflatten(1, (-1, units)).transpose(0, 1)
