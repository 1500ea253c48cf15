"""Trace spans by OpenTelemetry: one for each request that generates, sent once it has been answered.

Nothing of OpenTelemetry is imported before `Tracing.from_environment` is called. Its own variables say where spans are
sent, which are sampled and what the service is called. Spans hold figures and names, never text.
"""

import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from server.configuration.variables import BadSetting
from server.version import VERSION

PROTOCOL = "http/protobuf"
PROTOCOL_VARIABLES = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
TEXT_ROUTES = ("/v1/completions",)  # those that continue a text; all others answer a conversation
STOP_SECONDS = 0.5  # for the last spans, while the engine stops


@dataclass(frozen=True, slots=True)
class AnsweredRequest:
    """A request after its answer. Times are nanoseconds since the epoch."""

    route: str
    status: int
    began: int
    ended: int
    context: Mapping[str, str]  # the caller's trace, as headers
    call: Mapping[str, Any]  # the figures of its log line; empty where it was refused


class Tracing:
    """Makes spans of answered requests."""

    def __init__(self, api: Any, provider: Any, extract: Callable[[Mapping[str, str]], Any]) -> None:
        self._api, self._provider, self._extract = api, provider, extract
        self._tracer = provider.get_tracer("moedial", VERSION)

    @classmethod
    def from_environment(cls, exporter: Any = None) -> "Tracing":
        """Tracing as OpenTelemetry's variables say; `exporter` takes the place of the one that sends.

        Raises:
            BadSetting: OpenTelemetry is not installed, or is to use another protocol than OTLP over HTTP.
        """
        try:
            from opentelemetry import trace
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError as error:
            raise BadSetting(f"--otel needs the extra otel, as in pip install 'moedial[otel]': {error}") from None
        for name in PROTOCOL_VARIABLES:
            if os.environ.get(name, PROTOCOL) != PROTOCOL:
                raise BadSetting(f"--otel sends spans by {PROTOCOL}; {name} is {os.environ[name]!r:.80}")
        named = "OTEL_SERVICE_NAME" in os.environ or "service.name=" in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
        resource = Resource.create({} if named else {"service.name": "moedial"})
        provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        provider.add_span_processor(BatchSpanProcessor(exporter or OTLPSpanExporter()))
        return cls(trace, provider, TraceContextTextMapPropagator().extract)

    def record(self, request: AnsweredRequest) -> None:
        """Make the span of a request."""
        attributes, api = attributes_of(request), self._api
        model = attributes.get("gen_ai.request.model", "")
        name = f"{attributes['gen_ai.operation.name']} {model}".rstrip()
        context = self._extract(request.context)
        span = self._tracer.start_span(name, context, api.SpanKind.SERVER, attributes, start_time=request.began)
        if request.status >= 500:
            span.set_status(api.Status(api.StatusCode.ERROR))
        span.end(end_time=request.ended)

    def stop(self) -> None:
        """Send what is left, for at most `STOP_SECONDS`."""
        last = threading.Thread(target=self._provider.shutdown, name="last spans", daemon=True)
        last.start()
        last.join(STOP_SECONDS)


def attributes_of(request: AnsweredRequest) -> dict[str, Any]:
    """The attributes of a request's span, under the names of OpenTelemetry's conventions where they have one."""
    call = request.call
    attributes: dict[str, Any] = {
        "gen_ai.operation.name": "text_completion" if request.route in TEXT_ROUTES else "chat",
        "gen_ai.provider.name": "moedial",
        "http.request.method": "POST",
        "http.route": request.route,
        "http.response.status_code": request.status,
    }
    if request.status >= 400:
        attributes["error.type"] = str(request.status)
    if call:
        attributes |= {
            "gen_ai.request.model": call["model"],
            "gen_ai.response.id": call["id"],
            "gen_ai.response.finish_reasons": [str(outcome) for outcome in call["outcomes"]],
            "gen_ai.usage.input_tokens": call["prompt_tokens"],
            "gen_ai.usage.output_tokens": call["completion_tokens"],
            "moe.num_experts": float(call["num_experts"]),
            "moedial.request_id": str(call["request_id"]),
        }
    return attributes
