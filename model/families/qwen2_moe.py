"""Qwen2-MoE (arXiv 2407.10671; Qwen1.5-MoE-A2.7B): a shared expert with a sigmoid gate of its own, weights as they are,
biases of queries, keys and values. Where windows are used, every second layer below `max_window_layers` has one.
"""

from model.config_reader import Fields, activation, attention, decoder, dense, head_width, rope, sparse_layers, windows
from model.shapes.decoder import DecoderConfig
from model.shapes.mixtures import Router, TopK

NAMES = {"shared_experts": "shared_expert"}
EXAMPLES = (
    {
        "moe_intermediate_size": 12,
        "shared_expert_intermediate_size": 20,
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "num_hidden_layers": 4,
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 2,
    },
    {
        "moe_intermediate_size": 8,
        "shared_expert_intermediate_size": 12,
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 5,
        "mlp_only_layers": [3],
        "decoder_sparse_step": 2,
        "norm_topk_prob": True,
        "qkv_bias": False,
        "tie_word_embeddings": True,
        "use_sliding_window": True,
        "sliding_window": 6,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention", "full_attention"],
    },
)


def decoder_config(fields: Fields) -> DecoderConfig:
    """Read config.json; defaults are those of transformers' Qwen2MoeConfig."""
    mixture = TopK(
        experts=fields.either("num_experts", "num_local_experts", default=60),
        width=fields.get("moe_intermediate_size", 1408),
        trained=fields.get("num_experts_per_tok", 4),
        router=Router(normalise=fields.get("norm_topk_prob", False)),
        activation=activation(fields),
        shared=dense(fields, fields.get("shared_expert_intermediate_size", 5632)),
        shared_gate=True,
    )
    positions, bias = rope(fields, head_width(fields)), fields.get("qkv_bias", True)
    self_attention = [attention(fields, positions, bias=bias, window=window) for window in _windows(fields)]
    plain = dense(fields, fields.get("intermediate_size", 5632))
    return decoder(fields, self_attention, [mixture if moe else plain for moe in sparse_layers(fields)])


def _windows(fields: Fields) -> list[int]:
    window, below = fields.get("sliding_window", 4096), fields.get("max_window_layers", 28)
    used = window if fields.get("use_sliding_window") else None
    return windows(fields, used, lambda layer: layer % 2 == 0 and layer < below)
