"""From a model folder to a decoder that is ready to run. Every tensor and every parameter is accounted for.

Peak memory is the model in its run-time dtype plus one tensor. It knows folders and families, not requests.
"""

import importlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from model.config import DecoderConfig
from model.decoder import Decoder
from model.errors import CheckpointError
from model.reading import Fields
from weights.files import TensorFiles
from weights.folder import read_json
from weights.names import IGNORED, rules_for
from weights.rules import Piece, Rule

DType = Literal["auto", "float32", "bfloat16"]
STORED = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def read_config(folder: Path) -> tuple[DecoderConfig, dict[str, Any]]:
    """The decoder's shape and the raw config.json.

    Raises:
        CheckpointError: see `decoder_config`.
    """
    raw = read_json(folder / "config.json")
    return decoder_config(raw), raw


def decoder_config(raw: Mapping[str, Any]) -> DecoderConfig:
    """The decoder that a config.json describes.

    Raises:
        CheckpointError: unknown family, remote code asked for, a field that is missing, unknown or cannot be served.
    """
    if "auto_map" in raw:
        raise CheckpointError("config.json asks for remote code (auto_map); moedial runs none")
    name = raw.get("model_type")
    if not isinstance(name, str) or not re.fullmatch(r"[a-z0-9_]{1,64}", name):
        raise CheckpointError(f"config.json: model_type is {name!r:.80}, not the name of a family")
    if name not in families():
        raise CheckpointError(f"config.json: family {name!r} is not supported; known: {', '.join(families())}")
    family = importlib.import_module(f"model.families.{name}")
    try:
        config: DecoderConfig = family.decoder_config(Fields(raw))
        return config
    except KeyError as error:
        raise CheckpointError(f"config.json: field {error.args[0]!r} is missing for {name}") from None
    except (ValueError, TypeError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(f"config.json: {error}") from None


def families() -> list[str]:
    """The `model_type`s that can be loaded: the files of model/families."""
    import model.families

    return sorted(p.stem for root in model.families.__path__ for p in Path(root).glob("*.py") if p.stem != "__init__")


def load_model(folder: Path, dtype: DType = "auto") -> tuple[Decoder, dict[str, Any]]:
    """A decoder with the folder's weights, in eval mode, and the raw config.

    Args:
        dtype: the run-time dtype; "auto" is the checkpoint's own (float16 becomes bfloat16).
    """
    config, raw = read_config(folder)
    chosen = run_dtype(raw, dtype)
    with torch.device("meta"):
        model = Decoder(config).to(chosen)
    model.to_empty(device="cpu")
    with TensorFiles(folder) as files, torch.no_grad():
        fill(model, rules_for(raw["model_type"], config), files)
    return model.eval().requires_grad_(False), raw


def run_dtype(raw: Mapping[str, Any], dtype: DType) -> torch.dtype:
    """What "auto" means for this config."""
    if dtype != "auto":
        return STORED[dtype]
    stored = STORED.get(str(raw.get("dtype", raw.get("torch_dtype", "float32"))).removeprefix("torch."), torch.float32)
    return torch.bfloat16 if stored is torch.float16 else stored


def fill(model: nn.Module, rules: tuple[Rule, ...], files: TensorFiles) -> None:
    """Pull every parameter through its rule.

    Raises:
        CheckpointError: names every missing, extra and misshapen tensor at once.
    """
    plan, faults = _choose(model, rules, files.files), []
    used: set[str] = set()
    for target, pieces in plan.items():
        parameter = model.get_parameter(target)
        for piece in pieces:
            if piece.source not in files.files:
                faults.append(f"missing {piece.source}")
                continue
            used.add(piece.source)
            fault = _put(files.read(piece.source), piece, parameter)
            faults += [fault] if fault else []
    faults += [f"extra {name}" for name in sorted(files.files.keys() - used) if not _ignored(name, plan)]
    if faults:
        more = f"; and {len(faults) - 20} more" if len(faults) > 20 else ""
        raise CheckpointError("the tensors do not fit the config: " + "; ".join(faults[:20]) + more)


def _put(tensor: Tensor, piece: Piece, parameter: Tensor) -> str:
    """Copy one tensor into its part; what is wrong with it, if anything is."""
    part = parameter[piece.index]
    try:
        taken = piece.taken(tensor)
    except ValueError as error:
        return str(error)
    if taken.shape != part.shape:
        wanted = tuple(part.transpose(-1, -2).shape if piece.transposed else part.shape)
        return f"{piece.source} has shape {tuple(tensor.shape)}, not {wanted}"
    part.copy_(taken)
    return ""


def _choose(model: nn.Module, rules: tuple[Rule, ...], names: Mapping[str, str]) -> dict[str, tuple[Piece, ...]]:
    """One rule per parameter: the first whose first tensor exists, else the first, so that its absence is named."""
    plan: dict[str, tuple[Piece, ...]] = {}
    for rule in rules:
        pieces = rule.pieces()
        if rule.target not in plan or (plan[rule.target][0].source not in names and pieces[0].source in names):
            plan[rule.target] = pieces
    unruled = {name for name, _ in model.named_parameters()} - plan.keys()
    if unruled:
        raise CheckpointError(f"no rule fills {', '.join(sorted(unruled))}")
    return plan


def _ignored(name: str, plan: Mapping[str, object]) -> bool:
    """Whether a rule says that nobody needs this tensor: a tied head that is stored all the same, for one."""
    if name == "lm_head.weight":
        return "head.weight" not in plan
    patterns = (re.escape(rule.source).replace(r"\{l\}", r"\d+") for rule in IGNORED)
    return any(re.fullmatch(pattern, name) for pattern in patterns)
