"""Regions: clusters that share a registry. Each has its own aliases, shares and rollouts; a release moves from one to the next; each goes on when the other, or the registry, is away."""
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from typer.testing import CliRunner

from mlray.cli import app
from mlray.command_line.region_cli import look, release
from mlray.governance.access import new_key
from mlray.governance.ledger import audit
from mlray.governance.opened import policy_of
from mlray.governance.registry import Registry, Version, add_evidence, add_key, bundle_of, generation, open_registry, promote, register, remove, rollback, version as named, versions
from mlray.governance.release import approvals, approvals_table, approve
from mlray.judgement.gate import judge
from mlray.judgement.rollout import Promote, RollBack
from mlray.monitoring.delivery import changes_of
from mlray.monitoring.rollout_step import carry_out, running, standing_of, start
from mlray.pages.console_pages import against, standing
from mlray.running.card import dossier
from mlray.running.runbook import runbook
from mlray.serving.plan import plan_of, set_share, share_of
from mlray.values.errors import Refused, RegistryError
from mlray.values.settings import Settings, amended, read_settings
from mlray.values.spec import Rule
from tests.canaries import gone_wrong, same, slow
from tests.conftest import free_port
from tests.postgres import Postgres, postgres
from tests.test_rollout_serving import Load

POLICY = {"steps": [0.5, 1.0], "every": "2s", "checks": [{"metric": "error_rate", "margin": 0.05}]}


@dataclass
class World:
    settings: Settings  # of nobody in particular
    registry: Registry
    first: Version
    second: Version

    def of(self, region: str) -> Registry: return open_registry(amended(self.settings, region=region))


@pytest.fixture
def world(trained, tmp_path) -> World:
    "A registry with two versions; eu and us have the first one in production."
    settings = amended(trained[0], home=tmp_path / "home", gates=())
    registry, bundle = open_registry(settings), bundle_of(open_registry(trained[0]), trained[1].version)
    first, second = register(registry, bundle, {}), register(registry, gone_wrong(bundle, tmp_path / "second", same(), POLICY), {})
    made = World(settings, registry, first, second)
    for region in ("eu", "us"): promote(made.of(region), first)
    return made


def decided(registry: Registry, decision: type[Promote] | type[RollBack]) -> str:
    "Do in a region what its controller would do: up to production, or back."
    standing = standing_of(registry, "diabetes")
    spec = bundle_of(registry, named(registry, f"diabetes/{standing.canary}")).spec
    done, why = carry_out(registry, spec, standing, decision(1.0 if decision is Promote else 0.0, "shown", ()))
    assert not why
    return done.over


def test_each_region_has_its_own(world):
    eu, us = world.of("eu"), world.of("us")
    promote(eu, world.second)
    plans = {r.region: plan_of(r, ["diabetes"]).traffic[0] for r in (eu, us)}
    assert (plans["eu"].production, plans["eu"].previous, plans["us"].production) == ("2", "1", "1")
    with pytest.raises(RegistryError, match="no diabetes@production to serve"): plan_of(world.registry, ["diabetes"])
    assert named(world.registry, "diabetes@production@eu").number == 2 and named(eu, "diabetes@production").number == 2 and named(eu, "diabetes@production@us").number == 1
    assert set(named(eu, "diabetes/1").aliases) == {"production@us"} and set(named(us, "diabetes/1").aliases) == {"production"}
    promote(world.registry, world.second) # where there is no region
    assert set(named(us, "diabetes/2").aliases) == {"production@-", "production@eu"} and generation(us, "diabetes", "production@-") == 1
    assert rollback(eu, "diabetes")[0].number == 1 and named(world.registry, "diabetes@production").number == 2 and generation(us, "diabetes") == 1
    promote(us, world.second, "canary")
    set_share(us, "diabetes", 0.25)
    assert (share_of(us, "diabetes"), share_of(eu, "diabetes")) == (0.25, 0.0) and plan_of(us, ["diabetes"]).traffic[0].share == 0.25
    with pytest.raises(RegistryError, match="no diabetes@canary"): set_share(eu, "diabetes", 0.25)
    assert not audit(world.registry).faults


def test_what_production_asks_for_is_asked_for_in_each_region(world):
    asks = policy_of(amended(world.settings, approvals=1, separate_approver=False, freeze="2000-01-01..2000-01-02"))
    eu, us = world.of("eu"), world.of("us")
    eu.policy = us.policy = world.registry.policy = asks
    for registry, alias in ((eu, "production"), (world.registry, "production@us")):
        with pytest.raises(Refused, match="0 of 1 approvals are there"): promote(registry, world.second, alias)
    assert any("0 of 1 approvals" in why for why in against(eu, world.second)), "the console says so before anybody tries"
    approve(world.registry, world.second, "production@eu")
    assert [approvals_table(approvals(r, world.second)).rows[0][0] for r in (eu, us, world.registry)] == ["production", "production@eu", "production@eu"], "as each of them would say it"
    with pytest.raises(RegistryError, match="There is no diabetes@canary to take away"): remove(eu, "diabetes", "canary", "why not")
    with pytest.raises(RegistryError, match="There is no diabetes@canary@us, so nothing"): rollback(eu, "diabetes", "canary@us")
    assert [any("approval" in why for why in against(r, world.second)) for r in (eu, us)] == [False, True]
    with pytest.raises(Refused, match="for production@us` gives one"): promote(us, world.second)
    assert promote(eu, world.second) == 2
    for wrong in ("production@EU", "production@", "production@eu@us", "production/eu"):
        with pytest.raises(RegistryError, match="no name for an alias"): promote(eu, world.second, wrong)


