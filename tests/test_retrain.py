"""A next version is trained once for each trigger, within its budget, on labels that can be believed, by whatever keeps time; and what is worth a label or a look is said."""
import ast
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import kubernetes_validate
import numpy as np
import polars as pl
import pytest
import yaml
from cronsim import CronSim
from typer.testing import CliRunner

from mlray.governance.ledger import audit
from mlray.governance.opened import Registry
from mlray.governance.registry import bundle_of, events, open_registry, version
from mlray.governance.triggers import Claim, attempts, claim, finish, held_on, renew, resume
from mlray.judgement.retrain import Due, Evidence, due
from mlray.monitoring.archive import journaled
from mlray.monitoring.error_analysis import analyse_errors
from mlray.monitoring.journal import Entry, Feedback, Journal
from mlray.monitoring.keeping import Keys, answer_columns, kept, plan, pseudonym, read_keys
from mlray.monitoring.labelled import keep_rows, labelled_rows, next_spec, next_to_label
from mlray.monitoring.rollout_step import running
from mlray.operations.schedule import cron_of, job_of, schedule
from mlray.shipping.answer import predictions
from mlray.shipping.bundle import decide, predict
from mlray.sources.rows import read_rows
from mlray.values.errors import Conflict, DataError, SettingsError
from mlray.values.rollout_policy import Guard, Retrain
from mlray.values.settings import shipped
from mlray.values.spec import parse_spec
from tests.conftest import ROOT
from tests.postgres import postgres

MAY = datetime(2026, 5, 1, tzinfo=UTC)
NOON = 1_700_000_000 // 86400 * 86400
ENDLESS = Retrain(runs=10**6, minutes=10**6, failures=10**6)


def registry_in(folder: Path) -> Registry: return Registry(f"sqlite:///{folder}/registry.db", folder / "store", "ada")


# ---- one run for each trigger ---------------------------------------------------------------------------------------

def test_of_many_who_look_at_once_one_runs(tmp_path):
    registry_in(tmp_path) # made once
    got, ready = [], threading.Barrier(8)
    def look(i):
        mine = registry_in(tmp_path)
        ready.wait()
        for key in range(5):
            held = claim(mine, Evidence("adult", "3", MAY, MAY, asked={str(key): "now"}), ENDLESS, holder=f"h{i}")
            if isinstance(held, Claim):
                got.append((key, i))
                finish(mine, held, "passed", {}, MAY)
    threads = [threading.Thread(target=look, args=(i,)) for i in range(8)]
    for t in threads: t.start()
    for t in threads: t.join()
    done = attempts(registry_in(tmp_path), "adult")
    assert sorted(key for key, _ in got) == sorted(int(a.window) for a in done) == sorted({key for key, _ in got}) and got and all(a.state == "passed" and a.fence == 1 for a in done)


def test_a_holder_that_was_overtaken_ends_nothing(tmp_path):
    registry, asked = registry_in(tmp_path), Evidence("adult", "3", MAY, MAY, asked={"k": "now"})
    old = claim(registry, asked, ENDLESS, lease_s=60, holder="old")
    renew(registry, old, MAY + timedelta(seconds=50))
    assert not isinstance(claim(registry, replace(asked, now=MAY + timedelta(seconds=100)), ENDLESS), Claim)
    new = claim(registry, replace(asked, now=MAY + timedelta(seconds=111)), ENDLESS, holder="new")
    assert isinstance(new, Claim) and new.trigger == old.trigger and new.fence == 2
    for stale in (lambda: renew(registry, old, MAY), lambda: finish(registry, old, "passed", {}, MAY)):
        with pytest.raises(Conflict, match="gone on without old"): stale()
    finish(registry, new, "refused", {"version": "adult/4"}, MAY + timedelta(seconds=130))
    (done,) = attempts(registry, "adult")
    assert (done.state, done.fence, done.seconds) == ("refused", 2, 110 + 19), "what the first one cost counts too: to the end of its lease"


def test_a_run_that_kills_its_holders_is_given_up(tmp_path):
    registry, policy = registry_in(tmp_path), Retrain(failures=2, runs=9)
    at = lambda hour: Evidence("adult", "3", MAY, MAY + timedelta(hours=hour), asked={"k": "now"})
    assert [isinstance(claim(registry, at(hour), policy, lease_s=60), Claim) for hour in range(4)] == [True, True, True, False]
    (done,) = attempts(registry, "adult")
    assert done.state == "failed" and "3 holders have died" in done.result["why"]


