"""Gates against production: differences of every measure are those of its scorecards, their intervals hold the truth, and a verdict says when rows are too few to tell."""
import json
import pickle
import shutil
from dataclasses import replace

import numpy as np
import polars as pl
import pytest

from mlray.engines.gate_on_papermill import run_gates
from mlray.governance.registry import Policy, bundle_of, open_registry, promote
from mlray.judgement.gate import judge
from mlray.measures.counts import count
from mlray.measures.fairness import fairness_report, gaps, rates_named
from mlray.measures.gaps import class_terms, gap_report, number_terms
from mlray.measures.paired import auc_values, compare_answers, gap_differences, largest_moved, r2_values, ratio_values, root_values, term_differences
from mlray.measures.score import Measure, scorecard, wilson
from mlray.measures.score_of_classes import classes_scorecard, labels_scorecard
from mlray.measures.score_of_numbers import numbers_scorecard, quantiles_scorecard
from mlray.running.evaluation import evaluate_beside
from mlray.running.run import train
from mlray.values.errors import SpecError
from mlray.values.spec import Rule, parse_spec
from mlray.values.task import Task

ROWS = 400


def made(kind: str, seed: int, rows: int = ROWS):
    "A task, the truth, and what two models say of it; the second is the better one."
    rng = np.random.default_rng(seed)
    if kind in ("regression", "quantile"):
        truth = rng.normal(50, 10, rows)
        spread = (5.0, 4.0)
        if kind == "regression": return Task(kind, ("y",), ("y",)), truth, *((a, a) for a in (truth + rng.normal(0, s, rows) for s in spread))
        steps = np.array([-1.28, 0.0, 1.28])
        return Task(kind, ("y",), ("0.1", "0.5", "0.9"), (0.1, 0.5, 0.9)), truth, *((a, a[:, 1]) for a in ((truth + rng.normal(0, s, rows))[:, None] + s * steps for s in spread))
    if kind == "multiclass":
        truth = rng.integers(0, 3, rows)
        def said(s): return (e := np.exp(s * np.eye(3)[truth] + rng.normal(0, 1, (rows, 3)))) / e.sum(1, keepdims=True)
        return Task(kind, ("y",), ("a", "b", "c")), truth, *((p, p.argmax(1)) for p in map(said, (1.0, 1.6)))
    truth = rng.integers(0, 2, (rows, 3) if kind == "multilabel" else rows)
    def scores(s): return 1 / (1 + np.exp(-s * (truth - 0.5) + rng.normal(0, 1, truth.shape)))
    return Task(kind, ("a", "b", "c") if kind == "multilabel" else ("y",), ("a", "b", "c") if kind == "multilabel" else ("0", "1")), truth, *((p, (p > 0.5).astype(int)) for p in map(scores, (1.0, 2.0)))


def card(task, truth, said):
    if task.kind == "binary": return scorecard(truth, *said)
    if task.kind == "multiclass": return classes_scorecard(truth, *said, task.names)
    if task.kind == "multilabel": return labels_scorecard(truth, *said, task.names)
    return numbers_scorecard(truth, said[0]) if task.kind == "regression" else quantiles_scorecard(truth, said[0], task.quantiles)


KINDS = ("binary", "multiclass", "multilabel", "regression", "quantile")
WITHOUT = {"median_absolute_error", "coverage_error"} # of these no row's part is known


@pytest.mark.parametrize("kind", KINDS)
def test_a_difference_is_that_of_the_scorecards_in_every_measure(kind):
    task, truth, ours, theirs = made(kind, 0)
    found, a, b = compare_answers(task, truth, ours, theirs).overall, card(task, truth, ours).overall, card(task, truth, theirs).overall
    assert set(a) - set(found) <= WITHOUT and set(found) <= set(a)
    for name, d in found.items():
        assert (d.ours, d.theirs, d.difference.value) == pytest.approx((a[name].value, b[name].value, a[name].value - b[name].value), abs=1e-6), name
        assert d.difference.low <= d.difference.value <= d.difference.high, name


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_beside_itself_differs_in_nothing(kind):
    task, truth, ours, _ = made(kind, 1)
    for name, d in compare_answers(task, truth, ours, ours).overall.items(): assert d.difference.value == 0 and d.difference.low <= 0 <= d.difference.high and d.p_value == 1, name


