"""A rollout of a model of several classes or of numbers keeps the promises about groups, from the journal of a real service, and waits for none that live traffic cannot tell."""
import json
import re
import time
from dataclasses import replace
from uuid import uuid4

import numpy as np
import polars as pl
import pytest
from onnx import helper as h

from mlray.governance.access import new_key
from mlray.governance.registry import add_key, bundle_of
from mlray.judgement.arm import Arm, Evidence, Mean
from mlray.judgement.rollout import Finding, Hold, Promote, RollBack, decide
from mlray.measures.gaps import number_terms
from mlray.measures.group_sums import group_sums
from mlray.monitoring.journal import Feedback, Journal
from mlray.monitoring.keeping import open_recorder
from mlray.monitoring.rollout_run import arm_of
from mlray.monitoring.rollout_step import Controller, progress
from mlray.monitoring.windows import Window
from mlray.running.run import train
from mlray.serving.plan import loaded, plan_of
from mlray.serving.service import Service
from mlray.values.rollout_policy import Rollout
from mlray.values.settings import Settings
from mlray.values.spec import Rule
from tests.canaries import Added, _of_group, same
from tests.test_rollout_steps import ONE, House, housed
from tests.test_targets import spec_of

POLICY = {"steps": [0.5, 1.0], "every": "1s", "latency": None, "checks": [{"metric": "error_rate", "margin": 0.1, "minimum": 20, "demand": "not worse"}], "fairness": {"groups": 2, "minimum": 60}}
CALLS, ROWS = 80, 40


def turned_round(code: int) -> Added:
    "Rows of a group get the first class where they should have the last, and the other way round."
    nodes, constants = _of_group(code, "bad")
    more = [h.make_node("Unsqueeze", ["bad", "axis"], ["bad rows"]), h.make_node("Gather", ["honest", "backwards"], ["other"], axis=1), h.make_node("Where", ["bad rows", "other", "honest"], ["score"])]
    return [*nodes, *more], constants | {"axis": np.array([1], np.int64), "backwards": np.array([2, 1, 0], np.int64)}


def higher(code: int) -> Added:
    "Rows of a group get a number that is too large by 100."
    nodes, constants = _of_group(code, "bad")
    more = [h.make_node("Where", ["bad", "much", "none"], ["more"]), h.make_node("Add", ["honest", "more"], ["score"])]
    return [*nodes, *more], constants | {"much": np.array(100, np.float32), "none": np.array(0, np.float32)}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    made = {}

    def run_of(kind: str):
        if kind not in made:
            root = tmp_path_factory.mktemp(kind)
            settings = Settings(root=root, home=root / "home", object_store_mb=100, tracking="disabled")
            made[kind] = settings, train(spec_of(kind, "train: {epochs: 5}"), settings)
        return made[kind]

    return run_of


def heard(house: House, run, calls: int = CALLS, each: int = ROWS) -> None:
    "Ask a service that follows the registry, many rows at a time, and tell it what was true."
    key, text = new_key("predictor")
    add_key(house.registry, key)
    plan, recorder = plan_of(house.registry, ["patients"]), open_recorder(house.settings)
    service, told = Service(loaded(plan), plan.keys, recorder), Journal(house.settings.home / "journal/feedback/segments")
    rows, draw = run.rows.parts.train.to_dicts(), np.random.default_rng(7)
    (target,), names = bundle_of(house.registry, house.version).task.targets, ("age", "sex", "bmi", "blood_pressure", "triglycerides_log")
    for i in range(calls):
        part = [rows[j] for j in draw.integers(0, len(rows), each)]
        reply = service.answer("patients", json.dumps({"instances": [{n: r[n] for n in names} for r in part]}).encode(), text, f"{uuid4().hex[:12]}-{i}")
        assert reply.status == 200, reply.body
        id = json.loads(reply.body)["request_id"]
        for j, r in enumerate(part): told.write(Feedback(id, time.time_ns(), row=j, **({"text": r[target]} if target == "course" else {"number": float(r[target])})))
    recorder.journal.close()
    told.close()


PARITY, BIAS = {"metric": "equal_opportunity_difference", "by": ["sex"], "within": 0.1}, {"metric": "bias_difference", "by": ["sex"], "within": 60}


@pytest.mark.parametrize(("kind", "added", "promise", "over"), [
    ("multiclass", turned_round(ONE), PARITY, "rolled back"), ("multiclass", same(), PARITY, "promoted"),
    ("regression", higher(ONE), BIAS, "rolled back"), ("regression", same(), BIAS, "promoted")], ids=["classes unfair", "classes", "numbers unfair", "numbers"])
def test_promises_about_groups_are_kept_from_the_journal(runs, tmp_path, kind, added, promise, over):
    house = housed(runs(kind), tmp_path / "home", added, POLICY, {"gates": {"fairness": [promise, {"metric": "accuracy_ratio", "by": ["sex"], "at_least": 0.1}]}})
    house.begin()
    controller = Controller(house.registry, house.settings)
    heard(house, runs(kind)[1], 20, 4)
    (early,) = controller.look()
    first, untold = (next(f for f in early.decision.findings if f.metric.startswith(n)) for n in (promise["metric"], "accuracy_ratio"))
    assert isinstance(early.decision, Hold) and first.verdict == "too little" and "more of one group are wanting" in early.why and "accuracy_ratio" not in early.why
    heard(house, runs(kind)[1])
    controller.due.clear()
    (seen,) = controller.look()
    found = {f.metric: f for f in seen.decision.findings}
    measure = f"{promise['metric']}[sex]"
    print(seen.why, found[measure])
    assert seen.after.over == over and seen.decision.because == ((measure,) if over == "rolled back" else ()) and found[measure].canary is not None and found[measure].champion is not None
    assert found[measure].low > promise["within"] if over == "rolled back" else found[measure].verdict in ("within", "undecided")
    assert untold.verdict == found[untold.metric].verdict == "not judged" and (over == "rolled back" or untold.metric in seen.why)
    told = [json.loads(line)["what"] for line in (house.settings.home / f"alerts/{house.canary}/alerts.jsonl").read_text().splitlines()]
    assert sum(t.startswith("goes on without accuracy_ratio[sex]") for t in told) == 1 and sum(t.startswith(over) for t in told) == 1
    assert json.loads(json.dumps(progress(house.registry, house.settings, "patients").as_dict(), allow_nan=False))["over"] == over


