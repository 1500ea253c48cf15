"""Llama 4 as published, of which only the text part is served: pictures cannot be sent, and their tensors are skipped.

The text part is `model/families/llama4_text.py`.
"""

from typing import Any

from model.config_reader import Fields
from model.families import llama4_text
from model.shapes.decoder import DecoderConfig

PICTURES = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "vision_output_dim": 8,
    "image_size": 4,
    "patch_size": 2,
    "projector_input_dim": 8,
    "projector_output_dim": 8,
}
EXAMPLES: tuple[dict[str, Any], ...] = tuple(
    {"text_config": text, "vision_config": PICTURES, "tie_word_embeddings": text.get("tie_word_embeddings", False)}
    for text in llama4_text.EXAMPLES
)


def decoder_config(fields: Fields) -> DecoderConfig:
    """Read config.json's `text_config`."""
    text = Fields(fields["text_config"])
    fields.knows("vision_config", "boi_token_index", "eoi_token_index", "image_token_index")
    fields.expect("tie_word_embeddings", bool(text.get("tie_word_embeddings", False)))
    fields.check()
    return llama4_text.decoder_config(text)
