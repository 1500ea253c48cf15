"""∞-MoE checkpoints (`model_type: "infinity_moe"`, ours): every choice that the paper leaves open is a stated field."""

from model.config_reader import Fields, attention, decoder, rope
from model.shapes.decoder import DecoderConfig
from model.shapes.mixtures import Infinity


def decoder_config(fields: Fields) -> DecoderConfig:
    """Read config.json. Raises KeyError for a missing field: nothing is assumed."""
    mixture = Infinity(
        units=fields["intermediate_size"],
        latent_dim=fields["gate_dim"],
        keep_ratio=fields["kept_share"],
        trained=fields["num_experts_per_tok"],
        maximum=fields["max_experts_per_tok"],
        block=fields["mask_block"],
        activation=fields["activation"],
        sigma_link=fields["sigma_link"],
        sigma_min=fields["sigma_min"],
        draws=fields["draws"],
    )
    width = fields.get("head_dim", fields["hidden_size"] // fields["num_attention_heads"])
    bias = fields.get("attention_bias", False)
    rotary = fields["positions"] == "rotary"
    fields.knows("rope_theta")
    self_attention = attention(
        fields,
        rope(fields, width) if rotary else None,
        head_width=width,
        qk_norm=fields.get("qk_norm", "none"),
        bias=bias,
        out_bias=bias,
    )
    return decoder(
        fields,
        self_attention,
        mixture,
        norm=fields["norm"],
        norm_eps=fields.get("norm_eps", 1e-5),
        positions=fields["positions"],
        tied=fields["tie_word_embeddings"],
    )
