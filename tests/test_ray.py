"""The same loop here and on Ray: to the bit with one worker, as good with two, and through the death of a worker."""
import os
import signal
import threading
import time

import psutil
import pytest

from mlray.governance.registry import bundle_of, open_registry
from mlray.running.evaluation import evaluate
from mlray.running.run import LocalBackend, make_job, train
from mlray.sources.rows import read_rows
from mlray.values.settings import shipped
from mlray.values.spec import changed, read_spec
from tests.conftest import adult_data, gone, running_below, slower

pytestmark = [pytest.mark.ray, pytest.mark.xdist_group("ray")]


def same(a, b) -> bool:
    import torch
    return set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def job(diabetes, tmp_path_factory):
    "A run that ends early, a few epochs after its best one."
    from mlray.values.settings import Settings
    root = tmp_path_factory.mktemp("job")
    return make_job(spec := changed(diabetes, {"train.patience": 2}), read_rows(spec, Settings(root=root, home=root)))


@pytest.fixture(scope="module")
def here(job, tmp_path_factory): return list(LocalBackend().train(job, "d", tmp_path_factory.mktemp("here")))


def test_one_worker_gives_the_same_bits(ray_cluster, job, here, tmp_path):
    from mlray.engines.train_on_ray import RayBackend
    there = list(RayBackend(1).train(job, "d", tmp_path))
    assert len(here) > here[-1].metrics["best_epoch"] and [e.number for e in here] == [e.number for e in there] and [e.metrics for e in here] == [e.metrics for e in there]
    assert same(here[-1].state.now, there[-1].state.now) and same(here[-1].state.best, there[-1].state.best)


def test_two_workers_share_the_rows_and_agree(ray_cluster, job, here, tmp_path):
    from mlray.engines.train_on_ray import RayBackend
    first, second = job.shard(0, 2), job.shard(1, 2)
    assert len(first.labels) == len(second.labels) and len(first.labels) * 2 >= len(job.labels) and (first.rows.numbers[:5] != second.rows.numbers[:5]).any()
    history = list(RayBackend(2).train(job, "d", tmp_path))
    assert history[-1].metrics["valid_loss"] < history[0].metrics["valid_loss"] and not same(history[-1].state.now, here[-1].state.now)


@pytest.mark.chaos # half a minute for what one line decides
def test_a_mixture_of_networks_is_fitted_by_one_worker_to_the_same_bits(ray_cluster, tmp_path):
    from mlray.engines.train_on_ray import RayBackend
    from mlray.running.run import make_job
    from mlray.sources.rows import read_rows
    from mlray.values.settings import Settings
    from mlray.values.spec import read_spec
    spec = read_spec("configs/diabetes.yaml", ["model={network: mlp, hidden: [16], embedding: 4, bins: 4}", "train={epochs: 5, patience: 5}", "mitigation={method: exponentiated_gradient, by: [sex], eps: 0.02, rounds: 4}"])
    job = make_job(spec, read_rows(spec, Settings(root=tmp_path, home=tmp_path)))
    there, here = list(RayBackend(2).train(job, "there", tmp_path)), list(LocalBackend().train(job, "here", tmp_path))
    assert [e.metrics for e in there] == [e.metrics for e in here] and there[-1].state.workers == (1,) * 6 and "mixture_shares" in here[-1].state.best and same(there[-1].state.best, here[-1].state.best)


@pytest.mark.chaos # another half a minute; that a worker's number changes no bit is said without Ray in test_folds
def test_folds_are_fitted_side_by_side_to_the_same_bits_and_through_a_death(ray_cluster, tmp_path):
    from mlray.engines.train_on_ray import RayBackend
    from mlray.values.settings import Settings
    spec = read_spec("configs/diabetes.yaml", ["model={network: mlp, hidden: [16], embedding: 4, bins: 4}", "train={epochs: 40, patience: 40, folds: 3}"])
    job, killed = make_job(spec, read_rows(spec, Settings(root=tmp_path, home=tmp_path))), []
    here = list(LocalBackend().train(job, "here", tmp_path))

    def kill() -> None:
        if process := worker_process():
            os.kill(process.pid, signal.SIGKILL)
            killed.append(process.pid)
    for workers in (1, 2, 5):
        there = []
        for epoch in RayBackend(workers).train(job, f"on {workers}", tmp_path):
            there.append(epoch)
            if workers == 2 and epoch.number == 5 and not killed: kill()
        assert [e.metrics for e in there] == [e.metrics for e in here] and same(there[-1].state.best, here[-1].state.best)
        assert set(there[-1].state.workers) == {min(workers, 3)} or workers == 2
    assert killed


def worker_process() -> psutil.Process | None:
    "The training worker among our own descendants."
    return next((p for p, name in running_below().items() if "RayTrainWorker" in name), None)


