"""Reading config.json of models with an encoder and a decoder: what T5 and its kin have in common.

Not here: what all families share (see `model/config_reader.py`).
"""

from collections.abc import Sequence
from typing import Any

from model.config_reader import ConfigReader
from model.shapes.attention import Attention
from model.shapes.decoder import DecoderConfig
from model.shapes.encoder import Encoder, RelativeBias
from model.shapes.feed_forward import FeedForward
from model.shapes.mixtures import Dense

# Dropout, initial values and losses: of training. The others say what `is_encoder_decoder` says.
HARMLESS = """dropout_rate dropout attention_dropout activation_dropout classifier_dropout initializer_factor init_std
initializer_range encoder_layerdrop decoder_layerdrop n_positions is_gated_act dense_act_fn add_router_probs
router_ignore_padding_tokens num_hidden_layers tie_encoder_decoder output_past scalable_attention"""


def ends(hf_config: ConfigReader) -> tuple[int, ...]:
    """The tokens that end a text."""
    given = hf_config.get("eos_token_id")
    return tuple(given) if isinstance(given, Sequence) else () if given is None else (given,)


def encoder(hf_config: ConfigReader, layers: int, start: int | None, **changes: Any) -> Encoder:
    """The usual keys; `start` is the family's own first token of an answer."""
    given = hf_config.get("decoder_start_token_id")
    forced = hf_config.get("forced_bos_token_id")
    first = start if given is None else given
    if first is None:
        raise ValueError("decoder_start_token_id is missing: an answer has no first token")
    return Encoder(layers, first, ends(hf_config), forced, **changes)


def t5_layers(hf_config: ConfigReader) -> tuple[int, int]:
    """Layers of the encoder and of the decoder."""
    encoder_layers = hf_config.get("num_layers", hf_config.get("num_hidden_layers", 6))
    return encoder_layers, hf_config.get("num_decoder_layers") or encoder_layers


def t5_like(
    hf_config: ConfigReader,
    encoder_layers: Sequence[FeedForward],
    decoder_layers: Sequence[FeedForward],
    *,
    shared_bias: bool,
    tied: bool,
    scaled: bool,
) -> DecoderConfig:
    """RMS norms, relative position biases, scores that are not scaled.

    `tied`: the head is the embedding; `scaled`: what it multiplies is divided by the root of its width first.
    """
    width, heads = hf_config["d_model"], hf_config["num_heads"]
    bias = RelativeBias(
        hf_config.get("relative_attention_num_buckets", 32),
        hf_config.get("relative_attention_max_distance", 128),
        shared_bias,
    )
    shape = {"heads": heads, "kv_heads": heads, "head_width": hf_config.get("d_kv", 64), "scale": 1.0}
    attention = [Attention(**shape, causal=False)] * len(encoder_layers) + [Attention(**shape)] * len(decoder_layers)
    hf_config.mark_read(*HARMLESS.split())
    hf_config.mark_read("is_encoder_decoder", "use_cache")
    config = DecoderConfig(
        vocabulary=hf_config["vocab_size"],
        width=width,
        context=hf_config.get("max_position_embeddings") or CONTEXT,
        attention=tuple(attention),
        feed_forward=(*encoder_layers, *decoder_layers),
        norm_eps=hf_config.get("layer_norm_epsilon", 1e-6),
        positions="relative",
        tied=tied,
        logit_scale=width**-0.5 if scaled else 1.0,
        encoder=encoder(hf_config, len(encoder_layers), hf_config.get("pad_token_id", 0), bias=bias),
    )
    hf_config.check()
    return config


CONTEXT = 2048  # tokens of prompt and answer together: the biases set no limit, and no key of these files does


def t5_dense(hf_config: ConfigReader, projection: str) -> Dense:
    """The feed-forward layer of `feed_forward_proj`: an activation, or a gated one.

    Raises:
        ValueError: another activation than those that are known.
    """
    name = projection.removeprefix("gated-")
    gated = name != projection
    known = {"gelu": "gelu_tanh" if gated else "gelu", "gelu_new": "gelu_tanh", "swish": "silu"}
    return Dense(hf_config["d_ff"], known.get(name, name), gated=gated)  # type: ignore[arg-type]
