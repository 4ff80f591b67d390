"""What must hold whatever the data: one prediction function, bundles that cannot be altered, requests that cannot hurt."""
import json
import os
import shutil
from datetime import UTC, date, datetime, timedelta, timezone

import msgspec
import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, example, given, settings as hypothesis_settings, strategies as st

from mlray.governance.access import new_key
from mlray.governance.registry import bundle_of, open_registry
from mlray.learning.contract import Contract, check
from mlray.learning.request import broken_rules, row_type
from mlray.serving.served import Served
from mlray.serving.service import Service
from mlray.shipping.bundle import decide, load_bundle, predict
from mlray.values.column import Column
from mlray.values.errors import BundleError


@pytest.fixture(scope="module")
def bundle(trained):
    settings, run = trained
    return bundle_of(open_registry(settings), run.version)


@pytest.mark.parametrize("size", [1, 2, 7, 64, 441])
def test_a_row_alone_is_the_row_in_a_batch(trained, bundle, size):
    rows = trained[1].rows.checked["train"].good
    whole = predict(bundle, rows, rows.height)
    pieces = np.concatenate([predict(bundle, rows[i:i + size], min(size, rows.height - i)) for i in range(0, rows.height, size)])
    assert whole.tobytes() == pieces.tobytes()


def test_the_same_spec_gives_the_same_bytes(trained, diabetes, tmp_path):
    from mlray.running.run import train
    settings = trained[0].model_copy(update={"home": tmp_path / "elsewhere"})
    assert train(diabetes, settings).version.digest == trained[1].version.digest


def test_a_bundle_keeps_the_spec_as_it_was(bundle, diabetes):
    assert bundle.spec == diabetes and bundle.spec.id == diabetes.id and list(bundle.spec.contract) == list(diabetes.contract)


def test_a_bundle_tells_nothing_of_the_machine(bundle):
    import getpass
    import socket
    everything = b"".join(p.read_bytes() for p in bundle.path.iterdir())
    names = [name for name in (socket.gethostname(), getpass.getuser()) if len(name) > 5] # shorter ones occur in any weights
    assert not [told for told in (os.getcwd(), "site-packages", *names) if told.encode() in everything]


def alter(what):
    def byte(folder): (folder / "model.onnx").write_bytes((folder / "model.onnx").read_bytes()[:-1] + b"\0")
    def extra(folder): (folder / "extra.py").write_text("raise SystemExit")
    def missing(folder): (folder / "weights.safetensors").unlink()
    def link(folder): (folder / "bundle.json").rename(folder.parent / "b.json"); (folder / "bundle.json").symlink_to(folder.parent / "b.json")
    def folder_(folder): (folder / "bundle.json").unlink(); (folder / "bundle.json").mkdir()
    def pipe(folder): (folder / "bundle.json").unlink(); os.mkfifo(folder / "bundle.json")
    def manifest(folder): (folder / "manifest.json").write_text("[]")
    def rewritten(folder):
        about = json.loads((folder / "bundle.json").read_text())
        about["spec"]["model"]["threshold"] = 0.01
        (folder / "bundle.json").write_text(json.dumps(about))
    return locals()[what]


@pytest.mark.parametrize("what", ["byte", "extra", "missing", "link", "folder_", "pipe", "manifest", "rewritten"])
def test_an_altered_bundle_does_not_load(bundle, tmp_path, what):
    copy = tmp_path / "copy"
    shutil.copytree(bundle.path, copy)
    alter(what)(copy)
    with pytest.raises(BundleError): load_bundle(copy, bundle.digest)


def test_a_consistent_forgery_has_another_digest(bundle, tmp_path):
    import hashlib
    copy = tmp_path / "copy"
    shutil.copytree(bundle.path, copy)
    data = (copy / "bundle.json").read_bytes().replace(b'"threshold": 0.5', b'"threshold": 0.1')
    (copy / "bundle.json").write_bytes(data)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["files"]["bundle.json"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match="has digest"): load_bundle(copy, bundle.digest)


# Whatever JSON comes in: a defined answer, never an exception, never an echo.

@pytest.fixture(scope="module")
def service(bundle):
    key, secret = new_key("admin")
    return Service({"diabetes": Served("1", bundle)}, (key,)), secret


values = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.lists(st.integers(), max_size=2)
names = st.sampled_from(["age", "sex", "bmi", "blood_pressure", "hdl", "progression", "canary"])


@hypothesis_settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.dictionaries(names, values, max_size=7), max_size=3))
def test_any_json_gets_an_answer_or_a_reason(service, rows):
    asked, secret = service
    reply = asked.answer("diabetes", json.dumps({"instances": rows}).encode(), secret, "r")
    assert reply.status in (400, 422) and json.loads(reply.body)["request_id"] == "r"


@hypothesis_settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=st.binary(max_size=60))
def test_any_bytes_get_a_reason(service, body):
    assert service[0].answer("diabetes", body, service[1], "r").status in (400, 422)


def test_a_bad_value_is_never_echoed(service, trained):
    asked, secret = service
    row = {n: trained[1].rows.checked["train"].good[n][0] for n in asked.models["diabetes"].bundle.contract.features}
    for column in row:
        for canary in ("canary-7391", [73917391], {"canary7391": 73917391}):
            reply = asked.answer("diabetes", json.dumps({"instances": [row | {column: canary}]}).encode(), secret, "r")
            assert reply.status == 422 and b"7391" not in reply.body
            assert column in {p["column"] for p in json.loads(reply.body)["problems"]}


