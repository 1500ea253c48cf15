"""A decoder for fast training: whole windows, static shapes, the draws of a batch row known beforehand.

It computes what `model.decoder.Decoder` computes for the same weights (a test compares them) and stores its parameters
in a layout that suits large products; `decoder_state` turns them into the decoder's. It does not depend on files.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.moe.points import fixed_points
from training.gpu.kernels import Layout, gate, gated, masks


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes and choices of one network. For "topk", `blocks` are experts of `block` units with a gate."""

    kind: Literal["infinity", "topk", "dense"] = "infinity"
    width: int = 384
    layers: int = 6
    heads: int = 6
    kv_heads: int = 2
    vocabulary: int = 4096
    context: int = 512
    blocks: int = 96
    block: int = 64
    kept: int = 3  # blocks of one draw
    space: int = 32  # Z
    draws: Literal["points", "mean", "random", "learned"] = "points"
    replacement: bool = False  # may a draw keep what an earlier draw kept
    aggregate: Literal["sum", "mean", "norm", "unit"] = "sum"  # "unit": the mean, brought to norm 1
    values: Literal["raw", "softmax", "relu"] = "raw"  # a kept block's weight: its score, or that of the mean over all
    normalise: bool = False  # topk: divide the kept weights by their sum
    largest: int = 16

    @property
    def units(self) -> int:
        return self.blocks * self.block

    @property
    def depth(self) -> float:
        """What the first weights of every residual output are multiplied by."""
        return 1 / math.sqrt(2 * self.layers)


def random_matrix(rows: int, columns: int) -> Tensor:
    """Normal weights [rows, columns] that keep the variance of their input."""
    return torch.randn(rows, columns) / columns**0.5


class Infinity(nn.Module):
    """Router [2Z, D], scores [B, Z], up [F, D], down [D, F]."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.router = nn.Parameter(random_matrix(2 * shape.space, shape.width))
        self.router.data[shape.space :] = 0
        self.scores = nn.Parameter(random_matrix(shape.blocks, shape.space))
        self.up = nn.Parameter(random_matrix(shape.units, shape.width))
        fan = shape.block if shape.values == "softmax" or shape.aggregate == "unit" else shape.units
        down = torch.randn(shape.width, shape.units) / fan**0.5
        self.down = nn.Parameter(down * shape.depth)
        points = fixed_points(shape.largest, shape.space)
        self.points = nn.Parameter(points, requires_grad=shape.draws == "learned")

    def forward(self, x_TD: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        mask_TB = self.mask(x_TD, layout)
        return F.linear(gate(F.linear(x_TD, self.up), mask_TB), self.down), mask_TB

    def mask(self, x_TD: Tensor, layout: Layout) -> Tensor:
        """The weight of each block for each token, float32."""
        shape = self.shape
        mean_TZ, log_TZ = F.linear(x_TD, self.router).float().chunk(2, dim=-1)
        with torch.autocast(x_TD.device.type, enabled=False):
            score_RB = F.linear(self.draw(mean_TZ, log_TZ.exp(), layout), self.scores)
            if shape.values == "softmax":
                chosen_TB = masks(score_RB.detach(), layout, shape.kept, shape.replacement)[0] != 0
                return F.linear(mean_TZ, self.scores).softmax(-1) * chosen_TB
            if shape.values == "relu":
                score_RB = F.relu(score_RB) + 1e-4 * score_RB  # the rest still orders scores below zero
            sum_TB, square_T1 = masks(score_RB, layout, shape.kept, shape.replacement)
            return self.aggregate(sum_TB, square_T1, layout.counts_T1)

    def draw(self, mean_TZ: Tensor, sigma_TZ: Tensor, layout: Layout) -> Tensor:
        """z [R, Z] of every draw of every token."""
        rows = []
        for k, count in enumerate(layout.tokens_K):
            noise = self.noise(k, mean_TZ[:count])
            rows.append(mean_TZ[:count] + sigma_TZ[:count] * noise)
        return torch.cat(rows)

    def noise(self, k: int, mean_tZ: Tensor) -> Tensor:
        """ε of draw k, [Z] or per token."""
        if self.shape.draws == "random":
            return torch.randn_like(mean_tZ)
        if self.shape.draws == "mean":
            return torch.zeros_like(self.points[k])
        return self.points[k]

    def aggregate(self, sum_TB: Tensor, square_T1: Tensor, counts_T1: Tensor) -> Tensor:
        """One mask of the draws' masks, from their sum and their summed squares."""
        if self.shape.aggregate == "sum":
            return sum_TB
        mean_TB = sum_TB / counts_T1
        if self.shape.aggregate == "mean":
            return mean_TB
        norm_T1 = mean_TB.square().sum(-1, keepdim=True).add(1e-6).sqrt()
        if self.shape.aggregate == "unit":
            return mean_TB / norm_T1
        return mean_TB * ((square_T1 / counts_T1).add(1e-12).sqrt() / norm_T1)

    def decoder_state(self) -> dict[str, Tensor]:
        """The weights as the decoder has them."""
        return {"router": self.router, "scores": self.scores, "up": self.up, "down": self.down}


