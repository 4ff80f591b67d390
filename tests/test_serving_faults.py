"""Under a load of POSTs: versions change, updates fail, and whatever serves is killed, one after the other. What was lost is counted and printed."""
import os
import signal
import threading
import time
from collections import Counter
from dataclasses import dataclass, field

import httpx
import psutil
import pytest

from mlray.command_line.commands import deploy_versions
from mlray.engines.haproxy import servers_up
from mlray.governance.access import new_key
from mlray.governance.registry import Registry, Version, add_key, bundle_of, open_registry, promote, register, rollback
from mlray.running.run import train
from mlray.serving.openapi import example_row
from mlray.values.settings import Settings, shipped
from mlray.values.spec import read_spec
from tests.canaries import gone_wrong, raises, slow
from tests.conftest import free_port

pytestmark = [pytest.mark.ray, pytest.mark.chaos, pytest.mark.xdist_group("ray")]
CLIENTS, TIMES = int(os.environ.get("MLRAY_TEST_CLIENTS", "24")), int(os.environ.get("MLRAY_TEST_KILLS", "4"))
UPDATES = max(12, TIMES)


@dataclass
class Load:
    "POSTs, one after the other, by many clients; half of them ask a model in the gateway, half one in predictors."
    url: str
    key: str
    rows: dict[str, dict]
    timeout_s: float = 30
    said: Counter = field(default_factory=Counter)
    ended: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __enter__(self) -> "Load":
        names = list(self.rows)
        self.threads = [threading.Thread(target=self.client, args=(names[i % len(names)],), daemon=True) for i in range(CLIENTS)]
        for t in self.threads: t.start()
        return self

    def __exit__(self, *_) -> None:
        self.ended.set()
        for t in self.threads: t.join(self.timeout_s + 10)

    def client(self, name: str) -> None:
        with httpx.Client(base_url=self.url, timeout=self.timeout_s, headers={"authorization": f"Bearer {self.key}"}) as client:
            while not self.ended.is_set():
                try: said = str(client.post(f"/v1/models/{name}:predict", json={"instances": [self.rows[name]]}).status_code)
                except httpx.HTTPError as error: said = type(error).__name__
                with self.lock: self.said[said] += 1
                if said != "200": time.sleep(0.05)

    def taken(self) -> Counter:
        "What was said since the last time."
        with self.lock: now, self.said = self.said, Counter()
        return now


@dataclass(frozen=True)
class Stack:
    settings: Settings
    registry: Registry
    versions: list[Version]
    broken: Version
    key: str
    rows: dict[str, dict]

    def answering(self, load: Load, seconds: float = 60) -> None:
        "Wait until a hundred requests in a row were answered."
        end, since = time.monotonic() + seconds, None
        while time.monotonic() < end:
            with load.lock: now = Counter(load.said)
            since = now if since is None else since
            if now["200"] - since["200"] >= 100 and sum(now.values()) - now["200"] == sum(since.values()) - since["200"]: return
            if sum(now.values()) - now["200"] != sum(since.values()) - since["200"]: since = now
            time.sleep(0.1)
        raise AssertionError(f"the service did not come back within {seconds:g} s: {dict(now)}")


    def follows(self, version: Version, seconds: float = 60) -> None:
        "Wait until both replicas answer with a version: twenty answers in a row are by it."
        end, number, row = time.monotonic() + seconds, str(version).partition("/")[2], 0
        while row < 20:
            assert time.monotonic() < end, f"{version} does not answer within {seconds:g} s"
            said = httpx.post(f"{self.settings.url}/v1/models/near:predict", json={"instances": [self.rows["near"]]}, headers={"authorization": f"Bearer {self.key}"}, timeout=30)
            row = row + 1 if said.status_code == 200 and said.json()["version"] == number else 0


