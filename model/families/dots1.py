"""dots.llm1 (arXiv 2506.05767): DeepSeek-V3's router and shared experts over grouped-query attention with norms of each
query and key head. The kept weights are normalised at every count, one included.
"""

from dataclasses import replace

from model.config_reader import ConfigReader, activation, attention, decoder, dense, head_width, rope, windows
from model.shapes.decoder import DecoderConfig
from model.shapes.mixtures import Router, TopK


def decoder_config(hf_config: ConfigReader) -> DecoderConfig:
    """Read config.json; defaults are those of transformers' Dots1Config."""
    for key, *served in ("moe_layer_freq", 1), ("topk_method", "noaux_tc"), ("scoring_func", "sigmoid", "noaux_tc"):
        hf_config.expect(key, *served)
    positions, bias = rope(hf_config, head_width(hf_config)), hf_config.get("attention_bias", False)
    window, first = hf_config.get("sliding_window", 4096), hf_config.get("max_window_layers", 62)
    whole = attention(hf_config, positions, qk_norm="head", bias=bias, out_bias=bias)
    back = windows(hf_config, window, lambda layer: layer >= first)
    self_attention = [replace(whole, window=each) for each in back]
    plain, count = dense(hf_config, hf_config["intermediate_size"]), hf_config["num_hidden_layers"]
    before = hf_config.get("first_k_dense_replace") or 0
    mixture = _mixture(hf_config)
    return decoder(hf_config, self_attention, [plain if layer < before else mixture for layer in range(count)])


def _mixture(hf_config: ConfigReader) -> TopK:
    width, shared = hf_config.get("moe_intermediate_size", 1408), hf_config.get("n_shared_experts")
    experts = hf_config.either("n_routed_experts", "num_local_experts")
    shared_part = dense(hf_config, width * shared) if shared else None
    return TopK(
        experts=experts,
        width=width,
        trained=hf_config["num_experts_per_tok"],
        router=_router(hf_config),
        activation=activation(hf_config),
        shared=shared_part,
    )


def _router(hf_config: ConfigReader) -> Router:
    normalise = hf_config.get("norm_topk_prob", False)
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
