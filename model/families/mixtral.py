"""Mixtral (arXiv 2401.04088): softmax over the chosen experts' logits, which is softmax over all, normalised."""

from model.config_reader import Fields, activation, attention, decoder, head_width, rope
from model.shapes.decoder import DecoderConfig
from model.shapes.mixtures import Router, TopK

NAMES = {"mlp": "block_sparse_moe", "gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
EXAMPLES = (
    {"num_local_experts": 5, "sliding_window": 7},
    {
        "num_local_experts": 4,
        "num_experts_per_tok": 3,
        "tie_word_embeddings": True,
        "head_dim": 10,
        "num_key_value_heads": 4,
    },
)


def decoder_config(fields: Fields) -> DecoderConfig:
    """Read config.json; defaults are those of transformers' MixtralConfig."""
    mixture = TopK(
        experts=fields.get("num_local_experts", 8),
        width=fields["intermediate_size"],
        trained=fields.get("num_experts_per_tok", 2),
        router=Router(normalise=True),
        activation=activation(fields),
    )
    positions = rope(fields, head_width(fields), theta=1e6)
    self_attention = attention(fields, positions, window=fields.get("sliding_window") or 0)
    return decoder(fields, self_attention, mixture, norm_eps=fields.get("rms_norm_eps", 1e-5))
