"""What the tests share: settings of their own, one trained version, one Ray cluster."""
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil
import pytest

from mlray.values.settings import Settings, shipped

os.environ.setdefault("WANDB_SILENT", "true")
DATA = Path(os.environ["MLRAY_DATA"]).resolve() if os.environ.get("MLRAY_DATA") else None
ROOT = Path(__file__).parents[1]


_claims: list[socket.socket] = []


def free_port() -> int:
    "A TCP port of loopback that is given to no other test for as long as this process lives."
    from mlray.engines.cluster_on_ray import free_port as unused
    while True:
        _claims.append(socket.socket(type=socket.SOCK_DGRAM))
        with suppress(OSError):
            _claims[-1].bind(("127.0.0.1", port := unused())) # its UDP twin: other tests, beside this one, see by it that it is taken
            return port


def running_below(process: psutil.Process | None = None) -> dict[psutil.Process, str]:
    "What a process has started, and what that has, each with its name and command line; who goes meanwhile is left out."
    found = {}
    for one in (process or psutil.Process()).children(recursive=True):
        with suppress(psutil.NoSuchProcess): found[one] = " ".join([one.name(), *one.cmdline()])
    return found


def slower() -> float:
    "How many times slower than an idle machine this one is now, by a Python process that loads numpy: seconds that somebody promises are multiplied by it."
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", "import numpy"], check=True)
    return max(1.0, (time.monotonic() - began) / 0.25)


def gone(process: psutil.Process) -> bool:
    "Whether a process has ended, also where nobody has asked for how yet."
    with suppress(psutil.NoSuchProcess): return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    return True


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    "An environment of one's own."
    return Settings(root=tmp_path, home=tmp_path / "home", data=DATA, port=free_port(), object_store_mb=100, tracking="disabled")


@pytest.fixture(scope="session")
def diabetes():
    "The spec that ships."
    from mlray.values.spec import read_spec
    return read_spec(shipped("configs") / "diabetes.yaml")


@pytest.fixture(scope="session")
def trained(tmp_path_factory, diabetes):
    "Settings with one registered version of the diabetes model, and its run."
    from mlray.running.run import train
    root = tmp_path_factory.mktemp("trained")
    settings = Settings(root=root, home=root / "home", object_store_mb=100, tracking="disabled")
    return settings, train(diabetes, settings)


@pytest.fixture(scope="session")
def shared_cluster() -> Iterator[ExitStack]:
    "What ends the cluster that tests share, while there is one."
    with ExitStack() as up: yield up


@pytest.fixture(scope="module")
def ray_cluster(shared_cluster: ExitStack) -> None:
    "One cluster for all tests of a process, but those that want one of their own."
    import ray

    from mlray.engines.cluster_on_ray import cluster
    if not ray.is_initialized(): shared_cluster.enter_context(cluster(Settings(object_store_mb=100)))


@pytest.fixture(scope="module")
def no_shared_cluster(shared_cluster: ExitStack) -> None:
    "For whoever starts another: a process can be in one. The one that is shared begins again when it is wanted."
    shared_cluster.close()


@pytest.fixture(autouse=True)
def no_cluster(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    "A test that is not marked `ray` must not start one, not even by accident."
    if request.node.get_closest_marker("ray"): return
    def refuse(*args, **kwargs): raise RuntimeError("This test is not marked `ray`, so it runs in one process.")
    if "ray" in sys.modules: monkeypatch.setattr("ray.init", refuse)


adult_data = pytest.mark.skipif(DATA is None or not (DATA / "adult/adult.data").is_file(), reason="MLRAY_DATA names no folder with adult/adult.data")
