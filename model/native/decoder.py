"""A decoder on native kernels: the same function as `model.decoder.Decoder`, row results independent of the batch.

Activations between blocks are float32 whatever the weights are. Made from a loaded `Decoder`, whose parameters it takes
over layer by layer, so that memory holds one layer twice at most. It knows no requests and no files.
"""

import torch
from torch import Tensor

from model.batch import Batch
from model.config import DecoderConfig, Infinity
from model.decoder import Decoder, Layer, parameter_count
from model.kernels.pack import pack
from model.layers import rotary_tables
from model.mixture.seam import Mixture, Observer
from model.native.blocks import Quantize, attention_block, feed_forward_block, norm_args, precision_for
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
    """Packed weights and the program that runs them. `length` bounds the positions served."""

    def __init__(self, model: Decoder, length: int, quantize: Quantize = "none", experts_only: bool = True) -> None:
        config = model.config
        self.config, self.dtype, self.token_local = config, model.embed.weight.dtype, model.token_local
        self.parameters = parameter_count(model)
        self.precision = precision = precision_for(self.dtype, quantize, experts_only)
        self._loads = [m.blocks if isinstance(m, Infinity) else m.experts for m in config.mixtures]
        head, tied = pack((model.embed if config.tied else model.head).weight, precision.linears), model.embed.weight
        places = model.embed_positions.weight if config.positions == "learned" else None
        self._program = torch.classes.moedial.Program(config.width, tied.detach(), places)
        self._program.head(*norm_args(model.norm), head.words, head.side, config.vocabulary, None)
        rotary = rotary_table(config, length) if config.positions == "rotary" else None
        mixtures = 0
        while len(model.layers):
            layer = model.layers[0]
            assert isinstance(layer, Layer)
            attention = attention_block(layer.attention_norm, layer.attention, rotary, precision)
            self._program.attention(config.kv_heads, config.head_width, *attention.args)
            rest = feed_forward_block(layer.ffn_norm, layer.ffn, mixtures, precision)
            getattr(self._program, rest.kind)(*rest.args)
            mixtures += isinstance(layer.ffn, Mixture)
            del model.layers[0], layer
        self._run = self._program.run

    def cache(self, blocks: int, block_size: int) -> NativeCache:
        """The cache that this decoder reads and writes."""
        c = self.config
        return NativeCache(len(c.layers), blocks, block_size, c.kv_heads, c.head_width, self.dtype)

    @torch.inference_mode()
    def __call__(self, batch: Batch, pages: NativePages, observer: Observer | None = None) -> Tensor:
        """Logits of the wanted rows, [B, V], float32."""
        cache = pages.cache
        logits_BV, load_N = self._run(
            batch.ids_T,
            batch.positions_T,
            batch.seeds_T,
            batch.experts_LT,
            batch.k_max,
            batch.rows_B,
            cache.layers,
            pages.spans_B3,
            pages.tables_BP,
            cache.block_size,
        )
        if observer is not None:
            for mixture, (pairs, load_E) in enumerate(zip(batch.pairs_L, load_N.split(self._loads), strict=True)):
                observer.routed(mixture, pairs, load_E, None)
        result: Tensor = logits_BV
        return result


def rotary_table(config: DecoderConfig, length: int) -> Tensor:
    """Cosines and sines of every position, [positions, 2, C / 2], float32."""
    cos_P1C, sin_P1C = rotary_tables(torch.arange(length), config.head_width, config.rope_theta)
    half = config.head_width // 2
    return torch.cat([cos_P1C[..., :half], sin_P1C[..., :half]], dim=1).contiguous()
