"""Two environments on one cluster: each has its own registry, keys, versions and application, and neither touches the other. `-m chaos` runs it."""
import json
import time
from collections.abc import Callable

import httpx
import pytest

from mlray.engines.cluster_on_ray import cluster
from mlray.engines.serve_on_ray import deploy, undeploy
from mlray.governance.access import new_key
from mlray.governance.registry import add_key, bundle_of, open_registry, promote, version as find
from mlray.running.run import train
from mlray.serving.plan import plan_of
from mlray.values.settings import Settings
from mlray.values.spec import changed
from tests.conftest import free_port

pytestmark = [pytest.mark.chaos, pytest.mark.ray, pytest.mark.xdist_group("ray")]


def until(true: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.1)


def test_staging_and_production_on_one_cluster(tmp_path, diabetes):
    port = free_port()
    environment = lambda name: Settings(env=name, root=tmp_path, home=tmp_path / name, gates=(), tracking="disabled", object_store_mb=100, port=port, namespace=name, route="/" if name == "production" else f"/{name}")
    both = {name: environment(name) for name in ("production", "staging")}
    keys, rows = {}, {}
    for name, settings in both.items():
        registry = open_registry(settings)
        for seed in (1, 2): run = train(changed(diabetes, {"train.epochs": 1, "train.seed": seed + 10 * (name == "staging")}), settings)
        promote(registry, find(registry, "diabetes/1"), "production")
        key, keys[name] = new_key("predictor")
        add_key(registry, key)
        rows[name] = {n: run.rows.parts.test[n][0] for n in bundle_of(registry, run.version).contract.features}

    def ask(name: str, with_key: str = "") -> httpx.Response:
        return httpx.post(f"{both[name].url}/v1/models/diabetes:predict", content=json.dumps({"instances": [rows[name]]}, default=str), headers={"authorization": f"Bearer {keys[with_key or name]}"}, timeout=10)

    def version(name: str) -> str: return ask(name).json()["version"]

    key, admin = new_key("admin")
    add_key(open_registry(both["staging"]), key)
    with cluster(both["production"]):
        for settings in both.values(): deploy(plan_of(open_registry(settings), ["diabetes"]), ["diabetes"], settings)
        digests = {name: ask(name).json()["digest"] for name in both}
        assert len(set(digests.values())) == 2 and {ask(a, b).status_code for a, b in (("staging", "production"), ("production", "staging"))} == {401}, "the key of one is nobody's in the other"
        page = httpx.get(f"{both['staging'].url}/docs", headers={"authorization": f"Bearer {admin}"})
        assert "/staging/openapi.json" in page.text
        promote(registry := open_registry(both["staging"]), find(registry, "diabetes/2"), "production")
        until(lambda: version("staging") == "2")
        assert version("production") == "1"
        undeploy(both["staging"])
        assert version("production") == "1" and ask("production").json()["digest"] == digests["production"]
        until(lambda: ask("staging").status_code == 404)
