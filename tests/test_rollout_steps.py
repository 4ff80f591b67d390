"""A rollout that goes on by itself: each bad canary leaves for its own reason while nobody sees its errors, a good one arrives, and of several controllers, dead, stopped or late, one acts."""
import json
import multiprocessing
import os
import signal
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import uuid4

import numpy as np
import pytest
from typer.testing import CliRunner

from mlray.cli import app
from mlray.governance.access import new_key
from mlray.governance.database import ALIASES
from mlray.governance.lease import acting, holder_of, take
from mlray.governance.ledger import audit
from mlray.governance.registry import Registry, Version, add_key, bundle_of, open_registry, promote, register, remove, rollback, version as named
from mlray.judgement.arm import latencies
from mlray.judgement.retrain import due
from mlray.measures.counts import tabulated
from mlray.monitoring.archive import journaled
from mlray.monitoring.journal import Feedback, Journal
from mlray.monitoring.keeping import open_recorder
from mlray.monitoring.retraining import known_of
from mlray.monitoring.rollout_run import Standing, gauges
from mlray.monitoring.rollout_step import Controller, carry_out, from_journal, lease_of, progress, running, standing_of, start, stop
from mlray.monitoring.windows import Sum, Window
from mlray.serving.meters import Meters
from mlray.serving.plan import loaded, plan_of, set_share, share_of
from mlray.serving.service import Service
from mlray.serving.shadow import Shadow
from mlray.values.errors import Conflict, Refused, RegistryError
from mlray.values.rollout_policy import Retrain
from mlray.values.settings import Settings, amended
from tests.canaries import gone_wrong, no_number, opposite, raises, same, slow, unfair

ONE, TWO = 2, 3 # codes of the two groups of the diabetes model
POLICY = {"steps": [0.5, 1.0], "every": "10s", "checks": [{"metric": "error_rate", "margin": 0.02}, {"metric": "invalid_rate", "margin": 0.02}, {"metric": "accuracy", "margin": 0.2, "higher_is_better": True}]}
NOON = datetime(2026, 5, 4, 12, tzinfo=UTC)


@dataclass
class House:
    settings: Settings
    registry: Registry
    champion: str
    canary: str
    now: list[datetime] = field(default_factory=lambda: [NOON])

    def at_noon(self) -> "House":
        self.registry._now = lambda: self.now[0]
        return self

    def begin(self) -> Standing: return start(self.registry, self.version, bundle_of(self.registry, self.version).spec)

    @property
    def version(self) -> Version: return named(self.registry, self.canary)


def housed(trained, home: Path, added=None, policy=POLICY, sections=None, **more) -> House:
    "A registry with a champion in production, and a canary made from it."
    settings = amended(trained[0], home=home, journal=True, gates=(), **more)
    registry, bundle = open_registry(settings), bundle_of(open_registry(trained[0]), trained[1].version)
    champion = register(registry, bundle, {})
    canary = register(registry, gone_wrong(bundle, home.parent / f"bundle-{uuid4().hex[:6]}", added or same(), policy, **(sections or {})), {})
    promote(registry, champion)
    promote(registry, canary, "canary")
    return House(settings, registry, str(champion), str(canary))


# ---- with the service and its journal -------------------------------------------------------------------------------

def asked(house: House, rows, requests: int) -> tuple[Counter, list]:
    "Ask a service that follows the registry; what came back, and the answers."
    answers: list = []
    key, text = new_key("predictor")
    add_key(house.registry, key)
    plan = plan_of(house.registry, ["diabetes"])
    recorder = open_recorder(house.settings)
    shadow = Shadow(Meters("test"), requests, recorder=recorder)
    service = Service(loaded(plan), plan.keys, recorder, listen=shadow)
    features, found = bundle_of(house.registry, house.version).contract.features, Counter()
    bodies = [json.dumps({"instances": [{n: r[n] for n in features}]}).encode() for r in rows]
    for i in range(requests):
        reply = service.answer("diabetes", bodies[i % len(bodies)], text, f"{uuid4().hex[:12]}-{i}")
        said = json.loads(reply.body)
        found[reply.status, said.get("arm")] += 1
        if reply.status == 200: answers.append((said["request_id"], rows[i % len(rows)]["sex"], said["predictions"][0]["label"]))
    shadow.end() # once it has answered what waits
    recorder.journal.close()
    return found, answers


