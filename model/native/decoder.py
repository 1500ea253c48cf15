"""A decoder on native kernels: the same function as `model.decoder.Decoder`, row results independent of the batch.

Activations between blocks are float32 whatever the weights are. Made from a loaded `Decoder`, whose parameters it takes
over layer by layer, so that memory holds one layer twice at most. It knows no requests and no files.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from model.batch import Batch
from model.config import DecoderConfig
from model.decoder import Decoder, Layer, parameter_count
from model.kernels.pack import pack
from model.layers import rotary_tables
from model.mixture.seam import Mixture, Observer
from model.native.blocks import NativeAttention, NativeBlock, Quantize, feed_forward_block, norm_args, precision_for
from model.native.cache import TILE, NativeCache, NativePages

MOST_SHARERS = 32  # query heads of one key-value head that the attention kernel takes


def refusal(config: DecoderConfig, block_size: int) -> str | None:
    """Why the kernels cannot run this model, or None."""
    if config.head_width % TILE:
        return f"the head width {config.head_width} is not a multiple of {TILE}"
    if config.heads // config.kv_heads > MOST_SHARERS:
        return f"{config.heads // config.kv_heads} query heads share one key-value head, more than {MOST_SHARERS}"
    if block_size % TILE:
        return f"the block size {block_size} is not a multiple of {TILE}"
    return None


class NativeDecoder:
    """Packed weights and the ops that run them. `length` bounds the positions served."""

    def __init__(self, model: Decoder, length: int, quantize: Quantize = "none", experts_only: bool = True) -> None:
        config = model.config
        self.config, self.dtype, self.token_local = config, model.embed.weight.dtype, model.token_local
        self.parameters = parameter_count(model)
        precision = precision_for(self.dtype, quantize, experts_only)
        head = model.embed if config.tied else model.head
        self.head = pack(head.weight, precision.linears)
        self.norm = norm_args(model.norm)
        self.embed = model.embed.weight
        self.embed_positions = model.embed_positions.weight if config.positions == "learned" else None
        rotary = rotary_table(config, length) if config.positions == "rotary" else None
        self.blocks: list[NativeBlock] = []
        mixtures = 0
        while len(model.layers):
            layer = model.layers[0]
            assert isinstance(layer, Layer)
            self.blocks.append(
                NativeAttention(len(self.blocks) // 2, layer.attention_norm, layer.attention, rotary, precision)
            )
            self.blocks.append(feed_forward_block(layer.ffn_norm, layer.ffn, mixtures, precision))
            mixtures += isinstance(layer.ffn, Mixture)
            del model.layers[0], layer

    def cache(self, blocks: int, block_size: int) -> NativeCache:
        """The cache that this decoder reads and writes."""
        c = self.config
        return NativeCache(len(c.layers), blocks, block_size, c.kv_heads, c.head_width, self.dtype)

    @torch.inference_mode()
    def __call__(self, batch: Batch, pages: NativePages, observer: Observer | None = None) -> Tensor:
        """Logits of the wanted rows, [B, V], float32."""
        x_TD = F.embedding(batch.ids_T, self.embed).float()
        if self.embed_positions is not None:
            x_TD += F.embedding(batch.positions_T, self.embed_positions)
        for block in self.blocks:
            block(x_TD, batch, pages, observer)
        head = self.head
        if len(batch.rows_B) < len(x_TD):
            x_TD = x_TD[batch.rows_B]
        logits_BV: Tensor = torch.ops.moedial.linear(
            x_TD, *self.norm, head.words, head.side, self.config.vocabulary, None
        )
        return logits_BV


def rotary_table(config: DecoderConfig, length: int) -> Tensor:
    """Cosines and sines of every position, [positions, 2, C / 2], float32."""
    cos_P1C, sin_P1C = rotary_tables(torch.arange(length), config.head_width, config.rope_theta)
    half = config.head_width // 2
    return torch.cat([cos_P1C[..., :half], sin_P1C[..., :half]], dim=1).contiguous()
