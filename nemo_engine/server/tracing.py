"""OpenTelemetry: one span for every request of the engine, sent to a collector over OTLP/HTTP.

Needs the extra ``otel``.

Nothing is imported, and nothing done, without an endpoint. The names of attributes are those of the gen_ai conventions
as vLLM has them.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from nemo_engine import __version__
from nemo_engine.outputs import RequestOutput

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

SPAN_NAME = "llm_request"
_PATH = "/v1/traces"  # of a collector, where the endpoint has none


class Tracing:
    """Sends spans to ``endpoint`` in the background; ``exporter`` takes them instead. None: does nothing.

    ``ValueError`` for an endpoint that is no URL, and where the packages are missing.
    """

    def __init__(self, endpoint: str | None, exporter: SpanExporter | None = None) -> None:
        self._provider: Any = None
        if endpoint is None:
            return
        url = urlsplit(endpoint)
        if url.scheme not in ("http", "https") or not url.hostname:
            raise ValueError(f"otlp_endpoint must be an http or https URL, got {endpoint!r}")
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError as error:
            raise ValueError(
                f"otlp_endpoint needs the extra otel: pip install 'nemo-engine[otel]' ({error})"
            ) from error
        if url.path in ("", "/"):
            endpoint = url._replace(path=_PATH).geturl()
        exporter = exporter or OTLPSpanExporter(endpoint)
        name = os.environ.get("OTEL_SERVICE_NAME", "nemo_engine")
        # A provider of our own: that of a program which this one is part of stays as it is.
        self._provider = TracerProvider(
            resource=Resource.create({"service.name": name, "service.version": __version__})
        )
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("nemo_engine.server", __version__)
        self._propagator = TraceContextTextMapPropagator()

    def request_done(self, output: RequestOutput, request_id: str, model_name: str, headers: Mapping[str, str]) -> None:
        """A request has ended; ``output`` is its last. The span continues the trace of ``headers``."""
        if self._provider is None or output.metrics is None:
            return
        metrics = output.metrics
        from opentelemetry.trace import SpanKind, Status, StatusCode

        to_wall = time.time_ns() - time.monotonic_ns()
        end = metrics.last_token_ts or time.monotonic()
        span = self._tracer.start_span(
            SPAN_NAME,
            context=self._propagator.extract(headers),
            kind=SpanKind.SERVER,
            start_time=to_wall + int(metrics.arrival_time * 1e9),
            attributes=_attributes(output, request_id, model_name),
        )
        for completion in output.outputs:
            if completion.error is not None:
                span.set_status(Status(StatusCode.ERROR, completion.error))
        span.end(to_wall + int(end * 1e9))

    def close(self, timeout: float = 5.0) -> None:
        """Send what waits, and end; gives up after ``timeout`` seconds, for a collector may be out of reach."""
        if self._provider is not None:
            sender = threading.Thread(target=self._provider.shutdown, daemon=True)
            self._provider = None
            sender.start()
            sender.join(timeout)


def _attributes(output: RequestOutput, request_id: str, model_name: str) -> dict[str, Any]:
    metrics, params = output.metrics, output.sampling_params
    assert metrics is not None
    attributes: dict[str, Any] = {
        "gen_ai.request.id": request_id,
        "gen_ai.request.model": model_name,
        "gen_ai.response.model": model_name,
        "gen_ai.response.finish_reasons": [completion.finish_reason or "abort" for completion in output.outputs],
        "gen_ai.usage.prompt_tokens": len(output.prompt_token_ids),
        "gen_ai.usage.completion_tokens": metrics.num_generation_tokens,
        "gen_ai.usage.cached_tokens": output.num_cached_tokens,
        "gen_ai.usage.num_sequences": len(output.outputs),
    }
    if params is not None:
        attributes |= {
            "gen_ai.request.temperature": params.temperature,
            "gen_ai.request.top_p": params.top_p,
            "gen_ai.request.max_tokens": params.max_tokens,
            "gen_ai.request.n": params.n,
        }
    arrival, scheduled = metrics.arrival_time, metrics.scheduled_ts
    first, last = metrics.first_token_ts, metrics.last_token_ts
    for name, start, end in (
        ("time_in_queue", arrival, scheduled),
        ("time_to_first_token", arrival, first),
        ("e2e", arrival, last),
        ("time_in_model_prefill", scheduled, first),
        ("time_in_model_decode", first, last),
        ("time_in_model_inference", scheduled, last),
    ):
        if start is not None and end is not None:
            attributes[f"gen_ai.latency.{name}"] = end - start
    return {name: value for name, value in attributes.items() if value is not None}
