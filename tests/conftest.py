"""What the tests share: settings of their own, one trained version, one Ray cluster."""
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlray.values.settings import Settings, shipped

os.environ.setdefault("WANDB_SILENT", "true")
DATA = Path(os.environ["MLRAY_DATA"]).resolve() if os.environ.get("MLRAY_DATA") else None
ROOT = Path(__file__).parents[1]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


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
def ray_cluster() -> Iterator[None]:
    "One cluster for all tests of a process."
    from mlray.engines.cluster_on_ray import cluster
    with cluster(Settings(object_store_mb=100)): yield


@pytest.fixture(autouse=True)
def no_cluster(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    "A test that is not marked `ray` must not start one, not even by accident."
    if request.node.get_closest_marker("ray"): return
    def refuse(*args, **kwargs): raise RuntimeError("This test is not marked `ray`, so it runs in one process.")
    import sys
    if "ray" in sys.modules: monkeypatch.setattr("ray.init", refuse)


adult_data = pytest.mark.skipif(DATA is None or not (DATA / "adult/adult.data").is_file(), reason="MLRAY_DATA names no folder with adult/adult.data")
