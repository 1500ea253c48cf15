"""OLMoE (arXiv 2409.02060): norms over all query and key heads, softmax over all experts, weights as they are."""

from model.config_reader import ConfigReader, activation, attention, decoder, rope
from model.shapes.decoder import DecoderConfig
from model.shapes.mixtures import Router, TopK


def decoder_config(hf_config: ConfigReader) -> DecoderConfig:
    """Read config.json; defaults are those of transformers' OlmoeConfig."""
    width = hf_config["hidden_size"] // hf_config["num_attention_heads"]
    hf_config.mark_read("head_dim")
    bias = hf_config.get("attention_bias", False)
    clip = hf_config.get("clip_qkv")
    self_attention = attention(
        hf_config,
        rope(hf_config, width),
        head_width=width,
        qk_norm="full",
        clip=clip,
        bias=bias,
        out_bias=bias,
    )
    experts, trained = hf_config.get("num_experts", 64), hf_config.get("num_experts_per_tok", 8)
    router = Router(normalise=hf_config.get("norm_topk_prob", False))
    mixture = TopK(
        experts=experts,
        width=hf_config["intermediate_size"],
        trained=trained,
        router=router,
        activation=activation(hf_config),
    )
    return decoder(hf_config, self_attention, mixture, norm_eps=hf_config.get("rms_norm_eps", 1e-5))
