"""The one decoder skeleton: embed, then per layer attention and a feed-forward layer or mixture, then the head.

Every family is the same code under a `DecoderConfig` of its own; the modules of its layers come from `module_for`
(`model/registry.py`).
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import model.attention
import model.moe
from model.attention.rope import rotary_tables
from model.batch import Batch, LayerBudget
from model.grouped import Grouped
from model.layers import norm_layer
from model.moe.repair import RepairTables, repaired
from model.registry import module_for, register_all
from model.shapes.attention import AttentionShape
from model.shapes.decoder import DecoderConfig
from model.shapes.feed_forward import FeedForward
from model.step import LayerStep, Observer, Past


def embedding(count: int, width: int) -> nn.Embedding:
    """An embedding without torch's initial values: drawing them on the meta device imports much, and takes a second."""
    return nn.Embedding.from_pretrained(torch.empty(count, width), freeze=False)


class Layer(nn.Module):
    """Pre-norm residual block."""

    def __init__(self, config: DecoderConfig, attention: AttentionShape, feed_forward: FeedForward) -> None:
        super().__init__()
        self.attention_norm = norm_layer(config)
        self.attention = module_for(attention, config)
        self.ffn_norm = norm_layer(config)
        self.ffn = module_for(feed_forward, config)
        self.scale = config.residual_scale
        self.repair: RepairTables | None = None  # of a mixture, where a calibration has them

    def forward(self, x_TD: Tensor, attention_step: LayerStep, ffn_step: LayerStep) -> Tensor:
        """Both sublayers, each added to its input (before the norm)."""
        x_TD = x_TD + self.scale * self.attention(self.attention_norm(x_TD), attention_step)
        y_TD = repaired(self.ffn(self.ffn_norm(x_TD), ffn_step), ffn_step.budget, self.repair)
        return x_TD + self.scale * y_TD


class Decoder(nn.Module):
    """A decoder-only language model. Parameters are uninitialised until a loader or a trainer fills them."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        register_all(model.attention, model.moe)
        self.config = config
        self._ropes = config.ropes
        self.embed = embedding(config.vocabulary, config.width)
        if config.positions == "learned":
            self.embed_positions = embedding(config.context, config.width)
        self.layers = nn.ModuleList(self._layer(number) for number in range(len(config.attention)))
        self.norm = norm_layer(config)
        if not config.tied:
            self.head = nn.Linear(config.width, config.vocabulary, bias=config.head_bias)

    def _layer(self, number: int) -> Layer:
        return Layer(self.config, self.config.attention[number], self.config.feed_forward[number])

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.embed.weight.dtype

    @property
    def device(self) -> torch.device:
        """Of the weights."""
        return self.embed.weight.device

    def forward(self, batch: Batch, past: Past, observer: Observer | None = None) -> Tensor:
        """Logits of the wanted rows, [B, V], in the model's dtype."""
        return self.logits(self.hidden(batch, past, observer)[batch.rows_B])

    def hidden(self, batch: Batch, past: Past, observer: Observer | None = None) -> Tensor:
        """Final normed hidden states of all T tokens, [T, D]."""
        x_TD = self.embed(batch.ids_T)
        if self.config.embed_scale != 1:
            x_TD = x_TD * self.config.embed_scale
        if self.config.positions == "learned":
            x_TD = x_TD + self.embed_positions(batch.positions_T)
        for layer, steps in zip(self.layers, self._steps(batch, past, observer), strict=True):
            x_TD = layer(x_TD, *steps)
        return self.norm(x_TD)

    def _steps(self, batch: Batch, past: Past, observer: Observer | None) -> Iterator[tuple[LayerStep, LayerStep]]:
        """For each layer, the steps of its attention and of its feed-forward layer.

        In `config.memory`, feed-forward layers that keep something come after all attention layers.
        """
        rotary = {rope: rotary_tables(batch.positions_T, rope) for rope in self._ropes}
        no_counts = LayerBudget(batch.ids_T.new_empty(0), 0)
        moe_layer, memory = 0, len(self.config.attention)
        router_logits: list[Tensor] = []  # of this pass; a kind whose layers read each other's logits adds to it
        for number, shape in enumerate(self.config.feed_forward):
            is_mixture = shape.num_experts > 0
            budget = batch.budget.layer(moe_layer) if is_mixture else no_counts
            step = LayerStep(
                budget=budget,
                seeds_T=batch.seeds_T,
                positions_T=batch.positions_T,
                moe_layer=moe_layer,
                observer=observer,
                past=past,
                memory=number,
                rotary=rotary,
                routes=batch.routes,
                router_logits=router_logits,
            )
            yield step, step if shape.memory is None else replace(step, memory=memory)
            moe_layer += is_mixture
            memory += shape.memory is not None

    def logits(self, x_BD: Tensor) -> Tensor:
        """[B, V] for final hidden states."""
        logits_BV = F.linear(x_BD, self.embed.weight) if self.config.tied else self.head(x_BD)
        return logits_BV if self.config.logit_scale == 1 else logits_BV * self.config.logit_scale


@torch.inference_mode()
def parameter_count(model: nn.Module) -> int:
    """Stored parameters, a tied head counted once."""
    kept = sum(part.shape.numel() for part in grouped_parts(model))
    return kept + sum(parameter.numel() for parameter in model.parameters())


def grouped_parts(model: nn.Module) -> Iterator[Grouped]:
    """The quantised matrices that its modules have in place of parameters."""
    for module in model.modules():
        yield from (value for value in vars(module).values() if isinstance(value, Grouped))
