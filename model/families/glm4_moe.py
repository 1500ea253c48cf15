"""GLM-4.5 (arXiv 2508.06471): grouped-query attention whose heads are turned in part, with or without norms of each;
mixtures as in DeepSeek-V3."""

from model.config_reader import ConfigReader, attention, decoder, head_width, rope
from model.families.deepseek_v3 import biased_router, feed_forwards
from model.shapes.decoder import DecoderConfig


def decoder_config(hf_config: ConfigReader) -> DecoderConfig:
    """Read config.json. Raises KeyError for a missing size of a mixture: every published file states them all."""
    positions = rope(hf_config, head_width(hf_config), share=0.5)
    bias = hf_config.get("attention_bias", False)
    norm = "head" if hf_config.get("use_qk_norm", False) else "none"
    self_attention = attention(hf_config, positions, qk_norm=norm, bias=bias)
    mixtures = feed_forwards(hf_config, biased_router(hf_config))
    return decoder(hf_config, self_attention, mixtures, norm_eps=hf_config.get("rms_norm_eps", 1e-5))