def test_a_region_tells_its_own_moves(world):
    "In the console and in the runbook, whoever reads them in eu is told of eu."
    eu, us = world.of("eu"), world.of("us")
    promote(eu, world.second)
    told = {r.region: (standing(r, versions(r, "diabetes")), runbook(dossier(r, "diabetes/2")).markdown()) for r in (eu, us, world.registry)}
    assert told["eu"][0].production == named(eu, "diabetes/2") and told["eu"][0].since > told["us"][0].since and told["eu"][0].by == eu.actor
    assert told["us"][0].production == named(us, "diabetes/1") and told["us"][0].since, "what eu did is no move of us"
    assert told[""][0].production is None and not told[""][0].since
    assert "Production is diabetes/2, and was diabetes/1 before." in told["eu"][1] and "Production is diabetes" not in told["us"][1] + told[""][1]


def test_rollouts_of_two_regions_do_not_touch(world):
    eu, us = world.of("eu"), world.of("us")
    spec = bundle_of(eu, world.second).spec
    for registry in (eu, us):
        promote(registry, world.second, "canary")
        start(registry, world.second, spec)
    assert set(running(eu)) == set(running(us)) == {"diabetes"} and not running(world.registry)
    assert decided(us, RollBack) == "rolled back" and not running(us) and standing_of(eu, "diabetes").share == 0.5
    assert decided(eu, Promote) == "promoted" and named(us, "diabetes@production").number == 1
    taken = {c.version: (c.where, c.out is not None) for r in ("eu", "us") for c in changes_of("diabetes", audit(world.registry).entries, r) if c.version == "diabetes/2"}
    assert taken == {"diabetes/2": ("rollout", False)} and [c.out is not None for c in changes_of("diabetes", audit(world.registry).entries, "eu")] == [True, True]
    assert not audit(world.registry).faults


def test_a_release_moves_from_region_to_region(world):
    said, regions = list[str](), ["eu", "us"]
    def controllers() -> None:
        for r in regions:
            if "diabetes" in running(world.of(r)): decided(world.of(r), Promote)
    legs = release(world.registry, world.second, regions, wait=controllers, say=said.append)
    assert [(leg.region, leg.state) for leg in legs] == [("eu", "done"), ("us", "done")]
    order = [(e.object, e.action, e.details.get("alias", e.details.get("did"))) for e in audit(world.registry).entries if e.action in ("promote", "rollout")][2:]
    assert [o for o in order if o[1] == "promote"] == [("diabetes/2", "promote", a) for a in ("canary@eu", "production@eu", "canary@us", "production@us")], "the second one begins when the first one has it"
    assert release(world.registry, world.second, regions, wait=None) == legs, "given again, it does nothing"


def test_a_region_that_takes_it_back_is_the_last(world):
    asked = ["release", "diabetes/2", "--regions", "eu,us", "--json"]
    run = lambda *words: CliRunner().invoke(app, [*asked, *words], env={"MLRAY_HOME": str(world.settings.home), "MLRAY_TRACKING": "disabled"})
    release(world.registry, world.second, ["eu", "us"], wait=None)
    assert run("--once").exit_code == 3 and json.loads(run("--look").stdout)["regions"][0]["state"] == "running"
    decided(world.of("eu"), RollBack)
    told = run()
    assert told.exit_code == 1 and [(r["state"], r["why"]) for r in json.loads(told.stdout)["regions"]] == [("taken back", "rolled back"), ("to come", "")]
    assert not running(world.of("us")) and release(world.registry, world.second, ["eu", "us"], again=True, wait=None)[0].state == "running"
    with pytest.raises(RegistryError, match=r"in no region 'uss'.*'us'"): release(world.registry, world.second, ["eu", "uss"])
    assert look(world.registry, world.second, "us").state == "to come", "nothing was begun for a region that is none"


# ---- two clusters, for real ------------------------------------------------------------------------------------------

