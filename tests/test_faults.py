"""What breaks, and what must then be as if nothing had: workers, nodes, drivers, files, disks. `-m chaos` runs it in full."""
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import psutil
import pytest

from mlray.learning.features import Matrix
from mlray.learning.model import Job, State
from mlray.running.checkpoints import Checkpoints
from mlray.running.run import LocalBackend, make_job, train
from mlray.running.tracking import MemoryTracker
from mlray.sources.rows import read_rows
from mlray.values.errors import SpecError, TrainingError, Unavailable
from mlray.values.recipe import Train
from mlray.values.settings import Settings, shipped
from mlray.values.spec import RunSpec, read_spec
from tests.conftest import ROOT, running_below

EPOCHS, SHORT, DRIVEN, LONG = 24, 6, 40, 100


def same(a: State, b: State) -> bool:
    import torch
    return a.epoch == b.epoch and a.history == b.history and all(torch.equal(x[n], y[n]) for x, y in ((a.now, b.now), (a.best, b.best), (a.optimizer, b.optimizer)) for n in y)


def last(epochs) -> State: return list(epochs)[-1].state


def with_train(job: Job, **changes) -> Job: return replace(job, train=Train.model_validate(job.train.model_dump(by_alias=False) | changes))


@pytest.fixture(scope="module")
def job(diabetes: RunSpec, tmp_path_factory: pytest.TempPathFactory) -> Job:
    "Enough rows that an epoch takes a moment, in which one can be killed."
    root = tmp_path_factory.mktemp("job")
    small = with_train(make_job(diabetes, read_rows(diabetes, Settings(root=root, home=root))), epochs=EPOCHS, patience=EPOCHS, batch_size=64)
    many = lambda rows: np.concatenate([rows] * 8)
    return replace(small, rows=Matrix(*map(many, small.rows.tensors)), labels=many(small.labels))


@pytest.fixture(scope="module")
def undisturbed(job: Job, tmp_path_factory: pytest.TempPathFactory) -> State: return last(LocalBackend().train(job, "run", tmp_path_factory.mktemp("undisturbed")))


@pytest.fixture(scope="module")
def short(job: Job, tmp_path_factory: pytest.TempPathFactory) -> tuple[Job, State]:
    "A few epochs, and where they end."
    few = with_train(job, epochs=SHORT)
    return few, last(LocalBackend().train(few, "run", tmp_path_factory.mktemp("short")))


def stopped(job: Job, home: Path, after: int) -> Checkpoints:
    "A run that was stopped after an epoch."
    for epoch in LocalBackend().train(job, "run", home):
        if epoch.number == after: return Checkpoints(home / "run")
    raise AssertionError("it was not stopped")


# --- files -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("damage", [lambda d: d[:-1], lambda d: d[:100], lambda d: b"", lambda d: d[:5000] + bytes([d[5000] ^ 1]) + d[5001:], lambda d: d + b"\0"], ids=["one short", "torn", "empty", "one bit", "longer"])
def test_a_damaged_newest_checkpoint_is_passed_over(short, tmp_path, damage):
    job, undisturbed = short
    kept, notes = stopped(job, tmp_path, 4), []
    newest = kept.files()[0]
    newest.write_bytes(damage(newest.read_bytes()))
    assert same(last(LocalBackend().train(job, "run", tmp_path, resume=True, note=notes.append)), undisturbed)
    assert len(notes) == 1 and "epoch 4" in notes[0]


