"""The parameters of attention and of recurrent layers, as ops and as blocks of a Program (see `params.py`)."""

from dataclasses import dataclass

from torch import Tensor

from model.backends.cpu.kernels.pack import Packed
from model.backends.cpu.kernels.params import BlockParams, NormParams, Params


@dataclass(frozen=True, slots=True)
class MaskParams(Params):
    """What a query sees, and how scores become weights. `window` 0: everything before; `softcap` 0: none."""

    op = "attend"
    scale: float
    window: int = 0
    chunk: int = 0  # positions: a query sees those of its own run of so many; 0: all
    softcap: float = 0.0
    sinks: Tensor | None = None  # [H]: scores without values


@dataclass(frozen=True, slots=True)
class AttentionParams(BlockParams):
    """One layer's attention. `clip` 0: none. `q_norm`, `k_norm`: weights, over all heads at once or over each."""

    op, add_op = "attention_block", "add_attention"
    norm: NormParams
    qkv: Packed
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    norm_per_head: bool
    clip: float
    rotary: Tensor | None  # [positions, 2, half the turned elements of a head]
    out: Packed
    out_bias: Tensor | None
    heads: int
    kv_heads: int
    head_width: int
    mask: MaskParams
    norm_after_rotary: bool = False
    query_scale: Tensor | None = None  # [positions]
    gated: bool = False  # `qkv` gives queries, keys, values and gates
    residual_scale: float = 1.0


@dataclass(frozen=True, slots=True)
class LatentParams(BlockParams):
    """Multi-head latent attention, absorbed: `to_keys` and `to_values` hold a matrix for each head."""

    op, add_op = "latent_block", "add_latent"
    norm: NormParams
    query_norm: NormParams
    latent_norm: NormParams
    down: Packed  # [query_rank + rank + W, D]
    down_bias: Tensor | None  # padded as the packed outputs are
    query: Packed  # [H · (N + W), query_rank], or of D inputs where `query_rank` is 0
    to_keys: Packed  # [H, rank, N]
    to_values: Packed  # [H, V, rank]
    out: Packed
    out_bias: Tensor | None
    rotary: Tensor  # [positions, 2, W / 2]
    heads: int
    query_rank: int
    rank: int
    plain_width: int
    value_width: int
    mask: MaskParams
    residual_scale: float = 1.0


@dataclass(frozen=True, slots=True)
class DeltaParams(BlockParams):
    """A gated delta net. Heads are padded to a multiple of 16 where one value of each lies in a row."""

    op, add_op = "delta_block", "add_delta"
    norm: NormParams
    project: Packed  # queries, keys, values: the C channels of the convolution; then gates
    rates: Packed  # the logits of β, then of the decay
    rates_bias: Tensor  # zeros, then what is added to the decay's logits
    convolution: Tensor  # [kernel, C]
    decay: Tensor  # [heads]: what the decay's softplus is multiplied by
    head_norm: Tensor
    out: Packed
    key_heads: int
    value_heads: int
    key_width: int
    value_width: int