def test_after_failures_a_person_is_asked(tmp_path):
    registry, policy = registry_in(tmp_path), Retrain(failures=2, runs=9)
    look = lambda key: claim(registry, Evidence("adult", "3", MAY, MAY, asked={key: "now"}), policy)
    for key in ("a", "b"): finish(registry, look(key), "failed", {"why": "it broke"}, MAY)
    assert look("c").said == "stopped" and "--resume" in look("c").why[0]
    resume(registry, "adult", "the source is repaired", MAY + timedelta(minutes=1))
    assert isinstance(look("c"), Claim) and [row[1] for row in events(registry).rows].count("resume") == 1


def test_a_run_ends_with_its_minutes(tmp_path):
    registry, ticks = registry_in(tmp_path), iter(MAY + timedelta(minutes=m) for m in range(0, 99, 2))
    held = claim(registry, Evidence("adult", "3", MAY, MAY, asked={"k": "now"}), Retrain(minutes=5))
    with pytest.raises(Exception, match=r"used up its budget: 6\.0 of 5\.0"), held_on(registry, held, lambda: next(ticks)) as may_go_on:
        for _ in range(9): may_go_on()


def test_the_spec_names_alerts_that_there_are():
    text = (ROOT / "configs/diabetes.yaml").read_text()
    spec = parse_spec(text + "\nmonitor: {alerts: [{metric: accuracy, at_least: 0.6}]}\nretrain: {every: 30d, alerts: [accuracy], learn_from: both}\n")
    assert spec.id == parse_spec(text).id and spec.retrain.alerts == ("accuracy",)
    with pytest.raises(Exception, match="Did you mean 'accuracy'"): parse_spec(text + "\nmonitor: {alerts: [{metric: accuracy, at_least: 0.6}]}\nretrain: {alerts: [acuracy]}\n")


CONTROLLER = """
import os, random, sys, time
from datetime import UTC, datetime
from pathlib import Path
from mlray.governance.opened import Registry
from mlray.judgement.retrain import Evidence
from mlray.values.rollout_policy import Retrain
from mlray.governance.triggers import Claim, attempts, claim, finish, renew
from mlray.values.errors import Conflict, Unavailable

url, folder, seed, models, keys, runs = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]), int(sys.argv[6])
rng, registry = random.Random(seed), Registry(url, folder / "store", "ada")
policy = Retrain(runs=runs, minutes=10**6, failures=10**6, per="52w")
asked = {str(k): "now" for k in range(keys)}
while True:
    names = [f"model-{m}" for m in range(models)]
    rng.shuffle(names)
    idle = True
    for name in names:
        try:
            held = claim(registry, Evidence(name, "1", datetime.now(UTC), datetime.now(UTC), asked=asked), policy, lease_s=1.0)
            if not isinstance(held, Claim): continue
            idle = False
            time.sleep(rng.random() * 0.004) # a run
            with open(folder / f"done-{os.getpid()}-{seed}", "a") as file: file.write(f"{held.trigger} {held.fence}\\n")
            finish(registry, held, "passed", {"by": os.getpid()}, datetime.now(UTC))
        except (Conflict, Unavailable): pass
    if idle:
        if all(sum(a.state != "running" for a in attempts(registry, n)) >= min(keys, runs) for n in names): break
        time.sleep(0.05)
"""


def _eight(url: str, folder: Path, models: int, keys: int, runs: int) -> tuple[int, float]: # kills, seconds
    "Eight controllers, one of which is killed every so often and begun again."
    folder.mkdir(parents=True, exist_ok=True)
    start = lambda seed: subprocess.Popen([sys.executable, "-c", CONTROLLER, url, str(folder), str(seed), str(models), str(keys), str(runs)], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT), "MLRAY_AUDIT_KEY": "k" * 40}, stderr=subprocess.PIPE, text=True)
    rng, began, kills = random.Random(7), time.monotonic(), 0
    Registry(url, folder / "store", "ada")
    running = {seed: start(seed) for seed in range(8)}
    while any(p.poll() is None for p in running.values()):
        time.sleep(rng.uniform(0.3, 1.2))
        alive = [s for s, p in running.items() if p.poll() is None]
        if alive and kills < 60:
            victim = rng.choice(alive)
            running[victim].send_signal(signal.SIGKILL)
            running[victim].wait()
            kills += 1
            running[victim] = start(1000 * kills + victim)
        assert time.monotonic() - began < 1500
    failed = [p.stderr.read() for p in running.values() if p.returncode]
    assert not failed, failed[0]
    return kills, time.monotonic() - began