@pytest.fixture
def two(tmp_path, trained) -> Iterator[tuple[Path, Postgres, Registry, dict[str, str], list[dict]]]:
    "A registry on PostgreSQL with a store that both reach, environments of eu and us in one settings.ini, and a model with two versions."
    with postgres() as server:
        (tmp_path / "settings.ini").write_text("\n".join([
            f"[DEFAULT]\nregistry = {server.uri()}\nstore = file://{tmp_path}/store\njournal = on\ntracking = disabled\nconsole = off",
            *(f"[{r}]\nregion = {r}\nhome = {r}\nport = {free_port()}" for r in ("eu", "us")), "[office]\nhome = office\n"]))
        environ = {"MLRAY_AUDIT_KEY": secrets.token_hex(32), "WANDB_SILENT": "true"}
        os.environ |= environ
        try:
            registry, run = open_registry(read_settings("office", tmp_path)), trained[1]
            base = bundle_of(open_registry(trained[0]), run.version)
            for number in (1, 2):
                made = register(registry, gone_wrong(base, tmp_path / f"bundle-{number}", same() if number == 1 else slow(1), POLICY, name="light"), {})
                for gate in ("quality", "fairness"): add_evidence(registry, made, gate, judge({"roc_auc": 0.8}, (Rule(metric="roc_auc", at_least=0.5),)), b"{}")
            for region in ("eu", "us"): promote(registry, named(registry, "light/1"), f"production@{region}")
            key, text = new_key("admin")
            add_key(registry, key)
            yield tmp_path, server, registry, {"admin": text}, run.rows.parts.train.select(base.contract.features).to_dicts()
        finally:
            for name in environ: os.environ.pop(name)


def mlray(folder: Path, *words: str, **named: Any) -> subprocess.Popen: return subprocess.Popen([Path(sys.executable).with_name("mlray"), *words], cwd=folder, start_new_session=True, text=True, **named)


@contextmanager
def serving(folder: Path, settings: Settings) -> Iterator[subprocess.Popen]:
    "`mlray serve` of one region, on a cluster of its own."
    with open(log := folder / f"{settings.env}.log", "a") as said: process = mlray(folder, "serve", "light", "--env", settings.env, stdout=said, stderr=said)
    try:
        until(lambda: process.poll() is not None or ready(settings), 240)
        assert process.poll() is None, log.read_text()
        yield process
    finally: end(process, signal.SIGINT)


def end(process: subprocess.Popen, how: int) -> None:
    "End a cluster, by its command or all at once."
    mine = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)] if process.poll() is None else []
    for p in mine if how == signal.SIGKILL else mine[:1]:
        with suppress(psutil.NoSuchProcess): p.send_signal(how)
    for p in psutil.wait_procs(mine, timeout=90)[1]:
        with suppress(psutil.NoSuchProcess): p.kill()
    process.wait(30)


def ready(settings: Settings) -> bool:
    try: return httpx.get(f"{settings.url}/readyz", timeout=2).status_code == 200
    except httpx.HTTPError: return False


def until(true: Callable[[], object], seconds: float) -> None:
    last = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < last, "it did not come true"
        time.sleep(0.2)


@pytest.mark.chaos
@pytest.mark.ray
def test_two_clusters_and_one_registry(two):
    "The release goes through eu while us is dead, waits for us, and goes on there after the registry was away; nobody who asks eu notices any of it."
    folder, server, registry, keys, rows = two
    eu, us = (read_settings(r, folder) for r in ("eu", "us"))
    state = lambda region: look(registry, named(registry, "light/2"), region).state
    version = lambda at: httpx.post(f"{at.url}/v1/models/light:predict", json={"instances": rows[:1]}, headers={"authorization": f"Bearer {keys['admin']}"}, timeout=30).json()["version"]
    began = time.monotonic()
    tell = lambda text: print(f"  {time.monotonic() - began:5.1f} s  {text}", flush=True)
    with serving(folder, eu), Load(eu.url, "light", keys, rows, 2) as asking_eu:
        with serving(folder, us) as lost:
            tell("both serve")
            with open(log := folder / "release.log", "w") as said: going = mlray(folder, "release", "light/2", "--regions", "eu,us", "--env", "office", "--json", stdout=subprocess.PIPE, stderr=said)
            until(lambda: state("eu") == "running", 60)
            end(lost, signal.SIGKILL)
            tell("the rollout runs in eu; us is dead")
        until(lambda: state("us") == "running", 300)
        assert named(registry, "light@production@eu").number == 2 and not ready(us)
        tell("eu has it in production; the rollout of us waits for us")
        with serving(folder, us), Load(us.url, "light", keys, rows, 2) as asking_us:
            until(lambda: asking_us.statuses, 60)
            tell("us serves again")
            server.stop()
            before = [sum(load.statuses.values()) for load in (asking_eu, asking_us)]
            time.sleep(15) # so long it is away
            during = [sum(load.statuses.values()) - n for load, n in zip((asking_eu, asking_us), before, strict=True)]
            server.start()
            tell(f"the registry was away for 15 s: {during[0]} answers in eu, {during[1]} in us")
            until(lambda: going.poll() is not None, 300)
            tell("us has it in production")
            for at in (eu, us): until(lambda at=at: version(at) == "2", 60)
    told = json.loads(going.stdout.read())
    print(f"eu: {dict(asking_eu.statuses)}\nus: {dict(asking_us.statuses)}\n{log.read_text()}")
    assert going.returncode == 0 and [(r["region"], r["state"]) for r in told["regions"]] == [("eu", "done"), ("us", "done")]
    assert {s[0] for s in asking_eu.statuses} == {s[0] for s in asking_us.statuses} == {200} and min(during) > 50
    assert not audit(registry).faults
