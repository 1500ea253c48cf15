"""Llama (arXiv 2302.13971, 2407.21783): a dense baseline, without experts to count."""

from model.config_reader import ConfigReader, activation, attention, decoder, head_width, rope
from model.shapes.decoder import DecoderConfig
from model.shapes.mixtures import Dense

LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}


def decoder_config(hf_config: ConfigReader) -> DecoderConfig:
    """Read config.json; defaults are those of transformers' LlamaConfig."""
    bias = hf_config.get("attention_bias", False)
    self_attention = attention(hf_config, rope(hf_config, head_width(hf_config)), bias=bias, out_bias=bias)
    ffn = Dense(hf_config["intermediate_size"], activation(hf_config), bias=hf_config.get("mlp_bias", False))
    return decoder(hf_config, self_attention, ffn)
