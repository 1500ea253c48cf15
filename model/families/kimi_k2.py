"""Kimi K2 (arXiv 2507.20534): DeepSeek-V3's layers with more experts, fewer heads and one group."""

from model.families.deepseek_v3 import LATENT, YARN, decoder_config

__all__ = ["EXAMPLES", "decoder_config"]
ONE_GROUP = LATENT | {
    "moe_intermediate_size": 12,
    "n_routed_experts": 7,
    "num_experts_per_tok": 3,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.827,
}
EXAMPLES = (
    ONE_GROUP | {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 1.0, "beta_slow": 1.0}},
    ONE_GROUP | {"num_hidden_layers": 3, "first_k_dense_replace": 0, "tie_word_embeddings": True},
)
