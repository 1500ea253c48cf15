"""DeepSeek-V3 (arXiv 2412.19437): latent attention; sigmoid scores, a learned bias for choosing alone, groups of
experts ranked by their two best, shared experts, and first layers without a mixture. Weights are normalised at every
count, one included, as transformers does."""

from typing import Any

from model.config_reader import Fields, activation, decoder, dense, rope
from model.shapes.attention import MLA
from model.shapes.decoder import DecoderConfig
from model.shapes.mixtures import Dense, FeedForward, Router, TopK
from model.shapes.rope import Rope, yarn_mscale

LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 10,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 2.0,
    "beta_slow": 0.5,
    "mscale": 0.7,
    "mscale_all_dim": 1.2,
}
EXAMPLES = (
    LATENT
    | {
        "num_hidden_layers": 3,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 12,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "n_group": 4,
        "topk_group": 2,
        "n_shared_experts": 2,
        "rope_parameters": YARN,
        "attention_bias": True,
    },
    LATENT
    | {
        "first_k_dense_replace": 0,
        "moe_intermediate_size": 12,
        "n_routed_experts": 5,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "q_lora_rank": None,
        "rope_interleave": False,
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.5,
        "tie_word_embeddings": True,
        "moe_layer_freq": 1,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
    },
)


def decoder_config(fields: Fields) -> DecoderConfig:
    """Read config.json. Raises KeyError for a missing size: every published file states them all."""
    self_attention = latent(fields, interleaved=fields.get("rope_interleave") is not False)
    return decoder(fields, self_attention, feed_forwards(fields, biased_router(fields)))


def latent(fields: Fields, *, interleaved: bool = True) -> MLA:
    """MLA attention; YaRN's `mscale_all_dim` sharpens it."""
    heads, plain, turned = fields["num_attention_heads"], fields["qk_nope_head_dim"], fields["qk_rope_head_dim"]
    fields.expect("num_key_value_heads", heads)
    fields.knows("head_dim", "qk_head_dim")  # sums of the widths above
    positions = rope(fields, turned, interleaved=interleaved)
    return MLA(
        heads=heads,
        query_rank=fields.get("q_lora_rank"),
        rank=fields["kv_lora_rank"],
        plain_width=plain,
        rope=positions,
        value_width=fields["v_head_dim"],
        bias=fields.get("attention_bias", False),
        scale=(plain + turned) ** -0.5 * _sharpness(positions),
    )


def _sharpness(positions: Rope) -> float:
    """What YaRN multiplies the attention logits by, beside what it does to cosines and sines."""
    if positions.scaling == "default" or not positions.mscale_all_dim:
        return 1.0
    return yarn_mscale(positions.factor, positions.mscale_all_dim) ** 2


def biased_router(fields: Fields) -> Router:
    """Sigmoid scores; a bias chooses and does not weigh."""
    fields.expect("scoring_func", "sigmoid")
    fields.expect("topk_method", "noaux_tc")
    return Router(
        score="sigmoid",
        normalise=bool(fields.get("norm_topk_prob", True)),
        scale=fields.get("routed_scaling_factor", 1.0),
        selection_bias=True,
        groups=fields.get("n_group") or 1,
        kept_groups=fields.get("topk_group") or 1,
        group_score="top2",
        eps=1e-20,
    )


def feed_forwards(fields: Fields, router: Router, *, bias: bool = False) -> list[FeedForward]:
    """Of every layer: dense at first, then a mixture in every `moe_layer_freq`-th. `bias` is of all but the experts."""
    width, shared = fields["moe_intermediate_size"], fields.get("n_shared_experts") or 0
    kind = activation(fields)
    mixture = TopK(
        experts=fields["n_routed_experts"],
        width=width,
        trained=fields["num_experts_per_tok"],
        router=router,
        activation=kind,
        shared=Dense(width * shared, kind, bias=bias) if shared else None,
    )
    first, step = fields["first_k_dense_replace"], fields.get("moe_layer_freq", 1)
    plain = dense(fields, fields["intermediate_size"], bias=bias)
    return [mixture if n >= first and n % step == 0 else plain for n in range(fields["num_hidden_layers"])]
