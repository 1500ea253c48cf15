"""The fields of `EngineInfo` that follow from the model and the settings.

Not here: the fields that are known only after loading, such as the number of parameters and the load time
(`engine/build.py`).
"""

from dataclasses import replace
from typing import Any

from engine.sizes import block_size, model_length, shares_prefixes
from engine.types import EngineSettings
from model.backends.base import Runnable
from model.expert_range import ExpertRange


def describe(model: Runnable, settings: EngineSettings, kept: str = "") -> dict[str, Any]:
    """The fields of `EngineInfo` that follow from the model and the settings. `kept`: see `weights.groups.kept_as`."""
    config = model.config
    total = shared = 0
    if config.mixtures:
        total = config.mixtures[0].num_experts
        shared = config.mixtures[0].shared_experts
    return {
        "dtype": str(model.dtype).removeprefix("torch."),
        "vocabulary": config.vocabulary,
        "max_model_len": model_length(config, settings),
        "experts": experts_of(model),
        "experts_total": total,
        "shared_experts": shared,
        "block_size": block_size(settings),
        "kernels": model.kernels,
        "device": str(model.device),
        "backend": model.backend,
        "quantize": quantization(settings, kept),
        "kv_cache_dtype": settings.kv_cache_dtype,
        "token_local": config.token_local,
        "prefix_cache": shares_prefixes(config, settings, model.overlaps),
        "chunked": config.chunkable,
        "step_cost": None,
    }


def experts_of(model: Runnable) -> ExpertRange:
    """The counts and routing rules that can be served: those of the decoder, as far as its backend runs them."""
    experts = model.config.experts
    if not model.sets:
        refusal = f"{model.kernels} keeps no set of experts"
        experts = replace(experts, set_refusal=experts.set_refusal or refusal)
    if model.rules:
        return experts
    refusal = f"{model.kernels} runs no routing rule but the family's"
    return replace(experts, rule_refusal=experts.rule_refusal or refusal, repair_refusal=refusal, own_fields=())


def quantization(settings: EngineSettings, kept: str) -> str:
    """What is quantized and how, as in `EngineInfo.quantize`."""
    if settings.quantize == "none":
        return f"as stored: {kept}" if kept else "none"
    return f"{settings.quantize} {settings.quantize_layers}"
