"""The service as its clients see it: every route over real HTTP, through HAProxy and Ray Serve, while versions change underneath."""
import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import grpc
import httpx
import numpy as np
import polars as pl
import pytest
import tritonclient.grpc as tritongrpc
import tritonclient.http as triton

from mlray.client import AsyncClient, BrokenContract, Client, NotAllowed, NotFound, Patience, ServiceError
from mlray.command_line.commands import deploy_versions
from mlray.engines.grpc_on_ray import CALLS
from mlray.governance.access import ROLES, new_key
from mlray.governance.registry import Registry, Version, add_evidence, add_key, bundle_of, open_registry, promote, revoke_key, rollback
from mlray.judgement.gate import judge
from mlray.monitoring.archive import journaled
from mlray.running.run import train
from mlray.serving.arrow import ARROW
from mlray.serving.asgi import asked_of
from mlray.serving.inference_messages import messages
from mlray.serving.openapi import example_row
from mlray.serving.plan import set_share
from mlray.serving.routes import PUBLIC, ROUTES, Route
from mlray.serving.wire import Refused
from mlray.shipping.bundle import Bundle, predict
from mlray.values.settings import Settings, shipped
from mlray.values.spec import Rule, read_spec
from tests.conftest import free_port, running_below, slower

pytestmark = [pytest.mark.ray, pytest.mark.xdist_group("serve")]
ROWS = 10_000


@dataclass(frozen=True)
class Stack:
    "A service that runs."
    url: str
    registry: Registry
    versions: list[Version]
    bundle: Bundle          # of the first version
    keys: dict[str, str]    # role → text
    settings: Settings

    def ask(self, method: str, path: str, role: str = "admin", key: str | None = None, **more) -> httpx.Response:
        headers = {"authorization": f"Bearer {key or self.keys[role]}", **more.pop("headers", {})}
        return httpx.request(method, self.url + path, headers=headers, timeout=30, **more)

    def predict(self, *rows, name: str = "diabetes", **headers: str) -> httpx.Response:
        return self.ask("POST", f"/v1/models/{name}:predict", json={"instances": list(rows)}, headers={k.replace("_", "-"): v for k, v in headers.items()})


def registered(settings: Settings, name: str, seed: int, *more: str) -> Version:
    return train(read_spec(shipped("configs") / "diabetes.yaml", [f"name={name}", "train.epochs=1", f"train.seed={seed}", "serve.max_rows=20000", *more]), settings).version


@pytest.fixture(scope="module")
def stack(no_shared_cluster, tmp_path_factory):
    "Two models: diabetes with three versions, in the gateway; `distant` in predictors of its own."
    from mlray.engines.cluster_on_ray import cluster
    root = tmp_path_factory.mktemp("serving")
    settings = Settings(root=root, home=root / "home", port=free_port(), grpc_port=free_port(), object_store_mb=100, tracking="disabled", journal=True)
    registry, passed = open_registry(settings), judge({"roc_auc": 0.8}, (Rule(metric="roc_auc", at_least=0.5),))
    versions = [registered(settings, "diabetes", seed) for seed in (1, 2, 3)]
    far = registered(settings, "distant", 1, "serve.placement=apart")
    for version, gate in product([*versions, far], registry.policy.gates): add_evidence(registry, version, gate, passed, b"{}")
    for version in (versions[0], far): promote(registry, version)
    keys = {}
    for role in ROLES:
        key, keys[role] = new_key(role)
        add_key(registry, key)
    with cluster(settings):
        deploy_versions(["diabetes", "distant"], settings)
        yield Stack(settings.url, registry, versions, bundle_of(registry, versions[0]), keys, settings)


@pytest.fixture(scope="module")
def rows(stack) -> pl.DataFrame:
    "Rows that keep the contract, at random."
    draw, columns = np.random.default_rng(7), {}
    for name in stack.bundle.contract.features:
        column = stack.bundle.contract.columns[name]
        low, high = column.min if column.min is not None else 0, column.max if column.max is not None else 300
        columns[name] = draw.choice(column.values, ROWS).tolist() if column.values else draw.integers(low, high, ROWS, endpoint=True).tolist() if column.type == "integer" else draw.uniform(low, high, ROWS).tolist()
    return pl.DataFrame(columns)


def until(true: Callable[[], bool], seconds: float = 30) -> float:
    "How long it took to become true."
    start = time.monotonic()
    while not true():
        assert time.monotonic() - start < seconds, "it did not come true"
        time.sleep(0.02)
    return time.monotonic() - start


# The same rows, by every route.

