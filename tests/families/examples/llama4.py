"""Tiny configs of `llama4` that differ in what matters."""

from typing import Any

from tests.families.examples import llama4_text

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