def labelled(house: House, answers: list) -> None:
    "A world in which one group has the illness more often, and the champion is hardly better than guessing for the other."
    rng, told = np.random.default_rng(5), Journal(house.settings.home / "journal/feedback/segments")
    for id, sex, _ in answers: told.write(Feedback(id, time.time_ns(), number=200.0 if rng.random() < (0.25 if sex == "group 1" else 0.6) else 100.0))
    told.close()


@pytest.mark.parametrize(("added", "because"), [(raises(TWO), {"error_rate"}), (no_number(TWO), {"error_rate", "invalid_rate"}), (slow(1200), {"latency"}), (unfair(ONE), {"fairness"})], ids=["raises", "no number", "slow", "unfair"])
def test_a_bad_canary_leaves_for_its_reason_and_nobody_sees_it(trained, tmp_path, added, because):
    house, rows = housed(trained, tmp_path / "home", added, POLICY | {"every": "1s"}), trained[1].rows.parts.train.to_dicts()
    house.begin()
    found, answers = asked(house, rows, 900)
    labelled(house, answers)
    assert {status for status, _ in found} == {200} and (found[200, "fallback"] > 50) == (because <= {"error_rate", "invalid_rate"})
    (seen,) = Controller(house.registry, house.settings).look()
    kinds = {f.kind if f.kind == "fairness" else f.metric for f in seen.decision.findings if f.verdict == "worse"}
    print(found, seen.why)
    assert seen.after.over == "rolled back" and share_of(house.registry, "diabetes") == 0 and kinds == because
    if because == {"fairness"}:
        canary, champion = next((f.canary, f.champion) for f in seen.decision.findings if f.metric == "accuracy")
        assert canary > champion, "the unfair one should be the more accurate"
    (told,) = [json.loads(line) for line in (house.settings.home / f"alerts/{house.canary}/alerts.jsonl").read_text().splitlines()]
    row = next(e for e in reversed(audit(house.registry).entries) if e.action == "rollout")
    assert told["measure"] == "rollout" and row.details["why"] in told["what"] and set(row.details["because"]) == set(seen.decision.because) and not audit(house.registry).faults


def test_the_journal_of_a_good_canary_lets_it_go_on(trained, tmp_path):
    house, rows = housed(trained, tmp_path / "home", policy=POLICY | {"every": "1s", "checks": POLICY["checks"][:2], "fairness": {"groups": 6}}), trained[1].rows.parts.train.to_dicts()
    house.begin()
    labelled(house, asked(house, rows, 1600)[1])
    controller = Controller(house.registry, house.settings)
    (seen,) = controller.look()
    known = {f.metric: f for f in seen.decision.findings}
    assert seen.after.over != "rolled back" and known["error_rate"].canary == 0 and known["invalid_rate"].verdict == "within", seen.why
    assert known["equal_opportunity_difference[sex]"].canary is not None and known["demographic_parity_ratio[sex]"].canary is not None # labels, and decisions without any
    assert controller.look() == [] # not before it is time again


UNHEARD = {"steps": [0.5, 1.0], "every": "1s", "start": "shadow", "fairness": {"groups": 6}}


