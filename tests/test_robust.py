"""Robustness: only lawful rows are scored, flips are counted right, attacks stay within bounds, and gates judge all of it."""
import json
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings, strategies as st

from mlray.governance.registry import bundle_of, open_registry
from mlray.judgement.adversarial import adversarial, attack
from mlray.judgement.explain import keeping
from mlray.judgement.gate import judge, less_is_better
from mlray.judgement.local_line import words_of
from mlray.judgement.robust import DISTURBANCES, behave, missing, noise, robustness, typo, unit
from mlray.learning.contract import Contract
from mlray.learning.features import apply
from mlray.learning.network import scores
from mlray.running.evaluation import read_candidate
from mlray.running.explanation import asked_for, behaved, shaken
from mlray.running.white_box import network_of, own_importances
from mlray.shipping.bundle import decide, predict
from mlray.values.behaviour import Behaviour
from mlray.values.column import Column
from mlray.values.errors import ExplanationError, SpecError
from mlray.values.settings import shipped
from mlray.values.spec import Rule, read_spec

CONTRACT = Contract({"age": Column(type="integer", min=18, max=100), "weight": Column(type="number", min=30, max=250, nullable=True), "town": Column(type="category", nullable=True),
                     "sex": Column(type="category", values=("f", "m"), sensitive=True), "smokes": Column(type="boolean"), "t": Column(type="boolean", role="target")}, {"not absurd": "weight > age / 4"})
RNG = np.random.default_rng(0)
ROWS = pl.DataFrame({"age": RNG.integers(18, 100, 200), "weight": RNG.normal(75, 12, 200).clip(40, 120), "town": RNG.choice(["Bern", "Basel", "Chur"], 200), "sex": RNG.choice(["f", "m"], 200), "smokes": RNG.random(200) < 0.5})
rows = st.lists(st.fixed_dictionaries({"age": st.integers(18, 100), "weight": st.none() | st.floats(30, 250), "town": st.none() | st.text(min_size=1, max_size=6), "sex": st.sampled_from("fm"), "smokes": st.booleans()}), min_size=1, max_size=6)


def by_weight(frame): return (frame["weight"].fill_null(0).to_numpy() > 75) * 1.0


@settings(max_examples=60, deadline=None)
@given(rows=rows, seed=st.text(max_size=4), kind=st.sampled_from(sorted(DISTURBANCES)))
def test_one_row_in_one_row_out_and_one_thing_touched(rows, seed, kind):
    frame = pl.DataFrame(rows, schema=ROWS.schema)
    made, touched = DISTURBANCES[kind](CONTRACT, frame, words_of(seed))
    again, _ = DISTURBANCES[kind](CONTRACT, frame, words_of(seed))
    assert made.equals(again) and made.schema == frame.schema and made.height == frame.height == len(touched)
    for before, after, name in zip(frame.iter_rows(named=True), made.iter_rows(named=True), touched, strict=True):
        moved = {n for n in before if before[n] != after[n]}
        assert moved == ({name} if kind != "noise" and name else set()) or (kind == "noise" and moved <= {"age", "weight"})
        if kind == "missing" and name: assert after[name] is None and CONTRACT.columns[name].nullable
        if kind == "typo" and name: assert abs(len(after[name]) - len(before[name])) <= 1


@settings(max_examples=40, deadline=None)
@given(rows=rows, share=st.floats(0, 3))
def test_noise_stays_within_limits(rows, share):
    frame = pl.DataFrame(rows, schema=ROWS.schema)
    moved, _ = noise(CONTRACT, frame, words_of("n"), share)
    assert keeping(Contract(CONTRACT.columns), moved.with_columns(town=pl.lit("x"))).all()


def test_flips_are_counted_by_hand():
    "The same disturbed rows, asked one by one."
    report = robustness(by_weight, CONTRACT, ROWS, ROWS.select("sex"), digest="d")
    before = by_weight(ROWS)
    for kind, disturb in (("noise", noise), ("missing", missing), ("typo", typo), ("unit", unit)):
        made, touched = disturb(CONTRACT, ROWS, words_of(kind, "d", ROWS.height))
        kept = [bool(keeping(CONTRACT, made[i]).all()) for i in range(ROWS.height)]
        tried = [i for i in range(ROWS.height) if touched[i]]
        found = report.by_kind()[kind]
        assert (found.rows, found.refused) == (len(tried), sum(not kept[i] for i in tried))
        assert found.flipped == sum(by_weight(made[i])[0] != before[i] for i in tried if kept[i])
    assert report.by_kind()["missing"].flipped > 0 < report.by_kind()["unit"].refused
    assert sum(t.rows for t in report.groups["sex"].values()) == sum(t.rows for t in report.cells.values())
    assert report.values["refused_rate[unit]"] > 0.3 and 0 < report.values["flip_rate"] < 1


def test_the_model_is_asked_once():
    calls = []
    def score(frame):
        calls.append(frame.height)
        return by_weight(frame)
    robustness(score, CONTRACT, ROWS)
    behave(score, CONTRACT, ROWS, [Behaviour(name="a", kind="invariance", change={"town": "x"}), Behaviour(name="b", kind="direction", add={"weight": 9}, expect="up")])
    assert len(calls) == 2


