"""What OpenLineage's own client sends of real runs, as a server on this machine receives it; and that nobody who listens can delay or fail a run."""
import json
import socket
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec

import pytest

from mlray.command_line.commands import gate_version, train_run
from mlray.engines.trace_on_openlineage import Lineage, lineage_of
from mlray.governance.registry import open_registry
from mlray.values.errors import DataError
from mlray.values.spec import read_spec
from tests.test_gates import GOOD, page

client = pytest.mark.skipif(find_spec("openlineage") is None, reason="pip install 'mlray[lineage]'")


class Recorder:
    "`with Recorder() as server:` events in `server.events`, in the order in which they came."

    def __init__(self, status: int = 201):
        self.events: list[dict] = []
        self.heads: list[dict] = []
        recorder = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["content-length"]))
                recorder.heads.append({"path": self.path, **{k.lower(): v for k, v in self.headers.items()}})
                recorder.events.append(json.loads(body))
                self.send_response(status)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *args): pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def patient(monkeypatch) -> None:
    "On a machine that is busy with other tests an event may take longer than a person should wait for."
    monkeypatch.setattr(Lineage.close, "__defaults__", (60.0,))


@pytest.fixture
def hung() -> Iterator[str]:
    "A server that takes connections and never says a word."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        yield f"http://127.0.0.1:{s.getsockname()[1]}"


def quick(settings, tmp_path):
    "A spec that trains in a second, and a gate that takes no longer than its kernel."
    (tmp_path / "nbs/gates").mkdir(parents=True)
    page(tmp_path / "nbs/gates/one.ipynb", GOOD, parameters="version: str = ''")
    from mlray.values.settings import shipped
    return read_spec(shipped("configs") / "diabetes.yaml", ["train.epochs=1"])


@client
def test_a_run_and_its_gate_are_told_with_their_tests(settings, tmp_path, monkeypatch, patient):
    spec = quick(settings, tmp_path)
    with Recorder() as server:
        monkeypatch.setenv("OPENLINEAGE_URL", server.url)
        monkeypatch.setenv("OPENLINEAGE_API_KEY", "s3cret")
        run = train_run(spec, settings, "local", quiet=True)
        registry = open_registry(settings)
        gate_version(registry, run.version, ["one"], settings)
        assert gate_version(registry, run.version, ["one"], settings)["one"].reused, "evidence that is reused is not told again"
    assert [(e["job"]["name"], e["eventType"]) for e in server.events] == [("diabetes.train", "START"), ("diabetes.train", "COMPLETE"), ("diabetes.gate.one", "START"), ("diabetes.gate.one", "COMPLETE")]
    assert {h["path"] for h in server.heads} == {"/api/v1/lineage"} and {h["authorization"] for h in server.heads} == {"Bearer s3cret"}
    for e in server.events:
        assert e["job"]["namespace"] == settings.project and e["producer"].startswith("https://") and e["schemaURL"].endswith("RunEvent") and e["job"]["facets"]["jobType"]["integration"] == "MLRAY"
    began, ended, gate_began, gate_ended = server.events
    assert began["run"]["runId"] == ended["run"]["runId"] != gate_began["run"]["runId"] == gate_ended["run"]["runId"] and gate_began["eventTime"] < gate_ended["eventTime"]
    source, read = ended["inputs"][0], run.rows.sources["train"]
    assert source["facets"]["version"]["datasetVersion"] == (read.source_version or read.digest) and source["inputFacets"]["inputStatistics"]["rowCount"] == read.rows
    assert {f["name"] for f in source["facets"]["schema"]["fields"]} == set(spec.contract) and "version" not in began["inputs"][0]["facets"]
    told = {"namespace": settings.project, "name": "diabetes"}
    assert ended["outputs"][0].items() >= told.items() and ended["outputs"][0]["facets"]["version"]["datasetVersion"] == f"1:{run.version.digest}" == gate_ended["inputs"][0]["facets"]["version"]["datasetVersion"]
    assert [(t["name"], t["status"]) for t in ended["run"]["facets"]["test"]["tests"]] == [(f.measure, "pass" if f.passed else "fail") for f in run.verdict.findings]
    test, = gate_ended["run"]["facets"]["test"]["tests"]
    assert (test["name"], test["status"], test["severity"], test["expected"], test["actual"]) == ("x", "pass", "error", "at least 0", "1") and "test" not in gate_began["run"]["facets"]
    asserted, = gate_ended["inputs"][0]["inputFacets"]["dataQualityAssertions"]["assertions"]
    assert (asserted["assertion"], asserted["success"], asserted["severity"]) == ("x: at least 0", True, "error")


@client
def test_a_run_that_fails_says_why(settings, tmp_path, monkeypatch, patient):
    spec = read_spec_of_nothing(tmp_path)
    with Recorder() as server:
        monkeypatch.setenv("OPENLINEAGE_URL", server.url)
        with pytest.raises(DataError): train_run(spec, settings, "local", quiet=True)
    assert [e["eventType"] for e in server.events] == ["START", "FAIL"] and server.events[1]["run"]["facets"]["errorMessage"]["message"].startswith("DataError: ")


def read_spec_of_nothing(tmp_path):
    from mlray.values.spec import parse_spec
    return parse_spec("{name: nothing, data: {train: {file: is-not-there.csv}}, contract: {age: {type: number}, ill: {type: boolean, role: target}}}")


@client
@pytest.mark.parametrize("broken", ["hung", "refused", "500", "no URL"])
def test_who_listens_badly_neither_delays_nor_fails_a_run(settings, tmp_path, monkeypatch, hung, broken, capfd):
    with Recorder(500) as angry:
        monkeypatch.setenv("OPENLINEAGE_URL", {"hung": hung, "refused": "http://127.0.0.1:9", "500": angry.url, "no URL": "what://"}[broken])
        with pytest.raises(DataError, match="is-not-there"): train_run(read_spec_of_nothing(tmp_path), settings, "local", quiet=True)
    said = [line for line in capfd.readouterr().err.splitlines() if "lineage:" in line]
    assert said, "and it is said, once or twice, on stderr"
    assert len(said) <= 2


def test_without_a_client_a_run_goes_on(settings, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("OPENLINEAGE_URL", "http://127.0.0.1:9")
    monkeypatch.setitem(sys.modules, "openlineage", None)
    monkeypatch.setitem(sys.modules, "openlineage.client", None)
    with pytest.raises(DataError, match="is-not-there"): train_run(read_spec_of_nothing(tmp_path), settings, "local", quiet=True)
    assert capfd.readouterr().err.count("pip install 'mlray[lineage]'") == 1


def test_without_a_url_nothing_is_loaded_or_started():
    before = threading.active_count()
    lineage = lineage_of("mlray", environ={})
    lineage.emit(lambda: pytest.fail("no event is made"))
    lineage.close()
    assert lineage.send is None and threading.active_count() == before
    assert lineage_of("mlray", environ={"OPENLINEAGE_URL": "http://127.0.0.1:9", "OPENLINEAGE_DISABLED": "true"}).send is None


def test_events_arrive_in_order_and_what_raises_is_counted():
    seen, said = [], []
    def send(event):
        if event % 3 == 0: raise OSError("no")
        seen.append(event)
    lineage = Lineage(send, say=said.append)
    for n in range(100): lineage.emit(lambda n=n: n)
    lineage.close(60)
    assert seen == [n for n in range(100) if n % 3] and lineage.lost == 34 and len(said) == 1
