"""Extraction: a smaller checkpoint that has only the experts of an expert set, and loads as an ordinary one.

Its router scores these experts alone: where scores are a softmax they are shares among those that are left, as if the
logits of all others were minus infinity. Not here: how a set is chosen or stored.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from model.decoder import Decoder
from model.errors import CheckpointError
from model.shapes.decoder import DecoderConfig
from model.shapes.mixtures import TopK
from weights.config import decoder_config, read_config
from weights.expert_sets import ExpertSet
from weights.folder import SINGLE
from weights.load import empty_model, load_model
from weights.open_tensors import open_tensors
from weights.save import tensors
from weights.small_files import texts_of, write_texts
from weights.source import TensorSource

EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")  # of config.json
WIDE = (torch.float32, torch.bfloat16, torch.float16)  # what is written; anything else is quantised


def check_model(config: DecoderConfig) -> None:
    """That experts of this model can be left out.

    Raises:
        CheckpointError: they cannot.
    """
    if config.set_refusal:
        raise CheckpointError(f"this model has no expert sets: {config.set_refusal}")


def check_count(config: DecoderConfig, kept: int) -> None:
    """Check that `kept` experts of each layer can be kept.

    Raises:
        CheckpointError: more than there are, or fewer than a token runs.
    """
    experts, trained = config.mixtures[0].num_experts, config.experts.trained
    if not trained <= kept <= experts:
        raise CheckpointError(
            f"{kept} experts of a layer cannot be kept: a token runs {trained} (the trained count) of {experts}"
        )


def restricted(
    model: Decoder, raw: Mapping[str, Any], experts: Sequence[Sequence[int]]
) -> tuple[Decoder, dict[str, Any]]:
    """A decoder that has only these experts of each MoE layer, and its config.json.

    Raises:
        CheckpointError: the model cannot be restricted, or not to these.
    """
    check_model(model.config)
    kept = len(experts[0])
    check_count(model.config, kept)
    if len(experts) != len(model.config.mixtures):
        raise CheckpointError(f"experts of {len(experts)} layers are given, but {len(model.config.mixtures)} have some")
    smaller = _restricted_config(raw, model.config, kept)
    small = empty_model(decoder_config(smaller), torch.float32).to_empty(device="cpu")
    of_layer = {
        f"layers.{number}.ffn.": torch.tensor(experts[moe_layer])
        for moe_layer, number in enumerate(_moe_layers(model.config))
    }
    with torch.no_grad():
        for name, target in small.named_parameters():
            source = model.get_parameter(name)
            if source.shape == target.shape:
                target.copy_(source)
            else:  # one entry for each expert
                prefix = name[: name.index(".ffn.") + len(".ffn.")]
                target.copy_(source[of_layer[prefix]])
    return small.eval().requires_grad_(False), smaller


def extract(model: Path, found: ExpertSet, out: Path) -> None:
    """Write the checkpoint at `model` to `out`, a new or an empty folder, with the experts of the set alone.

    Raises:
        CheckpointError: the set does not fit the model, or there is something in `out`.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} exists; extract writes to a new folder")
    config, raw = read_config(model)
    check_model(config)
    if found.num_experts != (experts := config.mixtures[0].num_experts):
        raise CheckpointError(f"expert set {found.name!r} is of {found.num_experts} experts, the model has {experts}")
    texts = texts_of(model)
    small, smaller = restricted(*load_model(model, "float32"), found.experts)
    out.mkdir(parents=True, exist_ok=True)
    write_texts(texts, out)
    (out / "config.json").write_text(json.dumps(smaller, indent=2) + "\n")
    with open_tensors(model, raw) as source:
        written = _as_stored(tensors(small, smaller["model_type"]), source)
    save_file(written, out / SINGLE, metadata={"format": "pt"})
    (out / SINGLE).chmod(0o644)  # the library writes for the owner alone


def _as_stored(written: Mapping[str, Tensor], source: TensorSource) -> dict[str, Tensor]:
    """Tensors in the number format that the checkpoint has those of their names in; where it has none of this name, or
    a quantised one, in the format of most bytes of the others."""
    stored: dict[str, torch.dtype] = {}
    size: Counter[torch.dtype] = Counter()
    for name, each in source.stored.items():
        if each.dtype in WIDE and not each.grouped:
            stored[name] = each.dtype
            size[each.dtype] += each.bytes
    other = max(size, key=size.__getitem__, default=torch.bfloat16)
    return {name: tensor.to(stored.get(name, other)).clone() for name, tensor in written.items()}


def _moe_layers(config: DecoderConfig) -> list[int]:
    return [number for number, shape in enumerate(config.feed_forward) if shape.num_experts]


def _restricted_config(raw: Mapping[str, Any], config: DecoderConfig, kept: int) -> dict[str, Any]:
    """config.json with `kept` experts, under the key that the family reads, and unquantised."""
    wanted = tuple(replace(s, experts=kept) if isinstance(s, TopK) else s for s in config.feed_forward)
    unquantised = {key: value for key, value in raw.items() if key != "quantization_config"}
    text = unquantised.get("text_config", unquantised)  # where a family has its decoder's keys
    present = {key: kept for key in EXPERT_KEYS if key in text}
    for changes in (present, *({key: kept} for key in EXPERT_KEYS)):
        found = unquantised | ({"text_config": text | changes} if "text_config" in raw else changes)
        try:
            if decoder_config(found) == replace(config, feed_forward=wanted):
                return found
        except CheckpointError:  # a key that the family does not know
            continue
    raise CheckpointError(f"config.json: no field of family {raw['model_type']!r} says how many experts a layer has")
