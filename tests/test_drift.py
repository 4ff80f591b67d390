"""Drift, estimates and leakage: every kind of window has a defined answer, intervals cover, size alone decides nothing, and a run says what has moved before it trains."""
import json
import math
import shutil

import numpy as np
import polars as pl
import pytest
import scipy.stats
from hypothesis import given, settings as hypothesis_settings, strategies as st

from mlray.engines.gate_on_papermill import run_gates
from mlray.governance.registry import bundle_of, open_registry
from mlray.judgement.drift import distances, drift_report, kolmogorov_smirnov, kolmogorov_smirnov_bound, p_values, population_stability_index
from mlray.judgement.estimate import estimate, two_sample_auc
from mlray.judgement.gate import judge
from mlray.judgement.leakage import leakage_report
from mlray.learning.contract import Contract
from mlray.learning.profile import Profile, count_numbers, count_values, profile
from mlray.running.run import train
from mlray.running.tracking import MemoryTracker
from mlray.shipping.bundle import load_bundle
from mlray.values.column import Column
from mlray.values.errors import BundleError, DataError
from mlray.values.spec import Rule

NUMBER, WORD = Contract({"c": Column(type="number", nullable=True)}), Contract({"c": Column(type="category", nullable=True)})


def report(contract: Contract, old: list, new: list):
    frame = lambda values: pl.DataFrame({"c": pl.Series(values, dtype=pl.Float64 if contract is NUMBER else pl.String)})
    reference = profile(contract, frame(old))
    json.dumps(reference.as_dict(), allow_nan=False)
    found = drift_report(reference, profile(contract, frame(new), reference))
    json.dumps(found.as_dict(), allow_nan=False)
    return found


@pytest.mark.parametrize(("contract", "old", "new", "moved", "index"), [
    (NUMBER, [1, 2, 3] * 100, [], 0, math.nan), (NUMBER, [], [1, 2], 0, math.nan), (NUMBER, [5] * 100, [5] * 50, 0, 0), (NUMBER, [5] * 100, [6] * 50, 1, None), (NUMBER, [1, 2, 3] * 100, [2], 0, None),
    (NUMBER, [1, 2, 3] * 100, [None] * 90, 1, math.nan), (NUMBER, [None] * 100, [1, 2] * 50, 1, math.nan), (NUMBER, [1, 2, 3] * 100, [math.nan, math.inf] * 50, 1, math.nan), (NUMBER, [None] * 9, [None] * 9, 0, 0),
    (WORD, ["a", "b"] * 100, [], 0, math.nan), (WORD, ["a"] * 100, ["a"] * 50, 0, 0), (WORD, ["a"] * 100, ["b"] * 50, 1, None), (WORD, ["a", "b"] * 100, ["a"], 0, None),
    (WORD, ["a", "b"] * 100, ["a", "b", "new"] * 40, 1, None), (WORD, [f"old {i}" for i in range(5000)], [f"new {i}" for i in range(3000)], 0, 0), (WORD, ["a"] * 100, [None] * 100, 1, math.nan),
], ids=["empty window", "empty reference", "constant", "constant, another", "one row", "all missing", "missing before", "not finite", "never known",
        "no words", "one word", "another word", "one row of words", "unseen word", "identifiers", "words missing"])
def test_every_window_has_an_answer(contract, old, new, moved, index):
    found = report(contract, old, new)
    assert len(found.moved) == moved
    measured = found.values["population_stability_index[c]"]
    assert index is None or (math.isnan(measured) if math.isnan(index) else measured == pytest.approx(index, abs=1e-9))
    empty = not old or not new
    assert math.isnan(found.values["moved_share"]) == empty
    assert judge(found.values, [Rule(metric="moved_share", at_most=0)]).passed == (not empty and not moved), "an empty window passes no gate"


def test_ten_thousand_categories_are_neither_moved_by_chance_nor_blind():
    rng = np.random.default_rng(0)
    words = lambda high, rows: [f"v{i}" for i in rng.integers(0, high, rows)]
    old = words(10_000, 200_000)
    assert not report(WORD, old, words(10_000, 20_000)).moved, "the values that happened to be frequent are not the frequent ones"
    assert not report(WORD, [str(v) for v in rng.zipf(1.3, 1000)], [str(v) for v in rng.zipf(1.3, 1000)]).moved
    [shift] = report(WORD, old, words(10_000, 10_000) + ["v7"] * 10_000).columns
    assert shift.moved
    assert len(json.dumps(profile(WORD, pl.DataFrame({"c": old})).as_dict())) < 100_000, "a profile stays small"


