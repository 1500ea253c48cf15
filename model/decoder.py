"""The one decoder skeleton: embed, then per layer a mixer and a feed-forward layer or mixture, then the head.

Every family is the same code under a `DecoderConfig` of its own. It knows no files and no requests.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.attention.attention import SelfAttention
from model.attention.base import Attend, MixerModule, Place
from model.attention.gated_delta_net import GatedDelta
from model.attention.mla import LatentAttention
from model.attention.rope import rotary_tables
from model.backends.torch.attend import PagedCache
from model.backends.torch.tiles import WORKSPACE
from model.batch import Batch
from model.layers import DenseFFN, norm_layer
from model.moe.base import Mixture, Observer, Use
from model.moe.infinity import InfinityMixture
from model.moe.topk import TopKMixture
from model.shapes.attention import Attention, Delta, Latent, Mixer
from model.shapes.decoder import DecoderConfig, Dense, FeedForward, Infinity


def feed_forward(width: int, config: FeedForward) -> nn.Module:
    """The module for one layer's feed-forward config."""
    if isinstance(config, Dense):
        return DenseFFN(width, config)
    return InfinityMixture(width, config) if isinstance(config, Infinity) else TopKMixture(width, config)


def mixer(shape: Mixer, config: DecoderConfig) -> MixerModule:
    """The module for the shape of one layer's mixer."""
    if isinstance(shape, Attention):
        return SelfAttention(shape, config)
    return LatentAttention(shape, config) if isinstance(shape, Latent) else GatedDelta(shape, config)


def embedding(count: int, width: int) -> nn.Embedding:
    """Without torch's initial values: drawing them for a model without memory imports much, and takes a second."""
    return nn.Embedding.from_pretrained(torch.empty(count, width), freeze=False)


class Layer(nn.Module):
    """Pre-norm residual block."""

    def __init__(self, config: DecoderConfig, shape: Mixer, ffn: FeedForward) -> None:
        super().__init__()
        self.mixer_norm = norm_layer(config)
        self.mixer = mixer(shape, config)
        self.ffn_norm = norm_layer(config)
        self.ffn = feed_forward(config.width, ffn)
        self.scale = config.residual_scale

    def forward(self, x_TD: Tensor, place: Place, use: Use | None) -> Tensor:
        x_TD = x_TD + self.scale * self.mixer(self.mixer_norm(x_TD), place)
        h_TD = self.ffn_norm(x_TD)
        return x_TD + self.scale * (self.ffn(h_TD) if use is None else self.ffn(h_TD, use))


class Decoder(nn.Module):
    """A decoder-only language model. Parameters are uninitialised until a loader or a trainer fills them."""

    workspace = WORKSPACE  # bytes that a step's attention takes beside the cache

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = embedding(config.vocabulary, config.width)
        if config.positions == "learned":
            self.embed_positions = embedding(config.context, config.width)
        self.layers = nn.ModuleList(
            Layer(config, shape, ffn) for shape, ffn in zip(config.mixers, config.layers, strict=True)
        )
        self.norm = norm_layer(config)
        if not config.tied:
            self.head = nn.Linear(config.width, config.vocabulary, bias=config.head_bias)
        self._ropes = {s.rope for s in config.mixers if not isinstance(s, Delta) and s.rope is not None}

    @property
    def token_local(self) -> bool:
        """Whether every mixture treats each token by itself (so that chunked prefill and prefix reuse are exact)."""
        return all(m.token_local for m in self.modules() if isinstance(m, Mixture))

    @property
    def reusable(self) -> bool:
        """Whether what is kept of a prefix can serve another sequence: not a recurrent state, which has moved on."""
        return all(m.reusable for m in self.modules() if isinstance(m, MixerModule))

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.embed.weight.dtype

    def cache(self, blocks: int, block_size: int, slots: int = 0) -> PagedCache:
        """A paged cache for this decoder, with states for `slots` sequences."""
        memory = [shape.memory for shape in self.config.mixers]
        return PagedCache(memory, blocks, block_size, self.dtype, slots)

    def forward(self, batch: Batch, attend: Attend, observer: Observer | None = None) -> Tensor:
        """Logits of the wanted rows, [B, V], in the model's dtype."""
        return self.logits(self.hidden(batch, attend, observer)[batch.rows_B])

    def hidden(self, batch: Batch, attend: Attend, observer: Observer | None = None) -> Tensor:
        """Final normed hidden states of all T tokens, [T, D]."""
        x_TD = self.embed(batch.ids_T)
        if self.config.embed_scale != 1:
            x_TD = x_TD * self.config.embed_scale
        if self.config.positions == "learned":
            x_TD = x_TD + self.embed_positions(batch.positions_T)
        tables = {rope: rotary_tables(batch.positions_T, rope) for rope in self._ropes}
        mixtures = 0
        for index, layer in enumerate(self.layers):
            use = None
            if isinstance(layer.ffn, Mixture):
                use = _use(batch, mixtures, observer)
                mixtures += 1
            x_TD = layer(x_TD, Place(index, batch.positions_T, tables, attend), use)
        return self.norm(x_TD)

    def logits(self, x_BD: Tensor) -> Tensor:
        """[B, V] for final hidden states."""
        logits_BV = F.linear(x_BD, self.embed.weight) if self.config.tied else self.head(x_BD)
        return logits_BV if self.config.logit_scale == 1 else logits_BV * self.config.logit_scale


def _use(batch: Batch, layer: int, observer: Observer | None) -> Use:
    return Use(layer, batch.experts_LT[layer], batch.k_max, batch.seeds_T, batch.positions_T, observer)


@torch.inference_mode()
def parameter_count(model: nn.Module) -> int:
    """Stored parameters, a tied head counted once."""
    return sum(parameter.numel() for parameter in model.parameters())
