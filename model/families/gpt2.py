"""GPT-2 (Radford et al. 2019): a dense baseline with learned positions, layer norms and biases; no experts to count."""

from model.config_reader import ConfigReader, activation, attention, decoder
from model.shapes.attention import Attention
from model.shapes.decoder import DecoderConfig
from model.shapes.mixtures import Dense

SHARED = {
    "n_embd": "hidden_size",
    "n_head": "num_attention_heads",
    "n_layer": "num_hidden_layers",
    "n_positions": "max_position_embeddings",
    "activation_function": "hidden_act",
}


def decoder_config(hf_config: ConfigReader) -> DecoderConfig:
    """Read config.json, its names made the usual ones; defaults are those of transformers' GPT2Config."""
    defaults = {"hidden_act": "gelu_new", "tie_word_embeddings": True}
    usual = {SHARED.get(key, key): value for key, value in hf_config.items()}
    hf_config = ConfigReader(defaults | usual)
    hf_config.mark_read(
        "n_ctx", "output_past", "reorder_and_upcast_attn"
    )  # buffers and precision, not what is computed
    inner = hf_config.get("n_inner") or 4 * hf_config["hidden_size"]
    ffn = Dense(inner, activation(hf_config), gated=False, bias=True)
    self_attention = [_attention(hf_config, layer) for layer in range(hf_config["num_hidden_layers"])]
    norms = {"norm": "layer", "norm_eps": hf_config.get("layer_norm_epsilon", 1e-5)}
    return decoder(hf_config, self_attention, ffn, positions="learned", **norms)


def _attention(hf_config: ConfigReader, layer: int) -> Attention:
    """Every layer's own, because its scale may depend on its depth."""
    width = hf_config["hidden_size"] // hf_config["num_attention_heads"]
    scale = width**-0.5 if hf_config.get("scale_attn_weights", True) else 1.0
    if hf_config.get("scale_attn_by_inverse_layer_idx", False):
        scale /= layer + 1
    return attention(hf_config, None, head_width=width, scale=scale, bias=True, out_bias=True)
