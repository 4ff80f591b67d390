"""What production does is counted once, added up, and said: what was planted is found, by its name, and told once; what is quiet stays quiet."""
import json
import resource
import shutil
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from typer.testing import CliRunner

from mlray.governance.registry import add_evidence, bundle_of, open_registry, promote, version
from mlray.judgement.gate import Verdict
from mlray.monitoring.alert import advance
from mlray.monitoring.archive import _FEEDBACK, journaled
from mlray.monitoring.journal import Entry, Feedback, Journal
from mlray.monitoring.keeping import Keys, answer_columns, kept, plan
from mlray.monitoring.monitor import gauges, monitor, page, watched
from mlray.monitoring.windows import Window, Windows, count_new, count_window, together
from mlray.shipping.answer import predictions
from mlray.shipping.bundle import decide, predict
from mlray.values.spec import Alert, Monitor, parse_spec

NOON = 1_700_000_000 // 86400 * 86400
NOTHING = pl.DataFrame(schema=_FEEDBACK)
KEYS = Keys({"1": b"key"})


@pytest.fixture(scope="module")
def bundle(trained): return bundle_of(open_registry(trained[0]), trained[1].version)


@pytest.fixture(scope="module")
def people(trained): return trained[1].rows.parts.train


def answers(bundle, rows: pl.DataFrame, labels=None, decided=None) -> dict[str, list]:
    scores = predict(bundle, rows, rows.height)
    decisions = decide(bundle, scores, rows) if decided is None else decided(rows, scores)
    return {"columns": kept(plan(bundle.contract, bundle.profile, KEYS), rows.to_dict(as_series=False)), "answers": answer_columns(predictions(bundle.task, scores, decisions))}


def frame(bundle, rows: pl.DataFrame, start=NOON, status=200, decided=None) -> pl.DataFrame:
    "Rows as the journal gives them."
    both, n = answers(bundle, rows, decided=decided), rows.height
    about = {"id": [f"r-{start}-{i}" for i in range(n)], "row": [0] * n, "time": [(start + i) * 10**9 for i in range(n)], "status": [status] * n, "seconds": [0.002] * n, "rows": [1] * n, "lost": [0] * n, "arm": ["production"] * n}
    return pl.DataFrame({**about, **{f"column:{k}": v for k, v in both["columns"].items()}, **{f"answer:{k}": v for k, v in both["answers"].items()}})


def a_window(bundle, rows, start=NOON, said=NOTHING, **more): return count_window(bundle, frame(bundle, rows, start, **more), said, Window("diabetes", "1", "production", start, start + 3600))


def labels_of(bundle, rows, start=NOON, share=1.0, seed=0):
    heard = np.random.default_rng(seed).random(rows.height) < share
    some = [i for i in range(rows.height) if heard[i]]
    return pl.DataFrame({"id": [f"r-{start}-{i}" for i in some], "row": [0] * len(some), "time": [0] * len(some), "kind": ["label"] * len(some), "text": [None] * len(some), "number": [float(rows[bundle.contract.target][i]) for i in some], "source": [""] * len(some), "key": [""] * len(some), "caller": [""] * len(some)}, schema=_FEEDBACK)


# ---- windows --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("cuts", [(50,), (1, 2, 200), (100, 100, 150)])
def test_windows_add_up_however_rows_are_divided(bundle, people, cuts):
    whole, said = frame(bundle, people), labels_of(bundle, people, share=0.5)
    about = Window("diabetes", "1", "production", NOON, NOON + 3600)
    edges = [0, *cuts, people.height]
    parts = [count_window(bundle, whole[a:b], said, about) for a, b in zip(edges, edges[1:], strict=False)]
    one, sum_ = count_window(bundle, whole, said, about), together(parts)
    assert (one.requests, one.rows, one.latency, one.errors) == (sum_.requests, sum_.rows, sum_.latency, sum_.errors)
    assert one.profile == sum_.profile and one.answers == sum_.answers
    for ours, theirs in ((one.answered, sum_.answered), (one.labelled, sum_.labelled)):
        keys = [c for c in ours.cells.columns if c not in ("score", "log_loss", "squared_error")]
        assert ours.cells.select(keys).equals(theirs.cells.select(keys)) and np.allclose(ours.cells["score"], theirs.cells["score"])
    assert Window.from_dict(json.loads(json.dumps(sum_.as_dict()))).as_dict() == sum_.as_dict()