@pytest.mark.parametrize("kind", KINDS)
def test_intervals_of_differences_hold_the_truth(kind):
    "The truth is the difference over very many rows; of 120 samples of 400, 95 % should hold it."
    task, *large = made(kind, 99, 400_000)
    true = {n: d.difference.value for n, d in compare_answers(task, *large).overall.items()}
    held = {n: 0 for n in true}
    for seed in range(120):
        for name, d in compare_answers(*made(kind, seed)).overall.items(): held[name] += d.difference.low <= true[name] <= d.difference.high
    assert all(h >= 105 for h in held.values()), {n: h for n, h in held.items() if h < 105}  # 120 × 95 % = 114; fewer than 105 has a chance below 1 in 1000


@pytest.mark.parametrize("make", [lambda y, p: ratio_values(p, y), lambda y, p: r2_values(y, p), lambda y, p: root_values((y - p) ** 2), lambda y, p: auc_values((y > np.median(y)).astype(int), p)], ids=["ratio", "r2", "root", "auc"])
def test_the_spread_of_pseudo_values_is_the_error_of_the_measure(make):
    rng = np.random.default_rng(0)
    def sample(): return (y := rng.gamma(4, 1, 500)), y + rng.normal(0, 1, 500)
    drawn = [make(*sample()) for _ in range(600)]
    assert np.mean([d.std(ddof=1) / 500**0.5 for d in drawn]) == pytest.approx(np.std([d.mean() for d in drawn]), rel=0.12)


# Groups

def of_two(rng, ours, theirs, rows=1500, alike=0.8):
    "Groups, labels and decisions at these rates; rows are decided alike by both models as often as said."
    group, one, y = rng.integers(0, len(ours), rows), rng.random(rows), rng.integers(0, 2, rows)
    other = np.where(rng.random(rows) < alike, one, rng.random(rows))
    return pl.DataFrame({"g": group.astype(str)}), y, (one < np.array(ours)[group]).astype(int), (other < np.array(theirs)[group]).astype(int)


@pytest.mark.parametrize(("ours", "theirs"), [((.4, .4, .4), (.4, .4, .4)), ((.3, .4, .5), (.35, .4, .5)), ((.2, .4, .6), (.4, .4, .4)), ((.3, .5, .5), (.3, .45, .5)), ((.5, .4), (.4, .5))], ids=["level", "narrower", "from nothing", "tied", "turned round"])
@pytest.mark.parametrize("form", ["difference", "ratio", "group_min", "to_overall_difference"])
def test_intervals_of_differences_of_gaps_hold_the_truth(ours, theirs, form):
    def gap(r):
        r = np.array(r)
        return {"difference": r.max() - r.min(), "ratio": r.min() / r.max(), "group_min": r.min(), "to_overall_difference": np.abs(r - r.mean()).max()}[form]
    rng, held = np.random.default_rng(0), 0
    for seed in range(60):
        [moved] = gap_differences(*of_two(rng, ours, theirs), {"it": (f"selection_rate_{form}", ["g"])}, draws=200, seed=seed).values()
        held += moved.low <= gap(ours) - gap(theirs) <= moved.high
    assert held >= 52 # of 60; 95 % are 57


