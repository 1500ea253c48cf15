"""NLLB-MoE (arXiv 2207.04672): a translator, an encoder–decoder with a mixture in every so many layers."""

from math import sqrt
from typing import Any

from model.config_reader import ConfigReader
from model.encoder_reader import HARMLESS, encoder
from model.shapes.attention import Attention
from model.shapes.decoder import DecoderConfig
from model.shapes.dropping import Dropping
from model.shapes.feed_forward import FeedForward
from model.shapes.mixtures import Dense, Router, TopK

EPSILON = 2.0**-23  # of float32: the least sum that normalises
THRESHOLD = 0.2  # of a second expert's weight, as in ST-MoE


def decoder_config(hf_config: ConfigReader) -> DecoderConfig:
    """Read config.json; defaults are those of transformers' NllbMoeConfig.

    The output of an expert is scaled by what training kept of them (`moe_token_dropout`). `drop_tokens` is our key: no
    token is dropped without it; `second_expert_threshold` is ours too.
    """
    hf_config.expect("pad_token_id", 1)  # positions are counted from it
    hf_config.mark_read(*HARMLESS.split(), "is_encoder_decoder", "use_cache", "router_dtype", "max_length")
    encoder_layers, decoder_layers = hf_config.get("encoder_layers", 12), hf_config.get("decoder_layers", 12)
    width = hf_config["d_model"]
    if width % 2:
        raise ValueError(f"d_model must be even, half sines and half cosines, got {width!r:.40}")
    first, second = _attention(hf_config, "encoder", causal=False), _attention(hf_config, "decoder")
    config = DecoderConfig(
        vocabulary=hf_config["vocab_size"],
        width=width,
        context=2 * hf_config.get("max_position_embeddings", 1024),  # a prompt and an answer
        attention=(*(first,) * encoder_layers, *(second,) * decoder_layers),
        feed_forward=(
            *_feed_forward(hf_config, "encoder", encoder_layers),
            *_feed_forward(hf_config, "decoder", decoder_layers),
        ),
        norm="layer",
        positions="sinusoidal",
        tied=hf_config.get("tie_word_embeddings", True),
        embed_scale=sqrt(width) if hf_config.get("scale_embedding", True) else 1.0,
        encoder=encoder(hf_config, encoder_layers, 2),
    )
    hf_config.check()
    return config


def _attention(hf_config: ConfigReader, stack: str, **changes: Any) -> Attention:
    heads = hf_config.get(f"{stack}_attention_heads", 16)
    width = hf_config["d_model"] // heads
    return Attention(heads, heads, width, bias=True, out_bias=True, **changes)


def _feed_forward(hf_config: ConfigReader, stack: str, count: int) -> list[FeedForward]:
    """The layers of one stack: every so many is a mixture."""
    width, step = hf_config.get(f"{stack}_ffn_dim", 4096), hf_config.get(f"{stack}_sparse_step", 4)
    dense = Dense(width, hf_config.get("activation_function", "relu"), gated=False, bias=True)
    kept = 1 - hf_config.get("moe_token_dropout", 0.2)
    mixture = TopK(
        experts=hf_config.get("num_experts", 128),
        width=width,
        trained=2,
        router=Router(
            normalise=True,
            scale=kept,
            logit_bias=hf_config.get("router_bias", False),
            eps=EPSILON,
            clamp_sum=True,
        ),
        activation=dense.activation,
        bias=True,
        gated=False,
        dropping=_dropping(hf_config),
    )
    return [mixture if step > 0 and (number + 1) % step == 0 else dense for number in range(count)]


def _dropping(hf_config: ConfigReader) -> Dropping | None:
    """By `second_expert_policy`, and with `drop_tokens` by capacity."""
    hf_config.expect("second_expert_policy", "all", "threshold")  # the others are drawn at random
    by_weight = hf_config.get("second_expert_policy") == "threshold"
    share, tokens = hf_config.get("moe_eval_capacity_token_fraction", 1.0), hf_config.get("expert_capacity", 64)
    prioritised = hf_config.get("batch_prioritized_routing", False)
    before = hf_config.get("normalize_router_prob_before_dropping", False)
    threshold = hf_config.get("second_expert_threshold", THRESHOLD) if by_weight else 0.0
    if not hf_config.get("drop_tokens", False):
        return Dropping(threshold, renormalised=not before) if by_weight else None
    return Dropping(threshold, 0 if share > 0 else tokens, max(0.0, share), prioritised, renormalised=not before)
