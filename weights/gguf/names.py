"""Which tensors of a GGUF file are which of Hugging Face's shared layout (`weights/names.py`).

llama.cpp's names do not depend on the family, but for a few; what it stores otherwise than the checkpoint is undone
here: one piece for all experts, rotary rows as neighbours, gates apart from values, MLA's keys apart from its values,
and what it computes of Qwen3-Next.
"""

import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from model.errors import CheckpointError, shown
from weights.gguf.parts import GateAndUp, KeysAndValues, Part, Reordered, Whole
from weights.gguf.reader import GgufFile

OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "post_attention_norm": "post_attention_layernorm",  # gpt-oss, GLM-4.5
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_q_a": "self_attn.q_a_proj",
    "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_q_b": "self_attn.q_b_proj",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "attn_kv_b": "self_attn.kv_b_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_experts.gate_proj",
    "ffn_up_shexp": "mlp.shared_experts.up_proj",
    "ffn_down_shexp": "mlp.shared_experts.down_proj",
}
WHOLE = {  # with an ending of their own
    "attn_sinks.weight": "self_attn.sinks",
    "exp_probs_b.bias": "mlp.gate.e_score_correction_bias",
    "exp_probs_b": "mlp.gate.e_score_correction_bias",
    "ffn_gate_up_exps.weight": "mlp.experts.gate_up_proj",
}
COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")  # of experts, by the family
EXPERTS = {"ffn_gate_exps": "gate_proj", "ffn_up_exps": "up_proj", "ffn_down_exps": "down_proj"}
DELTA = {  # of Qwen3-Next's delta layers
    "ssm_in.weight": "in_proj_qkvz.weight",  # in files of 2025
    "ssm_ba.weight": "in_proj_ba.weight",
    "ssm_conv1d.weight": "conv1d.weight",
    "ssm_dt.bias": "dt_bias",
    "ssm_a": "A_log",
    "ssm_norm.weight": "norm.weight",
    "ssm_out.weight": "out_proj.weight",
}
TURNED = ("gpt_oss", "llama4_text")  # families whose rules want experts [E, in, out]
ROPE = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")  # they are in the config

GPT2_OUTSIDE = {"token_embd": "transformer.wte", "position_embd": "transformer.wpe", "output_norm": "transformer.ln_f"}
GPT2_LAYER = {
    "attn_norm": "ln_1",
    "ffn_norm": "ln_2",
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}
GPT2_TURNED = ("attn_qkv.weight", "attn_output.weight", "ffn_up.weight", "ffn_down.weight")
_IN_LAYER = re.compile(r"blk\.(\d{1,6})\.(.+)")
_ONE_EXPERT = re.compile(r"ffn_(gate|up|down)\.(\d{1,6})\.weight")  # Mixtral files of 2023


def tensor_parts(file: GgufFile, raw: Mapping[str, Any]) -> dict[str, Part]:
    """Every tensor of the file by its name in the rules of the family; what has none keeps the file's, so that it is
    reported. `raw`: the config of the file.

    Raises:
        CheckpointError: a tensor with several parts in one has not their rows.
    """
    if raw["model_type"] == "gpt2":
        return dict(_gpt2(file))
    found: dict[str, Part] = {}
    for name in file.tensors:
        if name in ROPE:
            continue
        match = _IN_LAYER.fullmatch(name)
        if match is None:
            lifted = raw["model_type"] == "qwen3_next" and name == "output_norm.weight"
            found[_renamed(name, OUTSIDE)] = Whole(name, change=_minus_one if lifted else None)
        else:
            prefix, own = f"model.layers.{int(match[1])}.", match[2]
            found |= {prefix + theirs: part for theirs, part in _in_layer(file, raw, name, own)}
    return found


def _renamed(name: str, table: Mapping[str, str]) -> str:
    """With the part before its last dot replaced."""
    stem, dot, ending = name.rpartition(".")
    return table.get(stem, stem) + dot + ending


def _in_layer(file: GgufFile, raw: Mapping[str, Any], name: str, own: str) -> Iterator[tuple[str, Part]]:
    """The tensors of a layer that the file's tensor `name` is, or is the first part of; `own` is it in the layer."""
    stem, _, ending = own.rpartition(".")
    shape = file.tensors[name].shape
    if own in WHOLE:
        yield WHOLE[own], Whole(name, shape=shape[-1:] if "exp_probs_b" in own else None)
    elif stem in EXPERTS and raw["model_type"] in TURNED:
        yield from _turned_experts(name, stem, ending, file, interleaved=raw["model_type"] == "gpt_oss")
    elif raw["model_type"] == "qwen3_next" and (part := _qwen3_next(raw, file, name, own)) is not None:
        yield from part
    elif stem in EXPERTS and ending == "weight" and len(shape) == 3 and shape[0] == _experts(raw):
        yield from ((f"mlp.experts.{e}.{EXPERTS[stem]}.weight", Whole(name, e)) for e in range(shape[0]))
    elif match := _ONE_EXPERT.fullmatch(own):
        yield f"mlp.experts.{int(match[2])}.{match[1]}_proj.weight", Whole(name)
    elif own in ("attn_k_b.weight", "attn_v_b.weight"):
        keys, values = (re.sub("attn_[kv]_b", each, name) for each in ("attn_k_b", "attn_v_b"))
        if keys in file.tensors and values in file.tensors:
            yield "self_attn.kv_b_proj.weight", KeysAndValues(Whole(keys), Whole(values))
    elif stem == "attn_qkv":
        yield from _fused(raw, file, name, ending)
    elif own == "ffn_gate_inp_shexp.weight":
        yield _renamed(own, LAYER), Whole(name, shape=(1, shape[-1]))
    else:
        yield _renamed(own, LAYER), Whole(name, heads=_paired_heads(raw, stem))


