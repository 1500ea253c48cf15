"""The tensor names that most families share: Hugging Face's Llama layout, with the parts that some families add.

A family with other names for the same tensors lists them in its `NAMES`; one with another layout has a table of its own
in `weights/families/`. It opens no files.
"""

import importlib
import importlib.util
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import singledispatch
from typing import Any

from model.shapes.attention import MLA, Attention, GatedDeltaNet
from model.shapes.decoder import DecoderConfig
from model.shapes.mixtures import Dense, Infinity, TopK
from model.shapes.moe_plus_plus import MoEPlusPlus
from weights.rules import Copy, Fuse, Ignore, Rule, Stack, renamed

_GPT2_MASKS = tuple(
    Ignore(f"{prefix}h.{{l}}.attn.{mask}", "GPT-2's causal mask, or the value of what it hides")
    for prefix in ("", "transformer.")
    for mask in ("bias", "masked_bias")
)
_EMBEDDINGS = tuple(
    Ignore(f"{prefix}{stack}.embed_tokens.weight", "the embedding of both stacks", copy_of="embed.weight")
    for prefix in ("", "model.")
    for stack in ("encoder", "decoder")
)
IGNORED = (
    Ignore("model.layers.{l}.self_attn.rotary_emb.inv_freq", "a function of the config"),
    *_GPT2_MASKS,
    Ignore("mtp.{any}", "layers for multi-token prediction, beside the decoder (Qwen3-Next)"),
    Ignore("model.mtp_{any}", "multi-token prediction (ERNIE 4.5)"),
    *_EMBEDDINGS,
    Ignore("decoder.block.{l}.layer.1.EncDecAttention.relative_attention_bias.weight", "not used (T5)"),
    Ignore("model.encoder.embed_positions.weights", "a function of the config (M2M100)"),
    Ignore("model.decoder.embed_positions.weights", "a function of the config (M2M100)"),
    Ignore("model.layers.{l}.mlp.gate.noise.weight", "noise of training (Shazeer et al. 2017)"),
    Ignore("vision_model.{any}", "the vision part (Llama 4)"),
    Ignore("multi_modal_projector.{any}", "the vision part (Llama 4)"),
)


def ignored(raw: Mapping[str, Any]) -> tuple[Ignore, ...]:
    """The tensors of a checkpoint that are not needed, among them the layers for multi-token prediction beyond the last
    one (DeepSeek-V3, arXiv 2412.19437 §2.2)."""
    more = raw.get("num_nextn_predict_layers")
    if not isinstance(more, int) or not 0 < more < 100:
        return IGNORED
    beyond = (f"model.layers.{raw['num_hidden_layers'] + number}.{{any}}" for number in range(more))
    return (*IGNORED, *(Ignore(source, "multi-token prediction") for source in beyond))


def rules_for(family: str, config: DecoderConfig) -> tuple[Rule, ...]:
    """Every rule of a family's decoder. Where several share a target, the first whose tensors exist is used."""
    family = family.replace("-", "_")  # nllb-moe
    own = f"weights.families.{family}"
    if importlib.util.find_spec(own):
        rules: tuple[Rule, ...] = importlib.import_module(own).rules(config)
        return rules
    names: Mapping[str, str] = getattr(importlib.import_module(f"model.families.{family}"), "NAMES", {})
    return hugging_face(config, names)


def hugging_face(config: DecoderConfig, names: Mapping[str, str] | None = None) -> tuple[Rule, ...]:
    """The rules of the shared layout, with whole words replaced as in `names`; the shared names work as well."""
    shared = tuple(_decoder(config))
    if not names:
        return shared
    patterns = [(_whole_word(old), new) for old, new in names.items()]

    def name(source: str) -> str:
        for pattern, new in patterns:
            source = pattern.sub(new, source)
        return source

    return tuple(each for rule in shared for each in (renamed(rule, name), rule))


