"""∞-MoE checkpoints (`model_type: "infinity_moe"`, ours): every choice that the paper leaves open is a stated field."""

from model.config_reader import ConfigReader, attention, decoder, rope
from model.shapes.decoder import DecoderConfig
from model.shapes.mixtures import Infinity


def decoder_config(hf_config: ConfigReader) -> DecoderConfig:
    """Read config.json. Raises KeyError for a missing field: nothing is assumed."""
    mixture = Infinity(
        units=hf_config["intermediate_size"],
        latent_dim=hf_config["gate_dim"],
        keep_ratio=hf_config["kept_share"],
        trained=hf_config["num_experts_per_tok"],
        maximum=hf_config["max_experts_per_tok"],
        block=hf_config["mask_block"],
        activation=hf_config["activation"],
        sigma_link=hf_config["sigma_link"],
        sigma_min=hf_config["sigma_min"],
        draws=hf_config["draws"],
        replacement=hf_config.get("replacement", True),
        aggregate=hf_config.get("aggregate", "mean"),
    )
    width = hf_config.get("head_dim", hf_config["hidden_size"] // hf_config["num_attention_heads"])
    bias = hf_config.get("attention_bias", False)
    rotary = rope(hf_config, width) if hf_config["positions"] == "rotary" else None
    hf_config.mark_read("rope_theta")
    norm = hf_config.get("qk_norm", "none")
    self_attention = attention(hf_config, rotary, head_width=width, qk_norm=norm, bias=bias, out_bias=bias)
    norms = {"norm": hf_config["norm"], "norm_eps": hf_config.get("norm_eps", 1e-5)}
    return decoder(
        hf_config,
        self_attention,
        mixture,
        positions=hf_config["positions"],
        tied=hf_config["tie_word_embeddings"],
        **norms,
    )
