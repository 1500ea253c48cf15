"""GPT-2 (Radford et al. 2019): a dense baseline with learned positions, layer norms and biases; no experts to count."""

from model.config_reader import Fields, activation, attention, decoder
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
FOREIGN = {"num_key_value_heads": None, "intermediate_size": None}
EXAMPLES = (
    FOREIGN,
    {"n_inner": 20, "activation_function": "relu", "tie_word_embeddings": False, "layer_norm_epsilon": 1e-3} | FOREIGN,
    {"num_hidden_layers": 3, "scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True} | FOREIGN,
    {"scale_attn_weights": False} | FOREIGN,
)


def decoder_config(fields: Fields) -> DecoderConfig:
    """Read config.json, its names made the usual ones; defaults are those of transformers' GPT2Config."""
    defaults = {"hidden_act": "gelu_new", "tie_word_embeddings": True}
    fields = Fields(defaults | {SHARED.get(key, key): value for key, value in fields.items()})
    fields.knows("n_ctx", "output_past", "reorder_and_upcast_attn")  # buffers and precision, not what is computed
    ffn = Dense(fields.get("n_inner") or 4 * fields["hidden_size"], activation(fields), gated=False, bias=True)
    self_attention = [_attention(fields, layer) for layer in range(fields["num_hidden_layers"])]
    norms = {"norm": "layer", "norm_eps": fields.get("layer_norm_epsilon", 1e-5)}
    return decoder(fields, self_attention, ffn, positions="learned", **norms)


def _attention(fields: Fields, layer: int) -> Attention:
    """Every layer's own, because its scale may depend on its depth."""
    width = fields["hidden_size"] // fields["num_attention_heads"]
    scale = width**-0.5 if fields.get("scale_attn_weights", True) else 1.0
    if fields.get("scale_attn_by_inverse_layer_idx", False):
        scale /= layer + 1
    return attention(fields, None, head_width=width, scale=scale, bias=True, out_bias=True)
