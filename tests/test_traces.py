"""Traces: one from a command through the API to the worker and back, at a real collector; and no secret in any."""

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import Status, StatusCode

from registry import traces
from registry.client import RegistryClient
from registry.schemas import Wishes
from registry.transfer import push_base, push_dataset
from tests.cli.test_up import up
from tests.factories import tiny_llama
from tests.test_logs import DATABASE, HIDDEN, SIGNED, TOKEN
from tests.waiting import wait_for

ITEMS = [{"prompt": f"{number} is ", "choices": ["even", "odd"], "answer": number % 2} for number in range(20)]


@dataclass
class Collector:
    """What was sent: spans with the service that sent each, and the bytes."""

    url: str
    spans: list[tuple[str, Span]] = field(default_factory=list)
    received: list[bytes] = field(default_factory=list)

    def take(self, body: bytes) -> None:
        self.received.append(body)
        for one in ExportTraceServiceRequest.FromString(body).resource_spans:
            [service] = [said.value.string_value for said in one.resource.attributes if said.key == "service.name"]
            self.spans += [(service, span) for scope in one.scope_spans for span in scope.spans]

    def named(self, service: str, name: str) -> Span:
        found = [span for by, span in self.spans if (by, span.name) == (service, name)]
        assert found, sorted({(by, span.name) for by, span in self.spans})
        return found[0]

    def above(self, span: Span) -> list[tuple[str, str]]:
        """The services and names of a span and of all that it is within."""
        known = {found.span_id: (service, found) for service, found in self.spans}
        path = []
        place = span.span_id
        while place in known:
            service, found = known[place]
            path.append((service, found.name))
            place = found.parent_span_id
        return path


@contextmanager
def collecting() -> Iterator[Collector]:
    """A collector of OTLP over HTTP."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:  # http.server's name
            assert self.path == "/v1/traces"
            collector.take(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(200)
            self.send_header("content-type", "application/x-protobuf")
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        collector = Collector(f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield collector
        server.shutdown()
        thread.join()


def test_one_trace_leads_from_a_command_through_the_api_to_the_worker_and_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with collecting() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
        with up(tmp_path / "data") as (_, told):
            token = Path(told["token_file"]).read_text().strip()
            monkeypatch.setenv("LORACTL_URL", told["url"])
            monkeypatch.setenv("LORACTL_TOKEN", token)
            (tmp_path / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in ITEMS))
            with RegistryClient(told["url"], token) as client:
                push_base(client, tiny_llama(tmp_path / "base"), Wishes(line="demo"))
                push_dataset(client, "suite", tmp_path / "items.jsonl", "team/parity")
                words = ["evaluate", "--for", "demo@r1", "--suite", "team/parity", "--no-wait", "--json"]
                ended = subprocess.run(
                    [sys.executable, "-m", "cli.main", *words], capture_output=True, text=True, check=True, timeout=300
                )
                job = json.loads(ended.stdout)["id"]
                wait_for(lambda: client.job(job).state in ("succeeded", "failed"), 300)
                assert client.job(job).state == "succeeded"
    command = collector.named("loractl-cli", "loractl evaluate")
    work = collector.named("loractl-worker", "job evaluate")
    asked, finished = (
        collector.named("loractl-api", f"POST {route}") for route in ("/v1/jobs", "/v1/jobs/{identity}/finish")
    )
    assert not command.parent_span_id
    assert {span.trace_id for span in (work, asked, finished)} == {command.trace_id}
    up_to_the_request = [("loractl-api", asked.name), ("loractl-cli", "POST"), ("loractl-cli", "loractl evaluate")]
    assert collector.above(asked) == up_to_the_request
    assert collector.above(work) == [("loractl-worker", "job evaluate"), *up_to_the_request]
    assert collector.above(finished)[-5:] == [("loractl-worker", "POST"), *collector.above(work)]
    said = {fact.key: fact.value.string_value for fact in work.attributes}
    assert (said["loractl.job"], said["loractl.outcome"]) == (job, "succeeded")
    statements = [
        fact.value.string_value
        for service, span in collector.spans
        for fact in span.attributes
        if service == "loractl-api" and span.trace_id == command.trace_id and fact.key == "db.query.text"
    ]
    assert any(text.startswith("INSERT INTO jobs ") for text in statements)
    assert not [span.name for _, span in collector.spans if "heartbeat" in span.name or "claim" in span.name]
    sent = b"".join(collector.received)
    for file in (tmp_path / "data" / "secrets").iterdir():
        secret = file.read_text().strip()[-32:]
        assert len(secret) == 32
        assert secret.encode() not in sent
    assert b"signature=" not in sent.replace(b"signature=***", b"")


def test_no_span_holds_a_secret_wherever_it_was_put() -> None:
    kept = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(kept))
    with provider.get_tracer("test").start_as_current_span(f"GET {SIGNED}") as span:
        span.set_attributes({
            "url.full": SIGNED, "url.query": SIGNED.partition("?")[2], "db.url": DATABASE, "said": [TOKEN, "fine"],
            "http.request.header.authorization": f"Bearer {TOKEN}", "password": "hunter2",
        })  # fmt: skip
        span.record_exception(ValueError(f"could not reach {DATABASE} with {TOKEN}"))
        span.set_status(Status(StatusCode.ERROR, f"with {TOKEN} at {SIGNED}"))
    [made] = kept.get_finished_spans()
    assert isinstance(made, ReadableSpan)
    assert all(secret in made.to_json() for secret in HIDDEN)
    shown = traces.cleaned(made)
    assert [secret for secret in HIDDEN if secret in shown.to_json()] == []
    assert (shown.context, shown.start_time, shown.end_time) == (made.context, made.start_time, made.end_time)
    assert shown.attributes is not None
    assert list(shown.attributes["said"]) == [f"lora_{TOKEN.split('_')[1]}_***", "fine"]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "env",
    [{}, {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9", "OTEL_SDK_DISABLED": "true"}],
    ids=["unset", "disabled"],
)
def test_what_was_not_asked_for_is_not_imported(env: dict[str, str]) -> None:
    script = "import sys; from cli.main import run; run(['whoami'])\n"
    script += "print([name for name in sys.modules if name.startswith('opentelemetry')])"
    ended = subprocess.run(
        [sys.executable, "-c", script],
        env={"PATH": "", "PYTHONPATH": ":".join(sys.path), "HOME": "/nowhere", **env},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert ended.stdout == "[]\n"


def test_without_the_extra_nothing_is_sent_and_everything_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traces, "find_spec", lambda _: None)
    assert not traces.configure({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"}, "cli")
    span = traces.begin("job")
    with traces.within(span):
        assert traces.current() is None
    traces.end(span, "done")
    traces.flush()
