"""One W&B run a training: online against a recorder, and offline, read back from the file that the real client wrote."""
import json
import os
import struct
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest

from mlray.running.run import LocalBackend, make_job, train
from mlray.running.tracking import MemoryTracker, NullTracker, Trackers
from mlray.sources.rows import read_rows
from mlray.values.settings import Settings, shipped
from mlray.values.spec import read_spec
from tests.conftest import running_below, slower
from tests.wandb_server import KEY, WandbServer

BLOCK = 32768


def records(path: Path):
    "The records of a .wandb file, once W&B has written its end: `finish` returns before that."
    from google.protobuf.message import DecodeError
    end = time.monotonic() + 60
    while time.monotonic() < end:
        try: found = list(_records(path.read_bytes()))
        except DecodeError: found = [] # cut within a record
        if found and found[-1].WhichOneof("record_type") == "exit": return found
        time.sleep(0.05)
    raise AssertionError(f"W&B never finished {path}")


def _records(data: bytes):
    "The records in it: a LevelDB log behind a seven-byte header."
    from wandb.proto.wandb_internal_pb2 import Record
    at, part = 7, b""
    while at + 7 <= len(data):
        if BLOCK - at % BLOCK < 7: at += BLOCK - at % BLOCK; continue
        _, size, kind = struct.unpack("<IHB", data[at:at + 7])
        part, at = (part if kind in (3, 4) else b"") + data[at + 7:at + 7 + size], at + 7 + size
        if kind in (1, 4): yield Record.FromString(part)


def plain(item):
    for kind in ("boolean", "integer", "number", "text"):
        try:
            if item.HasField(kind): return getattr(item, kind)
        except ValueError: pass
    return json.loads(item.value_json) if item.value_json else None