def test_size_alone_decides_nothing():
    rng = np.random.default_rng(0)
    far, near = rng.normal(2, 1, 1_000_000), rng.normal(0.02, 1, 1_000_000)
    old = rng.normal(0, 1, 1_000_000)
    [hair] = report(NUMBER, old, near).columns
    assert hair.p_value < 1e-9 and not hair.moved, "significant, and not far"
    assert not report(NUMBER, old, [0.9, -0.8]).moved, "far, and not sure"
    assert report(NUMBER, old, far[:30]).moved, "far and sure"


def test_a_few_values_that_went_very_far_are_seen():
    rng = np.random.default_rng(0)
    new = rng.normal(0, 1, 20_000)
    new[:500] *= 1000
    [shift] = report(NUMBER, rng.normal(0, 1, 20_000), new).columns
    assert shift.moved and shift.distances["population_stability_index"].value < 0.25 and shift.distances["wasserstein_distance"].value > 0.3 and "outside" in shift.what


def test_nothing_moved_is_rarely_called_moved_and_real_movement_is():
    contract = Contract({f"x{i}": Column(type="number") for i in range(40)})
    frame = lambda seed, by: pl.DataFrame({f"x{i}": np.random.default_rng([seed, i]).normal(by * (i < 5), 1, 300) for i in range(40)})
    alarms = 0
    for seed in range(20):
        reference = profile(contract, frame(seed, 0))
        alarms += bool(drift_report(reference, profile(contract, frame(seed + 100, 0), reference), draws=0).moved)
    moved = {s.column for s in drift_report(reference, profile(contract, frame(999, 0.8), reference), draws=0).moved}
    assert alarms <= 3 and {f"x{i}" for i in range(5)} <= moved


def test_intervals_cover_the_true_distance():
    "Known shares on both sides; the 95 % interval of drawn counts holds the true index at least nine times in ten."
    p, q = np.array([0.4, 0.3, 0.2, 0.1]), np.array([0.25, 0.25, 0.3, 0.2])
    truth, hits, rng = float(population_stability_index(p * 1e9, q * 1e9)), 0, np.random.default_rng(0)
    words = lambda shares: count_values(pl.Series(rng.choice(list("abcd"), 1500, p=shares)), "abcd")
    for seed in range(200):
        found = distances(words(p), words(q), seed=seed)["population_stability_index"]
        hits += found.low <= truth <= found.high
    assert hits >= 180


values = st.lists(st.floats(-3, 3) | st.integers(-2, 2), min_size=1, max_size=200)


@hypothesis_settings(max_examples=80, deadline=None)
@given(old=values, new=values)
def test_the_rows_lie_between_the_cells_and_their_bound(old, new):
    first = count_numbers(pl.Series(old, dtype=pl.Float64, strict=False))
    second = count_numbers(pl.Series(new, dtype=pl.Float64, strict=False), first.bins)
    e, a = np.array(first.counts), np.array(second.counts)
    rows = scipy.stats.ks_2samp(old, new, method="asymp")
    assert kolmogorov_smirnov(e, a) - 1e-12 <= rows.statistic <= kolmogorov_smirnov_bound(e, a) + 1e-12
    assert math.isnan(rows.pvalue) or p_values(first, second)["values"] >= rows.pvalue - 1e-9, "cells never make anything look surer than rows do"


