"""An encoder and a decoder as one module: the encoder's layers run for the rows of new prompts, the decoder's for those
of answers (`model/stack_rows.py` says which these are).

To the engine a sequence is a prompt and its answer, as any other. In `config.memory` come the decoder layers' own keys
and values, then those of the prompt, which stay as they are, and a state of one value: the prompt's length.
"""

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from model.attention.cross import CrossAttention
from model.attention.relative import distance_bias
from model.batch import Batch, LayerBudget
from model.decoder import Decoder, Layer
from model.layers import norm_layer
from model.moe.repair import repaired
from model.shapes.attention import Attention, AttentionShape
from model.shapes.decoder import DecoderConfig
from model.shapes.encoder import Encoder
from model.stack_rows import Layout, Rows, RowsObserver, layout
from model.step import DistanceBias, LayerStep, Observer, Past

FORCED = -1e4  # the logit of what an answer cannot begin with: finite, and below whatever a request adds


def decoder_of(config: DecoderConfig) -> Decoder:
    """The module of this shape, its parameters uninitialised."""
    return Decoder(config) if config.encoder is None else EncoderDecoder(config)


class CrossLayer(Layer):
    """A layer of the decoder: between its own attention and its feed-forward layer it looks at the prompt."""

    def __init__(self, config: DecoderConfig, number: int) -> None:
        shape = config.attention[number]
        super().__init__(config, shape, config.feed_forward[number])
        assert isinstance(shape, Attention)
        self.cross_norm = norm_layer(config)
        self.cross = CrossAttention(shape, config)

    def decode(self, x_TD: Tensor, encoded_SD: Tensor, own: LayerStep, cross: LayerStep, ffn: LayerStep) -> Tensor:
        """All three sublayers, each added to its input (before the norm)."""
        x_TD = x_TD + self.attention(self.attention_norm(x_TD), own)
        x_TD = x_TD + self.cross(self.cross_norm(x_TD), encoded_SD, cross)
        return x_TD + repaired(self.ffn(self.ffn_norm(x_TD), ffn), ffn.budget, self.repair)