def _whole_word(word: str) -> re.Pattern[str]:
    return re.compile(rf"(?<!\w){re.escape(word)}(?!\w)")


def turned_experts(rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """The same rules for experts that are stored in one piece, [E, in, out]."""
    found: list[Rule] = []
    for rule in rules:
        if not rule.target.endswith((".ffn.gate_up", ".ffn.down")):
            found.append(rule)
        elif isinstance(rule, Copy):
            found.append(replace(rule, transposed=True))
    return tuple(found)


def _decoder(config: DecoderConfig) -> Iterator[Rule]:
    yield Copy("embed.weight", "model.embed_tokens.weight")
    if config.positions == "learned":
        yield Copy("embed_positions.weight", "model.embed_positions.weight")
    for number, (shape, ffn) in enumerate(zip(config.attention, config.feed_forward, strict=True)):
        ours, theirs = f"layers.{number}.", f"model.layers.{number}."
        yield from attention(shape, ours + "attention.", theirs)
        yield from norm(config, ours + "attention_norm", theirs + "input_layernorm")
        yield from norm(config, ours + "ffn_norm", theirs + "post_attention_layernorm")
        yield from feed_forward(ffn, config.width, ours + "ffn.", theirs + "mlp.")
    yield from norm(config, "norm", "model.norm")
    if not config.tied:
        yield Copy("head.weight", "lm_head.weight")
        if config.head_bias:
            yield Copy("head.bias", "lm_head.bias")


def norm(config: DecoderConfig, ours: str, theirs: str) -> Iterator[Rule]:
    """A norm around a layer's half."""
    for part in ["weight"] if config.norm == "rms" else ["weight", "bias"]:
        yield Copy(f"{ours}.{part}", f"{theirs}.{part}")


@singledispatch
def attention(shape: object, ours: str, theirs: str) -> Iterator[Rule]:
    """The rules of a layer's first half, by the kind of its shape; `theirs` is the layer.

    Raises:
        TypeError: the kind has no names here.
    """
    raise TypeError(f"there are no tensor names for layers of the kind {type(shape).__name__}")


@attention.register
def _attention(shape: Attention, ours: str, theirs: str) -> Iterator[Rule]:
    theirs += "self_attn."
    query, group = shape.heads * shape.head_width, shape.kv_heads * shape.head_width
    sizes = (query * 2 if shape.gated else query, group, group)
    for part in ["weight", "bias"] if shape.bias else ["weight"]:
        sources = tuple(f"{theirs}{name}_proj.{part}" for name in "qkv")
        yield Fuse(f"{ours}qkv.{part}", sources, sizes)
    for part in ["weight", "bias"] if shape.out_bias else ["weight"]:
        yield Copy(f"{ours}out.{part}", f"{theirs}o_proj.{part}")
    if shape.qk_norm in ("full", "head"):
        yield from (Copy(f"{ours}{name}_norm.weight", f"{theirs}{name}_norm.weight") for name in "qk")
    if shape.sinks:
        yield Copy(ours + "sinks", theirs + "sinks")


@attention.register
def _mla(shape: MLA, ours: str, theirs: str) -> Iterator[Rule]:
    theirs += "self_attn."
    names = {"query": "q_proj"}
    if shape.query_rank is not None:
        names = {"query_down": "q_a_proj", "query_norm": "q_a_layernorm", "query": "q_b_proj"}
    names |= {"down": "kv_a_proj_with_mqa", "norm": "kv_a_layernorm", "up": "kv_b_proj", "out": "o_proj"}
    for our, their in names.items():
        yield Copy(f"{ours}{our}.weight", f"{theirs}{their}.weight")
        if shape.bias and our in ("query_down", "down", "out"):
            yield Copy(f"{ours}{our}.bias", f"{theirs}{their}.bias")


@attention.register
def _gated_delta_net(shape: GatedDeltaNet, ours: str, theirs: str) -> Iterator[Rule]:
    names = {
        "project.weight": "in_proj_qkvz.weight",
        "rates.weight": "in_proj_ba.weight",
        "out.weight": "out_proj.weight",
    }
    names |= {
        "convolution": "conv1d.weight",
        "step_bias": "dt_bias",
        "log_decay": "A_log",
        "norm.weight": "norm.weight",
    }
    for our, their in names.items():
        yield Copy(ours + our, f"{theirs}linear_attn.{their}")


@singledispatch
def feed_forward(shape: object, width: int, ours: str, theirs: str) -> Iterator[Rule]:
    """The rules of a layer's feed-forward part, by the kind of its shape.

    Raises:
        TypeError: the kind has no names here.
    """
    raise TypeError(f"there are no tensor names for layers of the kind {type(shape).__name__}")


@feed_forward.register
def _dense(shape: Dense, width: int, ours: str, theirs: str) -> Iterator[Rule]:
    return dense(shape, ours, theirs)


def dense(ffn: Dense, ours: str, theirs: str) -> Iterator[Rule]:
    """An ordinary feed-forward layer."""
    for part in ["weight", "bias"] if ffn.bias else ["weight"]:
        if ffn.gated:
            halves = (f"{theirs}gate_proj.{part}", f"{theirs}up_proj.{part}")
            yield Fuse(f"{ours}up.{part}", halves, (ffn.width, ffn.width))
        else:
            yield Copy(f"{ours}up.{part}", f"{theirs}up_proj.{part}")
        yield Copy(f"{ours}down.{part}", f"{theirs}down_proj.{part}")


@feed_forward.register
def _infinity(shape: Infinity, width: int, ours: str, theirs: str) -> Iterator[Rule]:
    names = {"router": "router", "scores": "mask_scores", "up": "up_proj", "down": "down_proj"}
    for our, their in names.items():
        yield Copy(ours + our, f"{theirs}{their}.weight")


@feed_forward.register
def _topk(ffn: TopK, width: int, ours: str, theirs: str) -> Iterator[Rule]:
    yield Copy(ours + "router", theirs + "gate.weight")
    if ffn.router.logit_bias:
        yield Copy(ours + "router_bias", theirs + "gate.bias")
    if ffn.router.selection_bias:
        yield Copy(ours + "selection_bias", theirs + "gate.e_score_correction_bias")
    if ffn.router.score == "top_any":
        yield Copy(ours + "temperature", theirs + "gate.temperature")
        yield Copy(ours + "thresholds", theirs + "gate.thresholds")
    expert = theirs + "experts.{e}."
    halves = (expert + "gate_proj.weight", expert + "up_proj.weight")
    yield Stack(ours + "gate_up", halves, (ffn.width, ffn.width), ffn.experts)
    yield Copy(ours + "gate_up", theirs + "experts.gate_up_proj")
    yield Stack(ours + "down", (expert + "down_proj.weight",), (width,), ffn.experts)
    yield Copy(ours + "down", theirs + "experts.down_proj")
    if ffn.bias:
        yield Copy(ours + "gate_up_bias", theirs + "experts.gate_up_proj_bias")
        yield Copy(ours + "down_bias", theirs + "experts.down_proj_bias")
    if ffn.shared is not None:
        yield from dense(ffn.shared, ours + "shared.", theirs + "shared_experts.")
    if ffn.shared_gate:
        yield Copy(ours + "shared_gate.weight", theirs + "shared_expert_gate.weight")


@feed_forward.register
def _moe_plus_plus(ffn: MoEPlusPlus, width: int, ours: str, theirs: str) -> Iterator[Rule]:
    yield from _topk(ffn, width, ours, theirs)
    if ffn.residual:
        yield Copy(ours + "residual", theirs + "gate.residual.weight")
    if ffn.constant:
        yield Copy(ours + "constants", theirs + "constants.value")
        yield Copy(ours + "constant_mix", theirs + "constants.mix")