def test_a_write_that_breaks_off_anywhere_leaves_the_one_before(job, tmp_path, monkeypatch):
    kept = stopped(job, tmp_path, 3)
    state, before = kept.newest(), kept.files()
    size = before[0].stat().st_size
    for at in np.linspace(0, size - 1, 20, dtype=int):
        def killed(path: Path, data: bytes, at: int = int(at)) -> None:
            path.write_bytes(data[:at])
            raise KeyboardInterrupt
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr("mlray.running.checkpoints.write_durably", killed)
            kept.save(replace(state, epoch=4))
        assert kept.files() == before and kept.newest().epoch == 3


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk_is_a_letter_and_costs_nothing(short, tmp_path):
    job, undisturbed = short
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(disk)], capture_output=True).returncode: pytest.skip("mount is not allowed here")
    try:
        kept = stopped(job, disk, 3)
        (disk / "filler").write_bytes(bytes(shutil.disk_usage(disk).free // 4096 * 4096))
        with pytest.raises(Unavailable, match=r"no room for a checkpoint .* before epoch 4 is whole"): list(LocalBackend().train(job, "run", disk, resume=True))
        assert kept.newest().epoch == 3 and not list(kept.folder.glob(".*.part"))
        (disk / "filler").unlink()
        assert same(last(LocalBackend().train(job, "run", disk, resume=True)), undisturbed)
    finally: subprocess.run(["umount", str(disk)], check=True)


# --- the driver ------------------------------------------------------------------------------------------------------

OVERRIDES = (f"train.epochs={DRIVEN}", f"train.patience={DRIVEN}", "train.batch_size=8")


def command(home: Path, *more: str) -> subprocess.Popen:
    arguments = ["train", str(shipped("configs") / "diabetes.yaml"), *OVERRIDES, "--json", *more]
    environment = os.environ | {"MLRAY_HOME": str(home), "MLRAY_TRACKING": "disabled", "MLRAY_OBJECT_STORE_MB": "100", "MLRAY_WORKERS": "1"}
    return subprocess.Popen([sys.executable, "-c", "from mlray.cli import main; main()", *arguments], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def reached(home: Path) -> int:
    "The newest epoch on disk, of whatever run."
    return max([int(p.name[6:14]) for p in home.glob("runs/*/epoch-*.safetensors")] + [0])


def finished(process: subprocess.Popen) -> tuple[dict, str]:
    out, err = process.communicate(timeout=600)
    assert process.returncode in (0, 1), err # 1: the verdict did not pass, which is not the matter here
    return json.loads(out), err


def killed_and_resumed(home: Path, *on: str) -> dict:
    "What the same command prints after its first attempt was ended with kill -9."
    process = command(home, *on)
    while reached(home) < 5 and process.poll() is None: time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and 5 <= reached(home) < DRIVEN, "it had ended, so nothing was shown"
    resumed, _ = finished(command(home, "--resume", *on))
    assert resumed["version"] == "diabetes/1" and not list(home.glob("runs/diabetes-*"))
    return resumed


def test_a_killed_driver_is_taken_up_by_the_same_command(tmp_path):
    resumed = killed_and_resumed(tmp_path / "home")
    spec = read_spec(shipped("configs") / "diabetes.yaml", OVERRIDES)
    undisturbed = train(spec, Settings(root=tmp_path, home=tmp_path / "other"))
    assert resumed["digest"] == undisturbed.version.digest
    memory = MemoryTracker()
    again = train(spec, Settings(root=tmp_path, home=tmp_path / "home"), tracker=memory, resume=True)
    assert str(again.version) == "diabetes/1" and len(memory.logged) == DRIVEN, "a finished run is repeated, and comes to the same version"


@pytest.mark.chaos
def test_a_killed_driver_on_ray(tmp_path):
    undisturbed, _ = finished(command(tmp_path / "other", "--on", "ray"))
    assert killed_and_resumed(tmp_path / "home", "--on", "ray")["digest"] == undisturbed["digest"]


# --- the loop --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("changes", [
    {"optimizer": "sgd", "schedule": "cosine", "warmup": 0.1, "clip": 0.5, "accumulate": 3}, {"schedule": "one_cycle", "precision": "bf16"}, {"optimizer": "torch.optim:RAdam", "clip": 1.0},
    pytest.param({"compile": True}, marks=pytest.mark.chaos)], ids=["sgd", "bf16", "RAdam", "compile"])
def test_every_kind_of_loop_resumes_to_the_bit(job, tmp_path, changes):
    job = with_train(job, epochs=5, **changes)
    whole = last(LocalBackend().train(job, "whole", tmp_path))
    stopped(job, tmp_path, 2)
    assert same(last(LocalBackend().train(job, "run", tmp_path, resume=True)), whole)


def test_what_stops_the_loop_says_what_to_do(job):
    import torch

    from mlray.learning.fitting import Average, make_optimizer, one_pass

    class Broken(torch.nn.Module):
        def __init__(self, answer):
            super().__init__()
            self.weight, self.answer = torch.nn.Parameter(torch.ones(1)), answer

        def forward(self, numbers, codes, arrays, texts): return self.answer(numbers * self.weight)

    rows = tuple(map(torch.from_numpy, (*job.rows.tensors, job.labels)))
    for answer, letter in [(lambda x: x[:, 0], r"shape \(\d+,\) where \(\d+, members\)"), (lambda x: x[:, :1] + torch.empty(2**52), r"Raise train\.accumulate"),
                           (lambda x: x[:, :1] * float("nan"), r"nan at step 1 of epoch 7, in the batch [0-9a-f]{12} of \d+ rows")]:
        network = Broken(answer)
        with pytest.raises(TrainingError, match=letter): one_pass(network, make_optimizer(network.parameters(), job.train), Average(network, 0.0, {}), rows, job.train, 7)
    for name in ("nothing.here:Adam", "torch.optim:Nothing", "json:dumps"):
        with pytest.raises(SpecError, match=r"train\.optimizer"): make_optimizer([torch.nn.Parameter(torch.ones(1))], Train(optimizer=name))


def test_a_child_must_be_of_the_same_kind_as_its_parent(trained, diabetes):
    settings, run = trained
    child = lambda **parts: diabetes.model_copy(update=parts | {"train": diabetes.train.model_copy(update={"parent": str(run.version), "epochs": 1})})
    with pytest.raises(TrainingError, match=r"head has shape \(16, 1, 128\) there and \(16, 1, 16\) here"): train(child(model=diabetes.model.model_copy(update={"hidden": (16,)})), settings)
    ignored = {"bmi": diabetes.contract["bmi"].model_copy(update={"role": "ignored"})}
    with pytest.raises(TrainingError, match="'bmi' is no feature in this contract and was number"): train(child(contract=diabetes.contract | ignored), settings)


# --- workers and nodes -----------------------------------------------------------------------------------------------

@dataclass
class Killer:
    "Ends something once a run has reached an epoch; remembers at which epoch it did."
    folder: Path
    at: int
    victim: object # () → bool: did it end something
    hit: list[int] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event) # the run has ended, so there is nothing left to end

    def __enter__(self) -> "Killer":
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_) -> None:
        self.over.set()
        self.thread.join(timeout=60)

    def watch(self) -> None:
        kept = Checkpoints(self.folder)
        while not self.over.is_set():
            newest = int(kept.files()[0].name[6:14]) if kept.files() else 0
            if newest >= self.at and self.victim():
                self.hit.append(newest)
                return
            time.sleep(0.005)