class EncoderDecoder(Decoder):
    """`layers` are the encoder's, then the decoder's."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        self.encoder_norm = norm_layer(config)
        if self._encoder.bias is not None:
            first = self._encoder.layers
            self.encoder_bias = self._bias_tables(config.attention[:first])
            self.decoder_bias = self._bias_tables(config.attention[first:])

    @property
    def _encoder(self) -> Encoder:
        assert self.config.encoder is not None
        return self.config.encoder

    def _layer(self, number: int) -> Layer:
        return super()._layer(number) if number < self._encoder.layers else CrossLayer(self.config, number)

    def _bias_tables(self, layers: tuple[AttentionShape, ...]) -> nn.ParameterList:
        """One table [buckets, H] for a stack, or one for each of its layers."""
        shape = self._encoder.bias
        assert shape is not None
        heads = [layer.heads for layer in layers if isinstance(layer, Attention)]
        tables = [torch.empty(shape.buckets, count) for count in heads[: 1 if shape.shared else None]]
        return nn.ParameterList(map(nn.Parameter, tables))

    def forward(self, batch: Batch, past: Past, observer: Observer | None = None) -> Tensor:
        """Logits of the wanted rows, [B, V]. Those of prompts, but for their last, have none."""
        rows = self._layout(batch, past)
        logits_BV = self.logits(self._run(batch, past, rows, observer)[batch.rows_B])
        if self._encoder.forced is None or not rows.bare:
            return logits_BV
        bare_B = torch.isin(batch.rows_B, _indices(rows.bare, batch))
        forced_V = torch.full_like(logits_BV[0], FORCED)
        forced_V[self._encoder.forced] = 0.0
        return torch.where(bare_B[:, None], forced_V, logits_BV)

    def hidden(self, batch: Batch, past: Past, observer: Observer | None = None) -> Tensor:
        """Final normed hidden states of the answers' rows, zeros for others, [T, D]."""
        return self._run(batch, past, self._layout(batch, past), observer)

    def _layout(self, batch: Batch, past: Past) -> Layout:
        lengths = 2 * (len(self.layers) - self._encoder.layers)  # after two memories of each of the decoder's layers
        return layout(batch, past, self._encoder, lengths)

    def _run(self, batch: Batch, past: Past, found: Layout, observer: Observer | None) -> Tensor:
        encoded_SD = self._encode(batch, past, found.encoder, observer)
        ids_T = batch.ids_T.index_fill(0, _indices(found.starts, batch), self._encoder.start)
        x_RD = self._embedded(ids_T, found.decoder)
        first, own, cross = self._encoder.layers, past.part(found.decoder.parts), past.part(found.cross)
        for number, step in self._steps_of(batch, found.decoder, observer, first, len(self.layers)):
            layer, memory = self.layers[number], number - first
            assert isinstance(layer, CrossLayer)
            own_step = replace(step, past=own, memory=memory, bias=self._decoder_bias(memory))
            cross_step = replace(step, past=cross, memory=memory + len(self.layers) - first)
            x_RD = layer.decode(x_RD, encoded_SD, own_step, cross_step, replace(step, past=own))
        y_RD = self.norm(x_RD)
        return y_RD.new_zeros(len(batch.ids_T), y_RD.shape[1]).index_copy(0, found.decoder.row_R, y_RD)

    def _encode(self, batch: Batch, past: Past, rows: Rows, observer: Observer | None) -> Tensor:
        """What the encoder makes of the new prompts, [S, D]."""
        x_SD = self._embedded(batch.ids_T, rows)
        if not rows.parts:
            self._report_no_routes(batch, observer)
            return x_SD
        own = past.part(rows.parts)
        for number, step in self._steps_of(batch, rows, observer, 0, self._encoder.layers):
            step = replace(step, past=own)
            x_SD = self.layers[number](x_SD, replace(step, bias=self._encoder_bias(number)), step)
        return self.encoder_norm(x_SD)

    def _report_no_routes(self, batch: Batch, observer: Observer | None) -> None:
        """Report the routes of the encoder's mixtures as empty: routes are reported of every mixture."""
        if observer is not None and batch.routes:
            none_TK = batch.ids_T.new_full((len(batch.ids_T), 1), -1, dtype=torch.int32)
            for moe_layer in range(self._mixtures_before(self._encoder.layers)):
                observer.routes(moe_layer, none_TK)

    def _embedded(self, ids_T: Tensor, rows: Rows) -> Tensor:
        x_RD = self.embed(ids_T[rows.row_R])
        if self.config.embed_scale != 1:
            x_RD = x_RD * self.config.embed_scale
        if self.config.positions == "sinusoidal":
            x_RD = x_RD + sinusoids(rows.position_R, self.config.width).to(x_RD.dtype)
        return x_RD

    def _encoder_bias(self, number: int) -> DistanceBias | None:
        shape = self._encoder.bias
        if shape is None:
            return None
        return distance_bias(self.encoder_bias[0 if shape.shared else number], shape, causal=False)

    def _decoder_bias(self, number: int) -> DistanceBias | None:
        shape = self._encoder.bias
        if shape is None:
            return None
        return distance_bias(self.decoder_bias[0 if shape.shared else number], shape, causal=True)

    def _mixtures_before(self, layer: int) -> int:
        return sum(shape.num_experts > 0 for shape in self.config.feed_forward[:layer])

    def _steps_of(
        self, batch: Batch, rows: Rows, observer: Observer | None, first: int, end: int
    ) -> Iterator[tuple[int, LayerStep]]:
        """The numbers of these layers, and what each one's sublayers see of the step beside the past."""
        moe_layer = self._mixtures_before(first)
        no_counts = LayerBudget(batch.ids_T.new_empty(0), 0)
        reported = None if observer is None else RowsObserver(observer, rows.row_R, len(batch.ids_T))
        for number in range(first, end):
            is_mixture = self.config.feed_forward[number].num_experts > 0
            yield (
                number,
                LayerStep(
                    budget=_of_rows(batch.budget.layer(moe_layer), rows.row_R) if is_mixture else no_counts,
                    seeds_T=batch.seeds_T[rows.row_R],
                    positions_T=batch.positions_T[rows.row_R],
                    moe_layer=moe_layer,
                    observer=reported,
                    routes=batch.routes,
                ),
            )
            moe_layer += is_mixture


def sinusoids(position_R: Tensor, width: int) -> Tensor:
    """M2M100's fixed positions [R, width], float32: sines, then cosines. The first token's place is 2, because fairseq
    counts from the padding's id, which is 1."""
    half = width // 2
    rate_F = torch.exp(torch.arange(half, device=position_R.device).float() * -(math.log(10000) / (half - 1)))
    angle_RF = (position_R + 2).float()[:, None] * rate_F
    return torch.cat([angle_RF.sin(), angle_RF.cos()], dim=1)


def _of_rows(budget: LayerBudget, row_R: Tensor) -> LayerBudget:
    rule_R = None if budget.rule_T is None else budget.rule_T[row_R]
    return replace(budget, counts_T=budget.counts_T[row_R], rule_T=rule_R, known_pairs=None, partial=True)


def _indices(rows: tuple[int, ...], batch: Batch) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64, device=batch.ids_T.device)
