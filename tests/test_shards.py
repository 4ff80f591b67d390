"""FSDP in two plain processes: the weights of DDP, from half of the memory, and resumed to the bit, by however many workers."""
import os
from dataclasses import replace
from pathlib import Path

import pytest

from mlray.learning.model import Job, State, dump_state, epochs, load_state
from mlray.running.run import make_job
from mlray.sources.rows import read_rows
from mlray.values.recipe import Train
from mlray.values.settings import Settings
from mlray.values.spec import changed
from tests.conftest import free_port


def same(a: State, b: State) -> bool:
    import torch
    return a.epoch == b.epoch and a.history == b.history and all(x.keys() == y.keys() and all(torch.equal(x[n], y[n]) for n in y)
                                                                for x, y in ((a.now, b.now), (a.best, b.best), (a.average, b.average), (a.optimizer, b.optimizer)))


def work(rank: int, world: int, port: int, job: Job, start: bytes | None, folder: str) -> None:
    "One of several processes; keeps what each epoch brings, and the numbers of a network that are here."
    import torch.distributed as dist

    from mlray.engines.train_on_ray import _averaged, _sharded, _together
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=world)
    here = []

    def parallel(network):
        whole, network = sum(w.numel() for w in network.parameters()), (_sharded if job.train.parallel == "fsdp" else _averaged)(network)
        here.append(sum((w.to_local() if hasattr(w, "to_local") else w).numel() for w in network.parameters()) / whole)
        return network

    for epoch in epochs(job.shard(rank, world), load_state(start) if start else None, rank, world, parallel, together=_together):
        assert (epoch.state is None) == (rank > 0)
        if epoch.state: Path(folder, f"{epoch.number}").write_bytes(dump_state(epoch.state))
    Path(folder, f"here-{rank}").write_text(str(max(here)))
    dist.destroy_process_group()


def trained(job: Job, folder: Path, start: bytes | None = None) -> list[bytes]:
    "The states of a run of two processes."
    import torch.multiprocessing
    folder.mkdir()
    torch.multiprocessing.spawn(work, (2, free_port(), job, start, str(folder)), nprocs=2)
    return [file.read_bytes() for number in range(1, 9) if (file := folder / str(number)).exists()]


def test_shards_give_the_same_weights_and_resume_to_the_bit(diabetes, tmp_path):
    import torch

    from mlray.learning.loss import valid_loss
    from mlray.learning.network import fitted, scores
    spec = changed(diabetes, {"train.epochs": 3, "train.clip": 1.0})
    jobs = {kind: make_job(changed(spec, {"train.parallel": kind}), read_rows(spec, Settings(root=tmp_path, home=tmp_path))) for kind in ("ddp", "fsdp")}
    jobs = {kind: replace(job, valid_rows=job.valid_rows[1:], valid_labels=job.valid_labels[1:]) for kind, job in jobs.items()} # an odd number of rows
    ddp, fsdp = (trained(job, tmp_path / kind) for kind, job in jobs.items())
    one, other = load_state(ddp[-1]), load_state(fsdp[-1])
    assert [max(abs(x[k] - y[k]) for k in x) for x, y in zip(one.history, other.history, strict=True)] == pytest.approx([0, 0, 0], abs=1e-5)
    assert all((one.best[n] - other.best[n]).abs().max() < 1e-5 for n in one.best if one.best[n].numel()) and {n: w.shape for n, w in one.optimizer.items()} == {n: w.shape for n, w in other.optimizer.items()}
    job = jobs["ddp"] # each of the two has validated its half of the rows, and both know what all rows say
    whole = valid_loss(job.task, scores(fitted(job.features, job.model, one.best, job.task.outputs), *map(torch.from_numpy, job.valid_rows.tensors)).clone(), torch.from_numpy(job.valid_labels))
    assert len(job.valid_labels) % 2 and whole == pytest.approx(one.best_loss, abs=1e-6)
    assert [float((tmp_path / "ddp" / f"here-{rank}").read_text()) for rank in (0, 1)] == [1.0, 1.0]
    assert all(float((tmp_path / "fsdp" / f"here-{rank}").read_text()) < 0.55 for rank in (0, 1))
    assert same(load_state(trained(jobs["fsdp"], tmp_path / "again", fsdp[0])[-1]), other)
    alone = list(epochs(jobs["fsdp"], load_state(fsdp[0])))[-1].state # what was kept knows nothing of shards
    assert alone.workers == (2, 1, 1) and alone.history[0] == other.history[0] and abs(alone.best_loss - other.best_loss) < 0.05


def test_what_does_not_go_with_shards():
    for given, said in (({"compile": True}, "fsdp and compile"), ({"privacy": {"epsilon": 3}}, "each worker needs all weights")):
        with pytest.raises(ValueError, match=said): Train(parallel="fsdp", **given)