def test_a_report_names_what_cannot_be_compared(tmp_path):
    both = Contract({"a": Column(type="number"), "b": Column(type="category"), "t": Column(type="boolean", role="target")})
    other = Contract({"a": Column(type="category"), "z": Column(type="number"), "t": Column(type="boolean", role="target")})
    reference = profile(both, pl.DataFrame({"a": [1.0, 2.0], "b": ["x", "y"], "t": [True, False]}))
    found = drift_report(reference, profile(other, pl.DataFrame({"a": ["x"], "z": [1.0], "t": [True]}), reference))
    assert found.unmatched == ("a", "b", "z") and [s.column for s in found.columns] == ["t"] and "not compared: a, b, z" in found.sentence
    with pytest.raises(DataError, match="no column 'a'"): profile(both, pl.DataFrame({"b": ["x"]}))
    with pytest.raises(DataError, match="in one of them alone"): reference + profile(other, pl.DataFrame({"a": ["x"], "z": [1.0], "t": [True]}))
    unlabelled = profile(both, pl.DataFrame({"a": [1.0], "b": ["x"]}), reference, also={"score": pl.Series([0.7])})
    assert set(unlabelled.columns) == {"a", "b", "score"}


def test_importing_drift_loads_neither_scipy_nor_scikit_learn():
    from tests.test_floors import loaded_after
    assert not {"scipy", "sklearn"} & loaded_after("import mlray.shipping.bundle, mlray.judgement.drift, mlray.judgement.estimate, mlray.judgement.leakage")


def test_the_expected_area_under_the_curve_is_the_mean_over_all_labels():
    scores = np.array([0.1, 0.4, 0.4, 0.9])
    good = pairs = 0.0
    for bits in range(16):
        y = [(bits >> i) & 1 for i in range(4)]
        weight = math.prod(s if b else 1 - s for s, b in zip(scores, y, strict=True))
        for i in range(4):
            for j in range(4):
                if y[i] and not y[j]:
                    pairs += weight
                    good += weight * ((scores[i] > scores[j]) + 0.5 * (scores[i] == scores[j]))
    assert estimate(scores, scores > 0.3).overall["estimated_roc_auc"].value == pytest.approx(good / pairs, abs=1e-12)
    assert estimate(scores, scores > 0.3).overall["estimated_accuracy"].value == pytest.approx((0.9 + 0.4 + 0.4 + 0.9) / 4)
    for few in (np.array([]), np.array([0.5]), np.zeros(3)): assert estimate(few, few > 0.5).rows == len(few)


def test_estimates_cover_what_labels_will_say():
    rng, hits = np.random.default_rng(0), 0
    for seed in range(60):
        scores = rng.beta(0.8, 1.5, 800)
        truth = rng.random(800) < scores
        found = estimate(scores, scores >= 0.5, seed=seed).overall["estimated_accuracy"]
        hits += found.low <= ((scores >= 0.5) == truth).mean() <= found.high
    assert hits >= 52


def test_two_samples_of_too_few_rows_have_no_answer():
    frame = pl.DataFrame({"c": [1.0, 2.0, None]})
    assert math.isnan(two_sample_auc(NUMBER, frame, frame).value)


def test_a_bundle_keeps_what_it_has_learned_from(trained, tmp_path):
    settings, run = trained
    bundle = bundle_of(open_registry(settings), run.version)
    assert bundle.profile == profile(run.rows.contract, run.rows.parts.train) and bundle.profile.rows == run.rows.parts.train.height
    copy = shutil.copytree(bundle.path, tmp_path / "copy")
    (copy / "profile.json").chmod(0o644)
    (copy / "profile.json").write_text(json.dumps(Profile(0, {}).as_dict()))
    with pytest.raises(BundleError, match=r"profile.json is not the file"): load_bundle(copy)


class Order(MemoryTracker):
    "Remembers how many epochs came before each note."
    def note(self, text: str) -> None: super().note(f"{len(self.logged)} {text}")


def moved_rows(spec, path, **changes):
    from mlray.samples import diabetes
    diabetes().with_columns(**changes).write_parquet(path)
    return spec.model_copy(update={"data": spec.data.model_copy(update={"train": spec.data.train.model_copy(update={"call": None, "file": str(path)})})})


@pytest.fixture
def home(trained, tmp_path):
    "The trained version, in a place of its own."
    shutil.copytree(trained[0].home, tmp_path / "home")
    return trained[0].model_copy(update={"root": tmp_path, "home": tmp_path / "home"})


