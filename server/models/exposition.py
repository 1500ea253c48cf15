"""The series of several models as one answer to a scrape.

Each model's series have its name as `model_name`; what is counted before a request's model is known has an empty one.
"""

from collections.abc import Iterable, Iterator, Sequence

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric

from server.metrics import PREFIX, Metrics
from server.processes import ENGINE_NAMESPACE

BEFORE_MODEL = frozenset({"http_requests", "http_body_bytes", "key_requests", "log_lines_dropped"})
ALSO_BEFORE_MODEL = frozenset({"requests_rejected", "key_requests_limited"})
WHILE_LOADED = frozenset({"engine_up", "engine_seconds_since_report"})  # of an unloaded model there is nothing to alert
LABEL = "model_name"


class _Merged:
    """A collector of the families of several registries, those of one name put together."""

    def __init__(self, server: Metrics, models: Sequence[tuple[bool, Metrics]]) -> None:
        self._server, self._models = server, models

    def collect(self) -> Iterator[Metric]:
        """Every family with its values; the registry calls this."""
        families: dict[str, Metric] = {}
        for family in self._families():
            known = families.setdefault(family.name, family)
            if known is not family and (not family.samples or LABEL in family.samples[0].labels):
                known.samples += family.samples
        yield from families.values()

    def _families(self) -> Iterator[Metric]:
        for family in self._server.collect():
            if family.name.removeprefix(PREFIX) in BEFORE_MODEL | ALSO_BEFORE_MODEL:
                yield family
        for loaded, metrics in self._models:
            left_out = BEFORE_MODEL if loaded else BEFORE_MODEL | WHILE_LOADED
            for family in metrics.registry.collect():
                if family.name.removeprefix(PREFIX) not in left_out:
                    yield _labelled(family, metrics.model_name)


def _labelled(family: Metric, model: str) -> Metric:
    """The family; figures of a model's process get its name. Those of the HTTP process are the same for all models."""
    if family.name.startswith(ENGINE_NAMESPACE):
        family.samples = [sample._replace(labels={LABEL: model, **sample.labels}) for sample in family.samples]
    return family


def merged_exposition(server: Metrics, models: Iterable[tuple[bool, Metrics]]) -> bytes:
    """The answer to a scrape: `server` counts what has no model; for each model, whether it is loaded, and its own."""
    registry = CollectorRegistry()
    registry.register(_Merged(server, list(models)))
    return generate_latest(registry)