def journal_of(home: Path, bundle, people, days: int):
    journal = Journal(home / "journal/segments")
    both = answers(bundle, people)
    for day in range(days):
        for i in range(people.height):
            journal.write(Entry(f"r-{day}-{i}", (NOON + day * 86400 + i * 300) * 10**9, "diabetes", "1", bundle.digest, seconds=0.002, rows=1, **{part: {n: [v[i]] for n, v in columns.items()} for part, columns in both.items()}))
    journal.close()


def test_late_early_and_repeated_feedback_end_in_the_same_windows(trained, bundle, people, tmp_path):
    people = people.head(80)
    said = [Feedback(f"r-{d}-{i}", 1, number=float(people[bundle.contract.target][i])) for d in range(2) for i in range(0, people.height, 2)]
    said += [Feedback(f"r-1-{i}", 2, kind="click", number=float(i % 2)) for i in range(40)]
    stored = []
    for order in ("early", "late", "thrice"):
        settings = trained[0].model_copy(update={"home": tmp_path / order})
        windows, told = Windows(settings, "diabetes", "1"), Journal(tmp_path / order / "journal/feedback/segments")
        def tell(many, told=told):
            for one in many: told.write(one)
            told.rotate()
        if order == "early": tell(said)
        journal_of(settings.home, bundle, people, 2)
        count_new(windows, bundle, 3600, NOON + 3 * 86400)
        if order == "late":
            for part in (said[::-1][:100], said[::-1][100:]):
                tell(part)
                count_new(windows, bundle, 3600, NOON + 3 * 86400 + 60)
        if order == "thrice":
            for _ in range(3):
                tell(said)
                count_new(windows, bundle, 3600, NOON + 3 * 86400 + 60)
        told.close()
        stored.append([w.as_dict() for w in windows.stored()])
    assert stored[0] == stored[1] == stored[2] and len(stored[0]) > 10 and sum(sum(w["labelled"]["cells"]["rows"]) for w in stored[0] if w["labelled"]) == len(said) - 40


def test_a_window_is_counted_once(trained, bundle, people, tmp_path):
    settings = trained[0].model_copy(update={"home": tmp_path})
    journal_of(tmp_path, bundle, people, 2)
    windows = Windows(settings, "diabetes", "1")
    count_new(windows, bundle, 3600, NOON + 2 * 86400)
    before = {p: p.stat().st_mtime_ns for p in windows.folder.rglob("*.json") if p.name != "mark.json"}
    for path in (tmp_path / "journal/rows").rglob("*.parquet"): path.unlink() # the rows may go; what was counted stays
    assert count_new(windows, bundle, 3600, NOON + 3 * 86400) == [] and before == {p: p.stat().st_mtime_ns for p in before}
    assert sum(w.rows for w in windows.stored()) == 2 * people.height


# ---- what is found --------------------------------------------------------------------------------------------------

ALERTS = (Alert(metric="moved_share", at_most=0.05, clear=0.0), Alert(metric="estimated_accuracy", at_least=0.6), Alert(metric="error_rate", at_most=0.02), Alert(metric="accuracy", at_least=0.6, minimum=100),
          Alert(metric="demographic_parity_difference", by=("sex",), at_most=0.4), Alert(metric="wasserstein_distance[answer:score]", at_most=0.3))


def season(bundle, people, seed, plant=None, after=6, days=9):
    "A day a window; what is said, and on which day."
    rng, states, told, history = np.random.default_rng(seed), {}, [], []
    for day in range(days):
        rows, start = people[rng.integers(0, people.height, 400)], NOON + day * 86400
        more = plant(rows) if plant and day >= after else {"rows": rows}
        rows = more.pop("rows")
        history.append(a_window(bundle, rows, start, labels_of(bundle, more.pop("truth", rows), start, 0.5, seed), **more))
        states, now = advance(states, ALERTS, watched(bundle, "1", history[-1:], history))
        told += [(day, t) for t in now]
    return told


def older(rows): return {"rows": rows.with_columns(rows["bmi"] * 1.25)}
def failing(rows): return {"rows": rows, "status": 503}
def unfair(rows): return {"rows": rows, "decided": lambda r, scores: np.where((r["sex"] == "group 1").to_numpy(), False, True)}
def other_world(rows): return {"rows": rows, "truth": rows.with_columns(300 - rows["progression"])}


