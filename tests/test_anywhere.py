"""`train(spec, on=…)`: the same value from here, from Ray, and from a cluster's job server; what cannot be is refused before anything starts."""
import asyncio
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp

import pytest

import mlray
from mlray.command_line.anywhere import Gated, Trained
from mlray.engines.submit_on_ray import token_here
from mlray.governance.registry import bundle_of, open_registry, version
from mlray.running.tracking import MemoryTracker
from mlray.values.errors import MlrayError, SettingsError, SpecError, Unavailable
from mlray.values.settings import Settings, read_settings, shipped
from mlray.values.spec import read_spec
from tests.conftest import free_port

DIABETES = shipped("configs") / "diabetes.yaml"


@pytest.mark.parametrize(("asked", "error", "words"), [
    ({"on": "ray://head:10001"}, SettingsError, "Ray's client is not used"), ({"on": "nowhere"}, SettingsError, r"has no environment \[nowhere\]"), ({"on": "bare"}, SettingsError, "has no `jobs`"),
    ({"on": "two words"}, SpecError, "is not understood"), ({"on": "ray", "backend": object()}, SpecError, "chooses backend by itself"), ({"on": "http://127.0.0.1:9"}, Unavailable, "No job server answers")])
def test_a_place_that_is_none(tmp_path, monkeypatch, asked, error, words):
    (tmp_path / "settings.ini").write_text("[local]\n[bare]\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=words): mlray.train(DIABETES, **asked)
    assert not (tmp_path / ".mlray").exists()


def test_what_a_run_prints_is_read_back(trained):
    from mlray.command_line.anywhere import trained as read
    _, run = trained
    came = read(run.as_dict(), "http://head:8265")
    assert (str(came.version), came.version.digest, came.verdict, came.as_dict()) == (str(run.version), run.version.digest, run.verdict, run.as_dict())
    assert came.measures["roc_auc"] == run.evaluation.scorecard.overall["roc_auc"] and "roc_auc" in came._repr_markdown_()


@contextmanager
def begun(folder: Path, **variables: str) -> Iterator[str]:
    "A cluster of its own with a job server, and its address."
    port = free_port()
    there = mkdtemp(prefix="ray-") # the names of sockets below it may not be long; and it is there that jobs look for their cluster, where several run on one machine
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MLRAY_")} | {"PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)} | variables
    ports = [f"--{name}={free_port()}" for name in ("port", "dashboard-agent-listen-port", "ray-client-server-port")] # each of them has a number of its own that somebody else may have
    running = subprocess.Popen(["ray", "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--dashboard-port={port}", *ports, "--min-worker-port=0", "--max-worker-port=0", "--include-dashboard=true", "--num-cpus=3",
                                "--object-store-memory=100000000", f"--temp-dir={there}", "--disable-usage-stats"], cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    from ray.job_submission import JobSubmissionClient
    end = time.monotonic() + 400
    while True: # what starts jobs comes up after what takes them
        try: JobSubmissionClient(f"http://127.0.0.1:{port}", headers={"Authorization": f"Bearer {token_here()}"}).submit_job(entrypoint="true")
        except (RuntimeError, ConnectionError):
            assert time.monotonic() < end and running.poll() is None, "the cluster takes no job"
            time.sleep(2)
        else: break
    try: yield f"http://127.0.0.1:{port}"
    finally:
        running.terminate()
        running.wait(120)
        shutil.rmtree(there, ignore_errors=True)


@pytest.fixture
def head(tmp_path):
    with begun(tmp_path) as address: yield address


@pytest.mark.chaos
@pytest.mark.ray
def test_one_argument(tmp_path, monkeypatch, head, capsys):
    if not shutil.which("mlray"): monkeypatch.setenv("PATH", f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}")
    there, mine = tmp_path / "there", tmp_path / "mine" # a home below the project's own folder would be another one on the cluster
    mine.mkdir()
    (mine / "settings.ini").write_text(f"[local]\ntracking = disabled\nworkers = 1\nobject_store_mb = 100\n[staging]\ntracking = disabled\nworkers = 1\njobs = {head}\nhome = {there}\naccess = open\n")
    monkeypatch.chdir(mine)
    spec, heard = read_spec(DIABETES, ["train.epochs=5"]), MemoryTracker()
    began = time.monotonic()

    async def cell(): return mlray.train(spec, on="staging", tracker=heard) # as a kernel runs it: within a loop of its own
    run = asyncio.run(cell())
    took = time.monotonic() - began
    assert isinstance(run, Trained) and [e["step"] for e in heard.logged] == [1, 2, 3, 4, 5] and heard.expected == 5 and heard.started == [spec] and any("rows" in n for n in heard.notes)
    registry = open_registry(Settings(root=mine, home=there, tracking="disabled"))
    kept = version(registry, str(run.version))
    assert (kept.digest, kept.spec_id, kept.rows_digest, kept.created) == (run.version.digest, run.version.spec_id, run.version.rows_digest, run.version.created) and bundle_of(registry, kept).spec == spec
    assert kept.results["values"]["roc_auc"] == run.measures["roc_auc"].value and kept.results["verdict"]["findings"] == [vars(f) for f in run.verdict.findings]

    proved = mlray.run_gates(run, ["data"], on="staging")
    assert isinstance(proved, Gated) and proved.passed and registry_gates(registry, kept) == {"data"}
    with pytest.raises(MlrayError, match=r"diabetes/99.*Look: mlray job gate-staging-\w+ --on staging"): mlray.run_gates("diabetes/99", on="staging")

    class Impatient(MemoryTracker):
        def log(self, metrics, step): raise KeyboardInterrupt # the square in the notebook's toolbar

    with pytest.raises(KeyboardInterrupt): mlray.train(read_spec(DIABETES, ["train.epochs=400", "train.patience=400"]), on="staging", tracker=Impatient())
    from mlray.engines.submit_on_ray import JobServer
    assert JobServer(head).jobs()[0]["status"] == "STOPPED" and len(mlray_versions(registry)) == 1

    beside = mlray.train(spec, read_settings("staging").model_copy(update={"ray": "local", "home": tmp_path / "here"}), on="ray", tracker=(near := MemoryTracker()))
    assert (tmp_path / "here/registry.db").is_file() and [e["step"] for e in near.logged] == [1, 2, 3, 4, 5]
    assert beside.evaluation.scorecard.overall["roc_auc"] == run.measures["roc_auc"] and beside.verdict == run.verdict and beside.version.spec_id == run.version.spec_id
    print(f"trained elsewhere in {took:.0f} s at a load of {os.getloadavg()[0]:.0f}; {len(heard.notes)} notes")


def registry_gates(registry, found):
    from mlray.governance.registry import evidence
    return set(evidence(registry, found))


def mlray_versions(registry):
    from mlray.governance.registry import versions
    return list(versions(registry, "diabetes"))