def test_a_killed_worker_changes_nothing(ray_cluster, job, tmp_path):
    from dataclasses import replace

    from mlray.engines.train_on_ray import RayBackend
    longer = replace(job, train=job.train.model_copy(update={"epochs": 40, "patience": 40}))
    killed: list[int] = []

    def kill() -> None:
        process = worker_process()
        if process is not None:
            os.kill(process.pid, signal.SIGKILL)
            killed.append(process.pid)
    history = []
    for epoch in RayBackend(1).train(longer, "d", tmp_path):
        history.append(epoch)
        if len(history) == 3: threading.Thread(target=kill).start()
        time.sleep(0.02)
    assert killed, "nobody was killed, so nothing was shown"
    undisturbed = list(LocalBackend().train(longer, "d", tmp_path))
    assert same(history[-1].state.now, undisturbed[-1].state.now) and history[-1].number == 40


def cores_free(within: float) -> bool:
    import ray
    until, all_of_them = time.monotonic() + within, ray.cluster_resources()["CPU"]
    while (free := ray.available_resources().get("CPU", 0)) < all_of_them and time.monotonic() < until: time.sleep(0.1)
    return free == all_of_them


def test_who_stops_listening_ends_the_workers(ray_cluster, job, tmp_path):
    from dataclasses import replace

    from ray.util import placement_group_table

    from mlray.engines.train_on_ray import RayBackend
    assert cores_free(10 * slower())
    endless = replace(job, train=job.train.model_copy(update={"epochs": 100_000, "patience": 100_000}))
    training = RayBackend(2).train(endless, "d", tmp_path)
    next(training)
    busy = worker_process()
    assert busy and not cores_free(0)
    training.close()
    assert cores_free(5 * slower()) and not [p for p in placement_group_table().values() if p["state"] != "REMOVED"]
    until = time.monotonic() + 10 * slower()
    while not gone(busy) and time.monotonic() < until: time.sleep(0.1)
    assert gone(busy)


def test_an_error_on_a_worker_is_a_letter(ray_cluster, job, tmp_path):
    from dataclasses import replace

    from mlray.engines.train_on_ray import RayBackend
    from mlray.values.errors import TrainingError
    with pytest.raises(TrainingError, match=r"Lower train\.learning_rate"):
        list(RayBackend(1).train(replace(job, train=job.train.model_copy(update={"learning_rate": 1e30, "epochs": 30, "patience": 30})), "d", tmp_path))


@adult_data
def test_adult(ray_cluster, settings):
    "On the original test file: AUC at least 0.905, with one process and, within 0.005, with two workers."
    from mlray.engines.train_on_ray import RayBackend
    spec = read_spec(shipped("configs") / "adult.yaml", ["train.epochs=3"])
    run = train(spec, settings, RayBackend(2))
    auc = run.evaluation.scorecard.overall["roc_auc"].value
    assert run.rows.parts.test.height == 16281 and auc >= 0.905 and run.verdict.passed
    here = train(spec, settings, LocalBackend())
    assert abs(here.evaluation.scorecard.overall["roc_auc"].value - auc) <= 0.005
    assert str(here.version) == "adult/2" and evaluate(bundle_of(open_registry(settings), here.version), here.rows.parts.test).values == here.evaluation.values


def test_a_worker_that_hangs_on_its_way_out_is_seen_off(ray_cluster):
    "Ray has workers that hear of nothing any more; they are found below their raylet, and ended."
    import os
    import subprocess
    import sys

    import psutil
    import ray

    from mlray.engines.cluster_on_ray import _see_off, _workers
    pid = ray.get(ray.remote(num_cpus=0)(lambda: os.getpid()).remote())
    assert pid in {p.pid for p in _workers()} and os.getpid() not in {p.pid for p in _workers()}
    stubborn = subprocess.Popen([sys.executable, "-c", "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"])
    assert stubborn.pid not in {p.pid for p in _workers()}, "it is none of Ray's"
    _see_off([psutil.Process(stubborn.pid)], 0.2)
    assert not psutil.pid_exists(stubborn.pid)


@pytest.mark.chaos
def test_a_ray_that_starts_too_slowly_is_a_letter_and_leaves_nothing(tmp_path):
    from mlray.engines.cluster_on_ray import cluster
    from mlray.values.errors import Unavailable
    from mlray.values.settings import Settings
    before, held = set(psutil.Process().children()), threading.Event()

    def hold() -> None:
        while not held.is_set():
            for process in (p for p in psutil.Process().children() if p not in before and p.name() == "raylet"):
                process.suspend()
                held.set()
            time.sleep(0.005)
    thread = threading.Thread(target=hold)
    thread.start()
    try:
        with pytest.raises(Unavailable, match="did not start on this machine within the 30 seconds"), cluster(Settings(root=tmp_path, home=tmp_path, object_store_mb=100)): pass
    finally:
        held.set()
        thread.join()
    assert not [p for p in set(psutil.Process().children()) - before if not gone(p) and p.name() in ("raylet", "gcs_server")]