@pytest.mark.parametrize("metric", ["demographic_parity_difference", "equalized_odds_difference", "equal_opportunity_ratio", "accuracy_group_min", "precision_difference", "false_positive_rate_group_max", "accuracy_to_overall_ratio"])
def test_a_difference_of_gaps_is_that_of_two_reports(metric):
    by, y, ours, theirs = of_two(np.random.default_rng(3), (.3, .5, .6), (.35, .45, .6))
    [moved] = gap_differences(by, y, ours, theirs, {"it": (metric, ["g"])}).values()
    a, b = (gaps(count(by, y, d), rates_named([metric]))[metric].value for d in (ours, theirs))
    assert moved.value == pytest.approx(a - b) and moved.low <= moved.value <= moved.high
    same = gap_differences(by, y, ours, ours, {"it": (metric, ["g"])})["it"]
    assert (same.low, same.value) == (pytest.approx(same.low), 0) and same.low <= 0 <= same.high


def test_pairing_narrows_the_interval_of_a_gap():
    widths = [(m := gap_differences(*of_two(np.random.default_rng(0), (.3, .6), (.35, .6), alike=a), {"it": ("selection_rate_difference", ["g"])})["it"]).high - m.low for a in (0.0, 0.95)]
    assert widths[1] < widths[0] / 2


def test_a_gap_without_a_sound_interval_has_none():
    by, y, ours, theirs = of_two(np.random.default_rng(3), (.3, .5), (.35, .45), rows=200)
    assert gap_differences(by, y, ours, theirs, {"it": ("equalized_odds_mean_difference", ["g"])}) == {} == gap_differences(by, y, ours, theirs, {"it": ("selection_rate_difference", ["g"])}, least=150)
    assert np.isnan(largest_moved(np.array([np.nan]), np.zeros(1), np.zeros((9, 1)), np.zeros((9, 1))).value)


def test_gaps_of_terms_have_intervals_that_hold_the_truth():
    rng, held, moved = np.random.default_rng(0), 0, 0
    for seed in range(100):
        group = rng.integers(0, 3, 900)
        by, true = pl.DataFrame({"g": group.astype(str)}), rng.normal(0, 1, 900)
        noise = rng.normal(0, 1, 900)
        ours, theirs = (number_terms(true, true + noise + np.array(s)[group]) for s in ((0, .2, .5), (0, .1, .3)))
        found = gap_report(by, ours, draws=200, seed=seed).measures["bias_difference[g]"]
        held += found.low <= 0.5 <= found.high
        d = term_differences(by, ours, theirs, {"it": ("bias_difference", ["g"])}, draws=200, seed=seed)["it"]
        moved += d.low <= 0.2 <= d.high
    assert held >= 88 and moved >= 88 # of 100; 95 are expected, or more where groups are nearly level


def test_gaps_of_two_classes_are_those_of_decisions():
    by, y, ours, _ = of_two(np.random.default_rng(3), (.3, .5, .6), (.3, .5, .6))
    a, b = gap_report(by, class_terms(y, ours, 2)).measures["demographic_parity_difference[g]"], fairness_report(count(by, y, ours)).measures["demographic_parity_difference[g]"]
    assert a.value == pytest.approx(b.value) and (a.low, a.high) == pytest.approx((b.low, b.high), abs=0.02)


# Judging

def test_certain_asks_the_whole_interval_of_a_difference():
    rule, sure = Rule(metric="recall", within=0.05), Rule(metric="recall", within=0.05, certain=True)
    near, clear = {"recall": Measure(-0.03, -0.07, 0.01)}, {"recall": Measure(-0.03, -0.04, -0.02)}
    verdict = judge({"recall": 0.8}, [rule, sure], {"recall": 0.83}, near)
    assert [f.passed for f in verdict.findings] == [True, False] and all("[-0.07, +0.01]" in f.why and "4 times as many" in f.why for f in verdict.findings)
    assert all(f.passed and "cannot tell" not in f.why for f in judge({"recall": 0.8}, [rule, sure], {"recall": 0.83}, clear).findings)
    assert "without a known interval" in judge({"recall": 0.8}, [sure], {"recall": 0.83}).findings[0].why