@pytest.mark.chaos
@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_eight_controllers_and_a_thousand_triggers(tmp_path, kind, monkeypatch):
    "One run for each trigger although controllers are killed; and with a budget, never one more than it allows."
    monkeypatch.setenv("MLRAY_AUDIT_KEY", "k" * 40)
    with postgres() if kind == "postgres" else nullcontext() as server:
        urls = [f"sqlite:///{tmp_path}/{part}/registry.db" for part in ("all", "few")]
        if server: [server.run(f"CREATE DATABASE {part}x") for part in ("all", "few")]; urls = [server.uri(f"{part}x") for part in ("all", "few")]
        for url, part, models, keys, runs in ((urls[0], "all", 20, 50, 10**6), (urls[1], "few", 20, 50, 7)):
            kills, took = _eight(url, tmp_path / part, models, keys, runs)
            registry = Registry(url, tmp_path / part / "store", "ada")
            every = [a for m in range(models) for a in attempts(registry, f"model-{m}")]
            ended = [row for row in events(registry).rows if row[1] == "retrained"]
            begun = sum(len(path.read_text().splitlines()) for path in (tmp_path / part).glob("done-*"))
            print(f"\n{kind}: {models * keys} triggers, budget {runs}: {len(every)} runs were taken up, {len(ended)} ended, {begun} times somebody had come to the end of a run, {kills} of 8 controllers killed, {took:.1f} s; load {os.getloadavg()[0]:.1f}")
            assert len({a.id for a in every}) == len(every) == models * min(keys, runs) == len(ended) and all(a.state == "passed" for a in every) and kills >= 5


# ---- labels ---------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def raw(trained):
    "A bundle whose journal keeps everything, and people with what is true of them."
    bundle = bundle_of(open_registry(trained[0]), trained[1].version)
    contract = {n: c.model_copy(update={"journal": "raw"} if c.role == "feature" else {}) for n, c in bundle.spec.contract.items()}
    spec = bundle.spec.model_copy(update={"contract": contract, "retrain": Retrain(learn_from="journal")})
    return replace(bundle, spec=spec), pl.concat(vars(trained[1].rows.parts).values()).sample(fraction=1.0, shuffle=True, seed=1)


def _journal(home: Path, bundle, people: pl.DataFrame, labelled: int, keys: Keys | None = None, subject=lambda i: "", wrong=(), at=lambda i: NOON + 60 * i) -> None:
    scores = predict(bundle, people, people.height)
    said, shown = answer_columns(predictions(bundle.task, scores, decide(bundle, scores))), kept(plan(bundle.contract, bundle.profile, keys or Keys({"1": b"key"})), people.to_dict(as_series=False))
    journal, told = Journal(home / "journal/segments"), Journal(home / "journal/feedback/segments")
    for i in range(people.height):
        journal.write(Entry(f"r{i:04}", at(i) * 10**9, "diabetes", "1", bundle.digest, rows=1, columns={n: [v[i]] for n, v in shown.items()}, answers={n: [v[i]] for n, v in said.items()}, subject=subject(i)))
        if i < labelled: told.write(Feedback(f"r{i:04}", (NOON + 60 * i + 5) * 10**9, number=float(people[bundle.contract.target][i]) if i not in wrong else 0.0, caller="shop"))
    journal.close(), told.close()


def test_answers_with_labels_are_the_rows_they_were(raw, trained, tmp_path):
    bundle, people = raw
    settings = trained[0].model_copy(update={"home": tmp_path / "home", "root": tmp_path})
    _journal(settings.home, bundle, people.head(120), 100)
    found = labelled_rows(bundle.spec, settings, bundle.task)
    columns = [*bundle.contract.features, bundle.contract.target]
    assert found.answers == 120 and found.rows.select(columns).equals(people.head(100).select(columns)), found.sentences
    spec = next_spec(bundle.spec, settings, "diabetes/1", found)
    again = next_spec(bundle.spec, settings, "diabetes/1", labelled_rows(bundle.spec, settings, bundle.task))
    assert spec == again and spec.data.train.sha256 and spec.data.test is None, "the same answers are the same file"
    rows = read_rows(spec, settings)
    assert rows.checked["train"].good.height == 100 and sum(getattr(rows.parts, p).height for p in ("train", "valid", "test")) == 100
    (settings.home / "labelled").joinpath("diabetes", f"{spec.data.train.sha256[:16]}.parquet").write_bytes(keep_rows(settings, "other", found.rows.head(3)).file.encode())
    with pytest.raises(DataError, match="another file, or a damaged one"): read_rows(spec, settings)


