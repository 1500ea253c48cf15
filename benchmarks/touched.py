"""How many weights one decoding step must read, which bounds how fast memory lets it be. It measures nothing."""

import math

import torch

from model.decoder import Decoder
from model.shapes.decoder import DecoderConfig
from model.shapes.mixtures import Infinity, TopK

EXPERT_PARTS = ("ffn.gate_up", "ffn.up", "ffn.down")
OWN_INT4 = 0.5 + 1 / 32  # what --quantize int4 makes: a scale of 8 bits for 32 weights
# Per shared and per expert weight: 8 bits without scales, files of 4 bits with a scale of 16 bits for 32 weights; those
# files have some matrices in more, which is left out.
BYTES = {
    "bf16": (2, 2),
    "8 bit": (1, 1),
    "8 bit experts": (2, 1),
    "4 bit": (0.5625, 0.5625),
    "4 bit experts": (1, OWN_INT4),
}


def expert_weights(config: DecoderConfig) -> int:
    """Weights of one expert (∞-MoE: of one block)."""
    kind = next(kind for kind in config.mixtures if kind.num_experts)  # the first layers may be dense
    if isinstance(kind, Infinity):
        return 2 * config.width * kind.block
    assert isinstance(kind, TopK)
    return 3 * config.width * kind.width


def shared_weights(config: DecoderConfig) -> int:
    """Weights that every step reads: all but the experts' and the embedding (a tied one is the head, and is read)."""
    with torch.device("meta"):
        model = Decoder(config)
    left_out = () if config.tied else ("embed.weight",)
    total = 0
    for name, parameter in model.named_parameters():
        if name not in left_out and not name.endswith(EXPERT_PARTS):
            total += parameter.numel()
    return total


def step_bytes(config: DecoderConfig, weights: str, touched: float | None, count: int, own: bool = False) -> float:
    """Bytes of one step that touches so many experts over all layers; None: one token's, by its count. `own`: our
    engine has quantised the weights, they come from no file of 4 bits."""
    if touched is None:
        touched = sum(count if isinstance(kind, TopK) else math.nan for kind in config.mixtures if kind.num_experts)
    shared, expert = (OWN_INT4, OWN_INT4) if own and weights == "4 bit" else BYTES[weights]
    return shared * shared_weights(config) + expert * touched * expert_weights(config)
