"""DeepSeek-V2 (arXiv 2405.04434): latent attention; softmax over all experts, weights as they are times a factor,
chosen from all or from the groups whose best expert is best; shared experts, first layers without a mixture."""

from model.config_reader import Fields, decoder
from model.families.deepseek_v3 import LATENT, YARN, feed_forwards, latent
from model.shapes.decoder import DecoderConfig
from model.shapes.mixtures import Router

EXAMPLES = (
    LATENT
    | {
        "num_hidden_layers": 3,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 12,
        "n_routed_experts": 6,
        "num_experts_per_tok": 3,
        "topk_method": "group_limited_greedy",
        "n_group": 3,
        "topk_group": 2,
        "n_shared_experts": 2,
        "routed_scaling_factor": 4.0,
        "rope_parameters": YARN,
    },
    LATENT
    | {
        "moe_intermediate_size": 12,
        "n_routed_experts": 5,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "q_lora_rank": None,
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
        "scoring_func": "softmax",
        "n_group": 1,
        "topk_group": 1,
    },
)


def decoder_config(fields: Fields) -> DecoderConfig:
    """Read config.json. Raises KeyError for a missing size: every published file states them all."""
    mixtures = feed_forwards(fields, _router(fields), bias=fields.get("mlp_bias", False))
    return decoder(fields, latent(fields), mixtures)


def _router(fields: Fields) -> Router:
    """`norm_topk_prob` is false in every published file, and transformers and DeepSeek's own code differ about it."""
    fields.expect("scoring_func", "softmax")
    fields.expect("norm_topk_prob", False)
    fields.expect("topk_method", "greedy", "group_limited_greedy")
    scale, groups, kept = fields.get("routed_scaling_factor", 1.0), fields.get("n_group"), fields.get("topk_group")
    if fields.get("topk_method") != "group_limited_greedy":
        return Router(scale=scale)
    return Router(scale=scale, groups=groups or 1, kept_groups=kept or 1)
