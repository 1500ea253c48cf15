"""What is known of a model before it is loaded: its config.json says which expert counts it can run."""

import time
from dataclasses import replace
from pathlib import Path

from engine.types import EngineInfo
from model.errors import CheckpointError, InvalidRequest
from server.experts.served_models import ServedModels
from server.service import Service
from server.settings import Settings
from weights.config import read_config
from weights.sizes import weight_files, weight_size


def expected_models(service: Service, model: Path) -> ServedModels:
    """The model and its aliases; what only an engine can tell is empty.

    Raises:
        CheckpointError: config.json cannot be served, or the operator's counts do not fit it.
    """
    settings, info = service.settings, _info(service.settings, model)
    sources = (service.card, int(time.time()), service.calibration, service.sets)
    try:
        return ServedModels.build(settings, info, *sources)
    except InvalidRequest as error:
        raise CheckpointError(f"the model {settings.name!r}: {error.message}") from None


def _info(settings: Settings, model: Path) -> EngineInfo:
    config, raw = read_config(model)
    experts = replace(config, extrapolates=settings.allow_extrapolated_experts).experts
    mixture = config.mixtures[0] if config.mixtures else None
    stored = str(raw.get("dtype") or raw.get("torch_dtype") or "float32")
    return EngineInfo(
        family=raw["model_type"],
        dtype=stored.removeprefix("torch.") if settings.dtype == "auto" else settings.dtype,
        parameters=weight_size(model, settings.dtype).parameters,
        weight_files=weight_files(model),
        vocabulary=config.vocabulary,
        max_model_len=settings.max_model_len or config.context,
        experts=experts,
        experts_total=mixture.num_experts if mixture else 0,
        shared_experts=mixture.shared_experts if mixture else 0,
        kv_blocks=0,
        block_size=settings.block_size,
        load_seconds=0.0,
        kernels="",
        kernels_reason="the model has not been loaded",
        quantize=settings.quantize,
        kv_cache_dtype=settings.kv_cache_dtype,
        step_cost=None,
        device=settings.device,
        backend="",
        token_local=config.token_local,
        prefix_cache=settings.prefix_cache and config.prefix_reusable,
        chunked=config.chunkable,
    )
