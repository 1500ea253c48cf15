"""Llama (arXiv 2302.13971, 2407.21783): a dense baseline, without experts to count."""

from model.config_reader import Fields, activation, attention, decoder, head_width, rope
from model.shapes.decoder import DecoderConfig
from model.shapes.mixtures import Dense

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}
EXAMPLES = (
    {"tie_word_embeddings": True, "rope_parameters": LLAMA3},
    {
        "attention_bias": True,
        "mlp_bias": True,
        "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0},
    },
)


def decoder_config(fields: Fields) -> DecoderConfig:
    """Read config.json; defaults are those of transformers' LlamaConfig."""
    bias = fields.get("attention_bias", False)
    self_attention = attention(fields, rope(fields, head_width(fields)), bias=bias, out_bias=bias)
    ffn = Dense(fields["intermediate_size"], activation(fields), bias=fields.get("mlp_bias", False))
    return decoder(fields, self_attention, ffn)
