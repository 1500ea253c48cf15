"""∞-MoE checkpoints (`model_type: "infinity_moe"`, ours): every choice that the paper leaves open is a stated field."""

from collections.abc import Mapping
from typing import Any

from model.config import DecoderConfig, Infinity


def decoder_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Read config.json. Raises KeyError for a missing field: nothing is assumed."""
    mixture = Infinity(
        units=config["intermediate_size"],
        space=config["gate_dim"],
        share=config["kept_share"],
        trained=config["num_experts_per_tok"],
        maximum=config["max_experts_per_tok"],
        block=config["mask_block"],
        activation=config["activation"],
        sigma_link=config["sigma_link"],
        sigma_min=config["sigma_min"],
        draws=config["draws"],
    )
    return DecoderConfig(
        vocabulary=config["vocab_size"],
        width=config["hidden_size"],
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        head_width=config.get("head_dim", config["hidden_size"] // config["num_attention_heads"]),
        context=config["max_position_embeddings"],
        layers=(mixture,) * config["num_hidden_layers"],
        norm=config["norm"],
        norm_eps=config.get("norm_eps", 1e-5),
        positions=config["positions"],
        rope_theta=config.get("rope_theta", 10000.0),
        qk_norm=config.get("qk_norm", "none"),
        attention_bias=config.get("attention_bias", False),
        tied=config["tie_word_embeddings"],
    )
