"""Loads a model into a decoder that is ready to run. Every tensor and every parameter is accounted for.

Peak memory is the model, as it runs, plus one tensor, or one parameter that stays quantised. It depends on names and
families, not on requests.
"""

import logging
import re
from collections.abc import Callable, Container, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model.decoder import Decoder
from model.devices import CPU
from model.encoder_decoder import decoder_of
from model.errors import CheckpointError
from model.grouped import Grouped
from model.options import DType
from model.ranks.share import Share
from model.shapes.decoder import DecoderConfig
from weights.config import read_config
from weights.files import Stored
from weights.groups import KeepGroups, finite, joined, keepable, kept_as, replace_parameter
from weights.memory import check_free, check_memory, take_memory
from weights.names import ignored, rules_for
from weights.open_tensors import open_tensors
from weights.rules import Ignore, Rule, TensorPart
from weights.share import FillPlan, narrowed
from weights.source import TensorSource

log = logging.getLogger(__name__)
ProgressCallback = Callable[[int, int], None]
STORED = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def no_progress(done: int, total: int) -> None:
    """A progress callback that shows nothing."""


def load_model(
    path: Path,
    dtype: DType = "auto",
    progress: ProgressCallback = no_progress,
    device: str = CPU,
    share: Share | None = None,
    keep_groups: KeepGroups | None = None,
) -> tuple[Decoder, dict[str, Any]]:
    """A decoder with the weights of a folder or a GGUF file, in eval mode, and the raw config.

    Args:
        dtype: the run-time dtype; "auto" is the checkpoint's own (float16 becomes bfloat16).
        progress: called with the bytes read so far and the bytes of all tensors.
        device: where the weights go, one tensor after another.
        share: the part of one rank; None: all.
        keep_groups: names the parameters (of the empty decoder) that become `Grouped` if they are stored quantised.

    Raises:
        CheckpointError: it is damaged, does not fit its config, or does not fit the memory.
    """
    config, raw = read_config(path)
    model = empty_model(config, run_dtype(raw, dtype))
    names = keep_groups(model) if keep_groups and device == CPU else ()
    if share is None:
        check_memory(model, device, {name: model.get_parameter(name).numel() // 2 for name in names})
    with open_tensors(path, raw) as tensors, torch.no_grad():
        plan = _plan(model, rules_for(raw["model_type"], config), tensors.stored)
        _refuse(_find_faults(model, plan, tensors, ignored(raw)))
        if share is not None:
            plan = narrowed(model, plan, share)
        kept = keepable(plan, tensors, names)
        check_memory(model, device, kept)
        take_memory(model, [name for name in plan if name not in kept], device)
        copies = ignored(raw) if share is None or share.rank == 0 else ()
        _refuse([*_fill(model, plan, tensors, kept, progress), *_wrong_copies(model, plan, tensors, copies)])
    if forms := kept_as(model):
        log.info("quantised weights stay as they are stored: %s", forms)
    return model.eval().requires_grad_(False), raw


def empty_model(config: DecoderConfig, dtype: torch.dtype) -> Decoder:
    """The decoder on the meta device. Selection biases stay float32: tiny differences decide between experts.

    Raises:
        CheckpointError: a matrix of it has more elements than can be counted.
    """
    with torch.device("meta"):
        try:
            model = decoder_of(config).to(dtype)
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
    name = raw.get("dtype", raw.get("torch_dtype", "float32"))
    stored = STORED.get(str(name).removeprefix("torch."), torch.float32)
    return torch.bfloat16 if stored is torch.float16 else stored


def _refuse(faults: list[str]) -> None:
    if faults:
        more = f"; and {len(faults) - 20} more" if len(faults) > 20 else ""
        raise CheckpointError("the tensors do not fit the config: " + "; ".join(faults[:20]) + more)


def _find_faults(model: nn.Module, plan: FillPlan, files: TensorSource, ignorable: tuple[Ignore, ...]) -> list[str]:
    """Every missing, extra or misshapen tensor: found in the files' headers before memory is allocated."""
    used = {part.source for parts in plan.values() for part in parts}
    faults = [f"missing {name}" for name in sorted(used - files.stored.keys())]
    unused = sorted(files.stored.keys() - used)
    extra = [name for name in unused if not _ignored(name, plan, ignorable)]
    biases = dict.fromkeys(name for name in extra if _is_bias(name, used, files))
    faults += [f"extra {name}" for name in extra if name not in biases]
    for target, parts in plan.items():
        parameter = model.get_parameter(target)
        for part in parts:
            if part.source in files.stored:
                shape = files.stored[part.source].shape
                faults += filter(None, [part.shape_error(shape, parameter[part.index].shape)])
    # Read only where the matrices have the sizes of the config: so have their biases.
    return faults or [f"extra {name}" for name in biases if files.read(name).any()]


def _fill(
    model: nn.Module, plan: FillPlan, files: TensorSource, kept: Mapping[str, int], progress: ProgressCallback
) -> list[str]:
    """Fill every parameter by its rule, those in `kept` with `Grouped` if that holds their values. Returns the faults
    of tensors."""
    faults: list[str] = []
    sizes = {target: kept.get(target, model.get_parameter(target).nbytes) for target in plan}
    done, left = 0, sum(sizes.values())  # bytes that are read, and of memory that is still to be filled
    sources = [part.source for parts in plan.values() for part in parts]
    total = sum(_bytes(files.stored[source]) for source in sources)
    for target, parts in plan.items():
        left -= sizes[target]
        grouped = _grouped(model, target, parts, files) if target in kept else None
        if grouped is not None:
            replace_parameter(model, target, grouped)
            if grouped.nbytes > sizes[target]:
                check_free(left, f"the weights after {target}, which has zero points despite sym: true,")
        elif target in kept:
            _widen(model, target, left)
        parameter = model.get_parameter(target) if grouped is None else None
        for part in parts:
            if parameter is not None and not _copy_tensor(files, part, parameter[part.index]):
                faults.append(f"{part.source} has values that are not finite")
            done += _bytes(files.stored[part.source])
            progress(done, total)
    return faults


def _bytes(stored: Stored) -> int:
    """The bytes that are read of a stored tensor."""
    return stored.grouped or stored.bytes


def _grouped(model: nn.Module, target: str, parts: tuple[TensorPart, ...], files: TensorSource) -> Grouped | None:
    """The quantised form of a parameter; None if it does not hold the parameter's values.

    Raises:
        CheckpointError: a value is not finite.
    """
    found: list[tuple[TensorPart, Grouped]] = []
    for part in parts:
        if (grouped := files.grouped(part.source)) is not None:
            if not finite(grouped):
                raise CheckpointError(f"{part.source} has values that are not finite")
            found.append((part, grouped))
    return joined(found, model.get_parameter(target).shape) if len(found) == len(parts) else None


def _widen(model: nn.Module, target: str, left: int) -> None:
    """Take memory for a parameter that does not fit groups. `left`: the bytes that are to be filled after it.

    Raises:
        CheckpointError: there is too little.
    """
    log.info("%s: its quantised values are computed in the run-time dtype, since they do not fit groups", target)
    size = model.get_parameter(target).nbytes
    check_free(size + left, f"{target}, whose values do not fit groups, and what is loaded after it")
    take_memory(model, [target])


def _wrong_copies(model: nn.Module, plan: FillPlan, files: TensorSource, ignorable: tuple[Ignore, ...]) -> list[str]:
    """Faults of the ignored tensors that must be copies of a parameter and are not."""
    used = {part.source for parts in plan.values() for part in parts}
    faults: list[str] = []
    for rule in ignorable:
        if rule.copy_of and rule.source in files.stored and rule.source not in used:
            parameter = model.get_parameter(rule.copy_of)
            tensor = files.read(rule.source)
            if tensor.shape != parameter.shape or not torch.equal(tensor.to(parameter), parameter):
                faults.append(f"{rule.source} is not the same as {plan[rule.copy_of][0].source}")
    return faults


def _copy_tensor(files: TensorSource, part: TensorPart, target: Tensor) -> bool:
    """Copy one tensor into its part of a parameter; returns whether all its values are finite."""
    as_stored = files.stored[part.source].dtype == target.dtype and target.is_contiguous() and not part.transposed
    if as_stored and part.rows is None and target.device.type == CPU:
        files.read_into(part.source, target)
    else:
        target.copy_(part.to_parameter(files.read(part.source)))
    # Minimum and maximum of a tensor are NaN if one of its values is: one pass at memory speed.
    bounds = torch.stack(torch.aminmax(target)) if target.numel() else torch.zeros(1)
    return bool(bounds.isfinite().all())


def _plan(model: nn.Module, rules: tuple[Rule, ...], names: Mapping[str, object]) -> FillPlan:
    """One rule per parameter: the first whose first tensor exists, else the first, so that its absence is named."""
    plan: FillPlan = {}
    for rule in rules:
        parts = rule.parts()
        if rule.target not in plan or (plan[rule.target][0].source not in names and parts[0].source in names):
            plan[rule.target] = parts
    unruled = {name for name, _ in model.named_parameters()} - plan.keys()
    if unruled:
        raise CheckpointError(f"no rule fills {', '.join(sorted(unruled))}")
    return plan


def _ignored(name: str, plan: Mapping[str, object], ignorable: tuple[Ignore, ...]) -> bool:
    """Whether a rule says that this tensor is not needed, such as a tied head that is stored anyway."""
    if name == "lm_head.weight":
        return "head.weight" not in plan
    patterns = (re.escape(rule.source).replace(r"\{l\}", r"\d+").replace(r"\{any\}", ".+") for rule in ignorable)
    return any(re.fullmatch(pattern, name) for pattern in patterns)


def _is_bias(name: str, used: Container[str], files: TensorSource) -> bool:
    """Whether a tensor has a value for each output of a matrix that is used: AutoGPTQ writes zeros beside every one."""
    matrix = name.removesuffix("bias") + "weight"
    beside = name.endswith(".bias") and matrix in used and matrix in files.stored
    return beside and files.stored[name].shape == files.stored[matrix].shape[:1]
