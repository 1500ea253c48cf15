"""DeepSeek-V2 (arXiv 2405.04434): MLA; softmax over all experts, weights as they are times a factor,
chosen from all or from the groups whose best expert is best; shared experts, first layers without a mixture."""

from model.config_reader import ConfigReader, decoder
from model.families.deepseek_v3 import feed_forwards, mla
from model.shapes.decoder import DecoderConfig
from model.shapes.mixtures import Router


def decoder_config(hf_config: ConfigReader) -> DecoderConfig:
    """Read config.json. Raises KeyError for a missing size: every published file states them all."""
    mixtures = feed_forwards(hf_config, _router(hf_config), bias=hf_config.get("mlp_bias", False))
    return decoder(hf_config, mla(hf_config), mixtures)


def _router(hf_config: ConfigReader) -> Router:
    """`norm_topk_prob` is false in every published file, and transformers and DeepSeek's own code differ about it."""
    hf_config.expect("scoring_func", "softmax")
    hf_config.expect("norm_topk_prob", False)
    hf_config.expect("topk_method", "greedy", "group_limited_greedy")
    scale, groups, kept = (
        hf_config.get("routed_scaling_factor", 1.0),
        hf_config.get("n_group"),
        hf_config.get("topk_group"),
    )
    if hf_config.get("topk_method") != "group_limited_greedy":
        return Router(scale=scale)
    return Router(scale=scale, groups=groups or 1, kept_groups=kept or 1)
