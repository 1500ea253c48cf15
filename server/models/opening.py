"""Opens several models: reads the small files of each, and checks that each fits the memory for models alone."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from server.access.access import Access
from server.configuration.variables import BadSetting
from server.models.engine import ReloadableEngine
from server.models.expected import expected_models
from server.models.host import HostedModels
from server.models.hosted import HostedModel
from server.protocols import EngineProtocol
from server.service import Service
from server.settings import Settings
from weights.folder import resolve_model
from weights.sizes import weight_size

OpenService = Callable[[Settings, Path, EngineProtocol, Access], Service]
EngineFor = Callable[[Settings, Path], EngineProtocol]


def host_models(settings: Settings, open_service: OpenService, engine_for: EngineFor) -> HostedModels:
    """The state of a server of several models, none of which is loaded yet.

    Raises:
        CheckpointError: a model cannot be found, or one of its small files is damaged.
        BadSetting: a model, or those to be loaded at start together, need more than --models-memory.
    """
    access = Access.read(settings)
    hosted = [_hosted(settings.of_model(name), access, open_service, engine_for) for name in settings.models]
    _check_memory(settings, hosted)
    return HostedModels(settings, access, hosted)


def _hosted(settings: Settings, access: Access, open_service: OpenService, engine_for: EngineFor) -> HostedModel:
    model = resolve_model(settings.model)
    engine = ReloadableEngine(partial(engine_for, settings, model))
    service = open_service(settings, model, engine, access)
    expected = expected_models(service, model)
    return HostedModel(service, engine, weight_size(model, settings.dtype).bytes + settings.kv_cache_bytes, expected)


def _check_memory(settings: Settings, hosted: Sequence[HostedModel]) -> None:
    limit = settings.models_memory
    if not limit:
        return
    for one in hosted:
        if one.bytes > limit:
            raise BadSetting(f"--models-memory is {limit}; the model {one.name!r} alone needs {one.bytes} bytes")
    first = settings.loaded_at_start
    if (needed := sum(one.bytes for one in hosted if one.name in first)) > limit:
        raise BadSetting(f"--models-memory is {limit}; {', '.join(first)} (--preload) need {needed} bytes together")
