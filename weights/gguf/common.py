"""Entries of config.json that all families share, and those of grouped-query attention, from a GGUF file's metadata."""

from collections.abc import Mapping
from typing import Any

from weights.gguf.config import Described, rope_scaling

Config = dict[str, Any]
COMMON = {
    "hidden_size": "embedding_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
}


def common(said: Described, model_type: str, keys: Mapping[str, str]) -> Config:
    """What every family's config.json has, and the `keys` that the file states."""
    embedding = said.file.tensors.get("token_embd.weight")
    if embedding is None:
        said.fail("tensor token_embd.weight is missing")
    found: Config = {
        "model_type": model_type,
        "vocab_size": embedding.shape[0],
        "num_hidden_layers": said.layers,
        "tie_word_embeddings": not said.has("output.weight"),
        "num_nextn_predict_layers": said.extra_layers,
    }
    stated = {ours: said.get(key) for ours, key in (COMMON | dict(keys)).items()}
    return found | {ours: value for ours, value in stated.items() if value is not None}


def decoder(said: Described, model_type: str, keys: Mapping[str, str], **more: Any) -> Config:
    """Grouped-query attention: widths of heads, and rotary positions."""
    width = said.head_width
    if said.get("attention.value_length") not in (None, width):
        said.fail(f"attention.value_length is {said.get('attention.value_length')}, but keys have a width of {width}")
    found = common(said, model_type, keys) | {"head_dim": width, "rope_scaling": rope_scaling(said)}
    if said.get("rope.dimension_count") is not None and width > 0:
        turned = said.number("rope.dimension_count")
        if turned < 1:
            said.fail(f"{said.architecture}.rope.dimension_count is {turned}")
        found["partial_rotary_factor"] = turned / width
    return found | more
