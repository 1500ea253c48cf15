"""MiniMax-M2 (2025): norms over all query and key heads, heads that are turned in part; sigmoid scores, a learned bias
for choosing alone, weights normalised at every count, one included."""

from model.config_reader import Fields, activation, attention, decoder, rope
from model.shapes.decoder import DecoderConfig
from model.shapes.mixtures import Router, TopK

NAMES = {
    "mlp": "block_sparse_moe",
    "gate_proj": "w1",
    "down_proj": "w2",
    "up_proj": "w3",
    "gate.e_score_correction_bias": "e_score_correction_bias",
}
EXAMPLES = (
    {"num_local_experts": 6, "num_experts_per_tok": 3, "head_dim": 12, "rotary_dim": 6},
    {
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
        "head_dim": 8,
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 300.0, "partial_rotary_factor": 0.25},
    },
)


def decoder_config(fields: Fields) -> DecoderConfig:
    """Read config.json; defaults are those of transformers' MiniMaxM2Config."""
    _same_as_published(fields)
    head = fields.get("head_dim") or 128
    share = (fields.get("rotary_dim") or head) / head
    self_attention = attention(fields, rope(fields, head, theta=5e6, share=share), head_width=head, qk_norm="full")
    mixture = TopK(
        experts=fields.either("num_local_experts", "num_experts", default=256),
        width=fields.get("intermediate_size", 1536),
        trained=fields.get("num_experts_per_tok", 8),
        router=Router(score="sigmoid", normalise=True, selection_bias=True),
        activation=activation(fields),
    )
    return decoder(fields, self_attention, mixture)


def _same_as_published(fields: Fields) -> None:
    """MiniMax's own files have switches of earlier models, which transformers does not read: only one way is known."""
    fields.expect("scoring_func", "sigmoid")
    fields.expect("use_routing_bias", True)
    fields.expect("use_qk_norm", True)
    fields.expect("qk_norm_type", "per_layer")
    fields.expect("attn_type_list", [1] * fields["num_hidden_layers"])
    for part in ("full_attention", "linear_attention", "mlp"):
        fields.expect(f"layernorm_{part}_beta", 1)
    fields.knows("shared_moe_mode", "mlp_intermediate_size")  # of shared experts and dense layers, which M2 has not
    fields.knows("use_mtp", "num_mtp_modules", "mtp_transformer_layers")