def test_what_the_journal_does_not_keep_is_not_learned(raw, trained, tmp_path):
    bundle, people = raw
    settings = trained[0].model_copy(update={"home": tmp_path})
    coarse = bundle.spec.model_copy(update={"contract": bundle.spec.contract | {"bmi": bundle.spec.contract["bmi"].model_copy(update={"journal": "bucket"})}})
    _journal(tmp_path, replace(bundle, spec=coarse), people.head(10), 10)
    with pytest.raises(DataError, match=r"does not keep bmi as it is.*journal: raw"): labelled_rows(coarse, settings, bundle.task)
    open_ = coarse.model_copy(update={"contract": coarse.contract | {"bmi": coarse.contract["bmi"].model_copy(update={"nullable": True})}})
    assert labelled_rows(open_, settings, bundle.task).rows["bmi"].null_count() == 10


def test_labels_of_every_kind_of_target_are_counted():
    from mlray.measures.moments import Sum
    from mlray.monitoring.windows import Window, labels_in
    one = Window("m", "1", "production", 0, 1)
    assert [labels_in(replace(one, numbers={n: Sum(7, 1.0, 1.0)})) for n in ("bias", "hamming_loss", "click")] == [7, 7, 0]


@pytest.mark.parametrize(("attack", "said"), [("contradiction", "a trusted key labelled too say otherwise"), ("burst", "a usual day has"), ("share", "one giver may bring 40%")])
def test_poisoned_labels_are_left_out(raw, trained, tmp_path, attack, said):
    bundle, people = raw
    settings = trained[0].model_copy(update={"home": tmp_path})
    _journal(tmp_path, bundle, people.head(200), 0)
    told, target = Journal(tmp_path / "journal/feedback/segments"), bundle.contract.target
    say = lambda i, day, who, value: told.write(Feedback(f"r{i:04}", (NOON + day * 86400 + i) * 10**9, number=float(value), caller=who, source="doctor"))
    for i in range(80):
        say(i, i % 10, "clinic", people[target][i])
        if i < 40: say(i, i % 10, "audit", people[target][i])
    lies = range(40) if attack == "contradiction" else range(80, 200)
    for i in lies: say(i, {"burst": 5}.get(attack, i % 10), "mallory", 400 - people[target][i])
    told.close()
    guard = {"contradiction": Guard(trusted=("audit",)), "burst": Guard(burst=5), "share": Guard(share=0.4, burst=1000)}[attack]
    spec = bundle.spec.model_copy(update={"retrain": Retrain(guard=guard)})
    found = labelled_rows(spec, settings, bundle.task)
    bad = found.rows.filter(pl.col("journal id").is_in([f"r{i:04}" for i in lies])).height if attack != "contradiction" else int((found.rows.head(40)[target] != people.head(40)[target]).sum())
    assert [left.giver for left in found.left_out] == ["mallory"] and said in found.left_out[0].why, found.sentences
    assert bad <= (80 if attack == "share" else 0) and found.rows.head(40)[target].equals(people.head(40)[target])


def test_who_is_erased_is_learned_from_no_more(raw, trained, tmp_path, monkeypatch):
    from mlray.cli import app
    bundle, people = raw
    settings = trained[0].model_copy(update={"home": tmp_path, "root": tmp_path})
    keys = read_keys(settings)
    _journal(tmp_path, bundle, people.head(60), 60, keys, lambda i: pseudonym(keys, "subject", f"person {i % 6}"))
    spec = next_spec(bundle.spec, settings, "diabetes/1", labelled_rows(bundle.spec, settings, bundle.task))
    for name, value in {"MLRAY_HOME": tmp_path, "MLRAY_TRACKING": "disabled"}.items(): monkeypatch.setenv(name, str(value))
    monkeypatch.chdir(tmp_path)
    done = json.loads(CliRunner().invoke(app, ["journal", "erase", "person 4", "--json"], catch_exceptions=False).stdout)
    assert done == {"rows": 10, "requests": 10, "feedback": 10, "learned": 10, "aside": 0, "jobs": 0, "pages": 0}
    assert {p.stat().st_mode & 0o777 for p in (tmp_path / "labelled").rglob("*.parquet")} == {0o600}, "what is left of them is for its owner alone, as it was"
    marks = {pseudonym(keys, "subject", "person 4"), *(f"r{i:04}" for i in range(4, 60, 6))}
    everything = b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and p.name != "erased.json")
    shown = [v for p in tmp_path.rglob("*.parquet") for c in pl.read_parquet(p).select(pl.col(pl.String)).get_columns() for v in c]
    assert not [m for m in marks if m.encode() in everything or m in shown]
    assert not set(labelled_rows(bundle.spec, settings, bundle.task).rows["journal id"]) & marks
    with pytest.raises(DataError, match="another file"): read_rows(spec, settings)


