"""Phi-3.5-MoE (arXiv 2404.14219): layer norms, biases, and a sparse mixer (2409.12136) that is made for two experts.

One expert is the first of its two, with its weight; transformers always runs both. Beyond the original context
transformers 5.23 keeps LongRoPE's short factors; the long ones are used here, as in the model's published code.
"""

from model.config_reader import ConfigReader, activation, attention, decoder, head_width, rope
from model.shapes.decoder import DecoderConfig
from model.shapes.mixtures import Router, TopK

NAMES = {"mlp": "block_sparse_moe", "gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


def decoder_config(hf_config: ConfigReader) -> DecoderConfig:
    """Read config.json; defaults are those of transformers' PhimoeConfig."""
    hf_config.expect("num_experts_per_tok", 2)
    experts = hf_config.get("num_local_experts", 16)
    router = Router("sparse_mixer", jitter=hf_config.get("router_jitter_noise", 0.01))
    mixture = TopK(
        experts=experts,
        width=hf_config["intermediate_size"],
        trained=2,
        router=router,
        activation=activation(hf_config),
        fixed=True,
    )
    positions = rope(hf_config, head_width(hf_config), theta=1e6)
    if positions.scaling not in ("default", "longrope"):
        raise ValueError(f"rope_type is {positions.scaling!r}, but phimoe knows 'longrope' alone")
    bias = hf_config.get("attention_bias", False)
    window = hf_config.get("sliding_window") or 0
    self_attention = attention(hf_config, positions, bias=bias, out_bias=bias, window=window)
    head_bias = bool(hf_config.get("lm_head_bias", False))
    return decoder(
        hf_config,
        self_attention,
        mixture,
        norm="layer",
        norm_eps=hf_config.get("rms_norm_eps", 1e-5),
        head_bias=head_bias,
    )
