"""Tiny configs of `kimi_k2` that differ in what matters."""

from tests.families.examples.deepseek_v3 import LATENT, YARN

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