def test_every_answer_is_the_prediction(service, trained):
    asked, secret = service
    served = asked.models["diabetes"]
    rows = trained[1].rows.parts.test
    sent = [{n: r[n] for n in served.bundle.contract.features} for r in rows.to_dicts()]
    answer = json.loads(asked.answer("diabetes", json.dumps({"instances": sent}).encode(), secret, "r").body)
    scores = predict(served.bundle, rows, rows.height)
    assert np.array([p["score"] for p in answer["predictions"]], np.float32).tobytes() == scores.tobytes()
    assert [p["label"] == ">140.5" for p in answer["predictions"]] == decide(served.bundle, scores).tolist()
    assert answer["version"] == "1" and answer["digest"] == served.bundle.digest


# A frame and a request are held to the same rules.

contract = Contract(
    {"n": Column(type="integer", min=-5, max=5, nullable=True), "x": Column(type="number", min=0.5, max=2), "c": Column(type="category", values=("a", "b")),
     "b": Column(type="boolean"), "t": Column(type="text", pattern="[a-c]+|z"), "d": Column(type="date", min="2024-01-01", max="2024-12-31"),
     "w": Column(type="datetime", time_zone="Europe/Berlin", max="2024-06-01T00:00:00+02:00", nullable=True), "l": Column(type="datetime", min="2024-01-01T00:00:00"),
     "u": Column(type="duration", min=0, max=3600), "v": Column(type="array", length=2, max=2), "y": Column(type="boolean", role="target")},
    {"small": "n <= x", "late": "d >= '2024-02-01'::date OR b", "not_of_the_request": "y OR NOT y"})
good_row = {"n": 0, "x": 1.0, "c": "a", "b": True, "t": "abc", "d": date(2024, 5, 1), "w": datetime(2024, 5, 1, tzinfo=UTC), "l": datetime(2024, 5, 1), "u": timedelta(minutes=5), "v": [1.0, 2.0]}
moments = st.datetimes(datetime(2022, 1, 1), datetime(2026, 1, 1))
row_values = {"n": st.none() | st.integers(-8, 8), "x": st.none() | st.floats(-1, 3), "c": st.sampled_from(["a", "b", "z"]), "b": st.booleans(), "t": st.text("abdz", min_size=1, max_size=4),
              "d": st.dates(date(2023, 6, 1), date(2025, 6, 1)), "w": st.none() | moments.map(lambda t: t.replace(tzinfo=timezone(timedelta(hours=-3)))), "l": moments,
              "u": st.timedeltas(timedelta(minutes=-9), timedelta(minutes=69)), "v": st.lists(st.floats(-3, 3), min_size=1, max_size=3)}

one_changed = st.sampled_from(sorted(row_values)).flatmap(lambda n: row_values[n].map(lambda value: {n: value}))


def iso(value):
    if isinstance(value, timedelta): return f"{'-' * (value < timedelta())}PT{abs(value) // timedelta(microseconds=1) / 1e6:.6f}S"
    return value.isoformat() if isinstance(value, date) else value


@hypothesis_settings(max_examples=400, deadline=None)
@example(changed={"x": 2.5}) # each end of a range alone, which draws may miss
@example(changed={"x": 0.25})
@example(changed={"n": -6})
@example(changed={"d": date(2025, 1, 1)})
@example(changed={"u": timedelta(seconds=-1)})
@example(changed={"c": "z"})
@given(changed=st.tuples(one_changed, one_changed).map(lambda pair: pair[0] | pair[1])) # few at a time: each rule is also broken alone
def test_frame_and_request_agree(changed):
    row = {**good_row, **changed}
    kinds = {"n": pl.Int64, "x": pl.Float64, "c": pl.String, "b": pl.Boolean, "t": pl.String, "d": pl.Date, "w": pl.Datetime("us", "UTC"), "l": pl.Datetime("us"), "u": pl.Duration("us"), "v": pl.List(pl.Float64)}
    frame = pl.DataFrame([row | {"y": True}], schema=kinds | {"y": pl.Boolean})
    sent = {n: iso(v) for n, v in row.items()}
    text = frame.with_columns(pl.lit(sent[n], pl.String).alias(n) for n in ("d", "w", "l", "u"))
    problems = check(contract, frame).problems
    assert [(p.column, p.rule) for p in check(contract, text).problems] == [(p.column, p.rule) for p in problems]
    try: msgspec.json.decode(json.dumps(sent), type=row_type(contract)); decoded = True
    except msgspec.ValidationError: decoded = False
    said = broken_rules(contract, sent)
    assert (not problems) == decoded == (not said)
    assert {c for c, _ in said if c} == {p.column for p in problems if p.column in contract.columns}


@pytest.mark.parametrize(("column", "bad"), [("d", "2024-02-30"), ("d", "1.5.2024"), ("w", "2024-05-01T12:00:00"), ("l", "2024-05-01T12:00:00Z"), ("u", "300"), ("u", "P"), ("u", "P1Y"), ("t", "abc d")])
def test_text_that_is_no_value_is_refused_by_both(column, bad):
    frame = pl.DataFrame([{n: iso(v) for n, v in good_row.items()} | {"y": True, column: bad}])
    assert [p.column for p in check(contract, frame).problems] == [column] == [c for c, _ in broken_rules(contract, {n: iso(v) for n, v in good_row.items()} | {column: bad})]


def test_no_example_has_a_deadline():
    "Of these tests or of any lesson: what holds, holds on a busy machine, too."
    assert hypothesis_settings().deadline is None