def arrow(stack, frame: pl.DataFrame, name: str = "diabetes", **more) -> pl.DataFrame:
    reply = stack.ask("POST", f"/v1/models/{name}:predict", content=frame.write_ipc_stream(None).getvalue(), headers={"content-type": ARROW, **more})
    assert reply.status_code == 200 and reply.headers["content-type"] == ARROW, reply.text
    return pl.read_ipc_stream(reply.content)


def tensors(frame: pl.DataFrame) -> dict:
    kinds = {pl.Int64: "INT64", pl.Float64: "FP64", pl.String: "BYTES"}
    return {"id": "mine", "inputs": [{"name": c.name, "shape": [len(c)], "datatype": kinds[c.dtype.base_type()], "data": c.to_list()} for c in frame]}


def test_ten_thousand_rows_have_one_answer(stack, rows):
    "In Arrow, as tensors, as MLflow's frame, as JSON, alone, in another process, and from the bundle itself: to the bit."
    expected = predict(stack.bundle, rows, ROWS)
    by_arrow = arrow(stack, rows)
    assert by_arrow["score"].to_numpy().tobytes() == expected.tobytes()
    assert arrow(stack, rows, "distant")["score"].to_numpy().tobytes() == expected.tobytes()
    some = rows.head(3000) # JSON of more is more than a body may have
    said = [p["score"] for p in stack.predict(*some.to_dicts()).json()["predictions"]]
    assert said == expected[:3000].tolist()
    split = {"dataframe_split": {"columns": some.columns, "data": [list(r) for r in some.rows()]}}
    assert [p["score"] for p in stack.ask("POST", "/invocations?model=diabetes", json=split).json()["predictions"]] == said
    answer = stack.ask("POST", "/v2/models/diabetes/infer", json=tensors(some)).json()
    outputs = {o["name"]: o["data"] for o in answer["outputs"]}
    assert outputs["score"] == said and outputs["label"] == by_arrow["label"].head(3000).to_list() and answer["id"] == "mine" and answer["model_version"] == "1"
    with httpx.Client(headers={"authorization": f"Bearer {stack.keys['admin']}"}) as client:
        one = [client.post(f"{stack.url}/v1/models/{name}:predict", json={"instances": [row]}).json()["predictions"][0]["score"] for name in ("diabetes", "distant") for row in rows.head(200).to_dicts()]
    assert one == 2 * said[:200]


def test_the_way_past_serve_is_the_way_through_it(stack, rows):
    "A body of unknown length goes through Ray Serve, one that is announced is answered in front of it: the same reply, under the same id."
    for row in rows.to_dicts()[:3]:
        body = json.dumps({"instances": [row]}).encode()
        ways = [stack.ask("POST", "/v1/models/diabetes:predict", content=content, headers={"content-type": "application/json", "x-request-id": "mine"}) for content in (body, iter([body]))]
        assert "content-length" in ways[0].request.headers and "content-length" not in ways[1].request.headers
        assert ways[0].content == ways[1].content and {w.status_code for w in ways} == {200}
        past, through = ({k: v for k, v in w.headers.items() if k != "date"} for w in ways)
        assert past == through and past["x-request-id"] == "mine"


def test_binary_tensors_as_triton_sends_them(stack, rows):
    some, tail, inputs = rows.head(5), b"", []
    for c in some:
        raw = b"".join(len(v.encode()).to_bytes(4, "little") + v.encode() for v in c) if c.dtype == pl.String else c.to_numpy().astype("<i8" if c.dtype == pl.Int64 else "<f8").tobytes()
        inputs.append({"name": c.name, "shape": [5, 1], "datatype": {pl.Int64: "INT64", pl.Float64: "FP64", pl.String: "BYTES"}[c.dtype.base_type()], "parameters": {"binary_data_size": len(raw)}})
        tail += raw
    head = json.dumps({"inputs": inputs, "outputs": [{"name": "score", "parameters": {"binary_data": True}}]}).encode()
    reply = stack.ask("POST", "/v2/models/diabetes/versions/1/infer", content=head + tail, headers={"inference-header-content-length": str(len(head)), "content-type": "application/octet-stream"})
    (output,) = reply.json()["outputs"]
    assert output["name"] == "score" and output["shape"] == [5] and np.array(output["data"], np.float32).tobytes() == predict(stack.bundle, some, 5).tobytes()


# The clients of others.

def triton_http(stack) -> triton.InferenceServerClient: return triton.InferenceServerClient(stack.url.removeprefix("http://"), network_timeout=60.0)


def triton_grpc(stack) -> tritongrpc.InferenceServerClient: return tritongrpc.InferenceServerClient(f"127.0.0.1:{stack.settings.grpc_port}")


def triton_inputs(module, frame: pl.DataFrame, **how) -> list:
    made = []
    for c in frame:
        values = np.array([v.encode() for v in c], object) if c.dtype == pl.String else c.to_numpy()
        made.append(module.InferInput(c.name, [len(c)], {pl.Int64: "INT64", pl.Float64: "FP64", pl.String: "BYTES"}[c.dtype.base_type()]))
        made[-1].set_data_from_numpy(values, **how)
    return made