def _experts(raw: Mapping[str, Any]) -> Any:
    """How many the config states, or None."""
    return next((raw[key] for key in COUNTS if key in raw), None)


def _paired_heads(raw: Mapping[str, Any], stem: str) -> int:
    """The heads whose rotary rows the converter has made neighbours: in the families that it counts as Llama."""
    if raw["model_type"] in ("llama", "mixtral", "granitemoe", "granitemoeshared"):
        if stem == "attn_q":
            return int(raw["num_attention_heads"])
        if stem == "attn_k":
            return int(raw.get("num_key_value_heads") or raw["num_attention_heads"])
    return 0


def _fused(raw: Mapping[str, Any], file: GgufFile, name: str, ending: str) -> Iterator[tuple[str, Part]]:
    """Queries, keys and values in one, which the converter writes where it is asked to."""
    width = raw.get("head_dim") or 0
    queries, groups = raw["num_attention_heads"], raw.get("num_key_value_heads") or raw["num_attention_heads"]
    _check_rows(file, (name,), (queries + 2 * groups) * width, "queries, keys and values")
    start = 0
    for part, heads in (("q", queries), ("k", groups), ("v", groups)):
        rows = range(start, start + heads * width)
        paired = _paired_heads(raw, f"attn_{part}")
        yield f"self_attn.{part}_proj.{ending}", Whole(name, heads=paired, rows=rows)
        start = rows.stop


def _check_rows(file: GgufFile, names: tuple[str, ...], wanted: int, what: str) -> None:
    """Raise CheckpointError unless the tensors have `wanted` rows together, those of `what`."""
    rows = sum(file.tensors[name].shape[0] for name in names)
    if rows != wanted:
        listed = " and ".join(map(shown, names))
        raise CheckpointError(f"{file.paths[0].name}: {listed} has {rows} rows, but {what} have {wanted}")


def _turned_experts(
    name: str, stem: str, ending: str, file: GgufFile, *, interleaved: bool
) -> Iterator[tuple[str, Part]]:
    """Experts that the rules want [experts, in, out], gates and values in one."""
    theirs, turned = ("", True) if ending == "weight" else ("_bias", False)
    if stem == "ffn_down_exps":
        yield f"mlp.experts.down_proj{theirs}", Whole(name, transposed=turned)
    up = name.replace(stem, "ffn_up_exps")
    if stem == "ffn_gate_exps" and up in file.tensors:
        pair = Whole(name, transposed=turned), Whole(up, transposed=turned)
        yield f"mlp.experts.gate_up_proj{theirs}", GateAndUp(*pair, interleaved)


def _qwen3_next(raw: Mapping[str, Any], file: GgufFile, name: str, own: str) -> list[tuple[str, Part]] | None:
    """What the converter changes of Qwen3-Next: norms have 1 added, decays are e to them and negative, and the delta
    layers' projections are sorted by part before they are by head."""
    stem = own.rpartition(".")[0]
    shape = file.tensors[name].shape
    if own in DELTA:
        theirs = f"linear_attn.{DELTA[own]}"
        if own == "ssm_a":
            return [(theirs, Whole(name, change=lambda values: (-values).log()))]
        if own == "ssm_conv1d.weight":
            return [(theirs, Whole(name, shape=(shape[0], 1, shape[-1])))]
        return [(theirs, Whole(name))]
    gate = name.replace("attn_qkv", "attn_gate")
    if own == "attn_qkv.weight" and gate in file.tensors:
        return [("linear_attn.in_proj_qkvz.weight", _queries_keys_values_gates(raw, file, name, gate))]
    if own == "attn_gate.weight":
        return []
    if stem.endswith("norm"):
        return [(_renamed(own, LAYER), Whole(name, change=_minus_one))]
    return None


def _minus_one(values: Tensor) -> Tensor:
    return values - 1


def _queries_keys_values_gates(raw: Mapping[str, Any], file: GgufFile, name: str, gate: str) -> Reordered:
    heads, width = raw["linear_num_key_heads"], raw["linear_key_head_dim"]
    values = raw["linear_num_value_heads"] * raw["linear_value_head_dim"]
    _check_rows(file, (name, gate), 2 * (heads * width + values), "queries, keys, values and gates")
    return Reordered(Whole(name), Whole(gate), _by_head(heads, width, values // heads))


@lru_cache(maxsize=1)
def _by_head(heads: int, width: int, values: int) -> Tensor:
    """For each key head its rows of queries, keys, values and gates, among those of all heads' queries, of all keys and
    so on."""
    rows, start = [], 0
    for size in (width, width, values, values):
        rows.append(torch.arange(start, start + heads * size).view(heads, size))
        start += heads * size
    return torch.cat(rows, dim=1).flatten()


def _gpt2(file: GgufFile) -> Iterator[tuple[str, Part]]:
    for name in file.tensors:
        match = _IN_LAYER.fullmatch(name)
        if match is None:
            yield _renamed(name, GPT2_OUTSIDE | {"output": "lm_head"}), Whole(name)
        else:
            turned = match[2] in GPT2_TURNED
            yield f"transformer.h.{int(match[1])}.{_renamed(match[2], GPT2_LAYER)}", Whole(name, transposed=turned)
