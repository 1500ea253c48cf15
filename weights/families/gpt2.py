"""GPT-2's tensors: matrices are stored [in, out], queries, keys and values as one. The first published files leave out
the prefix `transformer.`. It opens no files.
"""

from collections.abc import Iterator

from model.shapes.decoder import DecoderConfig
from weights.names import norm
from weights.rules import Copy, Rule

MATRICES = {
    "attention.qkv": "attn.c_attn",
    "attention.out": "attn.c_proj",
    "ffn.up": "mlp.c_fc",
    "ffn.down": "mlp.c_proj",
}


def rules(config: DecoderConfig) -> tuple[Rule, ...]:
    """Every rule, for files with the prefix and for those without."""
    head = () if config.tied else (Copy("head.weight", "lm_head.weight"),)
    return (*_decoder(config, "transformer."), *_decoder(config, ""), *head)


def _decoder(config: DecoderConfig, prefix: str) -> Iterator[Rule]:
    yield Copy("embed.weight", prefix + "wte.weight")
    yield Copy("embed_positions.weight", prefix + "wpe.weight")
    for layer in range(len(config.feed_forward)):
        yield from _layer(config, f"layers.{layer}.", f"{prefix}h.{layer}.")
    yield from norm(config, "norm", prefix + "ln_f")


def _layer(config: DecoderConfig, ours: str, theirs: str) -> Iterator[Rule]:
    for our, their in MATRICES.items():
        yield Copy(f"{ours}{our}.weight", f"{theirs}{their}.weight", transposed=True)
        yield Copy(f"{ours}{our}.bias", f"{theirs}{their}.bias")
    yield from norm(config, ours + "attention_norm", theirs + "ln_1")
    yield from norm(config, ours + "ffn_norm", theirs + "ln_2")
