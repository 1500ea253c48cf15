"""The tensor names that most families share: Hugging Face's Llama-like layout, with the mixtures' own tensors.

A family needs a table of its own only where it departs from this one. It opens no files.
"""

from collections.abc import Callable

from model.config import DecoderConfig, Dense, FeedForward, Infinity, TopK
from weights.rules import Copy, Fuse, Ignore, Rule, Stack

IGNORED = (Ignore("model.layers.{l}.self_attn.rotary_emb.inv_freq", "a function of the config"),)


def hugging_face(config: DecoderConfig) -> tuple[Rule, ...]:
    """Every rule of a decoder, layer by layer. Where two share a target, the first whose tensors exist is used."""
    rules: list[Rule] = [Copy("embed.weight", "model.embed_tokens.weight")]
    if config.positions == "learned":
        rules.append(Copy("embed_positions.weight", "model.embed_positions.weight"))
    for number, ffn in enumerate(config.layers):
        ours, theirs = f"layers.{number}.", f"model.layers.{number}."
        rules += _attention(config, ours, theirs)
        rules += _norm(config, ours + "attention_norm", theirs + "input_layernorm")
        rules += _norm(config, ours + "ffn_norm", theirs + "post_attention_layernorm")
        rules += _feed_forward(config.width, ffn)(ours + "ffn.", theirs + "mlp.")
    rules += _norm(config, "norm", "model.norm")
    if not config.tied:
        rules.append(Copy("head.weight", "lm_head.weight"))
    return tuple(rules)


def _norm(config: DecoderConfig, ours: str, theirs: str) -> list[Rule]:
    parts = ["weight"] if config.norm == "rms" else ["weight", "bias"]
    return [Copy(f"{ours}.{part}", f"{theirs}.{part}") for part in parts]


def _attention(config: DecoderConfig, ours: str, theirs: str) -> list[Rule]:
    ours, theirs = ours + "attention.", theirs + "self_attn."
    query, group = config.heads * config.head_width, config.kv_heads * config.head_width
    rules: list[Rule] = []
    for part in ["weight", "bias"] if config.attention_bias else ["weight"]:
        sources = tuple(f"{theirs}{name}_proj.{part}" for name in "qkv")
        rules.append(Fuse(f"{ours}qkv.{part}", sources, (query, group, group)))
        rules.append(Copy(f"{ours}out.{part}", f"{theirs}o_proj.{part}"))
    if config.qk_norm == "full":
        rules += [Copy(f"{ours}{name}_norm.weight", f"{theirs}{name}_norm.weight") for name in "qk"]
    return rules


def _feed_forward(width: int, ffn: FeedForward) -> Callable[[str, str], list[Rule]]:
    """The rules of one layer's feed-forward part, by kind."""
    if isinstance(ffn, Dense):
        return lambda ours, theirs: _dense(ffn, ours, theirs)
    if isinstance(ffn, Infinity):
        names = {"router": "router", "scores": "mask_scores", "up": "up_proj", "down": "down_proj"}
        return lambda ours, theirs: [Copy(ours + a, f"{theirs}{b}.weight") for a, b in names.items()]
    return lambda ours, theirs: _topk(width, ffn, ours, theirs)


def _topk(width: int, ffn: TopK, ours: str, theirs: str) -> list[Rule]:
    expert = theirs + "experts.{e}."
    halves = (expert + "gate_proj.weight", expert + "up_proj.weight")
    return [
        Copy(ours + "router", theirs + "gate.weight"),
        Stack(ours + "gate_up", halves, (ffn.width, ffn.width), ffn.experts),
        Copy(ours + "gate_up", theirs + "experts.gate_up_proj"),
        Stack(ours + "down", (expert + "down_proj.weight",), (width,), ffn.experts),
        Copy(ours + "down", theirs + "experts.down_proj"),
    ]


def _dense(ffn: Dense, ours: str, theirs: str) -> list[Rule]:
    rules: list[Rule] = []
    for part in ["weight", "bias"] if ffn.bias else ["weight"]:
        if ffn.gated:
            halves = (f"{theirs}gate_proj.{part}", f"{theirs}up_proj.{part}")
            rules.append(Fuse(f"{ours}up.{part}", halves, (ffn.width, ffn.width)))
        else:
            rules.append(Copy(f"{ours}up.{part}", f"{theirs}up_proj.{part}"))
        rules.append(Copy(f"{ours}down.{part}", f"{theirs}down_proj.{part}"))
    return rules