class TopK(nn.Module):
    """Router [E, D], up [2F, D] (all gates, then all ups), down [D, F]."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.router = nn.Parameter(random_matrix(shape.blocks, shape.width))
        self.up = nn.Parameter(random_matrix(2 * shape.units, shape.width))
        down = torch.randn(shape.width, shape.units) / shape.block**0.5
        self.down = nn.Parameter(down * shape.depth)
        self.balance: Tensor | float = 0.0  # the Switch loss of the last training step

    def forward(self, x_TD: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        mask_TE = self.mask(x_TD, layout)
        return F.linear(gated(F.linear(x_TD, self.up), mask_TE), self.down), mask_TE

    def mask(self, x_TD: Tensor, layout: Layout) -> Tensor:
        """The weight of each expert for each token, float32."""
        with torch.autocast(x_TD.device.type, enabled=False):
            score_TE = F.linear(x_TD.to(self.router.dtype), self.router).softmax(-1)
            best_TK = score_TE.detach().topk(layout.counts[0], dim=-1).values
            threshold_T1 = best_TK.gather(-1, layout.counts_T1.long() - 1)
            keep_TE = score_TE >= threshold_T1
            if self.training:
                self.balance = self._balance(score_TE, keep_TE)
            mask_TE = score_TE * keep_TE
            return mask_TE / mask_TE.sum(-1, keepdim=True) if self.shape.normalise else mask_TE

    def _balance(self, score_TE: Tensor, keep_TE: Tensor) -> Tensor:
        load_E = keep_TE.float().sum(0)
        return self.shape.blocks * (load_E / load_E.sum() * score_TE.mean(0)).sum()

    def decoder_state(self) -> dict[str, Tensor]:
        """The weights as the decoder has them: stacked by expert."""
        gate_EWD, up_EWD = self.up.unflatten(0, (2, self.shape.blocks, -1))
        down_EDW = self.down.unflatten(1, (self.shape.blocks, -1)).transpose(0, 1)
        return {"router": self.router, "gate_up": torch.cat([gate_EWD, up_EWD], dim=1), "down": down_EDW}


class Dense(nn.Module):
    """Up [F, D], down [D, F], gelu."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.up = nn.Parameter(random_matrix(shape.units, shape.width))
        self.down = nn.Parameter(random_matrix(shape.width, shape.units) * shape.depth)

    def forward(self, x_TD: Tensor, layout: Layout) -> tuple[Tensor, None]:
        return F.linear(F.gelu(F.linear(x_TD, self.up)), self.down), None

    def decoder_state(self) -> dict[str, Tensor]:
        raise ValueError(
            "a dense network serves as a comparison and is not exported: its kind must be infinity or topk"
        )


FeedForward = Infinity | TopK | Dense
_KINDS: dict[str, type[FeedForward]] = {"infinity": Infinity, "topk": TopK, "dense": Dense}


def rotate(x_NHSC: Tensor, cos_SC: Tensor, sin_SC: Tensor) -> Tensor:
    """Rotary positions, half against half."""
    first, second = x_NHSC.chunk(2, dim=-1)
    turned_first = first * cos_SC - second * sin_SC
    turned_second = second * cos_SC + first * sin_SC
    return torch.cat([turned_first, turned_second], -1)


def norm(x: Tensor) -> Tensor:
    """RMS norm in the dtype that the next product takes. Its weights stay 1: training them costs 6 % of a step."""
    normed = F.rms_norm(x.float(), (x.shape[-1],), None, 1e-5)
    return normed.bfloat16() if torch.is_autocast_enabled(x.device.type) else normed