def kill_worker() -> bool:
    found = next((p for p, name in running_below().items() if "RayTrainWorker" in name), None)
    if found: found.kill()
    return found is not None


@pytest.mark.ray
@pytest.mark.xdist_group("faults")
def test_a_worker_lost_too_often_leaves_its_last_checkpoint(ray_cluster, job, undisturbed, tmp_path):
    from mlray.engines.train_on_ray import RayBackend
    with Killer(tmp_path / "run", 5, kill_worker) as killer, pytest.raises(TrainingError, match=r"(?s)lost 1 times.*--resume"):
        list(RayBackend(1, failures=0).train(job, "run", tmp_path))
    kept = Checkpoints(tmp_path / "run")
    assert killer.hit and 5 <= kept.newest().epoch < EPOCHS
    kept.files()[0].write_bytes(kept.files()[0].read_bytes()[:-100]) # and the newest one is torn, too
    notes: list[str] = []
    history = list(RayBackend(1).train(job, "run", tmp_path, resume=True, note=notes.append))
    assert [e.number for e in history] == list(range(1, EPOCHS + 1)) and same(history[-1].state, undisturbed) and "passed over" in notes[0]


@pytest.mark.ray
@pytest.mark.xdist_group("faults")
def test_room_is_what_the_scheduler_finds(ray_cluster):
    "Beside what others have taken, and without nodes whose disk is full."
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    from mlray.engines.nodes_on_ray import Node, room
    node = ray.nodes()[0]
    cores = int(node["Resources"]["CPU"])
    taken = placement_group([{"CPU": 0.5}])
    assert taken.wait(60) and room(cores, 1, {"CPU": 1}) == cores - 1
    remove_placement_group(taken)
    assert room(1, 1, {"CPU": 1}, [Node("full", id=node["NodeID"])], patience_s=1) == 0


