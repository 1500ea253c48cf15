"""T5 (arXiv 1910.10683), T5 v1.1 and FLAN-T5: dense encoder–decoders, without experts to count."""

from model.config_reader import ConfigReader
from model.encoder_reader import t5_dense, t5_layers, t5_like
from model.shapes.decoder import DecoderConfig


def decoder_config(hf_config: ConfigReader) -> DecoderConfig:
    """Read config.json; defaults are those of transformers' T5Config.

    v1.1 has a head of its own and no scale of what it multiplies. Its published files say so by `tie_word_embeddings:
    false`, files that transformers 5 wrote by `scale_decoder_outputs: false`.
    """
    layer = t5_dense(hf_config, hf_config.get("feed_forward_proj", "relu"))
    encoder_layers, decoder_layers = t5_layers(hf_config)
    tied = hf_config.get("tie_word_embeddings", True) is not False
    scaled = hf_config.get("scale_decoder_outputs", tied)
    return t5_like(
        hf_config,
        [layer] * encoder_layers,
        [layer] * decoder_layers,
        shared_bias=True,
        tied=tied and scaled,
        scaled=scaled,
    )
