"""What the GPU kernels cannot run: decoders and single layers. It fails closed: what they are not written
for is refused by itself.

`TAKEN` names every field that the kernels read, or that the layers' own refusals decide about, and where only some
values of it have a kernel, these. A layer that is refused runs in plain torch beside the kernels of the others; a
decoder that is refused runs on another backend.
"""

from collections.abc import Iterator
from typing import Any

from model.backends.cuda import attention, delta, latent, layer, quantise
from model.backends.cuda.kernels.attend import MAX_QUERIES, PAGE
from model.backends.taken import ANY, Values, any_of, unknown
from model.options import Options
from model.shapes.attention import MLA, Attention, GatedDeltaNet
from model.shapes.decoder import DecoderConfig
from model.shapes.mixtures import Dense, Infinity, Router, TopK
from model.shapes.rope import Rope

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")
GATED_ACTIVATIONS = (*ACTIVATIONS, "swiglu_clamped")

_DECODER: Values = {
    **any_of("vocabulary", "width", "context", "attention", "feed_forward", "norm_eps", "norm_offset", "tied"),
    **any_of("head_bias", "embed_scale", "residual_scale", "logit_scale", "extrapolates", "repaired"),
    "norm": ("layer", "rms"),
    "positions": ("rotary", "learned"),
}
_ATTENTION: Values = {
    **any_of("heads", "kv_heads", "head_width", "rope", "bias", "out_bias", "clip", "scale", "window", "chunk"),
    **any_of("sinks", "gated", "floor_scale", "attn_scale", "causal"),
    "qk_norm": ("none", "full", "head", "unit"),
}
_MLA: Values = any_of("heads", "query_rank", "rank", "plain_width", "rope", "value_width", "bias", "scale", "norm_eps")
_DELTA: Values = any_of("key_heads", "value_heads", "key_width", "value_width", "kernel")
# Cosines and sines of every position are made in torch, whatever stretches them.
_ROPE: Values = {
    **any_of("width", "theta", "interleaved", "factor", "original", "attention_factor", "beta_fast", "beta_slow"),
    **any_of("mscale", "mscale_all_dim", "truncate", "low_freq_factor", "high_freq_factor"),
    **any_of("short_factor", "long_factor", "short_mscale", "long_mscale"),
    "scaling": ("default", "linear", "dynamic", "yarn", "llama3", "longrope"),
}
_DENSE: Values = {**any_of("width", "gated", "bias"), "activation": GATED_ACTIVATIONS}
_TOPK: Values = {
    **any_of("experts", "width", "trained", "router", "bias", "interleaved", "shared_gate", "fixed"),
    "shared": ANY,
    "activation": GATED_ACTIVATIONS,
}
_ROUTER: Values = {
    **any_of("normalise", "scale", "logit_bias", "selection_bias", "groups", "kept_groups", "weigh_input", "jitter"),
    **any_of("eps", "clamp_sum"),
    "score": ("softmax", "sigmoid", "sparse_mixer"),
    "group_score": ("max", "top2"),
}
_INFINITY: Values = {
    **any_of("units", "latent_dim", "keep_ratio", "trained", "maximum", "block", "sigma_min", "replacement"),
    "activation": ACTIVATIONS,
    "sigma_link": ("exp", "softplus"),
    "draws": ("independent", "antithetic", "points"),
    "aggregate": ("mean", "norm"),
}
TAKEN: dict[type, Values] = {
    DecoderConfig: _DECODER,
    Attention: _ATTENTION,
    MLA: _MLA,
    GatedDeltaNet: _DELTA,
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
    yield from unknown(config, TAKEN)
    if any(shape.adaptive for shape in config.mixtures):
        yield "mixtures in which how many experts run depends on the token"
    if options.block_size not in (0, PAGE):
        yield f"the block size {options.block_size}: the GPU kernels read blocks of {PAGE} tokens"
    if options.kv_cache != "auto":
        yield f"a KV cache in {options.kv_cache}, for which there is no GPU kernel"
    refused = quantise.refusal(config, options)
    if refused is not None:
        yield refused


def layer_refusal(shape: Any) -> str | None:
    """Why a layer, by the shape of its attention or of what follows, has no kernels, or None."""
    found = next(unknown(shape, TAKEN), None)
    if found is not None:
        return found
    if type(shape) is Attention:
        shared = shape.heads // shape.kv_heads
        if shared > MAX_QUERIES:
            return f"{shared} query heads share one key-value head, more than {MAX_QUERIES}"
        return attention.attention_refusal(shape)
    if type(shape) is MLA:
        return latent.latent_refusal(shape)
    if type(shape) is GatedDeltaNet:
        return delta.delta_refusal(shape)
    return layer.refusal(shape) if type(shape) is TopK else None