def bearer(stack, role: str = "admin") -> dict[str, str]: return {"authorization": f"Bearer {stack.keys[role]}"}


def test_triton_clients_work_unchanged(stack, rows):
    "Over HTTP, in binary tensors and in JSON, and over gRPC: health, metadata, answers to the bit."
    some, headers = rows.head(300), bearer(stack)
    expected = predict(stack.bundle, some, 300)
    with triton_http(stack) as http, triton_grpc(stack) as calls:
        for client in (http, calls):
            assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("diabetes", headers=headers) and client.is_model_ready("diabetes", "1", headers=headers)
        assert http.get_server_metadata(headers=headers)["name"] == calls.get_server_metadata(headers=headers).name == "mlray"
        told, said = calls.get_model_metadata("diabetes", headers=headers), http.get_model_metadata("diabetes", headers=headers)
        assert [(i.name, i.datatype, list(i.shape)) for i in told.inputs] == [(i["name"], i["datatype"], i["shape"]) for i in said["inputs"]] and list(told.versions) == said["versions"]
        answers = [http.infer("diabetes", triton_inputs(triton, some, binary_data=binary), headers=bearer(stack)) for binary in (True, False)]
        answers += [calls.infer(name, triton_inputs(tritongrpc, some), headers=headers, request_id="mine") for name in ("diabetes", "distant")]
        assert [a.as_numpy("score").tobytes() for a in answers] == [expected.tobytes()] * 4
        labels = [[v.decode() if isinstance(v, bytes) else v for v in a.as_numpy("label")] for a in answers]
        assert labels == [arrow(stack, some)["label"].to_list()] * 4 and answers[2].get_response().id == "mine" and answers[2].get_response().model_version == "1"
        only = calls.infer("diabetes", triton_inputs(tritongrpc, some.head(2)), outputs=[tritongrpc.InferRequestedOutput("score")], headers={"x-api-key": stack.keys["predictor"]})
        assert [o.name for o in only.get_response().outputs] == ["score"]


