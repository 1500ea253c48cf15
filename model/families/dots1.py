"""dots.llm1 (arXiv 2506.05767): DeepSeek-V3's router and shared experts over grouped-query attention with norms of each
query and key head. The kept weights are normalised at every count, one included.
"""

from model.config_reader import Fields, activation, attention, decoder, dense, head_width, rope, windows
from model.shapes.decoder import DecoderConfig
from model.shapes.mixtures import Router, TopK

EXAMPLES = (
    {
        "moe_intermediate_size": 12,
        "n_routed_experts": 8,
        "n_shared_experts": 2,
        "num_experts_per_tok": 3,
        "n_group": 4,
        "topk_group": 2,
        "first_k_dense_replace": 1,
        "num_hidden_layers": 3,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "sliding_window": 5,
        "max_window_layers": 2,
        "attention_bias": True,
    },
    {
        "moe_intermediate_size": 8,
        "n_routed_experts": 5,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "tie_word_embeddings": True,
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    {
        "moe_intermediate_size": 12,
        "n_routed_experts": 6,
        "n_shared_experts": 1,
        "num_experts_per_tok": 3,
        "norm_topk_prob": True,
        "sliding_window": None,
        "head_dim": 12,
    },
)


def decoder_config(fields: Fields) -> DecoderConfig:
    """Read config.json; defaults are those of transformers' Dots1Config."""
    for key, *served in ("moe_layer_freq", 1), ("topk_method", "noaux_tc"), ("scoring_func", "sigmoid", "noaux_tc"):
        fields.expect(key, *served)
    positions, bias = rope(fields, head_width(fields)), fields.get("attention_bias", False)
    window, first = fields.get("sliding_window", 4096), fields.get("max_window_layers", 62)
    self_attention = [
        attention(fields, positions, qk_norm="head", bias=bias, out_bias=bias, window=each)
        for each in windows(fields, window, lambda layer: layer >= first)
    ]
    plain, count = dense(fields, fields["intermediate_size"]), fields["num_hidden_layers"]
    before = fields.get("first_k_dense_replace") or 0
    mixture = _mixture(fields)
    return decoder(fields, self_attention, [plain if layer < before else mixture for layer in range(count)])


def _mixture(fields: Fields) -> TopK:
    width, shared = fields.get("moe_intermediate_size", 1408), fields.get("n_shared_experts")
    router = Router(
        score="sigmoid",
        normalise=fields.get("norm_topk_prob", False),
        scale=fields.get("routed_scaling_factor", 1.0),
        selection_bias=True,
        groups=fields.get("n_group") or 1,
        kept_groups=fields.get("topk_group") or 1,
        group_score="top2",
        eps=1e-20,
    )
    return TopK(
        experts=fields.either("n_routed_experts", "num_local_experts"),
        width=width,
        trained=fields["num_experts_per_tok"],
        router=router,
        activation=activation(fields),
        shared=dense(fields, width * shared) if shared else None,
    )
