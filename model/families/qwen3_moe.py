"""Qwen3-MoE (arXiv 2505.09388): norms of each query and key head, softmax over all experts, mostly normalised."""

from model.config_reader import Fields, activation, attention, decoder, dense, head_width, rope, sparse_layers
from model.shapes.decoder import DecoderConfig
from model.shapes.mixtures import Router, TopK

EXAMPLES = (
    {"moe_intermediate_size": 12, "num_experts": 6, "num_experts_per_tok": 3, "norm_topk_prob": True, "head_dim": 12},
    {
        "moe_intermediate_size": 12,
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 4,
        "mlp_only_layers": [0],
        "decoder_sparse_step": 2,
        "attention_bias": True,
        "tie_word_embeddings": True,
    },
)


def decoder_config(fields: Fields) -> DecoderConfig:
    """Read config.json; defaults are those of transformers' Qwen3MoeConfig."""
    mixture = TopK(
        experts=fields.either("num_experts", "num_local_experts", default=128),
        width=fields.get("moe_intermediate_size", 768),
        trained=fields.get("num_experts_per_tok", 8),
        router=Router(normalise=fields.get("norm_topk_prob", False)),
        activation=activation(fields),
    )
    fields.expect("use_sliding_window", False)
    fields.knows("sliding_window", "max_window_layers")
    bias = fields.get("attention_bias", False)
    self_attention = attention(fields, rope(fields, head_width(fields)), qk_norm="head", bias=bias, out_bias=bias)
    sparse = sparse_layers(fields)
    plain = dense(fields, fields.get("intermediate_size", 6144))
    return decoder(fields, self_attention, [mixture if moe else plain for moe in sparse])
