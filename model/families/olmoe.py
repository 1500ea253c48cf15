"""OLMoE (arXiv 2409.02060): norms over all query and key heads, softmax over all experts, weights as they are."""

from model.config_reader import Fields, activation, attention, decoder, rope
from model.shapes.decoder import DecoderConfig
from model.shapes.mixtures import Router, TopK

EXAMPLES = (
    {"num_key_value_heads": 2},
    {"tie_word_embeddings": True, "norm_topk_prob": True, "clip_qkv": 0.5, "attention_bias": True},
)


def decoder_config(fields: Fields) -> DecoderConfig:
    """Read config.json; defaults are those of transformers' OlmoeConfig."""
    width = fields["hidden_size"] // fields["num_attention_heads"]
    fields.knows("head_dim")
    bias = fields.get("attention_bias", False)
    self_attention = attention(
        fields,
        rope(fields, width),
        head_width=width,
        qk_norm="full",
        clip=fields.get("clip_qkv"),
        bias=bias,
        out_bias=bias,
    )
    mixture = TopK(
        experts=fields.get("num_experts", 64),
        width=fields["intermediate_size"],
        trained=fields.get("num_experts_per_tok", 8),
        router=Router(normalise=fields.get("norm_topk_prob", False)),
        activation=activation(fields),
    )
    return decoder(fields, self_attention, mixture, norm_eps=fields.get("rms_norm_eps", 1e-5))
