"""ERNIE 4.5 (Baidu, 2025): softmax over all experts, a learned bias for choosing only, weights normalised by at least
a least sum; neighbouring elements are turned in pairs. The experts themselves have no biases."""

from model.config_reader import ConfigReader, activation, attention, decoder, dense, head_width, rope
from model.shapes.decoder import DecoderConfig
from model.shapes.mixtures import Dense, Router, TopK


def decoder_config(hf_config: ConfigReader) -> DecoderConfig:
    """Read config.json; defaults are those of transformers' Ernie4_5_MoeConfig."""
    bias = bool(hf_config.get("use_bias", False))
    positions = rope(hf_config, head_width(hf_config), interleaved=True, theta=500000.0)
    self_attention = attention(hf_config, positions, bias=bias, out_bias=bias)
    mixture = _mixture(hf_config, bias)
    plain = dense(hf_config, hf_config.get("intermediate_size", 12288), bias=bias)
    layers = [mixture if sparse else plain for sparse in _sparse_layers(hf_config)]
    eps, tied = hf_config.get("rms_norm_eps", 1e-5), _tied(hf_config, bias)
    return decoder(hf_config, self_attention, layers, norm_eps=eps, tied=tied, head_bias=bias)


def _tied(hf_config: ConfigReader, bias: bool) -> bool:
    tied = bool(hf_config.get("tie_word_embeddings", True))
    if tied and bias:
        raise ValueError("tie_word_embeddings and use_bias: a tied head that has biases is not supported")
    return tied


def _mixture(hf_config: ConfigReader, bias: bool) -> TopK:
    hf_config.expect("use_rmsnorm", True)
    hf_config.expect("moe_use_aux_free", True)
    hf_config.expect("moe_gate", "topk")
    hf_config.mark_read("moe_capacity")  # of training: a token that finds no room in its expert is dropped
    width, shared = hf_config.get("moe_intermediate_size", 1536), hf_config.get("moe_num_shared_experts", 2)
    kind = activation(hf_config)
    least_sum = hf_config.get("moe_norm_min", 1e-12)
    experts = hf_config.either("moe_num_experts", "num_experts", default=64)
    trained = hf_config.either("moe_k", "num_experts_per_tok", default=6)
    router = Router(normalise=True, selection_bias=True, eps=least_sum, clamp_sum=True)
    shared_part = Dense(width * shared, kind, bias=bias) if shared else None
    return TopK(
        experts=experts,
        width=width,
        trained=trained,
        router=router,
        activation=kind,
        shared=shared_part,
    )


def _sparse_layers(hf_config: ConfigReader) -> list[bool]:
    """Every so many layers from a first to a last one; a last of -1 is the last of all."""
    count, step = hf_config["num_hidden_layers"], hf_config.get("moe_layer_interval", 1)
    first, last = hf_config.get("moe_layer_start_index", 1), hf_config.get("moe_layer_end_index", -1)
    last = count - 1 if last == -1 else last
    every = [(layer + 1) % step == 0 for layer in range(count)]
    return [sparse and first <= layer <= last for layer, sparse in enumerate(every)]
