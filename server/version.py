"""Which version this is, and what stands for it and the model in answers. It knows no route."""

import hashlib
from importlib.metadata import PackageNotFoundError, version

from engine.types import EngineInfo


def installed_version() -> str:
    try:
        return version("moedial")
    except PackageNotFoundError:
        return "0+unknown"


def fingerprint_of(name: str, info: EngineInfo, default_count: int) -> str:
    """OpenAI's system_fingerprint: the same as long as equal requests get equal answers, after a restart too."""
    model = (name, info.family, info.parameters, info.vocabulary, info.max_model_len, info.experts, default_count)
    parts = (installed_version(), *model, info.dtype, info.quantize, info.kernels)
    return "fp_" + hashlib.sha256(repr(parts).encode()).hexdigest()[:10]
