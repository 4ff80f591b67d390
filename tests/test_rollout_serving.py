"""Rollouts through the real service: HAProxy, Ray Serve, a load of clients, labels that come back, and the controller that `mlray serve` starts beside it."""
import threading
import time
from collections import Counter
from dataclasses import dataclass, field

import httpx
import numpy as np
import pytest
import ray

from mlray.command_line.commands import deploy_versions
from mlray.engines.watch_on_ray import watch_rollouts
from mlray.governance.access import new_key
from mlray.governance.ledger import audit
from mlray.governance.registry import Registry, Version, add_key, bundle_of, open_registry, promote, register
from mlray.monitoring.rollout_run import Standing
from mlray.monitoring.rollout_step import holder_of, lease_of, progress, standing_of, start
from mlray.running.run import train
from mlray.values.settings import Settings, shipped
from mlray.values.spec import read_spec
from tests.canaries import gone_wrong, no_number, opposite, raises, same, slow, unfair
from tests.conftest import free_port

pytestmark = [pytest.mark.ray, pytest.mark.chaos, pytest.mark.xdist_group("ray")]
POLICY = {"steps": [0.3, 1.0], "every": "2s", "checks": [{"metric": "error_rate", "margin": 0.02}, {"metric": "invalid_rate", "margin": 0.02}, {"metric": "accuracy", "margin": 0.1, "higher_is_better": True}], "latency": {"ratio": 1.5, "margin": 0.1}}
PROMISES = {"fairness": [{"metric": "equal_opportunity_difference", "by": ["sex"], "at_most": 0.3}]}
LABELS = {"group 1": 0.25, "group 2": 0.6} # share of each group that has the illness


@dataclass
class Load:
    "Clients who ask, and say later what became of it."
    url: str
    name: str
    keys: dict[str, str]
    rows: list[dict]
    clients: int = 4
    statuses: Counter = field(default_factory=Counter)
    ended: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> "Load":
        self.threads = [threading.Thread(target=self.client, args=(i,), daemon=True) for i in range(self.clients)]
        for t in self.threads: t.start()
        return self

    def __exit__(self, *_) -> None:
        self.ended.set()
        for t in self.threads: t.join(30)

    def client(self, seed: int) -> None:
        draw, said = np.random.default_rng(seed), []
        with httpx.Client(base_url=self.url, timeout=30, headers={"authorization": f"Bearer {self.keys['admin']}"}) as client:
            while not self.ended.is_set():
                row = self.rows[draw.integers(len(self.rows))]
                try: reply = client.post(f"/v1/models/{self.name}:predict", json={"instances": [row]})
                except httpx.HTTPError as error:
                    self.statuses[type(error).__name__] += 1
                    continue
                body = reply.json()
                self.statuses[reply.status_code, body.get("arm"), body.get("version")] += 1
                if reply.status_code == 200: said.append({"request_id": body["request_id"], "value": 200.0 if draw.random() < LABELS[row["sex"]] else 100.0})
                if len(said) >= 50: client.post("/v1/feedback", json={"feedback": said}), said.clear()


@dataclass(frozen=True)
class Stack:
    settings: Settings
    registry: Registry
    champions: dict[str, Version]
    keys: dict[str, str]
    rows: list[dict]
    folder: object


@pytest.fixture(scope="module")
def stack(tmp_path_factory):
    "Two models: one that answers at once, and one that takes some milliseconds."
    from mlray.engines.cluster_on_ray import cluster
    root = tmp_path_factory.mktemp("rollouts")
    settings = Settings(root=root, home=root / "home", port=free_port(), object_store_mb=100, tracking="disabled", journal=True, gates=())
    registry = open_registry(settings)
    run = train(read_spec(shipped("configs") / "diabetes.yaml"), settings)
    base = bundle_of(registry, run.version)
    champions = {"light": register(registry, gone_wrong(base, root / "light", same(), POLICY, name="light", gates=PROMISES), {}), "heavy": register(registry, gone_wrong(base, root / "heavy", slow(150), POLICY, name="heavy", gates=PROMISES), {})}
    for v in champions.values(): promote(registry, v)
    key, text = new_key("admin")
    add_key(registry, key)
    rows = run.rows.parts.train.select(base.contract.features).to_dicts()
    with cluster(settings):
        deploy_versions(["light", "heavy"], settings)
        yield Stack(settings, registry, champions, {"admin": text}, rows, (root, base))