def test_the_list_asks_where_there_is_something_to_learn(raw, trained, tmp_path):
    bundle, people = raw
    settings = trained[0].model_copy(update={"home": tmp_path})
    _journal(tmp_path, bundle, people.head(200), 50)
    made = next_to_label(settings, bundle, "1", 20)
    every = journaled(tmp_path / "journal").collect()["answer:score"].cast(pl.Float64).to_numpy()
    listed = np.array([r["uncertainty"] for r in made.rows])
    assert (made.unlabelled, made.labelled, len({r["id"] for r in made.rows})) == (150, 50, 20) and not {r["id"] for r in made.rows} & {f"r{i:04}" for i in range(50)}
    assert listed.mean() > np.mean(1 - np.abs(2 * every - 1)) and pl.read_csv(made.csv().encode()).columns[-1] == "label"


# ---- from a trigger to a canary, by the commands -----------------------------------------------------------------------

@pytest.mark.chaos
@pytest.mark.parametrize("labels", ["true", "random"])
def test_from_labels_to_a_canary_by_the_commands(raw, tmp_path, monkeypatch, labels):
    "Labels come; a version begins with the weights of the one in production, goes through the gate's own notebook, and becomes the canary whose rollout runs. Labels that mean nothing make one that the gate refuses."
    from mlray.cli import app
    people = raw[1]
    for name, value in {"MLRAY_HOME": tmp_path / "home", "MLRAY_TRACKING": "disabled", "MLRAY_JOURNAL": "on", "MLRAY_GATES": "quality"}.items(): monkeypatch.setenv(name, str(value))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "settings.ini").write_text("[local]\n")
    spec = parse_spec((ROOT / "configs/diabetes.yaml").read_text()).model_dump(mode="json", by_alias=True)
    for column in spec["contract"].values(): column["journal"] = "raw" if column["role"] == "feature" else None
    quality = [{"metric": "roc_auc", "at_least": 0.7}]
    retrain_ = {"new_labels": 150, "learn_from": "journal", "start": "warm", "then": "canary", "over": "520w"}
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(spec | {"gates": {"quality": quality}, "retrain": retrain_, "rollout": {"steps": [0.1, 1.0], "start": "shadow"}}))
    def run(*words, code=0):
        done = CliRunner().invoke(app, [*words, "--json"])
        assert done.exit_code == code, (words, done.output[-2000:], done.exception)
        return json.loads(done.stdout)
    run("train", "spec.yaml"), run("gate", "diabetes/1"), run("promote", "diabetes/1")
    assert run("retrain", "diabetes", "--dry-run")["decision"] == "not yet"
    from mlray.values.settings import read_settings
    registry = open_registry(read_settings(env="local"))
    first = bundle_of(registry, version(registry, "diabetes/1"))
    now = int(time.time())
    _journal(tmp_path / "home", first, people, 0, at=lambda i: now)
    told, draw = Journal(tmp_path / "home/journal/feedback/segments"), np.random.default_rng(1)
    for i in range(people.height): told.write(Feedback(f"r{i:04}", (now + 1) * 10**9, number=float(people[first.contract.target][i] if labels == "true" else draw.choice([100.0, 200.0])), caller="shop"))
    told.close()
    done = run("retrain", "diabetes", code=0 if labels == "true" else 1)
    assert done["decision"] == "due", done["why"]
    print(f"\n{labels} labels: {done['state']}, {done['version']}, {done['alias'] or 'no alias'}, gates {done['gates']}, {done['learned'][0]}, load {os.getloadavg()[0]:.0f}")
    (attempt,) = attempts(registry, "diabetes")
    assert (attempt.kind, attempt.state, attempt.result["version"]) == ("labels", done["state"], "diabetes/2") and done["version"] == "diabetes/2"
    made = version(registry, "diabetes/2")
    assert made.parent == first.digest, "a warm start"
    if labels == "random":
        assert done["state"] == "refused" and not done["gates"]["quality"] and done["alias"] is None and not made.aliases and running(registry) == {}
        return
    assert done["state"] == "passed" and done["alias"] == "canary" and done["gates"]["quality"] and done["because"] is None
    standing = run("rollout", "status", "diabetes")
    assert (standing["canary"], standing["champion"], standing["share"], standing["over"]) == ("2", "1", 0.0, "")
    waits = run("retrain", "diabetes")
    assert waits["decision"] == "not yet" and waits["state"] is None, waits["why"]
    run("rollout", "stop", "diabetes", "--why", "a holiday")
    again = run("retrain", "diabetes", "--now", "the canary is gone")
    assert again["version"] in ("diabetes/2", "diabetes/3") and again["state"] == "passed" and again["alias"] == "canary", again
    assert not audit(registry).faults