@pytest.fixture(scope="module")
def stack(tmp_path_factory):
    from mlray.engines.cluster_on_ray import cluster
    root = tmp_path_factory.mktemp("faults")
    settings = Settings(root=root, home=root / "home", port=free_port(), object_store_mb=100, tracking="disabled", journal=True, gates=(), replicas=2)
    registry = open_registry(settings)
    base = bundle_of(registry, train(read_spec(shipped("configs") / "diabetes.yaml"), settings).version)
    more = lambda name, added, **more: register(registry, gone_wrong(base, root / f"{name}-{len(os.listdir(root))}", added, name=name, **more), {})
    versions = [more("near", slow(n)) for n in (1, 2)]
    far = more("far", slow(1), serve=base.spec.serve.model_dump(mode="json") | {"placement": "apart", "min_replicas": 2, "max_replicas": 2})
    broken = more("near", raises(0)) # even the row with which a version warms up: this one cannot be loaded
    for v in (versions[0], far): promote(registry, v)
    key, text = new_key("predictor")
    add_key(registry, key)
    row = example_row(bundle_of(registry, versions[0]).contract)
    with cluster(settings):
        deploy_versions(["near", "far"], settings)
        yield Stack(settings, registry, versions, broken, text, {"near": row, "far": row})


def ours(word: str) -> list[psutil.Process]:
    "Processes of this cluster whose command line has a word."
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if word in " ".join([process.name(), *process.cmdline()[:1]]): found.append(process)
        except (psutil.NoSuchProcess, psutil.ZombieProcess): continue
    return found


def whole(word: str, before: list[psutil.Process]) -> bool:
    "Whether another has come for the one that was killed, and HAProxy knows both gateways."
    import ray
    if word != "haproxy": return len(ours(word)) >= len(before)
    return sum("Gateway" in name for name in servers_up(ray.get_runtime_context().get_node_id()) or ()) >= 2


def test_versions_change_and_nobody_is_lost(stack):
    with Load(stack.settings.url, stack.key, stack.rows) as load:
        stack.answering(load)
        load.taken()
        for i in range(UPDATES):
            promote(stack.registry, stack.versions[(i + 1) % 2])
            stack.follows(stack.versions[(i + 1) % 2])
            stack.answering(load)
        said = load.taken()
    print(f"\n{UPDATES} rolling updates, {CLIENTS} clients: {dict(said)}")
    assert set(said) == {"200"}


def test_updates_that_fail_change_nothing(stack):
    with Load(stack.settings.url, stack.key, stack.rows) as load:
        stack.answering(load)
        load.taken()
        for _ in range(TIMES):
            promote(stack.registry, stack.broken)
            time.sleep(1.2) # twice as long as replicas take to look
            stack.answering(load)
            rollback(stack.registry, "near")
            stack.answering(load)
        said = load.taken()
        promote(stack.registry, stack.versions[1])
        stack.follows(stack.versions[1]) # and those that can be used, are
    print(f"\n{TIMES} updates that cannot be loaded, {CLIENTS} clients: {dict(said)}")
    assert set(said) == {"200"}


@pytest.mark.parametrize(("word", "times", "lost", "most_s"), [ # the share of requests, and seconds until a hundred are answered in a row
    ("Predictor", 5 * TIMES // 2, 0.0, 60), ("ServeController", TIMES, 0.0, 60), ("Gateway", TIMES, 0.005, 60), ("haproxy", TIMES, 0.1, 8)]) # HAProxy has no second one before it: what is within it is lost, and what comes until its stand-in stands
def test_what_serves_is_killed(stack, word, times, lost, most_s):
    told: list[float] = []
    with Load(stack.settings.url, stack.key, stack.rows) as load:
        stack.answering(load)
        load.taken()
        for _ in range(times):
            victims = sorted(ours(word), key=lambda p: p.create_time(), reverse=True) # of HAProxy, the newest: those before it only finish what they have begun
            assert victims, f"no process of this cluster is called {word}"
            began = time.monotonic()
            victims[0].send_signal(signal.SIGKILL)
            psutil.wait_procs(victims[:1], timeout=10)
            stack.answering(load)
            told.append(time.monotonic() - began)
            end = time.monotonic() + 60
            while not whole(word, victims) and time.monotonic() < end: time.sleep(0.2)
        said = load.taken()
    failed = sum(n for s, n in said.items() if s != "200")
    print(f"\n{times} × SIGKILL {word}, {CLIENTS} clients: {dict(said)}; {failed} of {sum(said.values())} lost; a hundred answers in a row again after {sum(told) / times:.1f} s on average, {max(told):.1f} s at most; load {os.getloadavg()[0]:.0f}")
    assert failed <= lost * sum(said.values()) and max(told) < most_s