@pytest.mark.parametrize(("check", "share"), [
    (Behaviour(name="x", kind="invariance", change={"town": "Genf"}), 1.0), (Behaviour(name="x", kind="invariance", change={"weight": 200.0}), float((ROWS["weight"] > 75).mean())),
    (Behaviour(name="x", kind="direction", add={"weight": 30}, expect="up"), 1.0), (Behaviour(name="x", kind="direction", times={"weight": 0.5}, expect="up"), float((ROWS.filter(pl.col("weight") * 0.5 >= 30, pl.col("weight") * 0.5 > pl.col("age") / 4)["weight"] <= 75).mean())),
    (Behaviour(name="x", kind="invariance", where={"sex": "f"}, change={"sex": "m"}), 1.0), (Behaviour(name="x", kind="minimum", row={"age": 50, "weight": 100.0, "town": None, "sex": "f", "smokes": True}, score_at_most=0.5), 0.0)])
def test_behaviour_is_counted(check, share):
    assert behave(by_weight, CONTRACT, ROWS, [check]).values["behaviour[x]"] == pytest.approx(share)


@pytest.mark.parametrize("more", [{"where": {"age": 50}}, {"change": {"age": 50}}, {"add": {"age": 5}}, {"times": {"age": 2}}, {"expect": "up"}])
def test_a_minimum_speaks_of_its_row_alone(more):
    with pytest.raises(ValueError, match="not for a minimum"): Behaviour(name="x", kind="minimum", row={"age": 50}, score_at_least=0.5, **more)


def test_a_check_without_rows_is_not_kept():
    nobody = Behaviour(name="nobody", kind="invariance", where={"age": 17}, change={"sex": "m"})
    report = behave(by_weight, CONTRACT, ROWS, [nobody, Behaviour(name="unlawful", kind="invariance", change={"age": 500})])
    assert all(np.isnan(v) for v in report.values.values()) and report.checks[1][2] == 200
    assert not judge(report.measures, [Rule(metric=nobody.measure, at_least=0)]).passed


@pytest.mark.parametrize(("more", "words"), [("{name: a, kind: invariance, change: {bmj: 3}}", "Did you mean 'bmi'"), ("{name: a, kind: direction, add: {bmi: 5}}", "expect: up or down"), ("{name: a, kind: minimum, row: {bmi: 5}}", "needs row, and score_at_least"),
                                             ("{name: a, kind: invariance}", "needs change, add or times"), ("{name: a, kind: invariance, change: {bmi: 3}, tolerance: -1}", "greater than or equal to 0")])
def test_a_spec_says_what_is_wrong_with_a_check(more, words):
    with pytest.raises(SpecError, match=words): read_spec(shipped("configs") / "diabetes.yaml", [f"behaviour=[{more}]"])


def test_refused():
    with pytest.raises(ExplanationError, match="no row"): robustness(by_weight, CONTRACT, ROWS.head(0))
    with pytest.raises(ExplanationError, match="Did you mean 'noise'"): robustness(by_weight, CONTRACT, ROWS, kinds=["nois"])
    with pytest.raises(ExplanationError, match="reckons with 'town'"): behave(by_weight, CONTRACT, ROWS, [Behaviour(name="x", kind="invariance", add={"town": 1})])
    with pytest.raises(ExplanationError, match="NaN"): robustness(lambda frame: np.full(frame.height, np.nan), CONTRACT, ROWS)


def test_one_row_and_constant_columns():
    report = robustness(by_weight, CONTRACT, ROWS.head(1))
    assert all(t.rows == 1 for t in report.by_kind().values()) and np.isnan(robustness(by_weight, CONTRACT, ROWS.head(1), ROWS.head(1).select("sex")).values["flip_rate_difference[sex]"])
    constant = ROWS.with_columns(weight=pl.lit(75.0))
    assert noise(CONTRACT, constant, words_of("x"))[0]["weight"].equals(constant["weight"])


def test_less_is_better_with_and_without_brackets(): assert less_is_better("flip_rate") and less_is_better("flip_rate[noise]") and not less_is_better("behaviour[x]")


# attacks, on a trained bundle

@pytest.fixture(scope="module")
def bundle(trained):
    torch.set_num_threads(1)
    settings_, run = trained
    return bundle_of(open_registry(settings_), run.version)


def test_an_attack_makes_answers_worse_than_chance_does(bundle, trained):
    frame = trained[1].rows.parts.test
    report = adversarial(network_of(bundle), bundle.features, bundle.contract, frame, bundle.spec.model.threshold, (0.02, 0.2))
    small, large = report.cells["pgd", 0.02], report.cells["pgd", 0.2]
    assert small.flipped <= large.flipped and large.flipped > 0 and small.refused == large.refused == 0
    features = frame.select(bundle.contract.features)
    moved = attack(network_of(bundle), bundle.features, bundle.contract, features, share=0.2)
    assert keeping(bundle.contract, moved).all()
    by_graph = int((decide(bundle, predict(bundle, moved, moved.height)) != decide(bundle, predict(bundle, features, features.height))).sum())
    assert abs(by_graph - large.flipped) <= 1, "the graph that is shipped is fooled as its network is"
    random = features.with_columns((pl.col(n.name) + pl.Series(np.random.default_rng(0).choice([-0.2, 0.2], features.height) * features[n.name].std())).cast(features.schema[n.name]) for n in bundle.features.numbers)
    assert large.flipped > int((decide(bundle, predict(bundle, random, random.height)) != decide(bundle, predict(bundle, features, features.height))).sum())