def let_out(stack: Stack, name: str, added, seconds: float, policy=POLICY, gates=PROMISES) -> tuple[Standing, Counter, float]:
    "A rollout, under load, until it is over or so long has passed."
    root, base = stack.folder
    canary = register(stack.registry, gone_wrong(base, root / f"{name}-{time.time_ns()}", added, policy, name=name, gates=gates), {})
    promote(stack.registry, canary, "canary")
    with Load(stack.settings.url, name, stack.keys, stack.rows) as load:
        began = time.monotonic()
        start(stack.registry, canary, bundle_of(stack.registry, canary).spec)
        while not (standing := standing_of(stack.registry, name)).over and time.monotonic() - began < seconds: time.sleep(0.5)
        took = time.monotonic() - began
    return standing, load.statuses, took


@pytest.mark.parametrize(("name", "added", "because"), [
    ("light", raises(3), {"error_rate"}), ("light", no_number(3), {"error_rate", "invalid_rate"}), ("heavy", slow(400), {"latency"}), ("light", unfair(2), {"equal_opportunity_difference[sex]"})], ids=["raises", "no number", "slow", "unfair"])
def test_a_bad_canary_goes_back_by_itself(stack, name, added, because):
    standing, statuses, took = let_out(stack, name, added, 150)
    shown = progress(stack.registry, stack.settings, name)
    print(f"\n{because}: {standing.over} after {took:.0f} s; {dict(statuses)}\n  {shown.steps[-1][-1]}")
    for f in shown.decision.findings: print("   ", f.metric, f.canary, f.champion, round(f.low, 3), round(f.high, 3), f.verdict)
    assert standing.over == "rolled back" and set(shown.decision.because) == because
    assert {s[0] for s in statuses} == {200}, "a user has seen an error"


@pytest.mark.parametrize(("added", "because"), [(raises(3), {"error_rate"}), (no_number(3), {"error_rate", "invalid_rate"}), (opposite(), {"answer_shift"}), (same(), set())], ids=["raises", "no number", "opposite", "same"])
def test_shadow_first(stack, added, because):
    "What listens along is judged before anybody hears it; a good one goes on to its first step and to everybody."
    standing, statuses, took = let_out(stack, "light", added, 150, POLICY | {"start": "shadow", "checks": POLICY["checks"][:2]}, {})
    shown = progress(stack.registry, stack.settings, "light")
    heard = sum(n for s, n in statuses.items() if s[1] == "canary")
    print(f"\nshadow first, {because or 'good'}: {standing.over or 'undecided'} after {took:.0f} s, shares {[s[2] for s in shown.steps]}, heard {heard} times of {sum(statuses.values())}; {shown.steps[-1][-1]}")
    assert {s[0] for s in statuses} == {200} and shown.steps[0][2] == 0.0
    if because: assert standing.over == "rolled back" and set(shown.decision.because) == because and heard == 0 and len(shown.steps) == 2
    else: assert standing.over != "rolled back" and [s[2] for s in shown.steps][:2] == [0.0, 0.3] and heard > 0


@pytest.mark.parametrize("name", ["light", "heavy"])
def test_a_canary_that_is_its_champion_stays(stack, name):
    standing, statuses, took = let_out(stack, name, slow(2) if name == "light" else slow(151), 120)
    shown = progress(stack.registry, stack.settings, name)
    print(f"\nA/A {name}: {standing.over or 'undecided'} after {took:.0f} s; {dict(statuses)}; {shown.steps[-1][-1]}")
    for f in shown.decision.findings: print("   ", f.metric, f.canary, f.champion, round(f.low, 3), round(f.high, 3), f.verdict)
    assert standing.over != "rolled back" and {s[0] for s in statuses} == {200}


def test_the_controller_beside_the_service_comes_back_when_it_dies(stack):
    "Killed in the middle of a rollout: Ray starts it again, and the rollout ends as it should."
    root, base = stack.folder
    keeper = watch_rollouts(stack.settings) # the one that is there
    canary = register(stack.registry, gone_wrong(base, root / "killed", raises(3), POLICY | {"alpha": 0.04}, name="light", gates=PROMISES), {})
    promote(stack.registry, canary, "canary")
    start(stack.registry, canary, bundle_of(stack.registry, canary).spec)
    end = time.monotonic() + 30
    while holder_of(stack.registry, lease_of("light")) is None and time.monotonic() < end: time.sleep(0.1)
    first = holder_of(stack.registry, lease_of("light"))
    ray.kill(keeper, no_restart=False)
    with Load(stack.settings.url, "light", stack.keys, stack.rows) as load:
        began = time.monotonic()
        while not (standing := standing_of(stack.registry, "light")).over and time.monotonic() - began < 150: time.sleep(0.5)
        took = time.monotonic() - began
    last = next(e for e in reversed(audit(stack.registry).entries) if e.action == "rollout")
    print(f"\ncontroller killed: {standing.over} {took:.0f} s later; {dict(load.statuses)}; {last.details['why']}")
    assert first is not None and standing.over == "rolled back" and {s[0] for s in load.statuses} == {200} and not audit(stack.registry).faults