@pytest.mark.chaos
def test_ten_thousand_rows_over_grpc(stack, rows):
    "In raw bytes and in typed fields, by Triton's client over HTTP and over gRPC, in bulk and alone, together and apart: as the bundle says, to the bit."
    expected, headers, different = predict(stack.bundle, rows, ROWS), bearer(stack), Counter()
    with triton_grpc(stack) as calls, triton_http(stack) as http, grpc.insecure_channel(f"127.0.0.1:{stack.settings.grpc_port}") as channel:
        for name in ("diabetes", "distant"):
            different[f"gRPC raw, {name}"] = int((calls.infer(name, triton_inputs(tritongrpc, rows), headers=headers).as_numpy("score") != expected).sum())
            different[f"HTTP, 5 000 rows, {name}"] = int((http.infer(name, triton_inputs(triton, rows.head(5000)), headers=bearer(stack)).as_numpy("score") != expected[:5000]).sum())
        typed = messages()["ModelInferResponse"].FromString(channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")(infer_message(rows), metadata=list(headers.items())))
        different["gRPC typed"] = int((np.array(typed.outputs[1].contents.fp32_contents, np.float32) != expected).sum())
        different["Arrow"] = int((arrow(stack, rows)["score"].to_numpy() != expected).sum())
        different["gRPC, one row each"] = sum(int(calls.infer("diabetes", triton_inputs(tritongrpc, rows[i]), headers=headers).as_numpy("score")[0] != expected[i]) for i in range(ROWS))
    print({k: f"{v} of {ROWS} differ" for k, v in different.items()})
    assert not different.total()


def call(stack, name: str, body: bytes, *metadata: tuple[str, str]) -> tuple[str, str, dict[str, str]]:
    "A call of gRPC: its status, its details, what came in its trailers."
    with grpc.insecure_channel(f"127.0.0.1:{stack.settings.grpc_port}") as channel:
        try:
            _, done = channel.unary_unary(f"/inference.GRPCInferenceService/{name}").with_call(body, metadata=metadata, timeout=60)
        except grpc.RpcError as error: done = error
        return done.code().name, done.details() or "", {k: v for k, v in done.trailing_metadata() or ()}


def infer_message(frame: pl.DataFrame, model: str = "diabetes", **more) -> bytes:
    "A request with typed fields."
    kinds = {pl.Int64: ("INT64", "int64_contents"), pl.Float64: ("FP64", "fp64_contents"), pl.String: ("BYTES", "bytes_contents")}
    inputs = [{"name": c.name, "shape": [len(c)], "datatype": (kind := kinds[c.dtype.base_type()])[0], "contents": {kind[1]: [v.encode() if isinstance(v, str) else v for v in c]}} for c in frame]
    return messages()["ModelInferRequest"](**{"model_name": model, "inputs": inputs} | more).SerializeToString()


def test_grpc_refuses_as_http_does(stack, rows):
    "Who may not, what is not there, what breaks the contract; and nothing of it is the service's fault."
    one, key = rows.head(1), ("authorization", f"Bearer {stack.keys['predictor']}")
    for route, role in product(CALLS.items(), [*ROLES, "forged"]):
        body = infer_message(one) if route[0] == "ModelInfer" else messages()[f"{route[0]}Request"](**({"name": "diabetes"} if route[0].startswith("Model") else {})).SerializeToString()
        action = next(r.action for r in ROUTES if r.name == route[1])
        text = stack.keys["admin"][:-1] + "~" if role == "forged" else stack.keys[role]
        expected = "OK" if action == PUBLIC else "UNAUTHENTICATED" if role == "forged" else "OK" if action in ROLES[role] else "PERMISSION_DENIED"
        assert call(stack, route[0], body, ("authorization", f"Bearer {text}"))[0] == expected, (route, role)
    code, details, trailers = call(stack, "ModelInfer", infer_message(one.with_columns(pl.lit(200, pl.Int64).alias("age"))), key, ("x-request-id", "g-17"))
    assert (code, details.splitlines()[1], trailers["mlray-error"], trailers["x-request-id"]) == ("INVALID_ARGUMENT", "row 0: age: at most 120", "contract", "g-17")
    assert call(stack, "ModelInfer", infer_message(one, "nobody"), key)[0] == "NOT_FOUND" and call(stack, "ModelInfer", infer_message(one, model_version="99"), key)[0] == "NOT_FOUND"
    assert call(stack, "ModelInfer", infer_message(one), key, ("x-mlray-version", "3"))[0] in ("PERMISSION_DENIED", "NOT_FOUND")
    assert call(stack, "ModelInfer", b"\0" * (2**24 + 1), key)[0] == "RESOURCE_EXHAUSTED"
    whole, tensor = infer_message(one), {"name": "age", "datatype": "INT64", "shape": [1]}
    odd = [whole[:i] for i in range(1, len(whole), 29)] + [whole[:i] + b"\xff" * 4 + whole[i + 4:] for i in range(0, len(whole), 17)] + [messages()["ModelInferRequest"](model_name="diabetes", **more).SerializeToString() for more in (
        {}, {"inputs": [tensor]}, {"inputs": [tensor | {"datatype": "FP128"}]}, {"inputs": [tensor | {"shape": [10**15]}]}, {"inputs": [tensor | {"shape": []}]}, {"inputs": [tensor], "raw_input_contents": [b"123"]}, {"inputs": [tensor] * 2, "raw_input_contents": [b"12345678"]},
        {"inputs": [tensor | {"contents": {"fp32_contents": [1.0]}}]}, {"inputs": [tensor | {"datatype": "BYTES", "contents": {"bytes_contents": [b"\xff"]}}]}, {"inputs": [tensor | {"datatype": "FP64", "contents": {"fp64_contents": [float("nan")]}}]}, {"inputs": [tensor], "outputs": [{"name": "nobody"}]})]
    told = {call(stack, "ModelInfer", body, key)[0] for body in odd}
    assert told <= {"INVALID_ARGUMENT", "NOT_FOUND", "OK"} and "INVALID_ARGUMENT" in told, told
    assert call(stack, "ModelStreamInfer", b"", key)[0] == "UNIMPLEMENTED"


def test_an_mlflow_client_works_unchanged(stack, rows, tmp_path, monkeypatch):
    "MLflow's own client of a scoring server; the key stands where `requests` looks for passwords, and the model is the one that the key is for."
    from mlflow.pyfunc.scoring_server.client import ScoringServerClient
    key, text = new_key("predictor", models=("diabetes",))
    add_key(stack.registry, key)
    until(lambda: stack.ask("POST", "/v1/models/diabetes:predict", key=text, json={"instances": rows.head(1).to_dicts()}).status_code == 200)
    (tmp_path / "netrc").write_text(f"machine 127.0.0.1 login mlray password {text}\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    client = ScoringServerClient("127.0.0.1", stack.settings.port)
    client.wait_server_ready(timeout=30)
    said = client.invoke(rows.head(300).to_pandas()).get_predictions()
    assert said["score"].tolist() == predict(stack.bundle, rows.head(300), 300).tolist()
    with pytest.raises(Exception, match=r"error code 422.*at most 120"): client.invoke(rows.head(1).with_columns(pl.lit(200).alias("age")).to_pandas())


# What is answered later.

def test_a_job_answers_what_a_request_would(stack, rows):
    "JSON and Arrow in, JSON and Arrow out; the same key is the same job; its rows are journaled; nobody else sees it."
    with Client(stack.url, stack.keys["predictor"]) as client, Client(stack.url, stack.keys["tester"]) as other:
        job = client.submit("diabetes", rows, key="monday")
        assert client.submit("diabetes", rows, key="monday").id == job.id and (job.rows, job.version) == (ROWS, "1")
        small = client.submit("diabetes", rows.head(5).to_dicts())
        assert client.wait(job.id, 120).state == "done" and client.wait(small.id, 120).state == "done"
        expected = predict(stack.bundle, rows, ROWS)
        assert pl.read_ipc_stream(client.result_stream(job.id))["score"].to_numpy().tobytes() == expected.tobytes()
        said = client.result(small.id)
        assert [p["score"] for p in said.predictions] == expected[:5].tolist() and list(said.predictions) == stack.predict(*rows.head(5).to_dicts()).json()["predictions"]
        with pytest.raises(NotFound): other.job(job.id)
        with pytest.raises(ServiceError, match="named another job"): client.submit("diabetes", rows.head(3), key="monday")
        with pytest.raises(BrokenContract, match="row 1: age: at most 120"): client.submit("diabetes", rows.head(2).with_columns(pl.Series("age", [50, 200])))
        gone = client.cancel(client.submit("diabetes", rows).id)
        assert gone.state in ("cancelled", "done")
    kept = journaled(stack.settings.home / "journal", "diabetes").filter(pl.col("id").str.starts_with(job.id)).collect()
    assert kept.height == ROWS and kept["caller"].unique().to_list() == [stack.keys["predictor"].split("_")[1]]


def test_metadata_says_what_infer_takes(stack):
    told = stack.ask("GET", "/v2/models/diabetes").json()
    assert [i["name"] for i in told["inputs"]] == list(stack.bundle.contract.features) and told["platform"] == "onnx_onnxv1" and "1" in told["versions"]
    assert stack.ask("GET", "/v2/models/diabetes/ready").json()["ready"] and stack.ask("GET", "/v2/models/diabetes/versions/99/ready").status_code == 404
    assert stack.ask("GET", "/v1/models").json() == {"models": ["diabetes", "distant"]} and stack.ask("GET", "/v2").json()["name"] == "mlray"
    card = stack.ask("GET", "/v1/models/diabetes/card", "viewer")
    assert card.headers["content-type"].startswith("text/markdown") and "# Model card: diabetes/1" in card.text, "as the registry has it now"


def test_explanations_come_with_the_predictions(stack, rows):
    (row,) = rows.head(1).to_dicts()
    said = stack.ask("POST", "/v1/models/diabetes:explain", json={"instances": [row]}).json()
    assert said["predictions"] == stack.predict(row).json()["predictions"] and {r["feature"] for r in said["explanations"][0]["reasons"]} <= set(row)
    assert stack.ask("POST", "/v1/models/diabetes:explain", json={"instances": [row] * 17}).status_code == 422


# Who may.

def test_every_route_for_every_role(stack, rows):
    (row,) = rows.head(1).to_dicts()
    jobs = {role: stack.ask("POST", "/v1/models/diabetes/jobs", role, json={"instances": [row]}).json().get("id", "0" * 32) for role in ROLES}
    bodies = {"predict": {"instances": [row]}, "submit": {"instances": [row]}, "explain": {"instances": [row]}, "invoke": {"instances": [row]}, "infer": tensors(rows.head(1)), "feedback": {"feedback": [{"request_id": "r-1", "value": True}]}}
    for route, role in product(ROUTES, [*ROLES, "nobody", "forged"]):
        path = route.path.replace("{model}", "diabetes").replace("{version}", "1").replace("{job}", jobs.get(role, "0" * 32)) + ("?model=diabetes" if route.name == "invoke" else "")
        if route.name == "result" and route.action in ROLES.get(role, ()): until(lambda path=path, role=role: stack.ask("GET", path.removesuffix("/result"), role).json()["state"] == "done", 120)
        key = {"nobody": "none", "forged": stack.keys["admin"][:-1] + "~"}.get(role)
        reply = stack.ask(route.method, path, role, key, **({"json": bodies[route.name]} if route.method == "POST" else {}))
        expected = 200 if route.action == PUBLIC else 401 if key else (202 if route.name in ("feedback", "submit") else 200) if route.action in ROLES[role] else 403
        assert reply.status_code == expected, (route, role, reply.text)


def test_the_description_has_every_route_and_its_examples_are_answered(stack):
    told = stack.ask("GET", "/openapi.json", "viewer").json()
    for route in ROUTES: assert route.method.lower() in told["paths"][route.path.replace("{model}", "diabetes")], route
    asked = 0
    for path, methods in told["paths"].items():
        if "post" not in methods: continue
        example = methods["post"]["requestBody"]["content"]["application/json"]["example"]
        reply = stack.ask("POST", path.replace("{version}", "1") + ("?model=diabetes" if path == "/invocations" else ""), json=example)
        assert reply.status_code == (202 if path == "/v1/feedback" or path.endswith("/jobs") else 200), (path, reply.text)
        asked += 1
    assert asked == 12 # five of each model, /invocations, and /v1/feedback
    assert example_row(stack.bundle.contract).keys() == set(stack.bundle.contract.features)


# What is sent by mistake, or not by mistake.

def test_bad_input_is_never_the_services_fault(stack, rows):
    (row,) = rows.head(1).to_dicts()
    stream, whole = rows.head(3).write_ipc_stream(None).getvalue(), json.dumps({"instances": [row]}).encode()
    tensor = tensors(rows.head(2))
    def mended(**change): return json.dumps({"inputs": [tensor["inputs"][0] | change, *tensor["inputs"][1:]]}).encode()
    values = [None, "", "x" * 70_000, -0.0, 1e308, -(2**63), 2**63, True, [], {}, [[[]]], "\u0000", "🙂", "\u202e", "NaN", "0001-01-01"]
    bodies = [b"", b"{", b"null", b"[]", b"\xff\xfe{\x00", b"\xef\xbb\xbf{}", whole.decode().encode("utf-16"), b'{"instances": [NaN]}', b'{"instances": [{"age": Infinity}]}', b'{"instances": [{"age": 1e999}]}', b'{"instances": ["\\ud800"]}',
              b"[" * 100_000, b'{"a":' * 50_000, b"9" * 5000, b'{"instances": []}', b'{"instances": [{}]}', b'{"instances": [[1,2]]}', whole[:-1], whole + b"x", whole.replace(b'"age"', b'"age": 1, "age"'), b'{"instances": [' + b"{}," * 1000 + b"{}]}",
              *(json.dumps({"instances": [row | {c: v}]}).encode() for c in ("age", "sex", "bmi") for v in values), json.dumps({"instances": [row | {"shoe": 44}]}).encode(), json.dumps({"instances": [row], "x": 1}).encode(), b"x" * (2**20 + 1)]
    infers = [mended(**c) for c in ({"shape": []}, {"shape": [-1]}, {"shape": [2, 0]}, {"shape": [10**12]}, {"shape": [1] * 40}, {"datatype": "FP128"}, {"datatype": "BYTES"}, {"data": [[1], [2, 3]]}, {"data": None}, {"data": ["x", None]}, {"name": "nobody"}, {"parameters": {"binary_data_size": 10**9}})]
    arrows = [stream[:i] for i in (1, 8, 100, len(stream) - 9)] + [stream[:i] + b"\xff" * 16 + stream[i + 16:] for i in range(0, len(stream) - 16, 97)] + [rows.head(0).write_ipc_stream(None).getvalue(), rows.head(3).drop("age").write_ipc_stream(None).getvalue(),
              rows.head(3).with_columns(pl.lit("x").alias("age")).write_ipc_stream(None).getvalue(), rows.head(3).with_columns(pl.lit(float("nan")).alias("bmi")).write_ipc_stream(None).getvalue(), b"ARROW1\0\0" + b"\0" * 64]
    seen = set()
    with httpx.Client(headers={"authorization": f"Bearer {stack.keys['admin']}"}, timeout=30) as client:
        for path, kind, corpus in [("/v1/models/diabetes:predict", "application/json", bodies), ("/v1/models/distant:predict", "application/json", bodies[:20]), ("/v1/models/diabetes:explain", "application/json", bodies[:20]), ("/invocations?model=diabetes", "application/json", bodies),
                                   ("/v2/models/diabetes/infer", "application/json", [*bodies, *infers]), ("/v1/models/diabetes:predict", ARROW, [*arrows, whole, b""])]:
            for body in corpus:
                reply = client.post(stack.url + path, content=body, headers={"content-type": kind})
                assert reply.status_code < 500, (path, kind, body[:200], reply.text)
                if reply.status_code != 200: assert reply.json()["error"] and reply.json()["request_id"]
                seen.add(reply.status_code)
        for path in ("/v1/models/..%2f..%2fetc:predict", "/v1/models/%00:predict", "/v1/models/" + "a" * 5000, "/v2/models/diabetes/versions/1e9/infer", "//", "/invocations/", "/v1/models/diabetes:delete", "/metrics/../v1"):
            assert client.post(stack.url + path, content=b"{}").status_code in (404, 405)
        assert client.post(f"{stack.url}/v1/models/diabetes:predict", content=whole, headers={"content-type": "text/csv"}).status_code == 415
        assert client.post(f"{stack.url}/v1/models/diabetes:predict", content=whole, headers={"content-encoding": "gzip"}).status_code == 415
        assert client.get(f"{stack.url}/v1/models/diabetes:predict").status_code == 405
        assert client.post(f"{stack.url}/invocations", content=whole).json()["error"] == "which_model"
    assert {200, 400, 413, 422} <= seen


@pytest.mark.parametrize(("pieces", "left"), [(2, 0), (100, 100 - 65)]) # of a MiB: all of it, or as much as a body may have anywhere
def test_a_body_that_is_too_large_leaves_its_connection_usable(pieces, left):
    coming = [{"type": "http.request", "body": b"x" * 2**20, "more_body": i + 1 < pieces} for i in range(pieces)]
    async def receive(): return coming.pop(0)
    with pytest.raises(Refused) as refused: asyncio.run(asked_of({"method": "POST", "query_string": b""}, {}, receive, Route("predict", "POST", "/", "predict", ""), {}, "1"))
    assert refused.value.status == 413 and len(coming) == left and ("Connection" in refused.value.headers) == bool(left)


def test_a_stranger_cannot_lift_the_time_limit_nor_hold_a_connection(stack, rows):
    (row,) = rows.head(1).to_dicts()
    reply = stack.predict(row, x_request_timeout_seconds="0.000001") # were it not taken away, this would be 408
    assert reply.status_code == 200
    address = stack.url.removeprefix("http://").split(":")
    with socket.create_connection((address[0], int(address[1])), timeout=40) as slow:
        slow.sendall(b"POST /v1/models/diabetes:predict HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{")
        said = slow.recv(4096) # HAProxy gives up after 10 s
        assert not said or b" 408 " in said


# While versions change.

def test_traffic_follows_the_registry_while_it_is_asked(stack, rows):
    "Canary, override, shadow, promotion and roll-back, each within two seconds and without an error."
    registry, (_, two, three), (row,) = stack.registry, stack.versions, rows.head(1).to_dicts()
    promote(registry, two, "canary")
    promote(registry, three, "shadow")
    set_share(registry, "diabetes", 0.1)
    took = [until(lambda: stack.ask("GET", "/v1/models/diabetes").json()["traffic"]["share"] == 0.1)]
    with httpx.Client(headers={"authorization": f"Bearer {stack.keys['predictor']}"}) as client:
        def arm(key: str) -> tuple[str, str]:
            said = client.post(f"{stack.url}/v1/models/diabetes:predict", json={"instances": [row]}, headers={"x-routing-key": key}).json()
            return said["arm"], said["version"]
        first = [arm(f"caller-{i}") for i in range(1000)]
        assert set(first) == {("production", "1"), ("canary", "2")} and 70 <= first.count(("canary", "2")) <= 130
        assert [arm(f"caller-{i}") for i in range(200)] == first[:200] # sticky
    tested = stack.ask("POST", "/v1/models/diabetes:predict", "tester", json={"instances": [row]}, headers={"x-mlray-version": "3"}).json()
    assert (tested["version"], tested["arm"]) == ("3", "override") and tested["predictions"][0]["score"] == float(predict(bundle_of(registry, three), rows.head(1), 1)[0])
    assert stack.ask("POST", "/v1/models/diabetes:predict", "predictor", json={"instances": [row]}, headers={"x-mlray-version": "3"}).status_code == 403
    told = stack.ask("GET", "/metrics", "viewer").text
    assert 'mlray_canary_weight_ratio{model="diabetes"' in told and 'role="shadow",version="3"} 1.0' in told and "mlray_request_duration_seconds_bucket" in told
    until(lambda: "mlray_shadow_predictions_total{" in stack.ask("GET", "/metrics").text)
    for act, version in ((lambda: promote(registry, two), "2"), (lambda: rollback(registry, "diabetes"), "1")):
        set_share(registry, "diabetes", 0.0)
        act()
        took.append(until(lambda version=version: stack.predict(row).json()["version"] == version))
    key, text = new_key("predictor")
    add_key(registry, key)
    took.append(until(lambda: stack.ask("POST", "/v1/models/diabetes:predict", key=text, json={"instances": [row]}).status_code == 200))
    revoke_key(registry, key.id, "lost")
    took.append(until(lambda: stack.ask("POST", "/v1/models/diabetes:predict", key=text, json={"instances": [row]}).status_code == 401))
    print("followed within", [f"{t:.2f} s" for t in took])
    assert sorted(took)[len(took) // 2] < 2 * slower()


def test_the_client(stack, rows):
    some = rows.head(3).to_dicts()
    with Client(stack.url, stack.keys["admin"]) as client:
        said = client.predict("diabetes", some, request_id="r-17")
        assert said.request_id == "r-17" and said.version == "1" and [p["score"] for p in said.predictions] == predict(stack.bundle, rows.head(3), 3).tolist()
        assert client.models() == ["diabetes", "distant"] and len(client.explain("diabetes", some[:1]).explanations) == 1
        with pytest.raises(BrokenContract, match="row 0: age: at most 120") as refused: client.predict("diabetes", [some[0] | {"age": 200}])
        assert refused.value.status == 422 and refused.value.problems[0]["column"] == "age"
    with Client(stack.url, "mlr_00000000_x") as stranger, pytest.raises(NotAllowed): stranger.predict("diabetes", some)

    async def many() -> list[str]:
        async with AsyncClient(stack.url, stack.keys["predictor"]) as client: return [r.version for r in await asyncio.gather(*(client.predict("distant", some) for _ in range(50)))]
    assert asyncio.run(many()) == ["1"] * 50


def kill(deployment: str) -> None:
    "The replicas of a deployment, with -9."
    for process, name in running_below().items():
        if name.startswith("ray::Serve") and f":{deployment}" in name: process.kill()


@pytest.mark.chaos
def test_a_job_survives_whoever_works_on_it(stack, rows):
    "200 000 rows, while the worker, the gateway and the worker again are killed: one answer a row, to the bit, and one row in the journal."
    many, seen = pl.concat([rows] * 20), []
    with Client(stack.url, stack.keys["predictor"], Patience(seconds=120, attempts=60)) as client:
        job = client.submit("diabetes", many, key="kills")
        for deployment in ("Jobs", "Gateway", "Jobs"):
            before = client.job(job.id).done
            until(lambda before=before: client.job(job.id).done > before, 300)
            seen.append(client.job(job.id).done)
            kill(deployment)
        assert client.wait(job.id, 600).state == "done"
        scores = pl.read_ipc_stream(client.result_stream(job.id))["score"].to_numpy()
    kept = journaled(stack.settings.home / "journal", "diabetes").filter(pl.col("id").str.starts_with(job.id)).collect()
    print(f"killed at {seen} of {many.height} rows; {int((scores != np.tile(predict(stack.bundle, rows, ROWS), 20)).sum())} differ; {kept.height} rows journaled")
    assert scores.tobytes() == np.tile(predict(stack.bundle, rows, ROWS), 20).tobytes() and kept.height == many.height


def test_a_file_is_asked_on_the_command_line(stack, rows, tmp_path):
    rows.head(20).write_csv(tmp_path / "rows.csv")
    done = subprocess.run([sys.executable, "-c", "from mlray.cli import main; main()", "ask", "diabetes", "--file", str(tmp_path / "rows.csv"), "--url", stack.url, "--json"], capture_output=True, text=True, env=os.environ | {"MLRAY_API_KEY": stack.keys["predictor"]}, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["rows"], told["version"]) == (20, "1") and pl.read_parquet(told["answers"])["score"].to_numpy().tobytes() == predict(stack.bundle, rows.head(20), 20).tobytes()


# What the description promises.

def promises(stack, examples: int) -> Counter:
    "Requests that keep the description and requests that break it, by schemathesis, of every operation: each answer must be one that is described."
    import schemathesis
    from hypothesis import HealthCheck, Phase, given, settings as hypothesis_settings
    from hypothesis.errors import Unsatisfiable
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi import checks
    promised = [not_a_server_error, checks.status_code_conformance, checks.content_type_conformance, checks.response_schema_conformance, checks.response_headers_conformance, checks.unsupported_method]
    seen: Counter = Counter()
    for found in schemathesis.openapi.from_url(f"{stack.url}/openapi.json", headers=bearer(stack)).get_all_operations():
        for mode in (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE):
            @given(case=found.ok().as_strategy(generation_mode=mode))
            @hypothesis_settings(max_examples=examples, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck), phases=(Phase.generate,))
            def ask(case) -> None:
                reply = case.call(headers=bearer(stack))
                seen[reply.status_code] += 1
                case.validate_response(reply, checks=promised)
            try: ask()
            except Unsatisfiable: assert mode is schemathesis.GenerationMode.NEGATIVE # a health check takes nothing, so nothing is wrong for it
    return seen


def test_answers_are_as_described(stack):
    assert {200, 202, 404, 422} <= promises(stack, 2).keys()


@pytest.mark.chaos
def test_many_answers_are_as_described(stack):
    seen = promises(stack, 100)
    print(f"{seen.total()} requests of schemathesis: {dict(sorted(seen.items()))}")
    assert seen.total() > 3000 and not any(status >= 500 for status in seen)
