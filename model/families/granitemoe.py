"""Granite-MoE (IBM Granite 3; Power scheduler, arXiv 2408.13359): softmax over the chosen experts' logits, which is
softmax over all, normalised; and multipliers of embeddings, attention, residuals and logits.
"""

from model.config_reader import Fields, activation, attention, decoder, head_width, rope
from model.shapes.decoder import DecoderConfig
from model.shapes.mixtures import Dense, Router, TopK

SCALES = {
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.2,
    "residual_multiplier": 0.4,
    "logits_scaling": 0.7,
}
EXAMPLES = (
    {"num_local_experts": 5, "tie_word_embeddings": True, "num_key_value_heads": None} | SCALES,
    {"num_local_experts": 4, "num_experts_per_tok": 3, "attention_bias": True, "attention_multiplier": 0.35},
)


def decoder_config(fields: Fields) -> DecoderConfig:
    """Read config.json; defaults are those of transformers' GraniteMoeConfig."""
    return granite(fields, None)


def granite(fields: Fields, shared: Dense | None) -> DecoderConfig:
    """A Granite decoder whose mixtures have this shared part."""
    mixture = TopK(
        experts=fields.get("num_local_experts", 8),
        width=fields["intermediate_size"],
        trained=fields.get("num_experts_per_tok", 2),
        router=Router(normalise=True),
        activation=activation(fields),
        shared=shared,
    )
    bias, scale = fields.get("attention_bias", False), fields.get("attention_multiplier", 1.0)
    self_attention = attention(fields, rope(fields, head_width(fields)), scale=scale, bias=bias, out_bias=bias)
    return decoder(
        fields,
        self_attention,
        mixture,
        embed_scale=fields.get("embedding_multiplier", 1.0),
        residual_scale=fields.get("residual_multiplier", 1.0),
        logit_scale=1 / fields.get("logits_scaling", 1.0),
    )