# ---- the mistakes ---------------------------------------------------------------------------------------------------

def test_a_planted_cause_is_named(raw, trained, tmp_path):
    bundle, people = raw
    settings = trained[0].model_copy(update={"home": tmp_path})
    many = people.sample(500, with_replacement=True, seed=3)
    _journal(tmp_path, bundle, many, 500, wrong={i for i in range(500) if many["bmi"][i] > 28})
    found = analyse_errors(settings, bundle, "1")
    assert found.wrong > 100 and "concept drift" in found.causes[0] and any("bmi" in str(s) for s in found.slices.found)
    assert found.typical[0].stands_for >= found.typical[-1].stands_for and all(m.why and m.answer != m.truth for m in (*found.typical, *found.surprising))
    assert json.dumps(found.as_dict(), allow_nan=False)
    with pytest.raises(DataError, match="has answered nothing"): analyse_errors(settings, bundle, "9")


@pytest.mark.chaos
def test_the_report_is_a_notebook(raw, trained, tmp_path, monkeypatch):
    from mlray.cli import app
    settings = trained[0].model_copy(update={"home": tmp_path})
    _journal(tmp_path, bundle_of(open_registry(trained[0]), trained[1].version), raw[1].head(200), 200)
    (tmp_path / "store").symlink_to(open_registry(trained[0]).store.root)
    for name, value in {"MLRAY_HOME": settings.home, "MLRAY_REGISTRY": trained[0].registry_url, "MLRAY_TRACKING": "disabled"}.items(): monkeypatch.setenv(name, str(value))
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["errors", "diabetes/1", "--days", "9999", "--json"], catch_exceptions=False)
    said = json.loads(done.stdout)
    page, notebook = Path(said["page"]).read_text(), json.loads(Path(said["notebook"]).read_text())
    assert done.exit_code == 0 and said["causes"] and "What may be the cause" in page and "<svg" in page and str(tmp_path) not in page and all(c.get("execution_count") for c in notebook["cells"] if c["cell_type"] == "code")


def test_who_looks_twice_has_looked_once(raw):
    "Otherwise `mlray monitor` and `mlray retrain` in one hour would be two windows in a row."
    from mlray.monitoring.alert import advance
    from mlray.monitoring.monitor import watched
    from mlray.monitoring.windows import Window
    from mlray.values.spec import Alert
    alerts, window = (Alert(metric="error_rate", at_most=0.1, minimum=10, looks=2),), Window("diabetes", "1", "production", NOON, NOON + 3600, requests=100, errors=50)
    report, later = (watched(raw[0], "1", [w]) for w in (window, replace(window, start=NOON + 3600, end=NOON + 7200)))
    once, nothing = advance({}, alerts, report)
    twice, still_nothing = advance(once, alerts, report)
    _, told = advance(twice, alerts, later)
    assert not nothing and not still_nothing and [t.measure for t in told] == ["error_rate"]


# ---- who keeps time -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("text", "times"), [("daily at 3", ["05-02 03:00", "05-03 03:00"]), ("every 6 hours", ["05-01 18:00", "05-02 00:00"]), ("every 15 minutes", ["05-01 12:15", "05-01 12:30"]), ("mondays at 7:30", ["05-04 07:30", "05-11 07:30"]),
                                             ("weekdays at 9 pm", ["05-01 21:00", "05-04 21:00"]), ("monthly on the 15th at 2", ["05-15 02:00", "06-15 02:00"]), ("hourly", ["05-01 13:00", "05-01 14:00"]), ("0 3 * * 1-5", ["05-04 03:00", "05-05 03:00"]), ("every day at 12 am", ["05-02 00:00", "05-03 00:00"])])
