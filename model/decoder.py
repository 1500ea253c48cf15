"""The one decoder skeleton: embed, then per layer attention and a feed-forward layer or mixture, then the head.

GPT-2-like and Llama-like models are the same code under different `DecoderConfig`s. It knows no files and no requests.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.attend import PagedCache
from model.batch import Batch
from model.config import DecoderConfig, Dense, FeedForward, Infinity
from model.layers import Attend, DenseFFN, SelfAttention, norm_layer, rotary_tables
from model.mixture.infinity import InfinityMixture
from model.mixture.seam import Mixture, Observer, Use
from model.mixture.topk import TopKMixture


def feed_forward(width: int, config: FeedForward) -> nn.Module:
    """The module for one layer's feed-forward config."""
    if isinstance(config, Dense):
        return DenseFFN(width, config)
    return InfinityMixture(width, config) if isinstance(config, Infinity) else TopKMixture(width, config)


class Layer(nn.Module):
    """Pre-norm residual block."""

    def __init__(self, config: DecoderConfig, ffn: FeedForward) -> None:
        super().__init__()
        self.attention_norm = norm_layer(config)
        self.attention = SelfAttention(config)
        self.ffn_norm = norm_layer(config)
        self.ffn = feed_forward(config.width, ffn)

    def forward(
        self, x_TD: Tensor, rotary: tuple[Tensor, Tensor] | None, layer: int, attend: Attend, use: Use | None
    ) -> Tensor:
        x_TD = x_TD + self.attention(self.attention_norm(x_TD), rotary, layer, attend)
        h_TD = self.ffn_norm(x_TD)
        return x_TD + (self.ffn(h_TD) if use is None else self.ffn(h_TD, use))


class Decoder(nn.Module):
    """A decoder-only language model. Parameters are uninitialised until a loader or a trainer fills them."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocabulary, config.width)
        if config.positions == "learned":
            self.embed_positions = nn.Embedding(config.context, config.width)
        self.layers = nn.ModuleList(Layer(config, ffn) for ffn in config.layers)
        self.norm = norm_layer(config)
        if not config.tied:
            self.head = nn.Linear(config.width, config.vocabulary, bias=False)

    @property
    def token_local(self) -> bool:
        """Whether every mixture treats each token by itself (so that chunked prefill and prefix reuse are exact)."""
        return all(m.token_local for m in self.modules() if isinstance(m, Mixture))

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.embed.weight.dtype

    def cache(self, blocks: int, block_size: int) -> PagedCache:
        """A paged cache for this decoder."""
        c = self.config
        return PagedCache(len(c.layers), blocks, block_size, c.kv_heads, c.head_width, self.dtype)

    def forward(self, batch: Batch, attend: Attend, observer: Observer | None = None) -> Tensor:
        """Logits of the wanted rows, [B, V], in the model's dtype."""
        return self.logits(self.hidden(batch, attend, observer)[batch.rows_B])

    def hidden(self, batch: Batch, attend: Attend, observer: Observer | None = None) -> Tensor:
        """Final normed hidden states of all T tokens, [T, D]."""
        x_TD = self.embed(batch.ids_T)
        rotary = None
        if self.config.positions == "learned":
            x_TD = x_TD + self.embed_positions(batch.positions_T)
        else:
            rotary = rotary_tables(batch.positions_T, self.config.head_width, self.config.rope_theta)
        mixtures = 0
        for index, layer in enumerate(self.layers):
            use = None
            if isinstance(layer.ffn, Mixture):
                use = _use(batch, mixtures, observer)
                mixtures += 1
            x_TD = layer(x_TD, rotary, index, attend, use)
        return self.norm(x_TD)

    def logits(self, x_BD: Tensor) -> Tensor:
        """[B, V] for final hidden states."""
        return F.linear(x_BD, self.embed.weight) if self.config.tied else self.head(x_BD)


def _use(batch: Batch, layer: int, observer: Observer | None) -> Use:
    return Use(layer, batch.experts_LT[layer], batch.k_max, batch.seeds_T, batch.positions_T, observer)


@torch.inference_mode()
def parameter_count(model: nn.Module) -> int:
    """Stored parameters, a tied head counted once."""
    return sum(parameter.numel() for parameter in model.parameters())