def numbers(n: int, behind: float, seed: int, sites=("a", "b")) -> Arm:
    "Errors of a number by group, b's larger by `behind`; without sites, as of a model whose journal keeps no groups."
    g = np.random.default_rng(seed)
    by, error = pl.DataFrame({"site": g.choice(sites, n)} if sites else {}), g.normal(0, 2, n)
    if not sites: return arm_of([Window("m", "1", "canary", 0, 60, requests=n, rows=n)])
    terms = number_terms(np.zeros(n), error + behind * (by["site"] == "b").to_numpy())
    return arm_of([Window("m", "1", "canary", 0, 60, requests=n, rows=n, labelled_sums=group_sums(by, terms), answered_sums=group_sums(by, {"mean_prediction": terms["mean_prediction"]}))])


def decided(canary: Arm, champion: Arm | None = None, demand: str = "within", **promise) -> Promote | Hold | RollBack:
    policy = Rollout.model_validate({"latency": None, "checks": [{"metric": "error_rate", "margin": 0.02}], "fairness": {"demand": demand, "groups": 2}})
    rule = Rule.model_validate({"metric": "bias_difference", "by": ["site"], **promise})
    return decide(Evidence(0.05, canary, champion or numbers(50_000, 0, 9)), policy, [rule], strict=False)


def finding(decision) -> Finding: return next(f for f in decision.findings if f.kind == "fairness")


@pytest.mark.parametrize(("rows", "behind", "promise", "verdict", "action"), [
    (20_000, 0.0, {"at_most": 1.0}, "within", "promote"), (20_000, 3.0, {"at_most": 1.0}, "worse", "roll back"), (20_000, 3.0, {"within": 1.0}, "worse", "roll back"), (20_000, 1.0, {"at_most": 1.0}, "undecided", "hold"),
    (300, 0.4, {"at_most": 1.0}, "undecided", "hold"), (20, 0.0, {"at_most": 1.0}, "too little", "hold"),
    (20_000, 3.0, {"metric": "mean_absolute_error", "at_most": 2.0}, "worse", "roll back"), (20_000, 0.0, {"metric": "mean_absolute_error", "at_most": 2.0}, "better", "promote"),
    (20_000, 3.0, {"metric": "mean_prediction_difference", "at_most": 1.0}, "worse", "roll back"), (20_000, 0.0, {"metric": "demographic_parity_ratio", "at_least": 0.8}, "not judged", "promote"),
    (20_000, 0.0, {"by": ["age"], "at_most": 1.0}, "not judged", "promote"), (20_000, 0.0, {"metric": "roc_auc", "at_least": 0.8}, "not judged", "promote")])
def test_numbers_by_group(rows, behind, promise, verdict, action):
    canary = numbers(rows, behind, 3)
    decision = decided(replace(canary, means={**canary.means, "error_rate": Mean(0, 20_000)}, requests=20_000), **promise)
    found = finding(decision)
    assert (found.verdict, decision.action) == (verdict, action), decision.why
    assert found.metric not in decision.why if action == "promote" and verdict != "not judged" else found.metric in decision.why


def test_how_many_more_rows_is_said_and_enough():
    few = numbers(300, 0.4, 3)
    said = finding(decided(few, at_most=1.0)).why
    more = int(re.search(r"about ([\d,]+) more rows", said)[1].replace(",", ""))
    assert 50 < more < 20_000 and finding(decided(few + numbers(2 * 2 * more, 0.4, 4), at_most=1.0)).verdict == "within", said
    assert re.search(r"; (\d+) more of one group", finding(decided(numbers(20, 0, 3), at_most=1.0)).why)[1] in {str(100 - n) for n in range(11)}


def test_a_journal_without_groups_is_waited_for_by_nobody():
    decision = decided(numbers(20_000, 0, 3, ()), at_most=1.0)
    assert isinstance(decision, Promote) and "the journal does not keep site" in decision.why and finding(decision).met
    alone = decide(Evidence(0.05, numbers(20_000, 0, 3, ()), numbers(20_000, 0, 3, ())), Rollout(latency=None, checks=()), [Rule(metric="bias_difference", by=("site",), at_most=1.0)])
    assert isinstance(alone, Hold) and "nothing that the policy checks can be told" in alone.why, "a promise that nobody can tell promotes nobody"


def test_evidence_of_sums_adds_up():
    one, two = numbers(4000, 1.0, 1), numbers(3000, 1.0, 2)
    parts = [finding(decided(a, at_most=1.0)) for a in (one + two, two + one)]
    assert parts[0].low == pytest.approx(parts[1].low) and parts[0].verdict == parts[1].verdict and (one + two).labelled_sums.rows == {g: one.labelled_sums.rows[g] + two.labelled_sums.rows[g] for g in one.labelled_sums.rows}
