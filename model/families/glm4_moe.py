"""GLM-4.5 (arXiv 2508.06471): grouped-query attention whose heads are turned in part, with or without norms of each;
mixtures as in DeepSeek-V3."""

from model.config_reader import Fields, attention, decoder, head_width, rope
from model.families.deepseek_v3 import biased_router, feed_forwards
from model.shapes.decoder import DecoderConfig

EXAMPLES = (
    {
        "num_hidden_layers": 3,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 12,
        "n_routed_experts": 6,
        "num_experts_per_tok": 3,
        "n_group": 3,
        "topk_group": 2,
        "n_shared_experts": 1,
        "routed_scaling_factor": 2.5,
        "head_dim": 12,
        "use_qk_norm": True,
        "attention_bias": True,
    },
    {
        "first_k_dense_replace": 0,
        "moe_intermediate_size": 12,
        "n_routed_experts": 5,
        "num_experts_per_tok": 2,
        "n_shared_experts": 2,
        "norm_topk_prob": False,
        "partial_rotary_factor": 0.25,
        "tie_word_embeddings": True,
    },
)


def decoder_config(fields: Fields) -> DecoderConfig:
    """Read config.json. Raises KeyError for a missing size of a mixture: every published file states them all."""
    self_attention = attention(
        fields,
        rope(fields, head_width(fields), share=0.5),
        qk_norm="head" if fields.get("use_qk_norm", False) else "none",
        bias=fields.get("attention_bias", False),
    )
    mixtures = feed_forwards(fields, biased_router(fields))
    return decoder(fields, self_attention, mixtures, norm_eps=fields.get("rms_norm_eps", 1e-5))