def test_times_are_what_people_mean(text, times):
    coming = CronSim(cron_of(text), datetime(2026, 5, 1, 12))
    assert [f"{next(coming):%m-%d %H:%M}" for _ in times] == times


@pytest.mark.parametrize("text", ["", "now and then", "every 7 minutes", "daily at 25", "daily at 13 pm", "61 * * * *", "monthly on the 31st", "every 0 hours", "at 3; rm -rf /"])
def test_times_that_nobody_means_are_refused(text):
    with pytest.raises(SettingsError): cron_of(text)


@pytest.mark.parametrize("what", ["monitor", "retrain", "predict"])
def test_each_scheduler_takes_it(what, tmp_path):
    job = job_of(what, "adult", "daily at 3:05", "production", ("in.parquet", "out dir") if what == "predict" else (), image="registry.example.org/mlray:1.4.2")
    line = next(part for part in schedule(job, "cron").splitlines() if part.startswith("5 3"))
    assert f"mlray {what} adult" in line and next(CronSim(" ".join(line.split()[:5]), datetime(2026, 5, 1))) == datetime(2026, 5, 1, 3, 5)
    manifest = yaml.safe_load(schedule(job, "kubernetes"))
    kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)
    pod = manifest["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    assert pod["containers"][0]["command"] == list(job.command) and manifest["spec"]["concurrencyPolicy"] == "Forbid" and pod["securityContext"]["runAsNonRoot"]
    flow = tmp_path / "flow.yml"
    flow.write_text(schedule(job, "github"))
    checked = subprocess.run([sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows", str(flow)], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout
    dag = schedule(job, "airflow")
    calls = [n for n in ast.walk(ast.parse(dag)) if isinstance(n, ast.Call)]
    command = next(k.value.value for c in calls for k in c.keywords if k.arg == "bash_command")
    assert command == job.line and ("'out dir'" in command) == (what == "predict")


def test_what_is_scheduled_on_kubernetes_has_the_volume_and_the_user_that_ship():
    theirs = next(d for d in yaml.safe_load_all((shipped("cluster") / "kuberay/scheduled.yaml").read_text()) if d["metadata"]["name"] == "mlray-monitor")
    ours = yaml.safe_load(schedule(job_of("monitor", "adult", "hourly", image="r.example.org/m:1"), "kubernetes"))
    pods = [d["spec"]["jobTemplate"]["spec"]["template"]["spec"] for d in (theirs, ours)]
    assert pods[0]["volumes"] == pods[1]["volumes"] and pods[0]["securityContext"] == pods[1]["securityContext"] and pods[0]["containers"][0]["volumeMounts"] == pods[1]["containers"][0]["volumeMounts"]


def test_each_environment_has_a_lock_and_a_name_of_its_own():
    "Else the second of two would be passed over, or written over the first, without a word."
    one, two = (job_of("monitor", "adult", "hourly", env) for env in ("staging", "production"))
    assert one.title != two.title and schedule(one, "cron").split(" -n ")[1].split()[0] != schedule(two, "cron").split(" -n ")[1].split()[0]
    names = {job_of("monitor", "a-model-with-a-name-that-is-longer-than-anybody-needs-" + end, "hourly").title for end in ("x", "y")}
    assert len(names) == 2 and all(len(n) <= 52 for n in names)


def test_cron_is_told_where_and_by_which_path(tmp_path, monkeypatch):
    "It begins at home, and knows no environment of Python's."
    from mlray.command_line.schedule_cli import schedule_app
    (folder := tmp_path / "my loans").mkdir()
    (folder / "settings.ini").write_text("[production]\n")
    monkeypatch.chdir(folder)
    said = CliRunner().invoke(schedule_app, ["monitor", "adult", "--env", "production"]).output
    line = said.splitlines()[-1]
    assert f"cd '{folder}' && flock" in line and f" {Path(sys.executable).with_name('mlray')} monitor adult --env production" in line, said
    wrong = CliRunner().invoke(schedule_app, ["monitor", "adult", "--env", "prodution"])
    assert isinstance(wrong.exception, SettingsError) and "Did you mean 'production'" in str(wrong.exception)


def test_a_broken_manifest_would_be_found():
    manifest = yaml.safe_load(schedule(job_of("retrain", "adult", "hourly", image="r.example.org/m:1"), "kubernetes"))
    manifest["spec"]["concurrencyPolicies"] = manifest["spec"].pop("concurrencyPolicy")
    with pytest.raises(kubernetes_validate.ValidationError): kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)


@pytest.mark.chaos
def test_airflow_takes_its_dag(tmp_path):
    "Read by Airflow itself, whose Python MLRAY_AIRFLOW names; otherwise it is installed, and skipped where it cannot be."
    python = os.environ.get("MLRAY_AIRFLOW") or str(tmp_path / "venv/bin/python")
    if not Path(python).is_file():
        subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
        if subprocess.run([python, "-m", "pip", "install", "-q", "apache-airflow==3.*", "apache-airflow-providers-standard"], capture_output=True, timeout=900).returncode: pytest.skip("Airflow cannot be installed here")
    dags, env = tmp_path / "dags", {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "AIRFLOW_HOME": str(tmp_path / "home"), "AIRFLOW__CORE__LOAD_EXAMPLES": "False"}
    dags.mkdir()
    given = {"monitor": (), "retrain": (), "predict": ("in.parquet", "out dir")}
    for what, more in given.items(): (dags / f"{what}.py").write_text(schedule(job_of(what, "adult", "weekdays at 3:05", "production" if more else "", more), "airflow"))
    (dags / "broken.py").write_text((dags / "retrain.py").read_text().replace("bash_command", "bash_commands"))
    read = """import json; from datetime import UTC, datetime; from airflow.dag_processing.dagbag import DagBag
b = DagBag({0!r})
print(json.dumps([b.import_errors, {{d: [[t.task_id, t.bash_command, str(x.schedule)] for t in x.tasks] for d, x in b.dags.items()}}]))"""
    done = subprocess.run([python, "-c", read.format(str(dags))], env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    errors, found = json.loads(done.stdout.strip().splitlines()[-1])
    print(f"\nAirflow read {found}")
    assert [Path(p).name for p in errors] == ["broken.py"] and "missing keyword argument 'bash_command'" in next(iter(errors.values())), "what is wrong is found, and nothing else"
    assert {d: [(task, times) for task, _, times in tasks] for d, tasks in found.items()} == {f"mlray-{w}-adult" + "-production" * bool(more): [(w, "5 3 * * 1-5")] for w, more in given.items()} and "'out dir'" in found["mlray-predict-adult-production"][0][1]


@pytest.mark.chaos
def test_cron_takes_its_line(tmp_path):
    "Debian's own `crontab -n`, which MLRAY_CRONTAB may name."
    crontab = os.environ.get("MLRAY_CRONTAB") or shutil.which("crontab")
    if not crontab: pytest.skip("there is no crontab here")
    def check(text: str) -> int:
        (tmp_path / "line").write_text(text)
        return subprocess.run([crontab, "-n", str(tmp_path / "line")], capture_output=True).returncode
    check("") # makes its folder, where nobody has asked it anything yet
    lines = [schedule(job_of(what, "adult", when, "production" if more else "", more), "cron") for what, more in (("monitor", ()), ("retrain", ()), ("predict", ("in.parquet", "out dir"))) for when in ("hourly", "weekdays at 9 pm", "monthly on the 15th at 2")]
    assert [check(line) for line in lines] == [0] * 9 and check(lines[0].replace("0 * * * *", "61 * * * *")) != 0


def test_the_decision_needs_no_registry():
    known = Evidence("adult", "3", MAY, MAY + timedelta(days=40), rows=900)
    assert isinstance(due(known, Retrain(new_rows=500), ()), Due) and due(known, Retrain(new_rows=901), ()).said == "not yet"


@pytest.mark.filterwarnings("error")
def test_what_is_missing_is_in_the_middle_and_nobody_is_warned():
    from mlray.judgement.work_list import places
    found = places(np.array([[np.nan, 1.0, 5.0], [np.nan, 3.0, np.nan], [np.nan, np.inf, 5.0]]), np.zeros((3, 1), int))
    assert found.numbers.tolist() == [[0, -1, 0], [0, 1, 0], [0, 0, 0]] and places(np.zeros((0, 2)), np.zeros((0, 0), int)).numbers.shape == (0, 2)
