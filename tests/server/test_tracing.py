"""Spans: what they say, whose trace they continue, and that they reach a collector."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from nemo_engine import AsyncEngine
from nemo_engine.outputs import RequestMetrics
from nemo_engine.server.tracing import Tracing
from tests.server.live import MODEL, LiveServer
from tests.server.planted import planted

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"


class Collector:
    """Takes OTLP over HTTP."""

    def __init__(self) -> None:
        self.paths: list[str] = []
        self.spans: list[Any] = []
        self.resources: list[Any] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                collector.paths.append(self.path)
                for group in ExportTraceServiceRequest.FromString(body).resource_spans:
                    collector.resources.append(group.resource)
                    collector.spans += [span for scope in group.scope_spans for span in scope.spans]
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self._server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.close()


def ask(live: LiveServer, headers: dict[str, str] | None = None, **fields: Any) -> httpx.Response:
    body = {
        "model": MODEL,
        "prompt": "The heapq module",
        "max_tokens": 6,
        "ignore_eos": True,
        "temperature": 0.5,
        "seed": 1,
    }
    answer = httpx.post(f"{live.url}/v1/completions", json=body | fields, headers=headers)
    assert answer.status_code == 200, answer.text
    return answer


def test_spans_reach_a_collector(engine: AsyncEngine, collector: Collector) -> None:
    with LiveServer(engine, otlp_endpoint=collector.url) as live:
        before = time.time_ns()
        ask(live, {"traceparent": f"00-{TRACE}-{PARENT}-01", "x-request-id": "a1"}, top_p=0.9, n=2)
        ask(live, stream=True)
        after = time.time_ns()
        live.service.tracing.close()
    assert set(collector.paths) == {"/v1/traces"}
    names = {one.key: one.value.string_value for one in collector.resources[0].attributes}
    assert names["service.name"] == "nemo_engine"
    first, second = collector.spans
    assert first.name == second.name == "llm_request"
    assert (first.trace_id.hex(), first.parent_span_id.hex()) == (TRACE, PARENT)
    assert second.trace_id.hex() != TRACE and second.parent_span_id == b""
    for span in (first, second):
        assert before <= span.start_time_unix_nano < span.end_time_unix_nano <= after
    found = {one.key: one.value for one in first.attributes}
    assert found["gen_ai.request.id"].string_value == "cmpl-a1"
    assert found["gen_ai.response.model"].string_value == MODEL
    assert found["gen_ai.request.temperature"].double_value == 0.5
    assert found["gen_ai.request.top_p"].double_value == 0.9
    assert found["gen_ai.request.max_tokens"].int_value == 6
    assert found["gen_ai.request.n"].int_value == found["gen_ai.usage.num_sequences"].int_value == 2
    assert found["gen_ai.usage.completion_tokens"].int_value == 12
    assert found["gen_ai.usage.prompt_tokens"].int_value > 1
    seconds = {key: value.double_value for key, value in found.items() if ".latency." in key}
    parts = ("time_in_queue", "time_in_model_prefill", "time_in_model_decode")
    assert seconds["gen_ai.latency.e2e"] == pytest.approx(sum(seconds[f"gen_ai.latency.{part}"] for part in parts))
    assert 0 < seconds["gen_ai.latency.time_to_first_token"] < seconds["gen_ai.latency.e2e"]
    assert first.end_time_unix_nano - first.start_time_unix_nano == pytest.approx(
        seconds["gen_ai.latency.e2e"] * 1e9, abs=1e6
    )
    streamed = {one.key: one.value for one in second.attributes}
    assert streamed["gen_ai.usage.completion_tokens"].int_value == 6


def test_what_is_not_sampled_upstream_is_not_here(engine: AsyncEngine) -> None:
    exporter = InMemorySpanExporter()
    with LiveServer(engine) as live:
        live.service.tracing = tracing = Tracing("http://127.0.0.1:9", exporter)
        ask(live, {"traceparent": f"00-{TRACE}-{PARENT}-00"})
        ask(live, {"traceparent": "no trace at all"})
        tracing.close()
        ask(live)  # and after the end nothing fails
    (span,) = exporter.get_finished_spans()
    assert span.kind is SpanKind.SERVER and span.parent is None


def test_a_failure_is_an_error_of_the_span(engine: AsyncEngine) -> None:
    exporter = InMemorySpanExporter()
    with LiveServer(engine) as live, planted(engine, ["x"], "error", RequestMetrics(time.monotonic())):
        live.service.tracing = Tracing("http://127.0.0.1:9", exporter)
        answer = httpx.post(f"{live.url}/v1/completions", json={"prompt": "x"})
        live.service.tracing.close()
    assert answer.status_code == 500
    (span,) = exporter.get_finished_spans()
    assert span.status.status_code is StatusCode.ERROR and span.status.description == "planted"
    assert span.attributes is not None and "gen_ai.latency.time_to_first_token" not in span.attributes


def test_a_collector_out_of_reach_holds_up_nothing(engine: AsyncEngine) -> None:
    with LiveServer(engine, otlp_endpoint="http://127.0.0.1:9") as live:
        ask(live)
        tracing, may_end, ended = live.service.tracing, threading.Event(), threading.Event()
        shutdown = tracing._provider.shutdown
        tracing._provider.shutdown = lambda: [may_end.wait(120), shutdown(), ended.set()]
        tracing.close(timeout=0.05)
        assert not ended.is_set()
        may_end.set()


@pytest.mark.parametrize("endpoint", ["collector:4318", "ftp://collector", "http://", ""])
def test_endpoints_that_are_none(endpoint: str) -> None:
    with pytest.raises(ValueError, match="otlp_endpoint must be an http or https URL, got '"):
        Tracing(endpoint)


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(ValueError, match=r"otlp_endpoint needs the extra otel: pip install 'nemo-engine\[otel\]'"):
        Tracing("http://127.0.0.1:4318")


def test_nothing_is_imported_without_an_endpoint() -> None:
    code = (
        "import sys\nfrom nemo_engine.server.tracing import Tracing\nTracing(None).request_done(None, '', '', {})\n"
        "print([name for name in sys.modules if name.startswith('opentelemetry.sdk') or 'otlp' in name])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
