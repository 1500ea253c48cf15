"""The file of repair statistics, `repair.safetensors`: written, checked, and given to the layers of a decoder.

It belongs to the calibration beside it, which has its hash. A file that is damaged or of another model is no reason
not to serve: the model runs without repair, and says why. Not here: how the statistics are fitted or applied
(`model/moe/repair.py`).
"""

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from model.decoder import Decoder, Layer
from model.errors import CheckpointError
from model.moe.repair import RepairTables
from model.shapes.decoder import DecoderConfig
from weights.calibration import REPAIR_FILE, checkpoint_hash, find, read
from weights.folder import open_regular

log = logging.getLogger(__name__)

NEUTRAL = {"scale": 1.0, "shift": 0.0}  # the tensors of the file, and what changes nothing
MAX_HEADER = 1 << 16  # bytes before the tensors


@dataclass(frozen=True, slots=True)
class LoadedRepair:
    """The counts whose repair helps, as the calibration says; or why the calibration is not used."""

    repaired: tuple[int, ...] = ()
    reason: str = ""  # empty: it is used, or there is none


def load_repair(model: Decoder, path: Path) -> LoadedRepair:
    """Give the layers of a loaded decoder the repair statistics of its calibration, if there are any that fit."""
    try:
        return _load(model, path)
    except (CheckpointError, OSError) as error:
        log.warning("the calibration is not used: %s", error)
        return LoadedRepair(reason=str(error))


def _load(model: Decoder, checkpoint: Path) -> LoadedRepair:
    path = find(checkpoint)
    if path is None:
        return LoadedRepair()
    calibration = read(path, checkpoint_hash(checkpoint))
    if not calibration.repair_hash:
        return LoadedRepair()
    give_tables(model, *read_tables(path.with_name(REPAIR_FILE), model.config, calibration.repair_hash))
    return LoadedRepair(calibration.repaired)


def give_tables(model: Decoder, scale_LKD: Tensor, shift_LKD: Tensor) -> None:
    """Give the layers these statistics, [L, maximum + 1, D] float32. On the CPU they are not copied, nor by its
    backends: what is written to them later is what the model then repairs by."""
    device = model.device
    mixtures = (
        layer for layer, shape in zip(model.layers, model.config.feed_forward, strict=True) if shape.num_experts
    )
    for layer, scale_KD, shift_KD in zip(mixtures, scale_LKD, shift_LKD, strict=True):
        assert isinstance(layer, Layer)
        layer.repair = RepairTables(scale_KD.to(device), shift_KD.to(device))


def neutral_tables(config: DecoderConfig) -> tuple[Tensor, Tensor]:
    """Scale and shift [L, maximum + 1, D] that change nothing."""
    shape = (len(config.mixtures), config.experts.maximum + 1, config.width)
    return torch.ones(shape), torch.zeros(shape)


def write_tables(path: Path, scale_LKD: Tensor, shift_LKD: Tensor) -> str:
    """Write statistics [L, K, D] of all counts from 0 on, whole or not at all. Returns the file's SHA-256."""
    data = save({"scale": scale_LKD.float().contiguous(), "shift": shift_LKD.float().contiguous()})
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(data)
    part.replace(path)
    return hashlib.sha256(data).hexdigest()


def read_tables(path: Path, config: DecoderConfig, sha256: str) -> tuple[Tensor, Tensor]:
    """Scale and shift [L, maximum + 1, D], float32; rows of counts that the file does not have change nothing.

    Raises:
        CheckpointError: the file is damaged, not the one with this hash, or does not fit the decoder.
    """
    tensors = _load_tensors(path, config, sha256)
    _check(path, tensors, config)
    scale_LKD, shift_LKD = (_padded(tensors[name], config, value) for name, value in NEUTRAL.items())
    return scale_LKD, shift_LKD


def _load_tensors(path: Path, config: DecoderConfig, sha256: str) -> dict[str, Tensor]:
    """The tensors of a file that is no larger than it may be, and has this hash."""
    most = MAX_HEADER + len(NEUTRAL) * len(config.mixtures) * (config.experts.maximum + 1) * config.width * 4
    try:
        with open_regular(path) as file:
            data = file.read(most + 1)
        if len(data) > most:
            raise CheckpointError(f"{path} is larger than {most} bytes, which is too much for this model")
        if hashlib.sha256(data).hexdigest() != sha256:
            raise CheckpointError(f"{path} is not the file that was written with the calibration")
        return load(data)
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None


def _check(path: Path, tensors: dict[str, Tensor], config: DecoderConfig) -> None:
    """That these are finite numbers of this decoder's layers and counts that change nothing at the trained count."""
    if set(tensors) != set(NEUTRAL):
        raise CheckpointError(f"{path} must hold the tensors scale and shift, not {', '.join(tensors) or 'none'}")
    experts, layers = config.experts, len(config.mixtures)
    fitting = [(layers, counts, config.width) for counts in range(experts.trained + 1, experts.maximum + 2)]
    for name, neutral in NEUTRAL.items():
        tensor = tensors[name]
        if tensor.dtype != torch.float32 or tuple(tensor.shape) not in fitting:
            raise CheckpointError(
                f"{path}: tensor {name!r} must be float32 of {layers} layers, {experts.trained + 1} to"
                f" {experts.maximum + 1} counts and width {config.width}, not {tensor.dtype} {tuple(tensor.shape)}"
            )
        if not tensor.isfinite().all():
            raise CheckpointError(f"{path}: tensor {name!r} has values that are not finite")
        if not (tensor[:, experts.trained] == neutral).all():
            raise CheckpointError(f"{path}: tensor {name!r} is not {neutral:g} at the trained count")


def _padded(tensor_LKD: Tensor, config: DecoderConfig, value: float) -> Tensor:
    layers, counts, width = tensor_LKD.shape
    rest_LKD = torch.full((layers, config.experts.maximum + 1 - counts, width), value)
    return torch.cat([tensor_LKD, rest_LKD], dim=1)
