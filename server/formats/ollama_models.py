"""The model and its aliases as Ollama's clients list them: under `NAME:latest`, and `NAME:k2` for NAME@k2."""

import hashlib
import time
from collections.abc import Mapping
from typing import Any

from engine.types import EngineInfo
from server.experts.served_models import ServedModels
from server.formats.ollama import timestamp
from server.protocols import ChatTemplateProtocol
from server.requests.ollama_as_chat import LATEST, model_of

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}  # by dtype; 1 for quantised weights
LEVELS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
SCALES = ((1e9, "B"), (1e6, "M"), (1e3, "K"))
AS_STORED = "as stored: "  # begins `EngineInfo.quantize` of weights that the checkpoint has quantised
YEAR = 365 * 24 * 3600  # how long a model that is never unloaded stays


def listed(models: ServedModels) -> list[dict[str, Any]]:
    """The model and its listed aliases, with the size of the weight files."""
    size = models.info.weight_files.bytes or _in_memory(models.info)
    return [_listed(models, card["id"], size) for card in models.cards()]


def running(models: ServedModels) -> dict[str, Any]:
    """The loaded model, with the size of its weights in memory."""
    shared = {"expires_at": timestamp(time.time() + YEAR), "context_length": models.info.max_model_len}
    size = _in_memory(models.info)
    on_device = 0 if models.info.device == "cpu" else size
    return _listed(models, models.name, size) | shared | {"size_vram": on_device}


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


def _listed(models: ServedModels, id: str, size: int) -> dict[str, Any]:
    name, _, suffix = id.partition("@")
    tagged = f"{name}:{suffix or LATEST}"
    return {
        "name": tagged,
        "model": tagged,
        "modified_at": timestamp(models.created),
        "size": size,
        "digest": hashlib.sha256(f"{models.fingerprint} {id}".encode()).hexdigest(),
        "details": _details(models, "" if id == models.name else models.name),
    }


def _in_memory(info: EngineInfo) -> int:
    """About how many bytes the weights take: as many as the files where weights stay as they are stored, else by their
    number and type."""
    if info.quantize.startswith(AS_STORED) and info.weight_files.bytes:
        return info.weight_files.bytes
    if info.quantize.startswith("int4"):
        return info.parameters * 17 // 32  # a code and its share of a scale
    return info.parameters * (1 if info.quantize != "none" else BYTES.get(info.dtype, 4))


def _details(models: ServedModels, parent: str) -> dict[str, Any]:
    info = models.info
    return {
        "parent_model": parent,
        "format": info.weight_files.format,
        "family": info.family,
        "families": [info.family],
        "parameter_size": _short(info.parameters),
        "quantization_level": _level(info),
    }


def _level(info: EngineInfo) -> str:
    """The type of a GGUF file; of other files, and where the server quantises, what the weights are in memory."""
    kept = info.quantize == "none" or info.quantize.startswith(AS_STORED)
    if kept and info.weight_files.type:
        return info.weight_files.type
    if info.quantize == "none":
        return LEVELS.get(info.dtype, info.dtype)
    return info.quantize.removeprefix(AS_STORED)


def _short(count: int) -> str:
    """A number of parameters as Ollama writes it, such as `1.2B`."""
    scale, unit = next(((scale, unit) for scale, unit in SCALES if count >= scale), (1, ""))
    return f"{count / scale:.1f}{unit}"
