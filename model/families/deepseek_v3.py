"""DeepSeek-V3 (arXiv 2412.19437): MLA; sigmoid scores, a learned bias for choosing only, groups of
experts ranked by their two best, shared experts, and first layers without a mixture. Weights are normalised at every
count, one included, as transformers does."""

from model.config_reader import ConfigReader, activation, decoder, dense, rope
from model.shapes.attention import MLA
from model.shapes.decoder import DecoderConfig
from model.shapes.feed_forward import FeedForward
from model.shapes.mixtures import Dense, Router, TopK
from model.shapes.rope import Rope, yarn_mscale


def decoder_config(hf_config: ConfigReader) -> DecoderConfig:
    """Read config.json. Raises KeyError for a missing size: every published file states them all."""
    self_attention = mla(hf_config, interleaved=hf_config.get("rope_interleave") is not False)
    return decoder(hf_config, self_attention, feed_forwards(hf_config, biased_router(hf_config)))


def mla(hf_config: ConfigReader, *, interleaved: bool = True) -> MLA:
    """MLA attention; YaRN's `mscale_all_dim` sharpens it."""
    heads = hf_config["num_attention_heads"]
    plain, turned = hf_config["qk_nope_head_dim"], hf_config["qk_rope_head_dim"]
    hf_config.expect("num_key_value_heads", heads)
    hf_config.mark_read("head_dim", "qk_head_dim")  # sums of the widths above
    positions = rope(hf_config, turned, interleaved=interleaved)
    rank, query_rank = hf_config["kv_lora_rank"], hf_config.get("q_lora_rank")
    bias = hf_config.get("attention_bias", False)
    scale = (plain + turned) ** -0.5 * _sharpness(positions)
    return MLA(
        heads=heads,
        query_rank=query_rank,
        rank=rank,
        plain_width=plain,
        rope=positions,
        value_width=hf_config["v_head_dim"],
        bias=bias,
        scale=scale,
    )


def _sharpness(positions: Rope) -> float:
    """What YaRN multiplies the attention logits by, beside what it does to cosines and sines."""
    if positions.scaling == "default" or not positions.mscale_all_dim:
        return 1.0
    return yarn_mscale(positions.factor, positions.mscale_all_dim) ** 2


def biased_router(hf_config: ConfigReader) -> Router:
    """Sigmoid scores; a bias chooses and does not weigh."""
    hf_config.expect("scoring_func", "sigmoid")
    hf_config.expect("topk_method", "noaux_tc")
    normalise = bool(hf_config.get("norm_topk_prob", True))
    scale = hf_config.get("routed_scaling_factor", 1.0)
    groups, kept_groups = hf_config.get("n_group") or 1, hf_config.get("topk_group") or 1
    return Router(
        score="sigmoid",
        normalise=normalise,
        scale=scale,
        selection_bias=True,
        groups=groups,
        kept_groups=kept_groups,
        group_score="top2",
        eps=1e-20,
    )


def feed_forwards(hf_config: ConfigReader, router: Router, *, bias: bool = False) -> list[FeedForward]:
    """Of every layer: dense at first, then a mixture in every `moe_layer_freq`-th. `bias` is of all but the experts."""
    width, shared = hf_config["moe_intermediate_size"], hf_config.get("n_shared_experts") or 0
    kind = activation(hf_config)
    shared_part = Dense(width * shared, kind, bias=bias) if shared else None
    mixture = TopK(
        experts=hf_config["n_routed_experts"],
        width=width,
        trained=hf_config["num_experts_per_tok"],
        router=router,
        activation=kind,
        shared=shared_part,
    )
    first, step = hf_config["first_k_dense_replace"], hf_config.get("moe_layer_freq", 1)
    plain = dense(hf_config, hf_config["intermediate_size"], bias=bias)
    layers = range(hf_config["num_hidden_layers"])
    return [mixture if layer >= first and layer % step == 0 else plain for layer in layers]