def test_a_rule_of_every_group_names_the_worst_one():
    groups = {"sex=f": wilson(60, 100), "sex=m": wilson(90, 100), "sex=x": Measure(float("nan"))}
    kept, broken, sure = judge({"recall[sex]": groups}, [Rule(metric="recall", by=("sex",), **p) for p in ({"at_least": 0.5}, {"at_least": 0.7}, {"at_least": 0.55, "certain": True})]).findings
    assert kept.passed and "sex=f" in kept.why and "all 2 groups" in kept.why and "1 more with too few rows" in kept.why
    assert not broken.passed and broken.value == 0.6 and "sex=f (0.6000 [0.50" in broken.why and "1 of 2 groups" in broken.why
    assert not sure.passed
    most = judge({"false_positive_rate[sex]": groups}, [Rule(metric="false_positive_rate", by=("sex",), at_most=0.8)]).findings[0]
    assert not most.passed and "sex=m" in most.why
    none = judge({"recall[sex]": {"sex=x": Measure(float("nan"))}}, [Rule(metric="recall", by=("sex",), at_least=0)]).findings[0]
    assert not none.passed and none.value is None and "enough rows" in none.why
    assert "Did you mean 'recall[sex]'" in judge({"recall[sex]": groups}, [Rule(metric="recal", by=("sex",), at_least=0)]).findings[0].why


def test_a_group_is_held_against_the_same_group_of_production():
    rule = Rule(metric="recall", by=("sex",), within=0.02)
    now, before = {"sex=f": Measure(0.7), "sex=m": Measure(0.9)}, {"sex=f": Measure(0.8), "sex=m": Measure(0.5)}
    [finding] = judge({"recall[sex]": now}, [rule], {"recall[sex]": before}, {"recall[sex]": {"sex=f": Measure(-0.1, -0.15, -0.05)}}).findings
    assert not finding.passed and finding.value == 0.7 and "production has 0.8" in finding.why and "[-0.15, -0.05]" in finding.why
    assert judge({"recall[sex]": now}, [rule]).passed, "nothing is in production"
    assert not judge({"recall[sex]": now}, [rule], {}).passed, "production has no such measure"


@pytest.mark.parametrize("metric", ["moved_share", "invalid_share", "duplicate_share", "population_stability_index[age]", "single_feature_roc_auc"])
def test_what_is_measured_of_rows_is_not_held_against_production(metric):
    text = "name: a\ndata: {train: {call: mlray.samples:diabetes}}\ncontract: {age: {type: number}, y: {type: category, values: [a, b], positive: b, role: target}}\ngates: {data: [{metric: '%s', %s}]}"
    with pytest.raises(SpecError, match="of rows and not of models"): parse_spec(text % (metric, "within: 0.1"))
    assert parse_spec(text % (metric, "at_most: 0.1")).gates


# From a spec to the page

@pytest.fixture(scope="module")
def beside(trained, tmp_path_factory):
    "The shipped model in production, and a candidate of one epoch whose spec holds it against production in every way."
    home = tmp_path_factory.mktemp("beside") / "home"
    shutil.copytree(trained[0].home, home)
    settings, first = trained[0].model_copy(update={"home": home}), trained[1]
    registry = open_registry(settings)
    registry.policy = Policy(gates=())
    promote(registry, first.version)
    rules = [Rule(metric="roc_auc", within=0.5), Rule(metric="precision", within=0.5, certain=True), Rule(metric="recall", by=("sex",), at_least=0.0, within=1.0), Rule(metric="roc_auc", by=("sex",), at_least=0.0, within=1.0),
             Rule(metric="demographic_parity_difference", by=("sex",), within=1.0, certain=True), Rule(metric="accuracy_to_overall_difference", by=("age", "sex"), at_most=1.0), Rule(metric="flip_rate", within=1.0),
             Rule(metric="specificity", by=("age", "sex"), at_least=0.0, certain=True), Rule(metric="personal_columns", at_most=100, certain=True)]
    spec = first_spec(settings, first).model_copy(update={"gates": {"quality": tuple(rules)}})
    spec = spec.model_copy(update={"train": spec.train.model_copy(update={"epochs": 3})})
    return settings, first, train(spec, settings)