def test_a_training_is_one_run_with_losses_spec_and_scorecard(settings, diabetes):
    from mlray.engines.track_on_wandb import WandbTracker
    memory = MemoryTracker()
    run = train(diabetes, settings, tracker=Trackers((memory, WandbTracker(settings.home / "runs"))))
    files = list((settings.home / "runs").glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 1
    assert files[0].parent.name.endswith(run.version.lineage["tracked"]["wandb"].rpartition("/")[2]) and run.version.lineage["run"].startswith("diabetes-")
    found = list(records(files[0]))
    history = [{(i.key or "/".join(i.nested_key)): plain(i) for i in r.history.item} for r in found if r.WhichOneof("record_type") == "history"]
    losses = [h["valid_loss"] for h in history if "valid_loss" in h]
    assert losses == [e["valid_loss"] for e in memory.logged] and len(losses) > 5
    config = {i.key: json.loads(i.value_json) for r in found if r.WhichOneof("record_type") == "run" for i in r.run.config.update if i.value_json}
    assert config["data"]["split"]["seed"] == 8 and config["spec_id"] == diabetes.id
    summary = {(i.key or "/".join(i.nested_key)): plain(i) for r in found if r.WhichOneof("record_type") == "summary" for i in r.summary.update}
    assert summary["roc_auc"] == run.evaluation.scorecard.overall["roc_auc"].value and summary["version"] == "diabetes/1"
    assert list((settings.home / "runs").glob("wandb/offline-run-*/files/media/table/scorecard*"))


def test_a_run_that_fails_says_so(settings, diabetes):
    from mlray.values.errors import DataError
    memory = MemoryTracker()
    broken = diabetes.model_copy(update={"contract": diabetes.contract | {"progression": diabetes.contract["progression"].model_copy(update={"positive_above": 499.0})}})
    with pytest.raises(DataError): train(broken, settings, tracker=Trackers((memory, NullTracker())))
    assert "one class" in memory.summary["error"] and not memory.logged


def history_of(folder: Path) -> list[dict]:
    "The rows of the only run below a folder, from the file of the client."
    file, = folder.glob("wandb/*run-*/*.wandb")
    return [{(i.key or "/".join(i.nested_key)): plain(i) for i in r.history.item} for r in records(file) if r.WhichOneof("record_type") == "history"]


@pytest.fixture
def server(monkeypatch) -> Iterator[WandbServer]:
    with WandbServer() as made:
        for name, value in {"WANDB_BASE_URL": made.url, "WANDB_API_KEY": KEY}.items(): monkeypatch.setenv(name, value)
        for name in ("WANDB_DIR", "WANDB_DATA_DIR", "WANDB_MODE"): monkeypatch.delenv(name, raising=False)
        import wandb
        wandb.teardown() # it read the environment when it was first used
        yield made
        wandb.teardown()


class Watching(MemoryTracker):
    "Looks at the command lines of all our processes while a run is under way."
    def log(self, metrics, step):
        super().log(metrics, step)
        self.notes += [" ".join(psutil.Process().cmdline()), *running_below().values()]
        time.sleep(0.2) # long enough for a look at the machine


def test_an_online_run_is_whole_and_keeps_its_key_to_itself(settings, diabetes, server, capfd):
    from mlray.engines.track_on_wandb import WandbTracker
    memory = Watching()
    run = train(diabetes, settings, tracker=Trackers((memory, WandbTracker(settings.home / "runs", mode="online"))))
    found, = server.runs.values()
    losses = [row["valid_loss"] for row in found.history if "valid_loss" in row]
    assert losses == [e["valid_loss"] for e in memory.logged] and len(losses) > 5 and found.exit_code == 0 and found.group == "diabetes" and not server.unknown
    assert found.config["spec_id"]["value"] == diabetes.id and found.summary["roc_auc"] == run.evaluation.scorecard.overall["roc_auc"].value
    assert any(key.startswith("system.") for row in found.system for key in row), "no system metrics arrived"
    assert any("scorecard" in path for path in server.uploads)
    bundles = [i for i, a in enumerate(server.artifacts) if a["artifactTypeName"] == "model"]
    manifest = json.loads(server.uploads[f"artifact/{bundles[0]}/manifest"])["contents"]
    assert len(bundles) == 1 and server.artifacts[bundles[0]]["state"] == "COMMITTED" and manifest["bundle"]["ref"] == f"mlray://diabetes/1?sha256={run.version.digest}"
    assert not any(path.startswith(f"artifact/{bundles[0]}/file/") for path in server.uploads), "the bundle's bytes were copied"
    everywhere = [*server.received, *(p.read_bytes() for p in settings.home.rglob("*") if p.is_file()), "".join(capfd.readouterr()).encode(), "\n".join(memory.notes).encode()]
    sent = [json.loads(body)["variables"] for body in server.received if b"mutation UpsertBucket" in body]
    assert {(v.get("host"), v.get("program")) for v in sent} <= {("-", "mlray"), (None, None)}, "the name of this machine was sent"
    assert any(b"wandb-core" in place for place in everywhere) and not [place[:80] for place in everywhere if KEY.encode() in place], "the key was left somewhere"


def test_a_network_that_goes_away_costs_no_row(tmp_path, diabetes, server):
    from mlray.engines.track_on_wandb import WandbTracker
    tracker, pace = WandbTracker(tmp_path, mode="online"), slower()
    tracker.start(diabetes)
    for step in range(1, 61):
        if step == 20: server.cut()
        began = time.monotonic()
        tracker.log({"valid_loss": 1 / step}, step)
        assert time.monotonic() - began < pace, "training waited for the network"
    began = time.monotonic()
    tracker.finish({"error": "none"})
    assert time.monotonic() - began < 20 * max(pace, slower())
    assert [row["valid_loss"] for row in history_of(tmp_path) if "valid_loss" in row] == [1 / step for step in range(1, 61)]


def test_no_network_at_all_means_offline(tmp_path, diabetes, server):
    from mlray.engines.track_on_wandb import WandbTracker
    server.cut()
    tracker, began = WandbTracker(tmp_path, mode="online"), time.monotonic()
    tracker.start(diabetes)
    tracker.log({"valid_loss": 0.5}, 1)
    tracker.finish({"error": "none"})
    assert time.monotonic() - began < 25 * slower()
    kept, = tmp_path.glob("wandb/offline-run-*")
    assert kept.is_dir()


NOTEBOOK = """
from mlray.running.progress import ProgressTracker
tracker = ProgressTracker()
tracker.expect(20)
for step in range(1, 13): tracker.log({"valid_loss": 1 / step}, step)
tracker.finish({})
""", """
from pathlib import Path
from mlray import read_spec, train
from mlray.values.settings import Settings, shipped
run = train(read_spec(shipped("configs") / "diabetes.yaml", ["train.epochs=3"]), Settings(root=Path("."), home=Path(".mlray"), tracking="disabled"))
""", """
from mlray.running.search import Trial
from mlray.values.spec import changed
from mlray.running.tuned import SearchProgress
spec = read_spec(shipped("configs") / "diabetes.yaml", ["search={trials: 4, direction: minimize, space: {model.dropout: {low: 0, high: 0.4}}}"])
show = SearchProgress(spec)
trials = [Trial(n, str(n), {"model.dropout": n / 10}, 3, 1 / n, None, 0.1, 100 * n) for n in range(1, 5)]
for n in range(5): show(trials[:n], 4)
"""


def test_a_run_in_a_notebook_shows_a_bar_in_its_cell(tmp_path):
    "In a real kernel: the bar is a display of the cell, not a heap of lines on stderr; `mlray.train` has it by itself, and a search one of its own."
    import subprocess
    import sys

    import nbformat
    page = tmp_path / "page.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in NOTEBOOK]), page)
    subprocess.run([sys.executable, "-c", f"import nbformat, nbclient; page = {str(page)!r}; notebook = nbformat.read(page, 4); nbclient.NotebookClient(notebook, timeout=600, kernel_name='python3').execute(); nbformat.write(notebook, page)"], check=True, cwd=tmp_path)
    notebook = nbformat.read(page, 4)
    outputs = [c.outputs for c in notebook.cells]
    bar, trained, searched = (" ".join(str(o.get("data", o.get("text"))) for o in each) for each in outputs)
    assert "12/20" in bar + str(notebook.metadata) and not [o for each in outputs for o in each if o.output_type == "stream" and o.name == "stderr"], outputs
    assert "epoch 3/3" in trained and "diabetes/1" in trained and trained.count("<polyline") == 2, "losses as lines, and no line of a number of an epoch"
    assert "trial 4/4" in searched and "best is 4: valid_loss 0.25" in searched and searched.count("<svg") == 2, "the best so far as a line, and the front"
    assert [len(each) for each in outputs] == [1, 1, 1], "one card a cell, replaced"


def test_json_alone_is_printed_when_json_is_asked_for(tmp_path):
    "Nothing on stderr, and on stdout one value."
    import json
    import os
    import subprocess
    import sys
    done = subprocess.run([sys.executable, "-c", "from mlray.cli import main; main()", "train", str(shipped("configs") / "diabetes.yaml"), "train.epochs=2", "--json"], capture_output=True, text=True, cwd=tmp_path,
                          env={**os.environ, "MLRAY_HOME": str(tmp_path / "home"), "MLRAY_TRACKING": "disabled"}, check=False)
    assert json.loads(done.stdout)["version"] == "diabetes/1" and done.stderr == ""


@pytest.mark.chaos
def test_heads_of_the_audit_come_back_from_wandb(tmp_path, server):
    from mlray.engines.track_on_wandb import WandbPlace
    from mlray.governance.anchoring import anchor, verify
    from mlray.governance.audit import Anchor
    from mlray.governance.policy import Policy
    from mlray.governance.registry import Registry, register
    from mlray.governance.signature import create_signer
    from tests.test_registry import tiny
    registry, place = Registry(f"sqlite:///{tmp_path}/registry.db", tmp_path / "store", "ada", policy=Policy(gates=())), WandbPlace(tmp_path / "runs")
    create_signer(registry.attestor.folder, "ada", "2026-01-01T00:00:00+00:00")
    _, second = (register(registry, tiny(tmp_path, seed), {}) for seed in (1, 2))
    for _ in range(2): assert anchor(registry, "mlray/local", [place])[1] == {place.name: ""}
    assert [run.config.keys() for run in server.runs.values()] == [{"anchor", "_wandb"}], "the same head is the same run"
    found = verify(registry, "mlray/local", [place])
    assert found.outside == {place.name: 2} and not found.faults and not server.unknown
    with registry.database.change() as c:
        for statement in ("DROP TRIGGER events_kept_DELETE", "DELETE FROM events WHERE seq=2", "DELETE FROM versions WHERE number=2", f"DELETE FROM signatures WHERE about='{second.digest}'"): c.exec_driver_sql(statement)
    registry.database._anchor.write_text(json.dumps(vars(Anchor(1, verify(registry, "x", []).entries[0].mac))))
    assert not verify(registry, "mlray/local", []).faults and [f.seq for f in verify(registry, "mlray/local", [place]).faults] == [2]


def test_a_mirror_tells_wandb_what_the_registry_did(tmp_path, server):
    from mlray.engines.track_on_wandb import WandbMirror
    from mlray.governance.outbox import Letter, deliver, send_again, waiting
    from mlray.governance.policy import Policy
    from mlray.governance.registry import Registry, promote, register, remove
    from tests.test_registry import tiny
    registry = Registry(f"sqlite:///{tmp_path}/registry.db", tmp_path / "store", "ada", policy=Policy(gates=()), mirrors=("wandb",))
    found = register(registry, tiny(tmp_path, 1), {})
    promote(registry, found)
    mirror = {"wandb": WandbMirror(tmp_path / "runs", mode="online", collection="model")}
    said, = deliver(registry, mirror)
    assert said.delivered == (1, 2) and said.error is None and not server.unknown
    assert [sorted(a["alias"] for a in made["aliases"]) for made in server.artifacts] == [["latest", "mlray-1"], ["latest", "mlray-1", "production"]] and {made["state"] for made in server.artifacts} == {"COMMITTED"}
    assert all(json.loads(made["metadata"])["digest"] == found.digest for made in server.artifacts)
    assert [(run.config["action"]["value"], run.config["seq"]["value"], run.exit_code) for run in server.runs.values()] == [("register", 1, 0), ("promote", 2, 0)]
    assert [(link["artifactPortfolioName"], [a["alias"] for a in link["aliases"]]) for link in server.links] == [("tiny", ["production"])]
    before = set(server.runs)
    send_again(registry, "wandb")
    assert deliver(registry, mirror)[0].delivered == (1, 2) and set(server.runs) == before, "a letter that comes twice is another run"
    promote(registry, found, "canary")
    deliver(registry, mirror)
    places = ("mlray", "tiny"), ("wandb-registry-model", "tiny")
    assert all("canary" in server.held[place] for place in places)
    remove(registry, "tiny", "canary", "it was tried")
    ended, = waiting(registry, "wandb")
    for again in (lambda: deliver(registry, mirror), lambda: mirror["wandb"].take(Letter(ended, found), registry)):
        again()
        assert not waiting(registry, "wandb") and not server.unknown and [sorted(server.held[place]) for place in places] == [["latest", "mlray-1", "production"], ["production"]]
    assert [run.config["action"]["value"] for run in server.runs.values()] == ["register", "promote", "promote", "remove"]
    server.cut()
    promote(registry, found, "canary")
    assert "did not take row" in str(deliver(registry, mirror)[0].error) and len(waiting(registry, "wandb")) == 1


def test_long_epochs_are_told_one_by_one(monkeypatch):
    "Where a line is written for every tenth epoch, nobody waits ten long ones for a sign of life."
    from io import StringIO

    from rich.console import Console

    from mlray.running import progress
    for patience, told in ((3600.0, ["1", "10", "20"]), (-1.0, [str(i) for i in range(1, 21)])):
        monkeypatch.setattr(progress, "_PATIENCE", patience)
        tracker = progress.ProgressTracker(Console(file=(out := StringIO())))
        for epoch in range(1, 21): tracker.log({"valid_loss": 0.5}, epoch)
        assert [line.split()[1] for line in out.getvalue().splitlines()] == told


def test_words_with_brackets_are_words():
    "What gloo says when a worker is lost looks like the end of a tag."
    from io import StringIO

    from rich.console import Console

    from mlray.running.progress import ProgressTracker
    said = "a worker was lost ([/pytorch/gloo/transport/tcp/unbound_buffer.cc:129] timed out)"
    ProgressTracker(Console(file=(out := StringIO()), soft_wrap=True)).note(said)
    assert said in out.getvalue()


def test_who_waits_for_many_rows_is_told_of_the_other_cores(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    spec = read_spec(shipped("configs") / "diabetes.yaml", ["model.network=linear", "train.epochs=1"])
    few = make_job(spec, read_rows(spec, Settings(env="local", home=tmp_path)))
    of = np.arange(20_000) % len(few.labels)
    many = replace(few, rows=few.rows[of], labels=few.labels[of], train=few.train.model_copy(update={"batch_size": 4096}))
    for job, threads, told in ((many, 1, 1), (many, 4, 0), (few, 1, 0)):
        notes = []
        for _ in LocalBackend().train(replace(job, train=job.train.model_copy(update={"threads": threads})), f"run-{len(job.labels)}-{threads}", tmp_path, note=notes.append): pass
        assert [n for n in notes if "learning on 1 of 4 cores" in n and "train.threads=4" in n] == notes and len(notes) == told
