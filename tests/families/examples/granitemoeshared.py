"""Tiny configs of `granitemoeshared` that differ in what matters."""

from tests.families.examples.granitemoe import SCALES

EXAMPLES = (
    {"num_local_experts": 5, "shared_intermediate_size": 20} | SCALES,
    {"num_local_experts": 4, "num_experts_per_tok": 3, "tie_word_embeddings": True, "attention_multiplier": 0.35},
)
