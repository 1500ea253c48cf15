"""Llama 4 as published, of which only the text part is served: pictures cannot be sent, and their tensors are skipped.

The text part is `model/families/llama4_text.py`.
"""

from model.config_reader import ConfigReader
from model.families import llama4_text
from model.shapes.decoder import DecoderConfig


def decoder_config(hf_config: ConfigReader) -> DecoderConfig:
    """Read config.json's `text_config`."""
    text = ConfigReader(hf_config["text_config"])
    hf_config.mark_read("vision_config", "boi_token_index", "eoi_token_index", "image_token_index")
    hf_config.expect("tie_word_embeddings", bool(text.get("tie_word_embeddings", False)))
    hf_config.check()
    return llama4_text.decoder_config(text)