@pytest.mark.parametrize(("added", "because"), [(same(), set()), (raises(TWO), {"error_rate"}), (no_number(TWO), {"error_rate", "invalid_rate"}), (slow(1200), {"latency"}), (unfair(ONE), {"demographic_parity_ratio[sex]"}), (opposite(), {"answer_shift"})], ids=["same", "raises", "no number", "slow", "unfair", "opposite"])
def test_in_shadow_first_by_the_command_and_the_journal(trained, tmp_path, monkeypatch, added, because):
    "What it would have answered stands in the journal beside what was, and that it could not as well; nobody hears it before that is enough."
    house, rows = housed(trained, tmp_path / "home", added, UNHEARD, {"gates": {"fairness": [{"metric": "demographic_parity_ratio", "by": ["sex"], "at_least": 0.3}]}}), trained[1].rows.parts.train.to_dicts()
    for name, value in {"HOME": house.settings.home, "JOURNAL": "on", "GATES": " "}.items(): monkeypatch.setenv(f"MLRAY_{name}", str(value))
    (tmp_path / "settings.ini").write_text("[local]\n")
    monkeypatch.chdir(tmp_path)
    run = lambda *words: json.loads(CliRunner().invoke(app, [*words, "--json"], catch_exceptions=False).stdout)
    assert run("promote", house.canary, "canary")["rollout"] == {"share": 0.0, "champion": house.champion}
    asked(house, rows, 1) # in the second in which it began, of which no window is counted
    time.sleep(1.1)
    found, _ = asked(house, rows, 900)
    (acted,) = run("rollout", "run", "--once")
    shown = run("rollout", "status", "diabetes")
    findings = {f["metric"]: f for f in shown["decision"]["findings"]}
    print(found, acted["why"], {n: (f["canary"], f["champion"], f["verdict"]) for n, f in findings.items()})
    assert set(found) == {(200, "production")}, "somebody heard it, or an error of its"
    assert {n for n, f in findings.items() if f["verdict"] == "worse"} == because
    assert (acted["action"], acted["share"], acted["over"]) == (("roll back", 0.0, "rolled back") if because else ("promote", 0.5, ""))
    assert findings["latency"]["champion"] is not None and {"error_rate", "invalid_rate", "answer_shift", "latency"} <= set(findings)


# ---- on a clock of its own ------------------------------------------------------------------------------------------

