"""What `latent_block` computes, in plain torch and float64; see `reference`."""

from dataclasses import dataclass

import torch
from torch import Tensor

from model.backends.cpu.kernels.reference import Norm, Weight
from model.backends.cpu.kernels.reference_attention import Attention, Slots, attend, turn


@dataclass(frozen=True, slots=True)
class LatentBlock:
    """Multi-head latent attention, absorbed: what the op is given beside rows and cache. `to_keys` and `to_values` hold
    a matrix for each head; a `query_rank` of 0: queries come from norm(x) at once."""

    norm: Norm
    query_norm: Norm
    latent_norm: Norm
    down: Weight
    query: Weight
    to_keys: Weight
    to_values: Weight
    out: Weight
    rotary: Tensor  # [positions, 2, W / 2]
    heads: int
    query_rank: int
    rank: int
    plain_width: int
    rules: Attention
    residual_scale: float = 1.0

    @property
    def turned(self) -> int:
        """W."""
        return 2 * self.rotary.shape[-1]

    def queries(self, rows_TX: Tensor, positions_T: Tensor) -> Tensor:
        """In the space of the keys, [T, H, rank + W]."""
        q_THX = self.query(rows_TX).float().unflatten(-1, (self.heads, -1))
        plain_THN, turned_THW = q_THX.split((self.plain_width, self.turned), dim=-1)
        latent_THR = by_head(self.to_keys, plain_THN).float()
        return torch.cat([latent_THR, turn(turned_THW, self.rotary, positions_T)], dim=-1)


def by_head(weight: Weight, x_THX: Tensor) -> Tensor:
    """Each head's part through its own matrix."""
    return torch.stack([weight(x_TX, head) for head, x_TX in enumerate(x_THX.unbind(1))], dim=1)


def latent_block(x_TD: Tensor, cache: Slots, spans_B3: Tensor, tables_BP: Tensor, block: LatentBlock) -> Tensor:
    """x + residual_scale · attention(norm(x)); new latents and rotary keys are written to the cache."""
    h_TD = block.norm(x_TD)
    parts = block.down(h_TD).float().split((block.query_rank, block.rank, block.turned), dim=-1)
    low_TQ, latent_TR, key_TW = parts
    positions_T = torch.cat([torch.arange(context - rows, context) for _, rows, context in spans_B3.tolist()])
    key_T1W = turn(key_TW[:, None], block.rotary, positions_T)
    cache.write(torch.cat([block.latent_norm(latent_TR)[:, None], key_T1W], -1), None, spans_B3, tables_BP)
    queries_THC = block.queries(block.query_norm(low_TQ) if block.query_rank else h_TD, positions_T)
    mixed_THR = attend(queries_THC, cache, spans_B3, tables_BP, block.rules).float()
    return x_TD + block.residual_scale * block.out(by_head(block.to_values, mixed_THR).float().flatten(1))