class Block(nn.Module):
    """Attention with normed queries and keys, then the feed-forward part."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width, head = shape.width, shape.width // shape.heads
        key_width = shape.kv_heads * head
        self.shape = shape
        self.sizes = (width, key_width, key_width)
        self.qkv = nn.Parameter(random_matrix(sum(self.sizes), width))
        out = torch.randn(width, width) / width**0.5
        self.out = nn.Parameter(out / math.sqrt(2 * shape.layers))
        self.ffn: FeedForward = _KINDS[shape.kind](shape)

    def forward(self, x_NSD: Tensor, tables: tuple[Tensor, Tensor], layout: Layout) -> tuple[Tensor, Tensor | None]:
        x_NSD = x_NSD + self.attend(norm(x_NSD), tables)
        y_TD, mask_TB = self.ffn(norm(x_NSD).flatten(0, 1), layout)
        return x_NSD + y_TD.view_as(x_NSD), mask_TB

    def attend(self, x_NSD: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
        """Causal attention within each window."""
        head = self.shape.width // self.shape.heads
        qkv = F.linear(x_NSD, self.qkv)
        q, k, v = qkv.split(self.sizes, dim=-1)
        q, k = norm(q), norm(k)
        parts = [part.unflatten(-1, (-1, head)) for part in (q, k, v)]
        q, k, v = (part.transpose(1, 2) for part in parts)
        q = rotate(q, *tables).to(v.dtype)
        k = rotate(k, *tables).to(v.dtype)
        shared = self.shape.kv_heads != self.shape.heads
        y_NHSC = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=shared)
        return F.linear(y_NHSC.transpose(1, 2).flatten(2), self.out)

    def decoder_state(self) -> dict[str, Tensor]:
        """The weights as the decoder has them."""
        queries, keys, _ = self.sizes
        norms = {"attention_norm": queries, "ffn_norm": queries, "attention.q_norm": queries, "attention.k_norm": keys}
        state: dict[str, Tensor] = {"attention.qkv.weight": self.qkv, "attention.out.weight": self.out}
        state |= {f"{name}.weight": torch.ones(width) for name, width in norms.items()}
        return state | {f"ffn.{name}": value for name, value in self.ffn.decoder_state().items()}


class Network(nn.Module):
    """Embedding, blocks, final norm, tied head."""

    cos: Tensor
    sin: Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed = nn.Parameter(torch.randn(shape.vocabulary, shape.width) * 0.02)
        self.layers = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        head = shape.width // shape.heads
        frequency_C = 10000.0 ** (-torch.arange(0, head, 2) / head)
        angle_SC = torch.arange(shape.context)[:, None] * frequency_C
        self.register_buffer("cos", angle_SC.cos(), persistent=False)
        self.register_buffer("sin", angle_SC.sin(), persistent=False)

    def stack(self) -> Iterator[Block]:
        """The blocks from first to last."""
        for layer in self.layers:
            assert isinstance(layer, Block)
            yield layer

    def hidden(self, ids_NS: Tensor, layout: Layout) -> tuple[Tensor, list[Tensor | None]]:
        """Normed last states [N, S, D], and each layer's masks."""
        length = ids_NS.shape[1]
        tables = self.cos[:length], self.sin[:length]
        x_NSD = F.embedding(ids_NS, self.embed)
        found = []
        for layer in self.layers:
            x_NSD, mask_TB = layer(x_NSD, tables, layout)
            found.append(mask_TB)
        return norm(x_NSD), found

    def logits(self, ids_NS: Tensor, layout: Layout) -> Tensor:
        """[N, S, V]."""
        return F.linear(self.hidden(ids_NS, layout)[0], self.embed)


@torch.no_grad()
def decoder_state(net: Network) -> dict[str, Tensor]:
    """The same weights under the names and in the shapes of `model.decoder.Decoder`."""
    norm_D = torch.ones(net.shape.width)
    state: dict[str, Tensor] = {"embed.weight": net.embed, "norm.weight": norm_D}
    for number, block in enumerate(net.stack()):
        weights = block.decoder_state()
        state |= {f"layers.{number}.{name}": value for name, value in weights.items()}
    return {name: value.detach().cpu().clone().contiguous() for name, value in state.items()}
