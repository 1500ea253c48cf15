"""gpt-oss' tensors: experts in one piece, stored [E, in, out]. It does not read config.json."""

from model.families.gpt_oss import NAMES
from model.shapes.decoder import DecoderConfig
from weights.names import hugging_face, turned_experts
from weights.rules import Rule


def rules(config: DecoderConfig) -> tuple[Rule, ...]:
    """Every rule of the decoder."""
    return turned_experts(hugging_face(config, NAMES))
