"""ERNIE 4.5 (Baidu, 2025): softmax over all experts, a learned bias for choosing alone, weights normalised by at least
a least sum; neighbouring elements are turned in pairs. The experts themselves have no biases."""

from model.config_reader import Fields, activation, attention, decoder, dense, head_width, rope
from model.shapes.decoder import DecoderConfig
from model.shapes.mixtures import Dense, Router, TopK

EXAMPLES = (
    {
        "num_hidden_layers": 4,
        "moe_intermediate_size": 12,
        "moe_num_experts": 6,
        "moe_k": 3,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": 2,
        "use_bias": True,
        "tie_word_embeddings": False,
    },
    {
        "num_hidden_layers": 4,
        "moe_intermediate_size": 12,
        "moe_num_experts": 5,
        "moe_k": 2,
        "moe_num_shared_experts": 0,
        "moe_layer_interval": 2,
        "moe_norm_min": 0.3,  # larger than many sums
        "head_dim": 10,
    },
)


def decoder_config(fields: Fields) -> DecoderConfig:
    """Read config.json; defaults are those of transformers' Ernie4_5_MoeConfig."""
    bias = bool(fields.get("use_bias", False))
    positions = rope(fields, head_width(fields), interleaved=True, theta=500000.0)
    self_attention = attention(fields, positions, bias=bias, out_bias=bias)
    mixture, plain = _mixture(fields, bias), dense(fields, fields.get("intermediate_size", 12288), bias=bias)
    return decoder(
        fields,
        self_attention,
        [mixture if sparse else plain for sparse in _sparse_layers(fields)],
        norm_eps=fields.get("rms_norm_eps", 1e-5),
        tied=_tied(fields, bias),
        head_bias=bias,
    )


def _tied(fields: Fields, bias: bool) -> bool:
    tied = bool(fields.get("tie_word_embeddings", True))
    if tied and bias:
        raise ValueError("tie_word_embeddings and use_bias: a tied head that has biases is not supported")
    return tied


def _mixture(fields: Fields, bias: bool) -> TopK:
    fields.expect("use_rmsnorm", True)
    fields.expect("moe_use_aux_free", True)
    fields.expect("moe_gate", "topk")
    fields.knows("moe_capacity")  # of training: a token that finds no room in its expert is dropped
    width, shared = fields.get("moe_intermediate_size", 1536), fields.get("moe_num_shared_experts", 2)
    kind = activation(fields)
    return TopK(
        experts=fields.either("moe_num_experts", "num_experts", default=64),
        width=width,
        trained=fields.either("moe_k", "num_experts_per_tok", default=6),
        router=Router(normalise=True, selection_bias=True, eps=fields.get("moe_norm_min", 1e-12), clamp_sum=True),
        activation=kind,
        shared=Dense(width * shared, kind, bias=bias) if shared else None,
    )


def _sparse_layers(fields: Fields) -> list[bool]:
    """Every so many layers from a first to a last one; a last of -1 is the last of all."""
    count, step = fields["num_hidden_layers"], fields.get("moe_layer_interval", 1)
    first, last = fields.get("moe_layer_start_index", 1), fields.get("moe_layer_end_index", -1)
    last = count - 1 if last == -1 else last
    return [(layer + 1) % step == 0 and first <= layer <= last for layer in range(count)]
