"""Under load, through HAProxy and Ray Serve: replicas come and go, a queue is full, a shadow hangs, a canary gets its share. What was seen is printed."""
import asyncio
import itertools
import os
import statistics
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from mlray.command_line.commands import deploy_versions
from mlray.governance.access import new_key
from mlray.governance.registry import Registry, add_key, bundle_of, open_registry, promote, register
from mlray.monitoring.journal import Entry, records
from mlray.running.run import train
from mlray.serving.openapi import example_row
from mlray.serving.plan import set_share
from mlray.shipping.bundle import Bundle
from mlray.values.settings import Settings, shipped
from mlray.values.spec import read_spec
from tests.canaries import Added, gone_wrong, same, slow
from tests.conftest import free_port
from tests.test_serving_faults import Load

pytestmark = [pytest.mark.ray, pytest.mark.chaos, pytest.mark.xdist_group("ray")]


@dataclass(frozen=True)
class House:
    "A registry with a key, and versions of the diabetes model with something behind them."
    settings: Settings
    registry: Registry
    base: Bundle
    row: dict
    key: str

    def version(self, name: str, added: Added, alias: str = "production", **more: object) -> None:
        made = gone_wrong(self.base, self.settings.root / f"{name}-{time.time_ns()}", added, name=name, **more)
        promote(self.registry, register(self.registry, made, {}), alias)

    @property
    def headers(self) -> dict[str, str]: return {"authorization": f"Bearer {self.key}"}

    def ask(self, client: httpx.Client, name: str, **more: object) -> httpx.Response:
        return client.post(f"{self.settings.url}/v1/models/{name}:predict", json={"instances": [self.row]}, **more)


@pytest.fixture(scope="module")
def diabetes(tmp_path_factory) -> Bundle:
    root = tmp_path_factory.mktemp("trained")
    settings = Settings(root=root, home=root / "home", tracking="disabled", gates=())
    return bundle_of(open_registry(settings), train(read_spec(shipped("configs") / "diabetes.yaml"), settings).version)


def house(root: Path, base: Bundle, **more: object) -> House:
    root.mkdir(exist_ok=True)
    settings = Settings.model_validate({"root": root, "home": root / "home", "port": free_port(), "object_store_mb": 100, "tracking": "disabled", "gates": (), **more})
    registry, (key, text) = open_registry(settings), new_key("admin")
    add_key(registry, key)
    return House(settings, registry, base, example_row(base.contract), text)


@contextmanager
def served(house: House, *names: str) -> Iterator[None]:
    from mlray.engines.cluster_on_ray import cluster
    with cluster(house.settings):
        deploy_versions(names, house.settings)
        yield


def replicas(deployment: str) -> int:
    "Those that run."
    from ray import serve
    return serve.status().applications["mlray"].deployments[deployment].replica_states.get("RUNNING", 0)


def until(true, seconds: float, what: str) -> float:
    "The seconds it took."
    began = time.monotonic()
    while not true():
        assert time.monotonic() - began < seconds, f"{what}: not within {seconds:g} s"
        time.sleep(0.2)
    return time.monotonic() - began


def test_replicas_come_and_go_with_the_load(diabetes, tmp_path):
    "Gateways 1 → 3 → 1; predictors of a model that is apart 0 → 3 → 0; all that was asked is answered."
    here = house(tmp_path / "house", diabetes, replicas="1..3", replica_ongoing=3, replicas_up_s=2, replicas_down_s=4)
    here.version("near", slow(20), serve=diabetes.spec.serve.model_dump(mode="json") | {"timeout_s": 120})
    here.version("far", slow(20), serve=diabetes.spec.serve.model_dump(mode="json") | {"placement": "apart", "timeout_s": 120, "min_replicas": 0, "max_replicas": 3, "target_ongoing": 3, "up_delay_s": 2, "down_delay_s": 4})
    with served(here, "near", "far"):
        rows, told = {"near": here.row, "far": here.row}, {}
        assert replicas("Gateway") == 1 and replicas("Predictor-far") == 0
        with Load(here.settings.url, here.key, rows, timeout_s=150) as load: # for as long as a first predictor may take to start on a busy machine
            told["gateways 1 → 3"] = until(lambda: replicas("Gateway") == 3, 120, "three gateways")
            told["predictors 0 → 3"] = until(lambda: replicas("Predictor-far") == 3, 120, "three predictors")
            until(lambda: load.said["200"] > 2000, 120, "two thousand answers")
        loaded = load.taken()
        with httpx.Client(timeout=150, headers=here.headers) as client, ThreadPoolExecutor(1) as one: # a little goes on while they go
            ended, few = threading.Event(), Counter()

            def trickle() -> None:
                while not ended.wait(0.1): few[here.ask(client, "near").status_code] += 1
            going = one.submit(trickle)
            try:
                told["gateways 3 → 1"] = until(lambda: replicas("Gateway") == 1, 120, "one gateway")
                told["predictors 3 → 0"] = until(lambda: replicas("Predictor-far") == 0, 120, "no predictor")
            finally:
                ended.set()
                going.result(160)
            began = time.monotonic()
            again = here.ask(client, "far")
            told["an answer from 0"] = time.monotonic() - began
    print(f"\n{dict(loaded)} under load, {dict(few)} while replicas went; " + ", ".join(f"{what} {s:.1f} s" for what, s in told.items()) + f"; load {os.getloadavg()[0]:.0f}")
    assert set(loaded) == {"200"} and set(few) == {200} and again.status_code == 200


