"""What must hold whatever the data: one prediction function, bundles that cannot be altered, requests that cannot hurt."""
import json
import os
import shutil

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings as hypothesis_settings, strategies as st

from mlray.access import new_key
from mlray.bundle import decide, load_bundle, predict
from mlray.contract import Contract, broken_rules, check, row_type
from mlray.errors import BundleError
from mlray.registry import bundle_of, open_registry
from mlray.service import Served, Service
from mlray.spec import Column


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
    from mlray.run import train
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

contract = Contract({"n": Column(type="integer", min=-5, max=5, nullable=True), "x": Column(type="number", min=0.5), "c": Column(type="category", values=("a", "b")),
                     "b": Column(type="boolean"), "y": Column(type="boolean", role="target")})


@hypothesis_settings(max_examples=200, deadline=None)
@given(n=st.none() | st.integers(-8, 8), x=st.floats(-1, 3), c=st.sampled_from(["a", "b", "z"]), b=st.booleans())
def test_frame_and_request_agree(n, x, c, b):
    import msgspec
    import polars as pl
    row = {"n": n, "x": x, "c": c, "b": b}
    frame = pl.DataFrame([{**row, "y": True}], schema={"n": pl.Int64, "x": pl.Float64, "c": pl.String, "b": pl.Boolean, "y": pl.Boolean})
    good = check(contract, frame).good.height == 1
    try: msgspec.json.decode(json.dumps(row), type=row_type(contract)); decoded = True
    except msgspec.ValidationError: decoded = False
    assert good == decoded == (not broken_rules(contract, row))
