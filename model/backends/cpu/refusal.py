"""Why the native kernels cannot run a decoder. It fails closed: what they are not written for is refused by itself.

`TAKEN` names every field that the kernels read, and where only some values of it have a kernel, these. A field that is
not named must have its default.
"""

from collections.abc import Iterator
from typing import Any

from model.backends import taken
from model.backends.cpu.cache import TILE
from model.backends.cpu.kernels.params import ACTIVATIONS, SCORES, UNGATED
from model.backends.taken import Values, any_of
from model.options import Options
from model.shapes.attention import MLA, Attention, AttentionShape, GatedDeltaNet
from model.shapes.decoder import DecoderConfig
from model.shapes.feed_forward import FeedForward
from model.shapes.mixtures import Dense, Infinity, Router, TopK
from model.shapes.rope import Rope

MAX_TAPS = 16  # inputs of one output of a convolution
ACTIVATION = tuple(ACTIVATIONS)

_DECODER: Values = {
    **any_of("vocabulary", "width", "context", "attention", "feed_forward", "norm_eps", "tied"),
    **any_of("norm_offset", "extrapolates", "repaired", "head_bias", "embed_scale", "residual_scale", "logit_scale"),
    "norm": ("layer", "rms"),
    "positions": ("rotary", "learned"),
}
_ATTENTION: Values = {
    **any_of("heads", "kv_heads", "head_width", "rope", "bias", "out_bias", "clip", "scale", "window", "sinks"),
    **any_of("chunk", "gated", "floor_scale", "attn_scale"),
    "qk_norm": ("none", "full", "head", "unit"),
}
_MLA: Values = any_of(
    *("heads", "query_rank", "rank", "plain_width", "rope", "value_width", "bias", "scale", "norm_eps")
)
# Tables of cosines and sines are made in torch for every position, whatever stretches them.
_ROPE: Values = {
    **any_of("width", "theta", "interleaved", "factor", "original", "attention_factor", "beta_fast", "beta_slow"),
    **any_of("mscale", "mscale_all_dim", "truncate", "low_freq_factor", "high_freq_factor"),
    **any_of("short_factor", "long_factor", "short_mscale", "long_mscale"),
    "scaling": ("default", "linear", "dynamic", "yarn", "llama3", "longrope"),
}
_DENSE: Values = {**any_of("width", "gated", "bias"), "activation": ACTIVATION}
_TOPK: Values = {
    **any_of("experts", "width", "trained", "router", "fixed", "bias", "interleaved", "shared", "shared_gate"),
    "activation": ACTIVATION,
}
_ROUTER: Values = {
    **any_of("normalise", "scale", "logit_bias", "selection_bias", "groups", "kept_groups", "weigh_input", "jitter"),
    **any_of("eps", "clamp_sum"),
    "score": tuple(SCORES),
    "group_score": ("max", "top2"),
}
_INFINITY: Values = {
    **any_of("units", "latent_dim", "keep_ratio", "trained", "maximum", "block", "sigma_min", "replacement"),
    "activation": tuple(UNGATED),
    "sigma_link": ("exp", "softplus"),
    "draws": ("independent", "antithetic", "points"),
    "aggregate": ("mean", "norm"),
}
TAKEN: dict[type, Values] = {
    DecoderConfig: _DECODER,
    Attention: _ATTENTION,
    GatedDeltaNet: any_of("key_heads", "value_heads", "key_width", "value_width", "kernel"),
    MLA: _MLA,
    Rope: _ROPE,
    Dense: _DENSE,
    TopK: _TOPK,
    Router: _ROUTER,
    Infinity: _INFINITY,
}


def refusal(config: DecoderConfig, options: Options) -> str | None:
    """Why the kernels cannot run this decoder in this way, or None."""
    return next(_reasons(config, options), None)


def _reasons(config: DecoderConfig, options: Options) -> Iterator[str]:
    if config.encoder is not None:
        yield "a model with an encoder"
    for shape in config.attention:
        yield from _attention_reasons(shape)
    if config.residual_scale != 1 and any(type(shape) is GatedDeltaNet for shape in config.attention):
        yield "gated delta nets whose output is scaled"
    for ffn in config.feed_forward:
        yield from _feed_forward_reasons(ffn)
    yield from unknown(config)
    if options.block_size % TILE:
        yield f"the block size {options.block_size} is not a multiple of {TILE}"
    if options.dtype not in ("", "float32", "bfloat16"):
        yield f"weights of {options.dtype}: the kernels take float32 and bfloat16"
    if options.device != "cpu":
        yield f"the device {options.device}"
    if options.kv_cache not in ("auto", "int8"):
        yield f"a KV cache in {options.kv_cache}"
    if options.kv_cache != "auto" and any(type(shape) is MLA for shape in config.attention):
        yield f"a KV cache in {options.kv_cache} for latent attention, which keeps one small copy already"
    if options.quantize == "fp8-weights":
        yield "quantize fp8-weights has kernels for GPUs only: use int8-weights on a CPU"
    if options.quantize not in ("none", "int8", "int4", "int8-weights") or options.quantize_layers not in (
        "experts",
        "all",
    ):
        yield f"quantize {options.quantize} of {options.quantize_layers}"


def _attention_reasons(shape: AttentionShape) -> Iterator[str]:
    if type(shape) is GatedDeltaNet:
        yield from _delta_reasons(shape)
        return
    if type(shape) is MLA:
        if shape.rank % (2 * TILE) or shape.rope.width % TILE or shape.value_width % TILE:
            sizes = f"{shape.rank}, {shape.rope.width} and {shape.value_width}"
            yield f"latents, rotary keys and values of {sizes}, no multiples of {2 * TILE}, {TILE} and {TILE}"
        yield from unknown(shape)
        return
    if type(shape) is not Attention:
        yield f"layers of the kind {type(shape).__name__}"
        return
    if shape.head_width % TILE:
        yield f"the head width {shape.head_width} is not a multiple of {TILE}"
    if shape.clip is not None and shape.qk_norm == "head":
        yield "queries and keys that are clipped before each head is normed"
    yield from unknown(shape)


def _delta_reasons(shape: GatedDeltaNet) -> Iterator[str]:
    for name in ("key_width", "value_width"):
        if getattr(shape, name) % TILE:
            yield f"the {name} {getattr(shape, name)} of a delta net is not a multiple of {TILE}"
    if shape.kernel > MAX_TAPS:
        yield f"a convolution of {shape.kernel} inputs, more than {MAX_TAPS}"
    yield from unknown(shape)


def _feed_forward_reasons(ffn: FeedForward) -> Iterator[str]:
    if type(ffn) not in (Dense, TopK, Infinity):
        yield f"layers of the kind {type(ffn).__name__}"
        return
    if type(ffn) is TopK:
        yield from _router_reasons(ffn.router)
    yield from unknown(ffn)


def _router_reasons(router: Router) -> Iterator[str]:
    if router.score == "sparse_mixer" and (router.selection_bias or router.groups > 1):
        yield "a sparse mixer with a selection bias or groups"


def unknown(shape: Any) -> Iterator[str]:
    """Each field of a shape, and of the shapes in it, that has no kernel at its value."""
    return taken.unknown(shape, TAKEN)