@pytest.fixture(scope="module")
def nodes(no_shared_cluster: None) -> Iterator[object]:
    "Three Ray nodes on this machine: one for the driver, two that work and may die."
    from ray.cluster_utils import Cluster

    from mlray.engines.cluster_on_ray import cluster
    store = {"object_store_memory": 100 * 2**20}
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **store})
    for _ in range(2): made.add_node(num_cpus=1, **store)
    with cluster(Settings(ray=made.address)): yield made
    made.shutdown()


@pytest.mark.chaos
@pytest.mark.ray
@pytest.mark.parametrize("kind", ["worker"] * 10 + ["node"] * 5)
def test_chaos(nodes, job, undisturbed, tmp_path, kind, request):
    "A worker, or a whole node with kill -9, at a random epoch: the weights at the end are those of the undisturbed run."
    from mlray.engines.train_on_ray import RayBackend
    seed = request.node.callspec.indices["kind"]
    at, notes = random.Random(seed).randint(1, EPOCHS - 4), list[str]()

    def kill_node() -> bool:
        for node in nodes.worker_nodes:
            raylet = node.all_processes["raylet"][0].process.pid
            if any("RayTrainWorker" in name for name in running_below(psutil.Process(raylet)).values()):
                os.kill(raylet, signal.SIGKILL)
                return True
        return False

    began = time.monotonic()
    with Killer(tmp_path / "run", at, kill_worker if kind == "worker" else kill_node) as killer:
        history = list(RayBackend(1).train(job, "run", tmp_path, note=notes.append))
    assert killer.hit and killer.hit[0] < EPOCHS and any("a worker was lost" in n for n in notes), "nothing was lost, so nothing was shown"
    assert [e.number for e in history] == list(range(1, EPOCHS + 1)) and same(history[-1].state, undisturbed)
    if kind == "node":
        for node in [n for n in nodes.worker_nodes if n.all_processes["raylet"][0].process.poll() is not None]: nodes.remove_node(node, allow_graceful=False)
        nodes.add_node(num_cpus=1, object_store_memory=100 * 2**20)
    print(f"\n{kind} {seed}: ended after epoch {killer.hit[0]} of {EPOCHS}, {time.monotonic() - began:.1f} s in all, weights identical")


@pytest.mark.chaos
@pytest.mark.ray
def test_a_node_lost_for_good_leaves_fewer_workers(nodes, diabetes, tmp_path):
    "Two nodes with a worker each; one is killed and does not come back. The other goes on from the newest epoch, and the version says so."
    from mlray.engines.train_on_ray import RayBackend
    from mlray.governance.registry import bundle_of, open_registry
    from mlray.running.reproduce import reproduce
    spec = diabetes.model_copy(update={"train": diabetes.train.model_copy(update={"epochs": LONG, "patience": LONG, "batch_size": 8})})
    settings, memory, victims = Settings(root=tmp_path, home=tmp_path / "home"), MemoryTracker(), list(nodes.worker_nodes)[:1]
    alone = train(spec, Settings(root=tmp_path, home=tmp_path / "alone")).evaluation.scorecard.overall["roc_auc"].value

    def kill_node() -> None:
        while reached(settings.home) < 5: time.sleep(0.005)
        raylet = psutil.Process(victims[0].all_processes["raylet"][0].process.pid)
        for process in (raylet, *raylet.children(recursive=True)): process.kill() # the machine has lost its power
    killer, began = threading.Thread(target=kill_node, daemon=True), time.monotonic()
    killer.start()
    run = train(spec, settings, RayBackend(2, workers_min=1), memory)
    assert not killer.is_alive() and any("a worker was lost" in n for n in memory.notes) and any("room for 1 of 2" in n for n in memory.notes), memory.notes
    assert len(memory.logged) == LONG and all(np.isfinite(m["valid_loss"]) for m in memory.logged)
    bundle = bundle_of(open_registry(settings), run.version)
    team = bundle.provenance.get("workers_by_epoch", [])
    assert bundle.provenance["workers"] == 2 and len(team) == LONG and team[:5] == [2] * 5 and team[-1] == 1 and team == sorted(team, reverse=True)
    assert run.evaluation.scorecard.overall["roc_auc"].value > alone - 0.03
    print(f"\n{team.count(2)} epochs of two workers, then {team.count(1)} of one; {time.monotonic() - began:.1f} s in all")
    again = reproduce(bundle, "diabetes/1", settings, LocalBackend())
    assert not again.identical and "number of workers changed on the way" in again.finding
    for node in victims: nodes.remove_node(node, allow_graceful=False)
    nodes.add_node(num_cpus=1, object_store_memory=100 * 2**20)


