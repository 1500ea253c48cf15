"""A decoder on Triton kernels: the same function as `model.decoder.Decoder`, made from its loaded weights, which are
not copied. Where weights are to have 8 bits, the decoder's layers are taken over one by one.

A step is a chain of launches whose sizes follow from `StepShape`. Nothing is read back and nothing of the host reaches
a launch but those numbers, so that a step can be captured as a graph, if every layer has kernels (`native`).
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from model.attention.rope import rotary_tables
from model.backends.cuda.chain import attention_of, feed_forward_of, norm_of
from model.backends.cuda.inputs import StepInputs
from model.backends.cuda.kernels.attend import MAX_QUERIES
from model.backends.cuda.kernels.gemm import gemm
from model.backends.cuda.kernels.norm import residual_norm
from model.backends.cuda.kernels.operands import Weight
from model.backends.cuda.layer import row_tile
from model.backends.cuda.outputs import StepOutputs, loads_of
from model.backends.cuda.places import Places
from model.backends.cuda.quantise import Precision
from model.backends.cuda.refusal import layer_refusal
from model.backends.cuda.sublayers import PlainStep, ResidualStream, Sublayer
from model.decoder import Decoder, Layer
from model.shapes.attention import Attention
from model.shapes.decoder import DecoderConfig
from model.shapes.rope import Rope
from model.step import Tables

AS_LOADED = Precision()
POSITIONS = 4096  # whose cosines and sines are computed at a time


class CudaDecoder:
    """Weights as the kernels read them, and the chain that runs them. `length` bounds the positions served."""

    def __init__(self, model: Decoder, length: int, precision: Precision = AS_LOADED) -> None:
        config = model.config
        self.config = config
        self.plain = plain_layers(config)
        self._embed_VD = model.embed.weight
        self._positions_SD = model.embed_positions.weight if config.positions == "learned" else None
        self._rotary = {rope: rotary_table(rope, length, model.device) for rope in config.ropes}
        self._chain: list[Sublayer] = []
        norms = []
        for at, layer in enumerate(model.layers):
            assert isinstance(layer, Layer)
            for sublayer_of in (attention_of, feed_forward_of):
                self._chain.append(sublayer_of(layer, config, at, precision))
            norms += [norm_of(layer.attention_norm), norm_of(layer.ffn_norm)]
            if precision.quantize != "none":
                del layer.attention, layer.ffn  # what was converted is let go
        self._first_norm, *self._next_norms = [*norms, norm_of(model.norm)]
        head_bias = model.head.bias[None] if config.head_bias and not config.tied else None
        self._head = precision.linear(Weight((model.embed if config.tied else model.head).weight[None], head_bias))
        if self._head.packed != "none" and not config.tied:
            del model.head
        self._most = min((shape.maximum for shape in config.mixtures), default=0)

    @property
    def native(self) -> bool:
        """Whether every layer has kernels: only then can a step be captured, and equal bits are promised."""
        return not self.plain

    @property
    def tile_rows(self) -> int:
        """The most tokens of one sequence that a tile of queries may have, so that it fits every layer."""
        shared = [shape.heads // shape.kv_heads for shape in self.config.attention if isinstance(shape, Attention)]
        return max(1, MAX_QUERIES // max(shared, default=1))

    def compute(self, inputs: StepInputs, plain: PlainStep | None = None) -> StepOutputs:
        """What `logits` makes logits of, and what each mixture chose. Keys and values are written to the cache of the
        inputs. Only a decoder that is not `native` needs `plain`."""
        with current(self._embed_VD.device):
            return self._compute(_aligned(inputs), plain)

    def _compute(self, inputs: StepInputs, plain: PlainStep | None) -> StepOutputs:
        x_TD = self._embedded(inputs.ids_T, inputs.positions_T)
        stream = ResidualStream(
            inputs=inputs,
            places=Places(inputs.tables_BP, inputs.spans_B3, inputs.slots_T, inputs.tiles, inputs.shape.longest),
            rotary={rope: _looked_up(table, inputs.positions_T) for rope, table in self._rotary.items()},
            k_max=min(inputs.shape.k_max, self._most),
            x_TD=x_TD,
            normed_TD=x_TD.new_empty(x_TD.shape),
            scale=self.config.residual_scale,
            chosen=[],
            plain=plain,
        )
        residual_norm(x_TD, self._first_norm, stream.normed_TD)
        for sublayer, next_norm in zip(self._chain, self._next_norms, strict=True):
            sublayer(stream, next_norm)
        chosen = tuple(stream.chosen)
        return StepOutputs(stream.normed_TD.index_select(0, inputs.rows_B), loads_of(chosen), chosen)

    def _embedded(self, ids_T: Tensor, positions_T: Tensor) -> Tensor:
        x_TD = F.embedding(ids_T, self._embed_VD)
        if self.config.embed_scale != 1:
            x_TD *= self.config.embed_scale
        if self._positions_SD is not None:
            x_TD += F.embedding(positions_T, self._positions_SD)
        return x_TD

    def logits(self, normed_BD: Tensor) -> Tensor:
        """[B, V], float32, of rows of `StepOutputs`. Not a part of `compute`: outputs of graphs stay in memory, and
        logits are large."""
        logits_BV = normed_BD.new_empty(len(normed_BD), self._head.units, dtype=torch.float32)
        with current(logits_BV.device):
            gemm(normed_BD, self._head, logits_BV, tile=row_tile(len(normed_BD)))
        if self.config.logit_scale != 1:
            logits_BV *= self.config.logit_scale
        return logits_BV


def current(device: torch.device) -> AbstractContextManager[object]:
    """Makes a GPU the one that Triton launches on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _aligned(inputs: StepInputs) -> StepInputs:
    """With the counts of every layer at a multiple of 16 bytes: Triton compiles again for what lies elsewhere."""
    tokens = inputs.counts_LT.shape[1]
    if tokens % 2 == 0:
        return inputs
    return replace(inputs, counts_LT=F.pad(inputs.counts_LT, (0, 1))[:, :tokens])


def plain_layers(config: DecoderConfig) -> tuple[str, ...]:
    """Of each layer's sublayer without kernels why it has none."""
    shapes = (*config.attention, *config.feed_forward)
    return tuple(reason for shape in shapes if (reason := layer_refusal(shape)) is not None)


def rotary_table(rope: Rope, length: int, device: torch.device) -> Tensor:
    """Cosines and sines of every position, [2, positions, W], float32."""
    parts = []
    for first in range(0, length, POSITIONS):
        cos_P1W, sin_P1W = rotary_tables(torch.arange(first, min(first + POSITIONS, length), device=device), rope)
        parts.append(torch.stack([cos_P1W[:, 0], sin_P1W[:, 0]]))
    return torch.cat(parts, dim=1)


def _looked_up(table_2PW: Tensor, positions_T: Tensor) -> Tables:
    cos_TW, sin_TW = table_2PW.index_select(1, positions_T)
    return cos_TW[:, None], sin_TW[:, None]
