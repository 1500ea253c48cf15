"""The model and its aliases as Ollama's clients list them: under `NAME:latest`, and `NAME:k2` for NAME@k2."""

import hashlib
import time
from collections.abc import Mapping
from typing import Any

from server.experts.served_models import ServedModels
from server.formats.ollama import timestamp
from server.protocols import ChatTemplateProtocol
from server.requests.ollama_as_chat import LATEST, model_of

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}  # by dtype; 1 for quantised weights
LEVELS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
SCALES = ((1e9, "B"), (1e6, "M"), (1e3, "K"))
YEAR = 365 * 24 * 3600  # how long a model that is never unloaded stays


def listed(models: ServedModels) -> list[dict[str, Any]]:
    """The model and its listed aliases. Sizes are of the weights in memory, by their number and type."""
    return [_listed(models, card["id"]) for card in models.cards()]


def running(models: ServedModels) -> dict[str, Any]:
    """The loaded model."""
    shared = {"expires_at": timestamp(time.time() + YEAR), "context_length": models.info.max_model_len}
    on_device = 0 if models.info.device == "cpu" else _size(models)
    return _listed(models, models.name) | shared | {"size_vram": on_device}


def shown(
    models: ServedModels, chat: ChatTemplateProtocol | None, defaults: Mapping[str, Any], named: str | None
) -> dict[str, Any]:
    """What is known of a model, by default the server's, with GGUF's names for what it is. Raises ModelNotFound."""
    card, info = models.card(model_of(named, models.name) or models.name), models.info
    family, used = info.family, card["meta"]["moe"]["default"]
    knows_tools, knows_thinking = chat is not None and chat.knows_tools, chat is not None and chat.knows_thinking
    capabilities = ["completion"] + ["tools"] * knows_tools + ["thinking"] * knows_thinking
    return {
        "modelfile": "",
        "parameters": "\n".join(f"{name} {value}" for name, value in {**defaults, "num_experts": used}.items()),
        "template": chat.source if chat is not None else "{{ .Prompt }}",
        "details": _details(models, card["parent"] or ""),
        "model_info": {
            "general.architecture": family,
            "general.parameter_count": info.parameters,
            f"{family}.context_length": info.max_model_len,
            f"{family}.expert_count": info.experts_total,
            f"{family}.expert_used_count": used,
        },
        "capabilities": capabilities,
        "modified_at": timestamp(models.created),
    }


def _listed(models: ServedModels, id: str) -> dict[str, Any]:
    name, _, suffix = id.partition("@")
    tagged = f"{name}:{suffix or LATEST}"
    return {
        "name": tagged,
        "model": tagged,
        "modified_at": timestamp(models.created),
        "size": _size(models),
        "digest": hashlib.sha256(f"{models.fingerprint} {id}".encode()).hexdigest(),
        "details": _details(models, "" if id == models.name else models.name),
    }


def _size(models: ServedModels) -> int:
    info = models.info
    if info.quantize.startswith(("int4", "as stored: int4", "as stored: fp4")):
        return info.parameters * 9 // 16  # a code and its share of a scale
    return info.parameters * (1 if info.quantize != "none" else BYTES.get(info.dtype, 4))


def _details(models: ServedModels, parent: str) -> dict[str, Any]:
    info = models.info
    return {
        "parent_model": parent,
        "format": "safetensors",
        "family": info.family,
        "families": [info.family],
        "parameter_size": _short(info.parameters),
        "quantization_level": LEVELS.get(info.dtype, info.dtype) if info.quantize == "none" else info.quantize,
    }


def _short(count: int) -> str:
    """A number of parameters as Ollama writes it, such as `1.2B`."""
    scale, unit = next(((scale, unit) for scale, unit in SCALES if count >= scale), (1, ""))
    return f"{count / scale:.1f}{unit}"
