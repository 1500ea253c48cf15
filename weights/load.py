"""From a model folder to a decoder that is ready to run. Every tensor and every parameter is accounted for.

Peak memory is the model in its run-time dtype plus one tensor. It knows folders and families, not requests.
"""

import importlib
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model.config_reader import ConfigReader, check_numbers
from model.decoder import Decoder
from model.errors import CheckpointError
from model.options import DType
from model.shapes.decoder import DecoderConfig
from weights.dequantise import Tensors
from weights.files import TensorFiles
from weights.folder import read_json
from weights.memory import check_memory, take_memory
from weights.names import ignored, rules_for
from weights.rules import Ignore, Piece, Rule

Progress = Callable[[int, int], None]
Plan = dict[str, tuple[Piece, ...]]  # what each parameter is filled from
STORED = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def nobody(done: int, total: int) -> None:
    """Progress that is not shown."""


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
        raise CheckpointError(
            "config.json asks for remote code (auto_map); moedial runs none. If you trust that its own code for this"
            " model_type is what you want, take auto_map out of the file"
        )
    name = raw.get("model_type")
    if not isinstance(name, str) or not re.fullmatch(r"[a-z0-9_]{1,64}", name):
        raise CheckpointError(f"config.json: model_type is {name!r:.80}, not the name of a family")
    if name not in families():
        raise CheckpointError(f"config.json: family {name!r} is not supported; known: {', '.join(families())}")
    family = importlib.import_module(f"model.families.{name}")
    try:
        check_numbers(raw)
        config: DecoderConfig = family.decoder_config(ConfigReader(raw))
        return config
    except KeyError as error:
        raise CheckpointError(f"config.json: field {error.args[0]!r} is missing for {name}") from None
    except (ValueError, TypeError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(f"config.json: {error}") from None


def families() -> list[str]:
    """The `model_type`s that can be loaded: the files of model/families."""
    import model.families

    return sorted(p.stem for root in model.families.__path__ for p in Path(root).glob("*.py") if p.stem != "__init__")


def load_model(folder: Path, dtype: DType = "auto", progress: Progress = nobody) -> tuple[Decoder, dict[str, Any]]:
    """A decoder with the folder's weights, in eval mode, and the raw config.

    Args:
        dtype: the run-time dtype; "auto" is the checkpoint's own (float16 becomes bfloat16).
        progress: is told the bytes read so far, and of all tensors.

    Raises:
        CheckpointError: it is damaged, does not fit its config, or does not fit the memory.
    """
    config, raw = read_config(folder)
    model = empty_model(config, run_dtype(raw, dtype))
    check_memory(model)
    with TensorFiles(folder) as files, torch.no_grad():
        tensors = Tensors(files, raw.get("quantization_config"))
        plan = _choose(model, rules_for(raw["model_type"], config), tensors.stored)
        _refuse(_misfits(model, plan, tensors, ignored(raw)))
        take_memory(model)
        _refuse(_fill(model, plan, tensors, progress))
    return model.eval().requires_grad_(False), raw


def empty_model(config: DecoderConfig, dtype: torch.dtype) -> Decoder:
    """The decoder without memory. What decides between experts by tiny differences stays float32.

    Raises:
        CheckpointError: a matrix of it has more elements than can be counted.
    """
    with torch.device("meta"):
        try:
            model = Decoder(config).to(dtype)
        except (RuntimeError, OverflowError) as error:
            raise CheckpointError(f"config.json: no decoder of these sizes can be made: {error}") from None
        for name, parameter in model.named_parameters():
            if name.endswith("selection_bias"):
                parameter.data = parameter.data.float()
    return model


def run_dtype(raw: Mapping[str, Any], dtype: DType) -> torch.dtype:
    """What "auto" means for this config."""
    if dtype != "auto":
        return STORED[dtype]
    stored = STORED.get(str(raw.get("dtype", raw.get("torch_dtype", "float32"))).removeprefix("torch."), torch.float32)
    return torch.bfloat16 if stored is torch.float16 else stored


def _refuse(faults: list[str]) -> None:
    if faults:
        more = f"; and {len(faults) - 20} more" if len(faults) > 20 else ""
        raise CheckpointError("the tensors do not fit the config: " + "; ".join(faults[:20]) + more)


def _misfits(model: nn.Module, plan: Plan, files: Tensors, unneeded: tuple[Ignore, ...]) -> list[str]:
    """Every missing, extra or misshapen tensor: known from the files' headers, before memory is taken."""
    used = {piece.source for pieces in plan.values() for piece in pieces}
    faults = [f"missing {name}" for name in sorted(used - files.stored.keys())]
    faults += [f"extra {name}" for name in sorted(files.stored.keys() - used) if not _ignored(name, plan, unneeded)]
    for target, pieces in plan.items():
        parameter = model.get_parameter(target)
        for piece in pieces:
            if piece.source in files.stored:
                shape = files.stored[piece.source].shape
                faults += filter(None, [piece.misfit(shape, parameter[piece.index].shape)])
    return faults


def _fill(model: nn.Module, plan: Plan, files: Tensors, progress: Progress) -> list[str]:
    """Pull every parameter through its rule; the tensors that are broken."""
    faults: list[str] = []
    done, total = 0, sum(files.stored[piece.source].bytes for pieces in plan.values() for piece in pieces)
    for target, pieces in plan.items():
        parameter = model.get_parameter(target)
        for piece in pieces:
            if not _put(files, piece, parameter[piece.index]):
                faults.append(f"{piece.source} has values that are not finite")
            done += files.stored[piece.source].bytes
            progress(done, total)
    return faults


def _put(files: Tensors, piece: Piece, part: Tensor) -> bool:
    """Copy one tensor into its part; whether all its values are finite."""
    if files.stored[piece.source].dtype == part.dtype and part.is_contiguous() and not piece.transposed:
        files.read_into(piece.source, part)
    else:
        part.copy_(piece.taken(files.read(piece.source)))
    # The least and the greatest of a tensor are NaN where one of its values is: one pass at the speed of memory.
    bounds = torch.stack(torch.aminmax(part)) if part.numel() else torch.zeros(1)
    return bool(bounds.isfinite().all())


def _choose(model: nn.Module, rules: tuple[Rule, ...], names: Mapping[str, object]) -> Plan:
    """One rule per parameter: the first whose first tensor exists, else the first, so that its absence is named."""
    plan: Plan = {}
    for rule in rules:
        pieces = rule.pieces()
        if rule.target not in plan or (plan[rule.target][0].source not in names and pieces[0].source in names):
            plan[rule.target] = pieces
    unruled = {name for name, _ in model.named_parameters()} - plan.keys()
    if unruled:
        raise CheckpointError(f"no rule fills {', '.join(sorted(unruled))}")
    return plan


def _ignored(name: str, plan: Mapping[str, object], unneeded: tuple[Ignore, ...]) -> bool:
    """Whether a rule says that nobody needs this tensor: a tied head that is stored all the same, for one."""
    if name == "lm_head.weight":
        return "head.weight" not in plan
    patterns = (re.escape(rule.source).replace(r"\{l\}", r"\d+").replace(r"\{any\}", ".+") for rule in unneeded)
    return any(re.fullmatch(pattern, name) for pattern in patterns)
