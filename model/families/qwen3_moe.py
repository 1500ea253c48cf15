"""Qwen3-MoE (arXiv 2505.09388): norms of each query and key head, softmax over all experts, mostly normalised."""

from model.config_reader import ConfigReader, activation, attention, decoder, dense, head_width, rope, sparse_layers
from model.shapes.decoder import DecoderConfig
from model.shapes.mixtures import Router, TopK


def decoder_config(hf_config: ConfigReader) -> DecoderConfig:
    """Read config.json; defaults are those of transformers' Qwen3MoeConfig."""
    experts = hf_config.either("num_experts", "num_local_experts", default=128)
    width, trained = hf_config.get("moe_intermediate_size", 768), hf_config.get("num_experts_per_tok", 8)
    router = Router(normalise=hf_config.get("norm_topk_prob", False))
    mixture = TopK(
        experts=experts,
        width=width,
        trained=trained,
        router=router,
        activation=activation(hf_config),
    )
    hf_config.expect("use_sliding_window", False)
    hf_config.mark_read("sliding_window", "max_window_layers")
    bias = hf_config.get("attention_bias", False)
    self_attention = attention(
        hf_config, rope(hf_config, head_width(hf_config)), qk_norm="head", bias=bias, out_bias=bias
    )
    sparse = sparse_layers(hf_config)
    plain = dense(hf_config, hf_config.get("intermediate_size", 6144))
    return decoder(hf_config, self_attention, [mixture if moe else plain for moe in sparse])
