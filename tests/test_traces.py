"""Traces of requests, as a receiver of OTLP on loopback gets them from a service on Ray Serve; `-m chaos`, for it starts one of its own."""
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import grpc
import httpx
import polars as pl
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from mlray.command_line.commands import deploy_versions
from mlray.governance.access import new_key
from mlray.governance.registry import add_evidence, add_key, bundle_of, open_registry, promote
from mlray.judgement.gate import judge
from mlray.serving.openapi import example_row
from mlray.values.settings import Settings
from mlray.values.spec import Rule
from tests.conftest import free_port
from tests.test_serving import infer_message, registered

pytestmark = [pytest.mark.ray, pytest.mark.chaos, pytest.mark.xdist_group("ray")]
TRACE = "0af7651916cd43dd8448eb211c80319c"


@pytest.fixture
def receiver():
    "Its URL, and the spans it was sent, each with the name of its service."
    spans = []
    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces"
            for sent in ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["content-length"]))).resource_spans:
                service = next(a.value.string_value for a in sent.resource.attributes if a.key == "service.name")
                spans.extend((service, span) for scope in sent.scope_spans for span in scope.spans)
            self.send_response(200)
            self.end_headers()
        def log_message(self, *words) -> None: pass
    server = ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", spans
    server.shutdown()


def test_a_trace_goes_through_gateway_and_predictor(tmp_path, receiver):
    from mlray.engines.cluster_on_ray import cluster
    url, spans = receiver
    settings = Settings(root=tmp_path, home=tmp_path / "home", port=free_port(), grpc_port=free_port(), object_store_mb=100, tracking="disabled", journal=True, traces=url)
    registry, version = open_registry(settings), registered(settings, "distant", 1, "serve.placement=apart")
    for gate in registry.policy.gates: add_evidence(registry, version, gate, judge({"roc_auc": 0.8}, (Rule(metric="roc_auc", at_least=0.5),)), b"{}")
    promote(registry, version)
    key, text = new_key()
    add_key(registry, key)
    row, headers = example_row(bundle_of(registry, version).contract), {"authorization": f"Bearer {text}", "traceparent": f"00-{TRACE}-b7ad6b7169203331-01"}
    with cluster(settings):
        deploy_versions(["distant"], settings)
        assert httpx.post(f"{settings.url}/v1/models/distant:predict", json={"instances": [row]}, headers=headers, timeout=60).status_code == 200
        with grpc.insecure_channel(f"127.0.0.1:{settings.grpc_port}") as channel: channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")(infer_message(pl.DataFrame([row]), "distant"), metadata=list(headers.items()))
        end = time.monotonic() + 60
        while sum(s.name == "score" for _, s in list(spans)) < 2 or sum(service == "mlray" and s.trace_id.hex() == TRACE for service, s in list(spans)) < 14:
            assert time.monotonic() < end, [s.name for _, s in spans]
            time.sleep(0.1)
    ours = [(service, s) for service, s in spans if s.trace_id.hex() == TRACE]
    roots = {s.span_id: s.name for service, s in ours if s.parent_span_id.hex() == "b7ad6b7169203331"}
    assert set(roots.values()) == {"POST /v1/models/{model}:predict", "inference.GRPCInferenceService/ModelInfer"}
    for root in roots: assert {s.name for service, s in ours if service == "mlray" and s.parent_span_id == root} == {"admit", "decode", "route", "predict", "encode", "journal"}
    assert {s.parent_span_id for service, s in ours if service == "mlray-predictor" and s.name == "score"} == set(roots)
    print({s.name: f"{(s.end_time_unix_nano - s.start_time_unix_nano) / 1e6:.2f} ms" for _, s in ours})