@pytest.mark.parametrize(("plant", "measure"), [(older, "moved_share"), (failing, "error_rate"), (unfair, "demographic_parity_difference[sex]"), (other_world, "accuracy")])
def test_what_was_planted_is_named_and_told_once(bundle, people, plant, measure):
    told = season(bundle, people, 3, plant)
    begun = [(day, t) for day, t in told if t.begins and t.measure == measure]
    assert [day for day, _ in begun] == [6], f"{[(d, t.sentence) for d, t in told]}"
    assert not [t for day, t in told if day < 6]
    alert = begun[0][1]
    assert alert.since == datetime.fromtimestamp(NOON + 5 * 86400 + 3600, UTC).isoformat() and alert.may and "mlray journal rows" in alert.rows
    if plant is unfair: assert alert.whom == "sex=group 1"


@pytest.mark.parametrize("seasons", [1, pytest.param(100, marks=pytest.mark.chaos)])
def test_quiet_seasons_are_quiet(bundle, people, seasons):
    alarms = [(s, day, t.sentence) for s in range(seasons) for day, t in season(bundle, people, 100 + s)]
    print(f"\n{seasons} quiet seasons of 9 days, {len(ALERTS)} alerts: {len(alarms)} false alarms {alarms[:3]}")
    assert len(alarms) <= 0.05 * seasons


def test_the_gates_promises_are_judged_on_live_groups(bundle, people):
    fair, said = watched(bundle, "1", [a_window(bundle, people, said=labels_of(bundle, people))]), labels_of(bundle, people)
    worse = watched(bundle, "1", [a_window(bundle, people, said=said, **{k: v for k, v in unfair(people).items() if k != "rows"})])
    promised = {r.measure for r in bundle.spec.gates["fairness"]}
    assert {f.measure for f in fair.verdict.findings} == promised == {f.measure for f in worse.verdict.findings} and fair.verdict.passed and not worse.verdict.passed
    unlabelled = watched(bundle, "1", [a_window(bundle, people)])
    assert [f.measure for f in unlabelled.verdict.findings] == ["demographic_parity_ratio[sex]"] and all("too few labels" in w for w in unlabelled.waiting)


def test_live_numbers_are_those_of_the_rows(bundle, people):
    from sklearn.metrics import accuracy_score, roc_auc_score

    from mlray.learning.contract import labels
    report = watched(bundle, "1", [a_window(bundle, people, said=labels_of(bundle, people))])
    truth, scores = labels(bundle.contract, people).to_numpy(), predict(bundle, people, people.height)
    assert report.values["accuracy"] == pytest.approx(accuracy_score(truth, decide(bundle, scores, people)))
    assert report.values["roc_auc"] == pytest.approx(roc_auc_score(truth, scores), abs=0.01)
    assert report.values["estimated_accuracy"] == pytest.approx(np.maximum(scores, 1 - scores).mean(), abs=1e-4)


# ---- the door -------------------------------------------------------------------------------------------------------

def test_the_command(trained, bundle, people, tmp_path, monkeypatch):
    from mlray.cli import app
    settings = trained[0].model_copy(update={"home": tmp_path})
    registry = open_registry(trained[0])
    journal, now = Journal(tmp_path / "journal/segments"), int(time.time())
    both = answers(bundle, people)
    for i in range(people.height): journal.write(Entry(f"r-{i}", (now - 9000 + 30 * i) * 10**9, "diabetes", "1", bundle.digest, rows=1, **{part: {n: [v[i]] for n, v in columns.items()} for part, columns in both.items()}))
    journal.close()
    for name, value in {"MLRAY_HOME": settings.home, "MLRAY_REGISTRY": trained[0].registry_url, "MLRAY_TRACKING": "disabled"}.items(): monkeypatch.setenv(name, str(value))
    (tmp_path / "store").symlink_to(registry.store.root)
    monkeypatch.chdir(tmp_path)
    run = lambda *words: CliRunner().invoke(app, list(words), catch_exceptions=False)
    done = run("monitor", "diabetes/1", "--json", "--html", str(tmp_path / "page.html"))
    said = json.loads(done.stdout)
    assert done.exit_code == 0 and said["measures"]["requests"]["value"] == people.height and not said["moved"] and not said["broken"]
    html, numbers = (tmp_path / "page.html").read_text(), Path(said["gauges"]).read_text()
    assert html.startswith("<!doctype html>") and "<svg" in html and "http" not in html.replace("http://www.w3.org/2000/svg", "") and "# TYPE mlray_monitor_measure gauge" in numbers
    assert json.loads(run("journal", "compact", "--json").stdout)["open"] == 0 and len(json.loads(run("journal", "rows", "diabetes/1", "--json").stdout)) == people.height
    assert json.loads(run("journal", "purge", "--older", "90d", "--json").stdout) == {"days": 0, "feedback_days": 0}


