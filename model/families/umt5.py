"""UMT5 (arXiv 2304.09151): T5 v1.1 with position biases of every layer; dense encoder–decoders."""

from model.config_reader import ConfigReader
from model.encoder_reader import t5_dense, t5_layers, t5_like
from model.shapes.decoder import DecoderConfig


def decoder_config(hf_config: ConfigReader) -> DecoderConfig:
    """Read config.json; defaults are those of transformers' UMT5Config.

    The published files have a head of their own (`tie_word_embeddings: false`), which is multiplied without a scale.
    Files that transformers 5 wrote say that it is tied and scaled, and have it if it is not.
    """
    layer = t5_dense(hf_config, hf_config.get("feed_forward_proj", "gated-gelu"))
    encoder_layers, decoder_layers = t5_layers(hf_config)
    scaled = hf_config.get("tie_word_embeddings", True) is not False
    return t5_like(
        hf_config, [layer] * encoder_layers, [layer] * decoder_layers, shared_bias=False, tied=False, scaled=scaled
    )
