"""A decoder on native kernels: the same function as `model.decoder.Decoder`, row results independent of the batch.

Activations between blocks are float32 whatever the weights are. Made from a loaded `Decoder`, whose parameters it takes
over layer by layer, so that memory holds one layer twice at most. It knows no requests and no files.
"""

import torch
from torch import Tensor

from model.attention.attention import SelfAttention
from model.attention.rope import rotary_tables
from model.backends.cpu.blocks import (
    Quantize,
    attention_block,
    feed_forward_block,
    norm_params,
    precision_for,
)
from model.backends.cpu.cache import TILE, NativeCache, NativePages
from model.backends.cpu.kernels.pack import pack
from model.backends.cpu.kernels.params import ACTIVATIONS, BlockParams, LinearParams
from model.batch import Batch
from model.decoder import Decoder, Layer, parameter_count
from model.moe.base import Mixture, Observer
from model.shapes.attention import Attention, Mixer, Rope
from model.shapes.decoder import DecoderConfig, FeedForward, Infinity, Router, TopK

MOST_SHARERS = 32  # query heads of one key-value head that the attention kernel takes


def refusal(config: DecoderConfig, block_size: int) -> str | None:
    """Why the kernels cannot run this model, or None."""
    reasons = (*map(mixer_refusal, config.mixers), *map(feed_forward_refusal, config.layers))
    if reason := next(filter(None, reasons), None):
        return reason
    if config.head_bias or (config.embed_scale, config.residual_scale, config.logit_scale) != (1, 1, 1):
        return "a bias of the head, or embeddings, residuals or logits that are scaled"
    if block_size % TILE:
        return f"the block size {block_size} is not a multiple of {TILE}"
    return None


def mixer_refusal(shape: Mixer) -> str | None:
    """Why there is no kernel for this mixer, or None."""
    if not isinstance(shape, Attention):
        return f"layers of the kind {type(shape).__name__}"
    if shape.head_width % TILE:
        return f"the head width {shape.head_width} is not a multiple of {TILE}"
    if shape.heads // shape.kv_heads > MOST_SHARERS:
        return f"{shape.heads // shape.kv_heads} query heads share one key-value head, more than {MOST_SHARERS}"
    if shape.rope is not None and (shape.rope.interleaved or shape.rope.width != shape.head_width):
        return "rotary positions of neighbouring pairs or of parts of a head"
    if shape.chunk or shape.gated or shape.floor_scale is not None or shape.qk_norm == "unit":
        return "attention in chunks, with a gate, with a temperature, or with unit queries"
    return None


def feed_forward_refusal(ffn: FeedForward) -> str | None:
    """Why there is no kernel for this feed-forward layer, or None."""
    if isinstance(ffn, TopK):
        plain = TopK(ffn.experts, ffn.width, ffn.trained, Router(normalise=ffn.router.normalise), ffn.activation)
        if ffn != plain:
            return "a router other than softmax, or experts with biases or a shared part"
    return "this activation" if ffn.activation not in ACTIVATIONS else None


class NativeDecoder:
    """Packed weights and the program that runs them. `length` bounds the positions served."""

    workspace = 0  # attention works on a few tiles per thread

    def __init__(self, model: Decoder, length: int, quantize: Quantize = "none", experts_only: bool = True) -> None:
        config = model.config
        self.config, self.dtype, self.token_local = config, model.embed.weight.dtype, model.token_local
        self.parameters = parameter_count(model)
        self.precision = precision = precision_for(self.dtype, quantize, experts_only)
        self._loads = [m.blocks if isinstance(m, Infinity) else m.experts for m in config.mixtures]
        head, embeddings = (model.embed if config.tied else model.head), model.embed.weight.detach()
        places = model.embed_positions.weight if config.positions == "learned" else None
        self._program = torch.classes.moedial.Program(config.width, embeddings, places)
        packed_head = pack(head.weight, precision.linears)
        last = LinearParams(norm=norm_params(model.norm), weight=packed_head, outputs=config.vocabulary)
        torch.ops.moedial.set_head(self._program, *last.arguments())
        ropes = {s.rope for s in config.mixers if isinstance(s, Attention) and s.rope is not None}
        tables = {rope: rotary_table(rope, length) for rope in ropes}
        mixtures = 0
        while len(model.layers):
            layer = model.layers[0]
            assert isinstance(layer, Layer)
            assert isinstance(layer.mixer, SelfAttention)
            shape = layer.mixer.shape
            rotary = None if shape.rope is None else tables[shape.rope]
            self._add(attention_block(layer.mixer_norm, layer.mixer, rotary, precision))
            self._add(feed_forward_block(layer.ffn_norm, layer.ffn, mixtures, precision))
            mixtures += isinstance(layer.ffn, Mixture)
            del model.layers[0], layer
        self._run = self._program.run

    def _add(self, block: BlockParams) -> None:
        """Makes it the next block of the program."""
        getattr(torch.ops.moedial, block.add_op)(self._program, *block.arguments())

    @property
    def reusable(self) -> bool:
        """Whether what is kept of a prefix can serve another sequence."""
        return True

    def cache(self, blocks: int, block_size: int, slots: int = 0) -> NativeCache:
        """The cache that this decoder reads and writes; it has no states, so `slots` are none."""
        return NativeCache([shape.memory for shape in self.config.mixers], blocks, block_size, self.dtype)

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


def rotary_table(rope: Rope, length: int) -> Tensor:
    """Cosines and sines of every position, [positions, 2, C / 2], float32."""
    cos_P1C, sin_P1C = rotary_tables(torch.arange(length), rope)
    half = rope.width // 2
    return torch.cat([cos_P1C[..., :half], sin_P1C[..., :half]], dim=1).contiguous()