def test_a_run_says_what_has_moved_before_it_trains(trained, diabetes, home, tmp_path):
    assert trained[1].drift is None and trained[1].as_dict()["drift"] is None, "the first version has nothing to compare with"
    tracker = Order()
    run = train(moved_rows(diabetes, tmp_path / "new.parquet", glucose=pl.col("glucose") + 40), home, tracker=tracker)
    [said] = [n for n in tracker.notes if "compared with" in n]
    assert said.startswith("0 compared with the training rows of diabetes/1: 1 of 11 columns has moved: glucose (mean ≈ ") and len(tracker.logged) > 0
    assert [s.column for s in run.drift.moved] == ["glucose"] and list(run.as_dict()["drift"]["moved"]) == ["glucose"]
    json.dumps(run.as_dict(), allow_nan=False)


def test_a_damaged_last_version_is_named_and_does_not_stop_the_next(trained, diabetes, home):
    path = open_registry(home).store.path(trained[1].version.digest) / "profile.json"
    path.parent.chmod(0o755), path.chmod(0o644)
    path.write_text("{}")
    tracker = Order()
    other = diabetes.model_copy(update={"train": diabetes.train.model_copy(update={"seed": 5, "epochs": 2})})
    assert train(other, home, tracker=tracker).drift is None
    assert any("no comparison with the rows of diabetes/1" in n for n in tracker.notes)


def test_the_data_gate_judges_as_the_run_does(diabetes, home, tmp_path):
    registry = open_registry(home)
    [gate] = run_gates(registry, train(diabetes, home).version, ["data"], home)
    assert not gate.broken and gate.verdict.passed and [f.measure for f in gate.verdict.findings] == ["invalid_share", "moved_share", "duplicate_share", "single_feature_roc_auc"]
    leaking = moved_rows(diabetes, tmp_path / "leak.parquet", glucose=30 + pl.col("progression"))
    leaking = leaking.model_copy(update={"gates": {"data": (Rule(metric="single_feature_roc_auc", at_most=0.995), Rule(metric="population_stability_index[bmi]", at_most=0.25))}})
    run = train(leaking, home)
    [gate] = run_gates(registry, run.version, ["data"], home)
    assert gate.verdict == run.verdict and not gate.broken, "the gate and the run judge the same"
    assert [f.passed for f in gate.verdict.findings] == [False, True]


def test_an_identifier_is_no_leak_and_a_hidden_label_is():
    contract = Contract({"id": Column(type="category"), "code": Column(type="category"), "gap": Column(type="number", nullable=True), "t": Column(type="boolean", role="target")})
    rng = np.random.default_rng(0)

    def rows(seed, n):
        t = rng.random(n) < 0.5
        return pl.DataFrame({"id": [f"{seed}/{i}" for i in range(n)], "code": np.where(t, "x", "y"), "gap": pl.Series(rng.normal(size=n)).set(pl.Series(t), None), "t": t})
    found = leakage_report(contract, rows(0, 500), rows(1, 300))
    assert found.values["single_feature_roc_auc[code]"] == 1 and found.values["single_feature_roc_auc[gap]"] == 1, "that a value is missing can be the leak"
    assert found.values["single_feature_roc_auc[id]"] == 0.5 and found.values["duplicate_share"] == 0


@hypothesis_settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=2, max_size=12), st.lists(st.integers(0, 40), min_size=2, max_size=12), st.booleans(), st.integers(0, 1000))
def test_a_distance_lies_in_its_interval(old, new, numeric, seed):
    column = Column(type="number") if numeric else Column(type="category")
    contract = Contract({"x": column})
    rows = lambda values: pl.DataFrame({"x": [v * 1.0 if numeric else str(v) for v in values]})
    reference = profile(contract, rows(old))
    for name, found in distances(reference.columns["x"], profile(contract, rows(new), reference).columns["x"], seed=seed).items(): assert 0 <= found.low <= found.value <= found.high, name


@hypothesis_settings(max_examples=100, deadline=None)
@given(st.integers(0, 5000), st.integers(1, 5000), st.integers(0, 30), st.integers(1, 30))
def test_few_are_tested_as_fisher_does(n, m, first, second):
    from scipy.stats import fisher_exact

    from mlray.judgement.drift import _fisher
    rows = np.array([[min(first, n), n - min(first, n)], [min(second, m), m - min(second, m)]])
    assert _fisher(rows) == pytest.approx(fisher_exact(rows).pvalue, abs=1e-9)