class World:
    "Traffic by the window, made when a controller looks."
    def __init__(self, canary=(0.002, 0.004), champion=(0.002, 0.004), requests=4000, seed=0, tpr=((0.7, 0.7), (0.7, 0.7)), clicks=None):
        self.rng, self.requests, self.of, self.tpr, self.clicks, self.kept = np.random.default_rng(seed), requests, {"canary": canary, "champion": champion}, {"canary": tpr[0], "champion": tpr[1]}, clicks, {}

    def window(self, standing, who, start):
        failing, seconds = self.of[who]
        share = 1.0 if not standing.share else standing.share if who == "canary" else 1 - standing.share
        n, version = int(self.requests * share), standing.canary if who == "canary" else standing.champion
        cells = {(g,): (int(n * 0.25) - (p := int(self.rng.binomial(int(n * 0.25), 0.25))), p, int(n * 0.25) - (t := int(self.rng.binomial(int(n * 0.25), rate))), t) for g, rate in zip(("f", "m"), self.tpr[who], strict=True)}
        numbers = {"click": Sum(n, k := float(self.rng.binomial(n, self.clicks[who])), k)} if self.clicks else {}
        return Window(standing.name, version, ("canary" if standing.share else "shadow") if who == "canary" else "production", start, start + 10, requests=n, errors=int(self.rng.binomial(n, failing)), rows=n,
                      latency=latencies(self.rng.lognormal(np.log(seconds), 0.3, n)), labelled=tabulated(("sex",), cells), numbers=numbers)

    def __call__(self, standing, spec, now):
        for at in range(-(-standing.since // 10) * 10, int(now) - 9, 10):
            if (standing.fence, at) not in self.kept: self.kept[standing.fence, at] = (self.window(standing, "canary", at), self.window(standing, "champion", at))
        return [k[0] for k in self.kept.values()], [k[1] for k in self.kept.values()], {}


def watched(house: House, world, looks: int = 60) -> Standing:
    controller = Controller(house.registry, house.settings, world)
    for _ in range(looks):
        house.now[0] += timedelta(seconds=10)
        controller.look()
        if (standing := standing_of(house.registry, "diabetes")).over: break
    return standing


FAIR = {"steps": [0.1, 0.5, 1.0], "every": "10s", "checks": [*POLICY["checks"][:2], {"metric": "accuracy", "margin": 0.05, "higher_is_better": True}]}


@pytest.mark.parametrize("simulations", [12, pytest.param(1000, marks=pytest.mark.chaos)])
def test_a_canary_that_is_its_champion_is_rolled_back_no_more_often_than_promised(trained, tmp_path, simulations):
    "The controller's own loop, registry, lease and all; five kinds of evidence, looked at every ten seconds."
    ended = Counter()
    for i in range(simulations):
        if i % 50 == 0:
            house = housed(trained, tmp_path / f"home-{i}" / "home", policy=FAIR).at_noon()
            promise = {"by": ["sex"], "metric": "equal_opportunity_difference", "at_most": 0.3}
            spec = bundle_of(house.registry, house.version).spec
            spec = spec.model_validate(spec.model_dump(mode="json") | {"gates": {"fairness": [promise]}})
        if "canary" not in house.version.aliases: promote(house.registry, house.version, "canary") # the last rollout took the alias with it
        start(house.registry, house.version, spec)
        controller = Controller(house.registry, house.settings, World(seed=i))
        controller._specs[house.canary] = spec # with the one promise that this world has rows for
        for _ in range(25):
            house.now[0] += timedelta(seconds=10)
            controller.look()
            if (over := standing_of(house.registry, "diabetes").over): break
        ended[over or "undecided"] += 1
        if over == "promoted": rollback(house.registry, "diabetes")
        elif not over: stop(house.registry, "diabetes", "enough")
    print(dict(ended))
    assert ended["rolled back"] <= max(1, 0.05 * simulations) and ended["promoted"] >= simulations * 0.5


def test_no_traffic_decides_nothing(trained, tmp_path):
    house = housed(trained, tmp_path / "home").at_noon()
    house.begin()
    before = len(audit(house.registry).entries)
    assert watched(house, World(requests=0)).over == "" and len(audit(house.registry).entries) == before
    assert from_journal(house.registry, house.settings)(standing_of(house.registry, "diabetes"), bundle_of(house.registry, house.version).spec, house.now[0].timestamp()) == ([], [], {})


class Unlabelled(World):
    "Nobody says what was true."
    def window(self, standing, who, start): return replace(super().window(standing, who, start), labelled=None)


@pytest.mark.parametrize("limit", [None, 3000])
def test_labels_that_never_come_are_somebodys_business(trained, tmp_path, monkeypatch, limit):
    "What it waits for, since when and what would end it is in its status; an alert says so once; labels end it, and so does the limit."
    house = housed(trained, tmp_path / "home", policy=FAIR | {"limit": limit}).at_noon()
    start(house.registry, house.version, plain(house))
    look = lambda world, looks: watched_with(house, world, looks)
    assert look(World(requests=0), 2).over == "" and progress(house.registry, house.settings, "diabetes").held.stuck is False
    assert look(Unlabelled(), 5).share == 0.1
    waits = (shown := progress(house.registry, house.settings, "diabetes")).held
    assert waits.unlabelled == ("accuracy",) and waits.stuck and waits.labelled == 0 and waits.requests >= 1000 and waits.since == shown.standing.since and "no label has come yet" in dict(waits.waits)["accuracy"]
    assert shown.as_dict()["held"]["ends"] in shown.tables()[1].title and (f"rolled back after {limit} requests" if limit else "nothing else does") in waits.ends and "worklist" in waits.ends
    alerts = lambda: [t for t in map(json.loads, (house.settings.home / f"alerts/{house.canary}/alerts.jsonl").read_text().splitlines()) if "labels that do not come: accuracy" in t["what"]]
    assert len(alerts()) == 1 and alerts()[0]["may"].startswith("Labels end it")
    if limit:
        assert look(Unlabelled(seed=1), 20).over == "rolled back" and "not shown within 3000 requests: accuracy" in progress(house.registry, house.settings, "diabetes").steps[-1][-1] and progress(house.registry, house.settings, "diabetes").held is None
    else:
        assert look(Unlabelled(seed=1), 20).over == "" and look(World(), 60).over == "promoted"
    assert len(alerts()) == 1


def test_shadow_first_then_canary_then_everybody(trained, tmp_path):
    shadow = [{"metric": "disagreement", "at_most": 0.05}, {"metric": "error_rate", "at_most": 0.02}]
    house = housed(trained, tmp_path / "home", policy=FAIR | {"shadow": shadow}).at_noon()
    first = replace_gates(house)
    assert (first.share, plan_of(house.registry, ["diabetes"]).traffic[0].shadow) == (0.0, house.canary.partition("/")[2])
    world = World()
    from mlray.judgement.arm import Mean
    apart = lambda standing, spec, now: (*world(standing, spec, now)[:2], {"disagreement": Mean(4.0, 2000)})
    assert watched_with(house, apart).over == "promoted"
    shown = progress(house.registry, house.settings, "diabetes")
    assert [s[2] for s in shown.steps] == [0.0, 0.1, 0.5, 1.0] and plan_of(house.registry, ["diabetes"]).traffic[0].shadow is None
    assert "diabetes" in shown._repr_html_() and "<svg" in shown._repr_html_() and "mlray_rollout_running" in gauges(shown) and json.dumps(shown.as_dict())
    house.now[0] += timedelta(days=1)
    worse = housed(trained, tmp_path / "other" / "home", policy=FAIR | {"shadow": shadow}).at_noon()
    replace_gates(worse)
    differs = lambda standing, spec, now: (*world(standing, spec, now)[:2], {"disagreement": Mean(400.0, 2000)})
    assert watched_with(worse, differs).over == "rolled back" and {e.details.get("canary") for e in audit(worse.registry).entries if e.action == "traffic"} == {0.0} # nobody ever heard it


def replace_gates(house: House) -> Standing:
    return start(house.registry, house.version, plain(house))


def plain(house: House):
    spec = bundle_of(house.registry, house.version).spec
    return spec.model_validate(spec.model_dump(mode="json") | {"gates": {}})


def watched_with(house: House, source, looks: int = 60) -> Standing:
    controller = Controller(house.registry, house.settings, source)
    controller._specs[house.canary] = plain(house)
    for _ in range(looks):
        house.now[0] += timedelta(seconds=10)
        controller.look()
        if standing_of(house.registry, "diabetes").over: break
    return standing_of(house.registry, "diabetes")


@pytest.mark.parametrize(("clicks", "over"), [({"canary": 0.12, "champion": 0.08}, "promoted"), ({"canary": 0.08, "champion": 0.12}, "rolled back"), ({"canary": 0.10, "champion": 0.10}, "")])
def test_a_business_metric_decides(trained, tmp_path, clicks, over):
    "A/B: half of the people each, and the new one has to be shown to earn more."
    house = housed(trained, tmp_path / "home", policy={"steps": [0.5, 1.0], "every": "10s", "latency": None, "checks": [{"metric": "click", "margin": 0.0, "higher_is_better": True, "demand": "better"}]}).at_noon()
    replace_gates(house)
    standing = watched_with(house, World(clicks=clicks, requests=1000), 20)
    assert standing.over == over, standing


@pytest.mark.parametrize(("earns", "over"), [((0.45, 0.15), "promoted"), ((0.15, 0.45), "rolled back"), ((0.3, 0.3), "")], ids=["more", "less", "as much"])
def test_a_business_metric_decides_by_the_commands(trained, tmp_path, monkeypatch, earns, over):
    "A/B to its end: half of the people each, what they bought comes back as feedback, and the new version has to be shown to sell more."
    policy = {"steps": [0.5, 1.0], "every": "1s", "latency": None, "checks": [{"metric": "sale", "margin": 0.0, "higher_is_better": True, "demand": "better"}]}
    house, rows = housed(trained, tmp_path / "home", same(), policy, {"gates": {}}), trained[1].rows.parts.train.to_dicts()
    for name, value in {"HOME": house.settings.home, "JOURNAL": "on", "GATES": " "}.items(): monkeypatch.setenv(f"MLRAY_{name}", str(value))
    (tmp_path / "settings.ini").write_text("[local]\n")
    monkeypatch.chdir(tmp_path)
    run = lambda *words: json.loads(CliRunner().invoke(app, [*words, "--json"], catch_exceptions=False).stdout)
    assert run("promote", house.canary, "canary")["rollout"]["share"] == 0.5
    time.sleep(1.1) # the second in which it began is not counted
    found, _ = asked(house, rows, 1000)
    said, told = journaled(house.settings.home / "journal").collect(), Journal(house.settings.home / "journal/feedback/segments")
    draw = np.random.default_rng(3)
    for id, arm in said.select("id", "arm").iter_rows():
        if draw.random() < 0.8: told.write(Feedback(id, time.time_ns(), kind="sale", number=float(draw.random() < earns[arm != "canary"]))) # of some nobody hears again
    told.close()
    (acted,) = run("rollout", "run", "--once")
    finding = run("rollout", "status", "diabetes")["decision"]["findings"][0]
    print(dict(found), acted["why"], finding["canary"], finding["champion"])
    assert acted["over"] == over and finding["metric"] == "sale" and finding["verdict"] == {"promoted": "better", "rolled back": "worse", "": "undecided"}[over]
    at = {a: str(v) for v in (named(house.registry, house.champion), house.version) for a in v.aliases}
    assert at == {"promoted": {"production": house.canary}, "rolled back": {"production": house.champion}, "": {"production": house.champion, "canary": house.canary}}[over]


@pytest.mark.parametrize(("world", "over"), [(World(canary=(0.3, 0.004)), "rolled back"), (World(), "promoted")])
def test_the_alias_ends_with_its_rollout(trained, tmp_path, world, over):
    "Otherwise a version that nobody hears is the canary for ever, and retraining waits for it."
    house = housed(trained, tmp_path / "home", policy=FAIR).at_noon()
    replace_gates(house)
    waits = lambda: due(replace(known_of(house.registry, house.settings, "diabetes", house.now[0], look_only=True)[0], labels=500), Retrain(new_labels=100), ())
    assert waits().said == "not yet" and f"{house.canary} is the canary" in waits().why[0]
    assert watched_with(house, world).over == over and waits().said == "due"
    gone = [e for e in audit(house.registry).entries if e.action == "remove"]
    assert [(e.object, e.details) for e in gone] == [(house.canary, {"alias": "canary", "why": f"its rollout is over: {over}"})] and "canary" not in house.version.aliases
    assert plan_of(house.registry, ["diabetes"]).traffic[0].canary is None and not audit(house.registry).faults
    if over == "promoted": return
    with pytest.raises(RegistryError, match="no diabetes@canary"): rollback(house.registry, "diabetes", "canary")
    assert promote(house.registry, house.version, "canary", expect=0) == 2, "where it has been stays, and is counted on"
    with pytest.raises(RegistryError, match="--remove WHY"): rollback(house.registry, "diabetes", "canary")
    assert str(remove(house.registry, "diabetes", "canary", "a try by hand")) == house.canary and not audit(house.registry).faults
    for alias, said in (("canary", "to take away"), ("production", "what answers")):
        with pytest.raises(RegistryError, match=said): remove(house.registry, "diabetes", alias, "again")
    with house.registry.database.change() as c: c.execute(ALIASES.insert().values(name="diabetes", alias="canary", number=2, generation=2))
    assert [f.why for f in audit(house.registry).faults] == ["no row tells of alias diabetes canary 2 diabetes/2"], "an alias that somebody put back past the registry"


# ---- people, policies, and other controllers ------------------------------------------------------------------------

def test_what_people_do_holds(trained, tmp_path):
    def one(act):
        house = housed(trained, tmp_path / uuid4().hex / "home").at_noon()
        house.begin()
        third = register(house.registry, gone_wrong(bundle_of(house.registry, named(house.registry, house.champion)), tmp_path / uuid4().hex, same(), FAIR), {})
        act(house, third)
        house.now[0] += timedelta(seconds=10)
        (seen,) = Controller(house.registry, house.settings, World()).look()
        return seen.after.over, share_of(house.registry, "diabetes"), bool(running(house.registry))
    assert one(lambda h, third: promote(h.registry, third)) == ("abandoned", 0.0, False)            # another champion
    assert one(lambda h, third: promote(h.registry, third, "canary")) == ("abandoned", 0.5, False)  # another canary
    assert one(lambda h, third: set_share(h.registry, "diabetes", 0.2)) == ("abandoned", 0.2, False)  # a share by hand
    assert one(lambda h, third: promote(h.registry, h.version)) == ("promoted", 0.0, False)         # or a controller that died after it had let it out
    house = housed(trained, tmp_path / "home").at_noon()
    house.begin()
    assert stop(house.registry, "diabetes", "the campaign begins").over == "stopped" and share_of(house.registry, "diabetes") == 0
    with pytest.raises(RegistryError, match="no rollout that runs"): stop(house.registry, "diabetes", "again")


def test_what_cannot_begin_is_a_letter(trained, tmp_path):
    house = housed(trained, tmp_path / "home").at_noon()
    spec = bundle_of(house.registry, house.version).spec
    champion = named(house.registry, house.champion)
    with pytest.raises(RegistryError, match="is diabetes@production already"): start(house.registry, champion, spec)
    with pytest.raises(RegistryError, match="has had no rollout"): progress(house.registry, house.settings, "diabetes")


def test_a_policy_that_says_no_is_told_once_and_asked_again(trained, tmp_path):
    house = housed(trained, tmp_path / "home", policy=POLICY | {"latency": None}).at_noon()
    house.registry.policy = replace(house.registry.policy, approvals=1)
    replace_gates(house)
    refused = lambda: sum(e.action == "refuse" for e in audit(house.registry).entries)
    assert watched_with(house, World(), 30).over == "" and refused() == 0
    (told,) = [json.loads(line) for line in (house.settings.home / f"alerts/{house.canary}/alerts.jsonl").read_text().splitlines()]
    assert "0 of 1 approvals" in told["what"] and f"mlray promote {house.canary}" in told["may"]
    house.registry.policy = replace(house.registry.policy, approvals=0)
    assert watched_with(house, World(), 30).over == "promoted"


def test_controllers_side_by_side_take_each_step_once(trained, tmp_path):
    house = housed(trained, tmp_path / "home", policy=FAIR).at_noon()
    replace_gates(house)
    world = World()
    def controller(i):
        registry = open_registry(house.settings)
        registry._now = lambda: house.now[0]
        made = Controller(registry, house.settings, world)
        made._specs[house.canary] = plain(house)
        return made
    several = [controller(i) for i in range(4)]
    for _ in range(40):
        house.now[0] += timedelta(seconds=10)
        with ThreadPoolExecutor(4) as pool: list(pool.map(lambda c: c.look(), several))
    steps = [e.details["standing"]["fence"] for e in audit(house.registry).entries if e.action == "rollout"]
    assert steps == list(range(1, len(steps) + 1)) and standing_of(house.registry, "diabetes").over == "promoted" and not audit(house.registry).faults


def test_of_two_decisions_from_one_place_one_is_carried_out(trained, tmp_path):
    from mlray.judgement.rollout import Promote, RollBack
    house = housed(trained, tmp_path / "home", policy=FAIR).at_noon()
    first, spec = house.begin(), plain(house)
    carry_out(house.registry, spec, first, Promote(0.5, "shown", ()))
    with pytest.raises(Conflict, match="gone on meanwhile"): carry_out(house.registry, spec, first, RollBack(0.0, "late", ()))
    assert share_of(house.registry, "diabetes") == 0.5


def late(settings: Settings, canary: str, out: Path) -> None:
    "A controller that is stopped between its look and its act, for longer than its lease."
    from mlray.judgement.arm import Mean
    def source(standing, spec, now):
        os.kill(os.getpid(), signal.SIGSTOP)
        world = World(canary=(0.5, 0.004))
        return (*world(standing, spec, standing.since + 60)[:2], {"disagreement": Mean(0.0, 1)})
    controller = Controller(open_registry(settings), settings, source)
    try:
        controller.look()
        out.write_text("it acted")
    except Refused as error: out.write_text(str(error))


def test_a_controller_that_was_stopped_past_its_lease_is_refused(trained, tmp_path):
    house = housed(trained, tmp_path / "home", policy=FAIR)
    first = replace_gates(house)
    process = multiprocessing.get_context("spawn").Process(target=late, args=(house.settings, house.canary, tmp_path / "said"))
    process.start()
    os.waitpid(process.pid, os.WUNTRACED)
    token = holder_of(house.registry, lease_of("diabetes")).token
    now = datetime.now(UTC) + timedelta(seconds=100)
    house.registry._now = lambda: now # on the clock of another machine it is later, too
    second = Controller(house.registry, house.settings, World())
    second._specs[house.canary] = plain(house)
    (seen,) = second.look()
    assert seen.after.share == 0.5 and holder_of(house.registry, lease_of("diabetes")).token == token + 1
    os.kill(process.pid, signal.SIGCONT)
    process.join()
    said = (tmp_path / "said").read_text()
    print(said)
    assert "acts by an old lease" in said and standing_of(house.registry, "diabetes").share == 0.5 == share_of(house.registry, "diabetes") and first.fence + 1 == seen.after.fence
    refusal = next(e for e in audit(house.registry).entries if e.action == "refuse")
    assert "old lease" in refusal.details["why"] and not audit(house.registry).faults


def test_a_lease_is_one_holders_at_a_time(trained, tmp_path):
    house = housed(trained, tmp_path / "home").at_noon()
    mine = take(house.registry, "x", "one", 30, "rollout:step")
    assert take(house.registry, "x", "two", 30, "rollout:step") is None and take(house.registry, "x", "one", 30, "rollout:step").token == mine.token
    house.now[0] += timedelta(seconds=31)
    theirs = take(house.registry, "x", "two", 30, "rollout:step")
    assert theirs.token == mine.token + 1
    with acting(house.registry, mine), pytest.raises(Refused, match="old lease"): set_share(house.registry, "diabetes", 0.3)
    with acting(house.registry, theirs): set_share(house.registry, "diabetes", 0.3)
    with acting(house.registry, mine), pytest.raises(Refused): promote(house.registry, house.version)
    assert share_of(house.registry, "diabetes") == 0.3


# ---- the commands ---------------------------------------------------------------------------------------------------

def test_the_commands(trained, tmp_path, monkeypatch):
    house = housed(trained, tmp_path / "home")
    for name, value in {"HOME": house.settings.home, "JOURNAL": "on", "GATES": " "}.items(): monkeypatch.setenv(f"MLRAY_{name}", str(value))
    run = lambda *words: CliRunner().invoke(app, [*words, "--json"])
    (tmp_path / "settings.ini").write_text("[local]\n")
    monkeypatch.chdir(tmp_path)
    begun = run("promote", house.canary, "canary", "--once", "k1")
    assert begun.exit_code == 0, begun.output + str(begun.exception)
    assert json.loads(begun.stdout)["rollout"] == {"share": 0.5, "champion": house.champion}
    run("promote", house.canary, "canary", "--once", "k1") # asked again, and done once
    assert [(a["action"], a["why"]) for a in json.loads(run("rollout", "run", "--once").stdout)] == [("hold", "the canary has had no traffic yet")]
    shown = json.loads(run("rollout", "status", "diabetes").stdout)
    assert [s["did"] for s in shown["steps"]] == ["begin"] and shown["over"] == "" and shown["decision"]["action"] == "hold"
    assert json.loads(run("rollout", "stop", "diabetes", "--why", "enough").stdout)["over"] == "stopped"
    assert [type(run(*words).exception).__name__ for words in (["rollout", "stop", "diabetes", "--why", "again"], ["rollout", "status", "diabets"])] == ["RegistryError", "RegistryError"]
    assert "mlray_rollout_share_ratio" in (house.settings.home / "monitor/rollout-diabetes.prom").read_text()
