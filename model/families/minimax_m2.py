"""MiniMax-M2 (2025): norms over all query and key heads, heads that are turned in part; sigmoid scores, a learned bias
for choosing only, weights normalised at every count, one included."""

from model.config_reader import ConfigReader, activation, attention, decoder, rope
from model.shapes.decoder import DecoderConfig
from model.shapes.mixtures import Router, TopK

NAMES = {
    "mlp": "block_sparse_moe",
    "gate_proj": "w1",
    "down_proj": "w2",
    "up_proj": "w3",
    "gate.e_score_correction_bias": "e_score_correction_bias",
}


def decoder_config(hf_config: ConfigReader) -> DecoderConfig:
    """Read config.json; defaults are those of transformers' MiniMaxM2Config."""
    _same_as_published(hf_config)
    head = hf_config.get("head_dim") or 128
    share = (hf_config.get("rotary_dim") or head) / head
    self_attention = attention(
        hf_config, rope(hf_config, head, theta=5e6, share=share), head_width=head, qk_norm="full"
    )
    experts = hf_config.either("num_local_experts", "num_experts", default=256)
    width, trained = hf_config.get("intermediate_size", 1536), hf_config.get("num_experts_per_tok", 8)
    router = Router(score="sigmoid", normalise=True, selection_bias=True)
    mixture = TopK(
        experts=experts,
        width=width,
        trained=trained,
        router=router,
        activation=activation(hf_config),
    )
    return decoder(hf_config, self_attention, mixture)


def _same_as_published(hf_config: ConfigReader) -> None:
    """MiniMax's own files have switches of earlier models, which transformers does not read: only one way is known."""
    hf_config.expect("scoring_func", "sigmoid")
    hf_config.expect("use_routing_bias", True)
    hf_config.expect("use_qk_norm", True)
    hf_config.expect("qk_norm_type", "per_layer")
    hf_config.expect("attn_type_list", [1] * hf_config["num_hidden_layers"])
    for part in ("full_attention", "linear_attention", "mlp"):
        hf_config.expect(f"layernorm_{part}_beta", 1)
    hf_config.mark_read(
        "shared_moe_mode", "mlp_intermediate_size"
    )  # of shared experts and dense layers, which M2 has not
    hf_config.mark_read("use_mtp", "num_mtp_modules", "mtp_transformer_layers")
