"""Packed models: written once for the CPU's kernels, and started from without packing again.

Not here: the files (see `weights/packed.py`), and what a call of an op means (see `model/backends/cpu/calls.py`).
"""

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from engine.types import EngineSettings
from model.backends import choose
from model.backends.base import Runnable
from model.decoder import parameter_count
from model.devices import CPU, resolve
from model.errors import CheckpointError
from model.options import DType, Options, Quantize, QuantizeLayers
from model.shapes.decoder import DecoderConfig
from weights import expert_sets
from weights.calibration import REPAIR_FILE, checkpoint_hash, find
from weights.config import read_config
from weights.folder import CARD, PACKED, beside, resolve_model
from weights.groups import bytes_per_weight, kept_as
from weights.load import ProgressCallback, load_model, no_progress
from weights.packed import Index, MappedTensors, is_packed, read_index, write_packed
from weights.repair import load_repair
from weights.sizes import BytesPerWeight
from weights.small_files import CONFIG, texts_of, write_texts


@dataclass(frozen=True, slots=True)
class ReadyModel:
    """A model that is ready to run, and what is said of it."""

    model: Runnable
    parameters: int
    kept: str  # see `weights.groups.kept_as`
    loaded_bytes: BytesPerWeight
    kernels_reason: str = ""  # why it is on no faster backend
    calibration_reason: str = ""  # why a calibration is not used
    expert_bytes: tuple[int, ...] = ()  # of each rank


def pack_model(
    name: str,
    out: Path,
    dtype: DType = "auto",
    quantize: Quantize = "none",
    quantize_layers: QuantizeLayers = "experts",
    progress: ProgressCallback = no_progress,
    tokenizer: Path | None = None,
) -> None:
    """Write the model, as the CPU's kernels read it, to a new or an empty folder, with its tokenizer (or that of the
    folder `tokenizer`) and what was measured of it. Memory holds it once, and one layer packed.

    Raises:
        CheckpointError: it cannot be loaded, no kernel takes it, there is no such tokenizer, or there is something in
            the folder.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} exists; pack writes to a new folder")
    path = resolve_model(name)
    if is_packed(path):
        raise CheckpointError(f"{path} is packed")
    config, raw = read_config(path)
    backend, options = choose.packing(), Options(quantize=quantize, quantize_layers=quantize_layers)
    backend.provide()
    if reason := backend.refusal(config, options):
        raise CheckpointError(f"the kernels cannot run this model: {reason}")
    texts = texts_of(path, tokenizer)  # before the weights, which take longer
    keep = backend.groups if quantize == "none" and dtype == "auto" else None
    model, _ = load_model(path, dtype, progress, keep_groups=keep)
    repair = load_repair(model, path)
    about = Index(
        layout=backend.layout(),
        dtype=str(model.dtype).removeprefix("torch."),
        quantize=quantize,
        quantize_layers=quantize_layers,
        kept=kept_as(model),
        loaded_bytes=bytes_per_weight(model),
        checkpoint=checkpoint_hash(path),
        repaired=repair.repaired,
        parameters=parameter_count(model),
    )
    out.mkdir(parents=True, exist_ok=True)
    (out / CONFIG).write_text(json.dumps(raw, indent=2) + "\n")
    write_texts(texts, out)
    _copy_measured(path, out)
    write_packed(out, about, backend.calls(model, options))


def _copy_measured(model: Path, out: Path) -> None:
    """Copy a model's card, its calibration with the statistics of repairs, and its expert sets."""
    card, calibration = beside(model) / CARD, find(model)
    files = [card, calibration, calibration.with_name(REPAIR_FILE)] if calibration else [card]
    for file in files:
        if file.is_file():
            shutil.copyfile(file, out / file.name)
    for name, file in expert_sets.every(model).items():
        target = out / expert_sets.FOLDER / f"{name}.json"
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, target)


def start_packed(
    folder: Path, config: DecoderConfig, settings: EngineSettings, dtype: torch.dtype, options: Options
) -> ReadyModel:
    """The model of a packed folder, over its mapped files. `dtype`: what the settings and config.json ask for.

    Raises:
        CheckpointError: it was packed for something else than what is asked for, or is damaged.
    """
    index = read_index(folder)
    _refuse(index, config, settings, dtype, options)
    shown = replace(config, extrapolates=settings.allow_extrapolated_experts, repaired=index.repaired)
    tensors = MappedTensors(folder)
    try:
        calls = tensors.calls(index, config.vocabulary)
        model = choose.packing().start(shown, dtype, index.parameters, calls, options)
    except (TypeError, RuntimeError, IndexError) as error:
        raise CheckpointError(f"{PACKED}: the kernels cannot run what it lists: {error}") from None
    return ReadyModel(model, index.parameters, index.kept, index.loaded_bytes)


def _refuse(
    index: Index, config: DecoderConfig, settings: EngineSettings, dtype: torch.dtype, options: Options
) -> None:
    """Raise CheckpointError unless the folder was packed for these settings and kernels."""
    if settings.ranks > 1 or resolve(settings.device) != CPU:
        raise CheckpointError("a packed model runs on one CPU: start from the checkpoint that it was made from")
    backend = choose.packing()
    if reason := backend.refusal(config, options):
        raise CheckpointError(f"a packed model needs the native kernels: {reason}")
    if index.layout != (layout := backend.layout()):
        raise CheckpointError(
            f"{PACKED} was written for weights of layout {index.layout}, these kernels read {layout}: pack it again"
        )
    wanted = {
        "dtype": str(dtype).removeprefix("torch."),
        "quantize": settings.quantize,
        "quantize_layers": settings.quantize_layers if settings.quantize != "none" else index.quantize_layers,
    }
    for name, value in wanted.items():
        if getattr(index, name) != value:
            raise CheckpointError(f"the model was packed with {name} {getattr(index, name)}, and {value} is asked for")