def first_spec(settings, run): return bundle_of(open_registry(settings), run.version).spec


def test_every_rule_against_production_has_its_interval(beside):
    _, _, run = beside
    assert run.verdict.passed, run.verdict.table()
    why = {(f.measure, f.rule): f.why for f in run.verdict.findings}
    for (measure, rule), said in why.items():
        if "production" in rule and measure != "flip_rate": assert "a difference of" in said and "[" in said.partition("a difference of")[2], (measure, said)
    assert "production has" in why["flip_rate", "no more than 1 worse than production"]
    told = json.loads(json.dumps(run.as_dict(), allow_nan=False))
    assert told["comparison"]["roc_auc"]["difference"]["low"] is not None and told["measures"]["demographic_parity_difference[sex]"]["low"] is not None
    assert "Two models on the same" in run._repr_markdown_()


def test_the_gate_judges_as_the_run_did_and_shows_the_comparison(beside):
    settings, _, run = beside
    [done] = run_gates(open_registry(settings), run.version, ["quality"], settings)
    assert not done.broken, done.broken
    assert done.verdict == run.verdict and b"Two models on the same" in done.page and b"svg" in done.page


def test_another_question_is_not_compared(beside):
    settings, _, run = beside
    bundle = bundle_of(open_registry(settings), run.version)
    other = replace(bundle, task=replace(bundle.task, names=("well", "worse")))
    assert evaluate_beside(bundle, other, run.rows.parts.test).comparison is None
    same = evaluate_beside(bundle, bundle, run.rows.parts.test)
    assert same.comparison and all(d.difference.value == 0 for d in same.comparison.overall.values() if d.difference.value == d.difference.value)
    assert evaluate_beside(bundle, None, run.rows.parts.test).comparison is None


def test_answers_are_not_kept(beside):
    _, _, run = beside
    assert len(pickle.dumps(run.comparison)) < 20_000


def test_a_version_with_fewer_columns_is_judged_without_production(tmp_path):
    "Production asks for a column that is gone: the run goes on, says so, and a promise to be no worse than production is not kept; a column that is ignored lets both answer."
    import yaml

    from mlray.governance.registry import add_evidence
    from mlray.running.tracking import MemoryTracker
    from mlray.values.settings import Settings, shipped
    settings = Settings(root=tmp_path, home=tmp_path / "home", tracking="disabled")
    tree = yaml.safe_load((shipped("configs") / "diabetes.yaml").read_text()) | {"gates": {"quality": [{"metric": "roc_auc", "at_least": 0.1, "within": 1.0}]}}
    tree["train"] = tree.get("train", {}) | {"epochs": 1}
    first, registry = train(parse_spec(yaml.safe_dump(tree)), settings), open_registry(settings)
    for gate in registry.policy.gates: add_evidence(registry, first.version, gate, judge({"roc_auc": 0.8}, [Rule(metric="roc_auc", at_least=0.5)]), b"{}")
    promote(registry, first.version)
    glucose = tree["contract"].pop("glucose")
    fewer = train(parse_spec(yaml.safe_dump(tree)), settings, tracker=(heard := MemoryTracker()))
    assert fewer.comparison is None and not fewer.verdict.passed and "production has no such measure" in fewer.verdict.findings[0].why
    assert any("no comparison with production, which asks for glucose" in note for note in heard.notes)
    kept = train(parse_spec(yaml.safe_dump(tree | {"contract": tree["contract"] | {"glucose": glucose | {"role": "ignored"}}})), settings)
    assert kept.comparison is not None and kept.verdict.passed and "glucose" not in bundle_of(registry, kept.version).contract.features
