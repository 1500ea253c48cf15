"""Granite-MoE with a shared part beside the experts, of `shared_intermediate_size` hidden units; 0: none."""

from model.config_reader import Fields, dense
from model.families.granitemoe import SCALES, granite
from model.shapes.decoder import DecoderConfig

EXAMPLES = (
    {"num_local_experts": 5, "shared_intermediate_size": 20} | SCALES,
    {"num_local_experts": 4, "num_experts_per_tok": 3, "tie_word_embeddings": True, "attention_multiplier": 0.35},
)


def decoder_config(fields: Fields) -> DecoderConfig:
    """Read config.json; defaults are those of transformers' GraniteMoeSharedConfig."""
    width = fields.get("shared_intermediate_size", 0)
    return granite(fields, dense(fields, width) if width else None)