def test_a_full_queue_says_so(diabetes, tmp_path):
    "More at once than one gateway takes and may wait for it: answered or told to come back, never anything else; what was answered is journaled, once, and nothing else is."
    here = house(tmp_path / "house", diabetes, max_queued=8, journal=True, console=False)
    here.version("slow", slow(150))

    async def storm(clients: int, each: int) -> list[tuple[int, str | None, str, float]]:
        async with httpx.AsyncClient(timeout=60, headers=here.headers, limits=httpx.Limits(max_connections=None)) as client:
            async def one() -> list[tuple[int, str | None, str, float]]:
                said = []
                for _ in range(each):
                    began = time.monotonic()
                    reply = await client.post(f"{here.settings.url}/v1/models/slow:predict", json={"instances": [here.row]})
                    said.append((reply.status_code, reply.headers.get("retry-after"), reply.json().get("request_id" if reply.status_code == 200 else "error", ""), time.monotonic() - began))
                return said
            return list(itertools.chain.from_iterable(await asyncio.gather(*(one() for _ in range(clients)))))

    with served(here, "slow"):
        said = asyncio.run(storm(200, 10))
        with httpx.Client(timeout=60, headers=here.headers) as client: after = here.ask(client, "slow")
    acknowledged = [i for status, _, i, _ in said if status == 200] + [after.json()["request_id"]]
    found = Counter(e.id for e in records(here.settings.home / "journal" / "segments", Entry) if e.status == 200)
    print(f"\n200 clients at once, 8 may wait: {dict(Counter(s for s, *_ in said))}, the longest {max(s for *_, s in said):.1f} s; {len(acknowledged)} acknowledged, {found.total()} journaled; load {os.getloadavg()[0]:.0f}")
    assert {status for status, *_ in said} == {200, 503}
    assert {(retry, error) for status, retry, error, _ in said if status == 503} == {("1", "overloaded")}
    assert found == Counter(acknowledged)
    assert after.status_code == 200


def test_a_canary_gets_its_share(diabetes, tmp_path):
    "Ten percent of those who ask, and always the same ones, whichever of two gateways they meet."
    here = house(tmp_path / "house", diabetes, replicas=2)
    here.version("light", same())
    here.version("light", slow(1), "canary")
    set_share(here.registry, "light", 0.1)
    with served(here, "light"):
        def arms(keys: range) -> list[tuple[str, str]]: # each with connections of its own
            with httpx.Client(timeout=60, headers=here.headers) as client:
                return [((said := here.ask(client, "light", headers={"x-routing-key": f"caller-{k}"}).json())["arm"], said["version"]) for k in keys]
        with ThreadPoolExecutor(8) as clients:
            parts = [range(i, i + 1250) for i in range(0, 10_000, 1250)]
            first, second = (list(itertools.chain.from_iterable(clients.map(arms, parts))) for _ in range(2))
    share = first.count(("canary", "2")) / len(first)
    print(f"\n{len(first) + len(second)} requests of {len(first)} callers: canary {share:.2%}, {sum(a == b for a, b in zip(first, second, strict=True))} of {len(first)} got the same version again; load {os.getloadavg()[0]:.0f}")
    assert {*first} == {("production", "1"), ("canary", "2")} and 0.09 <= share <= 0.11 and first == second


def test_a_stuck_shadow_is_not_felt(diabetes, tmp_path):
    "Two environments of one cluster, behind one HAProxy: the same version, and beside one of them a shadow that takes far longer than requests take to come. They are asked by turns."
    from mlray.engines.cluster_on_ray import cluster
    port, turns, each = free_port(), 20, 500
    plain, shadowed = (house(tmp_path / n, diabetes, port=port, namespace=n, route=f"/{n}", console=False, jobs_queued=0) for n in ("plain", "shadowed"))
    for here in (plain, shadowed): here.version("light", same())
    shadowed.version("light", slow(20_000), "shadow")
    with cluster(plain.settings):
        for here in (plain, shadowed): deploy_versions(["light"], here.settings)

        def p99(here: House) -> float: # milliseconds
            took = []
            with httpx.Client(timeout=60, headers=here.headers) as client:
                for _ in range(each):
                    began = time.perf_counter()
                    assert here.ask(client, "light").status_code == 200
                    took.append(time.perf_counter() - began)
            return 1000 * statistics.quantiles(took, n=100)[98]
        for here in (plain, shadowed): p99(here)
        pairs = [(p99(plain), p99(shadowed)) for _ in range(turns)]
        with httpx.Client(headers=shadowed.headers) as client: told = client.get(f"{shadowed.settings.url}/metrics").text
    dropped = sum(float(line.rpartition(" ")[2]) for line in told.splitlines() if line.startswith("mlray_shadow_dropped_total{"))
    added = statistics.median(b - a for a, b in pairs)
    print(f"\n{turns} turns of {each} requests: p99 {statistics.median(a for a, _ in pairs):.2f} ms without, {statistics.median(b for _, b in pairs):.2f} ms beside a stuck shadow; median of the differences {added:+.2f} ms; {dropped:.0f} of {(turns + 1) * each} dropped; load {os.getloadavg()[0]:.0f}")
    assert dropped > 0.9 * turns * each and added < 1