def test_alerts_stand_in_the_spec(diabetes):
    text = Path("configs/diabetes.yaml") if Path("configs/diabetes.yaml").is_file() else Path(__file__).parents[1] / "configs/diabetes.yaml"
    watching = "\nmonitor:\n  window: 15m\n  alerts:\n    - {metric: error_rate, at_most: 0.02, clear: 0.01, looks: 2, owner: risk, runbook: 'https://example.org/errors'}\n"
    spec = parse_spec(text.read_text() + watching)
    assert spec.monitor.alerts[0].looks == 2 and spec.id == diabetes.id and Monitor() == diabetes.monitor
    with pytest.raises(Exception, match="not a sensitive column"): parse_spec(text.read_text() + watching.replace("metric: error_rate,", "metric: selection_rate, by: [bmi],"))


@pytest.mark.chaos
def test_the_replay_gate(trained, bundle, people, tmp_path):
    from mlray.engines.gate_on_papermill import environment_of, run_gate
    from mlray.running.gate_page import gate_path
    shutil.copytree(trained[0].home, tmp_path / "home")
    settings = trained[0].model_copy(update={"home": tmp_path / "home", "root": tmp_path})
    registry = open_registry(settings)
    for gate in ("quality", "fairness"): add_evidence(registry, version(registry, "diabetes/1"), gate, Verdict(trained[1].verdict.findings[:1]), b"{}")
    promote(registry, version(registry, "diabetes/1"), "production")
    both, journal, now = answers(bundle, people), Journal(settings.home / "journal/segments"), int(time.time())
    journal.write(Entry("r", (now - 60) * 10**9, "diabetes", "1", bundle.digest, rows=people.height, **both))
    journal.close()
    runs = [run_gate(gate_path("replay", settings), {"version": "diabetes/1"}, environment=environment_of(settings)) for _ in range(2)]
    assert all(r.verdict.passed and not r.broken and r.verdict.findings[0].value == 0 for r in runs), [r.broken for r in runs]


@pytest.mark.chaos
def test_ten_million_rows(bundle, people, trained, tmp_path):
    "From raw segments, and from stored windows; prints what both took."
    from mlray.monitoring.journal import line_of
    settings, n = trained[0].model_copy(update={"home": tmp_path}), 10_000_000
    both, folder = answers(bundle, people), tmp_path / "journal/segments"
    folder.mkdir(parents=True)
    entries = [Entry("", 0, "diabetes", "1", bundle.digest, seconds=0.002, rows=1, **{part: {k: [v[i]] for k, v in columns.items()} for part, columns in both.items()}) for i in range(people.height)]
    from msgspec.structs import replace
    for at in range(0, n, 150_000):
        (folder / f"{NOON * 10**9 + at:020}-1-{at:08x}.log").write_bytes(b"".join(line_of(replace(entries[i % people.height], id=f"{i:032x}", time=NOON * 10**9 + i * 86_000)) for i in range(at, min(n, at + 150_000))))
    took = []
    cpu = lambda: sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    for _ in range(2):
        start, before = time.perf_counter(), cpu()
        report = monitor(settings, bundle, "1", NOON + 86400, workers=4)
        took.append((time.perf_counter() - start, cpu() - before))
    print("\n10 000 000 rows: {:.1f} s ({:.1f} s of CPU) from raw segments, {:.2f} s ({:.2f} s of CPU) from stored windows".format(*took[0], *took[1]))
    assert report.window.rows == n and took[1][1] < 5


def test_pages_and_gauges_say_the_same(bundle, people):
    report = watched(bundle, "1", [a_window(bundle, people, status=503)])
    assert 'measure="error_rate"} 1' in gauges(report) and report.as_dict()["measures"]["error_rate"]["value"] == 1 and "&lt;" in page(report, ["<b>"]) and json.dumps(report.as_dict(), allow_nan=False)
    assert journaled(Path("nowhere")).collect().height == 0


def test_an_erasure_that_found_nobody_says_so(tmp_path, monkeypatch):
    "A name with a slip in it would look like a promise that was kept."
    from mlray.cli import app
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLRAY_HOME", str(tmp_path / "home"))
    said = CliRunner().invoke(app, ["journal", "erase", "perso-7"], catch_exceptions=False).output
    assert "Nothing of 'perso-7' was found" in said and "nothing was erased" in " ".join(said.split())
    assert json.loads(CliRunner().invoke(app, ["journal", "erase", "perso-7", "--json"], catch_exceptions=False).stdout)["rows"] == 0