@pytest.mark.chaos
@pytest.mark.ray
@pytest.mark.parametrize("room", ["a node comes", "a neighbour goes"])
def test_a_smaller_team_grows_between_two_epochs(nodes, diabetes, tmp_path, room):
    "It began with one worker, for want of a node or beside something else; the second joins without a failure, and each part is to the bit what a team of its size makes of it."
    from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group

    from mlray.engines.train_on_ray import RayBackend
    most = 3 * LONG # a node takes its time to come
    long = with_train(make_job(diabetes, read_rows(diabetes, Settings(root=tmp_path, home=tmp_path))), epochs=most, patience=most, batch_size=16)
    neighbour = placement_group([{"CPU": 1}])
    assert neighbour.wait(60)
    if room == "a node comes":
        remove_placement_group(neighbour)
        nodes.remove_node(next(iter(nodes.worker_nodes)))
        nodes.wait_for_nodes(60)
    notes, reached, began = list[str](), 0, time.monotonic()
    asked, lasted = dict[str, float](), 0.0 # places that nobody has, since when; and how long the oldest has been asked for
    for epoch in RayBackend(2, failures=0, workers_min=1, grow_every_s=1).train(long, "run", tmp_path / "grown", note=notes.append):
        if lasted < 3: # a cluster that brings up nodes looks every few seconds at what is missing
            asked = {id: asked.get(id, time.monotonic()) for id, place in placement_group_table().items() if place["state"] == "PENDING"}
            lasted = max((time.monotonic() - since for since in asked.values()), default=0.0)
            if lasted >= 3 and room == "a node comes": nodes.add_node(num_cpus=1, object_store_memory=100 * 2**20)
            if lasted >= 3 and room == "a neighbour goes": remove_placement_group(neighbour)
        reached = epoch.number
    assert lasted >= 3, "what is missing goes on being asked for while the team works"
    assert not [p for p in placement_group_table().values() if p["state"] == "PENDING"], "and by nobody afterwards"
    grown, seconds = epoch.state, time.monotonic() - began
    alone = grown.workers.count(1)
    assert reached == most and 5 <= alone < most and grown.workers == (1,) * alone + (2,) * (most - alone), (grown.workers, notes)
    assert f"grew from 1 to 2 workers after epoch {alone}" in notes and not any("lost" in n for n in notes), notes
    stopped(long, tmp_path / "by hand", alone)
    assert same(last(RayBackend(2).train(long, "run", tmp_path / "by hand", resume=True)), grown)
    print(f"\n{room}: {alone} epochs of one worker, then {most - alone} of two, {seconds:.1f} s in all, load {os.getloadavg()[0]:.0f}; weights identical to one worker stopped there and two that go on: {notes}")


@pytest.mark.ray
@pytest.mark.xdist_group("faults")
def test_a_head_without_workers_says_that_it_goes(nodes, job, tmp_path):
    "The heads of the launchers have no cores for a training, and lead it all the same; where the workers go, too, the run ends with a letter and its states."
    import ray

    from mlray.engines.train_on_ray import RayBackend
    notes, leads, failed = list[str](), ray.get_runtime_context().get_node_id(), list[BaseException]()
    drain = lambda node, seconds: ray._private.worker.global_worker.gcs_client.drain_node(node, 2, "taken away", int((time.time() + seconds) * 1000))[0] # type: ignore[attr-defined]

    def announced() -> None:
        try:
            until = time.monotonic() + 120
            while not Checkpoints(tmp_path / "run").files() and time.monotonic() < until: time.sleep(0.1)
            assert drain(leads, 600)
            while not notes and time.monotonic() < until: time.sleep(0.1)
        except BaseException as error: failed.append(error)
        for node in nodes.worker_nodes: drain(node.node_id, 1)

    (telling := threading.Thread(target=announced)).start()
    with pytest.raises(Unavailable, match=r"leads this run is taken away.*--resume"):
        list(RayBackend(1).train(with_train(job, epochs=10**6, patience=10**6), "run", tmp_path, note=notes.append))
    telling.join()
    print("\n", notes)
    assert not failed and "is taken away in" in notes[0] and "and with it this run, which it leads" in notes[0] and "--resume" in notes[0]
    assert Checkpoints(tmp_path / "run").newest().epoch >= 1