def test_an_attack_moves_the_score_the_other_way(bundle, trained):
    frame = trained[1].rows.parts.test.select(bundle.contract.features)
    def asked(rows):
        matrix = apply(bundle.features, rows, rows.height)
        return scores(network_of(bundle), *map(torch.from_numpy, matrix.tensors)).numpy()
    before, after = asked(frame), asked(attack(network_of(bundle), bundle.features, bundle.contract, frame, share=0.05))
    assert ((after - before) * np.where(before >= 0.5, -1, 1)).mean() > 0.01


def test_own_importances_agree_with_shuffling(bundle, trained):
    from mlray.judgement.importance import permutation_importance
    from mlray.measures.score import roc_auc
    frame = trained[1].rows.parts.test
    truth = (frame["progression"] > 140.5).to_numpy().astype(int)
    shuffled = permutation_importance(lambda f: predict(bundle, f, f.height), frame.select(bundle.contract.features), truth, lambda y, p: roc_auc(y, p).value)
    own = own_importances(bundle, frame)
    assert {i.feature for i in own.features[:4]} & {i.feature for i in shuffled.features[:3]} >= {"bmi"}


# gates

def test_only_what_is_asked_for_is_measured(bundle, trained):
    frame = trained[1].rows.parts.test
    assert asked_for(bundle, frame, [Rule(metric="roc_auc", at_least=0.5)]) == {}
    found = asked_for(bundle, frame.head(20), [Rule(metric="flip_rate[noise]", at_most=0.5)])
    assert "flip_rate[noise]" in found and "fidelity" not in found and found == shaken(bundle, frame.head(20)).measures
    assert behaved(bundle, frame).values == {}


def test_a_run_and_the_gates_judge_the_same(diabetes, tmp_path):
    from mlray.engines.gate_on_papermill import run_gates
    from mlray.running.run import train
    from mlray.values.settings import Settings
    rules = {"robustness": (Rule(metric="flip_rate[noise]", at_most=0.3), Rule(metric="flip_rate[pgd]", at_most=0.0), Rule(metric="flip_rate_difference", by=("sex",), at_most=0.5)), "explanation": (Rule(metric="stability", at_least=0.8),)}
    checks = (Behaviour(name="heavier is no healthier", kind="direction", add={"bmi": 5}, expect="up", tolerance=0.1, at_least=0.5), Behaviour(name="impossible", kind="minimum", row=_patient(), score_at_least=2.0))
    settings_ = Settings(root=tmp_path, home=tmp_path / "home", tracking="disabled")
    run = train(diabetes.model_copy(update={"gates": rules, "behaviour": checks}), settings_)
    done = {g.gate: g for g in run_gates(open_registry(settings_), run.version, ["explanation", "robustness", "behaviour"], settings_)}
    assert not any(g.broken for g in done.values())
    told = {f.measure: (f.value, f.passed) for g in done.values() for f in g.verdict.findings}
    assert all(told[f.measure] == (f.value, f.passed) for f in run.verdict.findings)
    assert not told["flip_rate[pgd]"][1] and told["behaviour[heavier is no healthier]"][1] and told["behaviour[impossible]"] == (0.0, False)
    assert not done["robustness"].verdict.passed and done["explanation"].verdict.passed
    assert "<svg" in json.dumps(json.loads(done["explanation"].page))
    assert read_candidate("diabetes", settings_).judge("explanation").passed


def _patient(): return {"age": 50, "sex": "group 1", "bmi": 25.0, "blood_pressure": 90.0, "total_cholesterol": 190.0, "ldl": 120.0, "hdl": 50.0, "cholesterol_ratio": 4.0, "triglycerides_log": 4.6, "glucose": 90.0}


def test_an_incumbent_without_a_gradient_is_a_finding(bundle, trained):
    from mlray.judgement.gate import judge
    from mlray.running.white_box import asked_of_network
    from mlray.values.errors import ExplanationError
    trees = replace(bundle, spec=bundle.spec.model_copy(update={"model": bundle.spec.model.model_copy(update={"estimator": "sklearn.ensemble:HistGradientBoostingClassifier"})}))
    frame, rules = trained[1].rows.parts.test.head(20), [Rule(metric="flip_rate[pgd]", within=0.1)]
    with pytest.raises(ExplanationError, match="no gradient"): asked_of_network(trees, frame, rules)
    (finding,) = judge(asked_of_network(bundle, frame, rules), rules, asked_of_network(trees, frame, rules, incumbent=True)).findings
    assert not finding.passed and "production has no such measure" in finding.why
