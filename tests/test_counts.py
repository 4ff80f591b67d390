"""Counts stand for the rows: every metric is fairlearn's or scikit-learn's for any division of the rows, intervals cover, and bad input has a defined answer."""
import math
import warnings
from itertools import combinations

import numpy as np
import polars as pl
import pytest
from fairlearn import metrics as fl
from hypothesis import given, settings, strategies as st
from scipy.stats import binom
from sklearn import metrics as sk

from mlray.judgement.gate import less_is_better
from mlray.measures.comparison import compare, mcnemar, paired_mean, paired_proportion, paired_roc_auc
from mlray.measures.counts import Counts, binned, confusion, count, count_rows, groups_of, largest_slices, merged, suppress, tabulated
from mlray.measures.fairness import JUDGED, fairness_report, gaps, rates_named
from mlray.measures.intervals import bootstrap, in_pairs, largest
from mlray.measures.moments import count_errors, count_numbers, means, quantile, regression, scorecard_of_errors
from mlray.measures.ranking import average_precision, expected_calibration_error, lift, roc_auc
from mlray.measures.rates import RATES, class_rates
from mlray.measures.score import scorecard, wilson_intervals
from mlray.measures.score_of_classes import class_measures, classes_scorecard, label_measures
from mlray.measures.score_of_counts import scorecard_of_counts
from mlray.measures.slices import conditions, worst_slices
from mlray.values.errors import DataError

# ---- counts are the rows ----------------------------------------------------------------------------------------------

GRID = 16 # scores stand on the edges of as many bins, so that bins hide nothing
row = st.tuples(st.sampled_from(["a", "b", "ß"]), st.sampled_from(["x", "y"]), st.booleans(), st.booleans(), st.integers(0, GRID - 1), st.sampled_from([0.25, 1.0, 3.0]))
whole = [(g, h, y, d, 3, 1.0) for g in ("a", "b", "ß") for h in ("x", "y") for y in (False, True) for d in (False, True)] # every group has both labels and decisions
tables = st.lists(row, max_size=50).map(lambda rows: pl.DataFrame(rows + whole, schema={"g": pl.String, "h": pl.String, "label": pl.Boolean, "decision": pl.Boolean, "score": pl.Float64, "w": pl.Float64}, orient="row").with_columns(pl.col("score") / GRID))
parts_of = st.lists(st.integers(0, 4), min_size=74, max_size=74)


def in_parts(frame, part, **how):
    at = pl.Series(part[:frame.height])
    return merged(count_rows(frame.filter(at == i).lazy(), ["g", "h"], score="score", bins=GRID, **how) for i in range(5))


FAIRLEARN = {"accuracy": sk.accuracy_score, "zero_one_loss": sk.zero_one_loss, "precision": sk.precision_score, "recall": sk.recall_score, "f1": sk.f1_score, "balanced_accuracy": sk.balanced_accuracy_score,
             "matthews_corrcoef": sk.matthews_corrcoef, "selection_rate": fl.selection_rate, "true_positive_rate": fl.true_positive_rate, "false_positive_rate": fl.false_positive_rate,
             "true_negative_rate": fl.true_negative_rate, "false_negative_rate": fl.false_negative_rate}


@settings(max_examples=25, deadline=None)
@given(tables, parts_of, st.booleans())
def test_every_group_metric_is_fairlearns(frame, part, weighted):
    counts = in_parts(frame, part, weight="w" if weighted else None)
    given_ = {"sample_weight": frame["w"].to_numpy()} if weighted else {}
    wide = frame.to_dict(as_series=False)
    args = dict(y_true=wide["label"], y_pred=wide["decision"], sample_params={n: given_ for n in FAIRLEARN})
    for columns, theirs in {("g",): fl.MetricFrame(metrics=FAIRLEARN, sensitive_features={"g": wide["g"]}, **args),
                            ("g", "h"): fl.MetricFrame(metrics=FAIRLEARN, sensitive_features={"g": wide["g"], "h": wide["h"]}, **args)}.items():
        division = counts.by(columns)
        ours = gaps(division, list(FAIRLEARN))
        for name in FAIRLEARN:
            by_group = theirs.by_group[name].to_dict()
            for group, value in zip(groups_of(division), RATES[name](confusion(division)), strict=True):
                assert abs(value - by_group[group if len(columns) > 1 else group[0]]) < 1e-12, (name, group)
            same = lambda a, b, what: pytest.approx(float(b), abs=1e-12, nan_ok=True) == a or pytest.fail(f"{what}: {a} and {b}")
            same(ours[f"{name}_difference"].value, theirs.difference()[name], name)
            same(ours[f"{name}_to_overall_difference"].value, theirs.difference(method="to_overall")[name], name)
            same(ours[f"{name}_group_min"].value, theirs.group_min()[name], name)
            same(ours[f"{name}_group_max"].value, theirs.group_max()[name], name)
            if name != "matthews_corrcoef":
                same(ours[f"{name}_ratio"].value, theirs.ratio()[name], name)
                same(ours[f"{name}_to_overall_ratio"].value, theirs.ratio(method="to_overall")[name], name)
        assert RATES["accuracy"](confusion(counts.by(())))[0] == pytest.approx(theirs.overall["accuracy"], abs=1e-12)


@settings(max_examples=25, deadline=None)
@given(tables, parts_of)
def test_named_metrics_are_fairlearns_with_either_method_and_aggregate(frame, part):
    ours, wide = gaps(in_parts(frame, part, weight="w").by(["g"])), frame.to_dict(as_series=False)
    for name in ("demographic_parity", "equal_opportunity", "equalized_odds"):
        for form in ("difference", "ratio"):
            for method in ("between_groups", "to_overall"):
                for agg in ("worst_case", "mean")[:1 + (name == "equalized_odds")]:
                    theirs = getattr(fl, f"{name}_{form}")(wide["label"], wide["decision"], sensitive_features=wide["g"], sample_weight=wide["w"], method=method, **({"agg": agg} if name == "equalized_odds" else {}))
                    assert abs(ours[f"{name}{'_mean' * (agg == 'mean')}{'_to_overall' * (method == 'to_overall')}_{form}"].value - theirs) < 1e-12, (name, form, method, agg)


@settings(max_examples=20, deadline=None)
@given(tables, parts_of)
def test_control_features_are_fairlearns(frame, part):
    report, wide = fairness_report(in_parts(frame, part), 1, control=["h"], draws=0), frame.to_dict(as_series=False)
    theirs = fl.MetricFrame(metrics={n: FAIRLEARN[n] for n in JUDGED}, y_true=wide["label"], y_pred=wide["decision"], sensitive_features=wide["g"], control_features={"h": wide["h"]})
    for level in ("x", "y"):
        for name in JUDGED:
            assert report.values[f"{name}_difference[g|h={level}]"] == pytest.approx(theirs.difference()[name][level], abs=1e-12)
            assert report.values[f"{name}_to_overall_ratio[g|h={level}]"] == pytest.approx(theirs.ratio(method="to_overall")[name][level], abs=1e-12)


@settings(max_examples=25, deadline=None)
@given(tables, parts_of, st.booleans())
def test_metrics_of_scores_are_those_of_scikit_learn(frame, part, weighted):
    counts = in_parts(frame, part, weight="w" if weighted else None)
    for group in ("a", "b", "ß"):
        rows = frame.filter(pl.col("g") == group)
        y, p, w = rows["label"].to_numpy(), rows["score"].to_numpy(), rows["w"].to_numpy() if weighted else None
        at = scorecard_of_counts(counts.at("g", group), draws=2).overall
        for name, theirs in (("log_loss", sk.log_loss), ("brier_score_loss", sk.brier_score_loss), ("roc_auc", sk.roc_auc_score), ("average_precision", sk.average_precision_score)):
            assert at[name].value == pytest.approx(theirs(y, p, sample_weight=w), abs=1e-12), name


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.floats(0, 1)), min_size=2, max_size=60), st.sampled_from([10, 40, 1000]))
def test_scores_off_the_grid_lie_between_the_stated_bounds(rows, bins):
    y, p = np.array([r[0] for r in rows] + [True, False]), np.array([r[1] for r in rows] + [0.7, 0.2])
    counts = count(None, y, p >= 0.5, p, bins=bins)
    for bounded, theirs in ((roc_auc(binned(counts)), sk.roc_auc_score(y, p)), (average_precision(binned(counts)), sk.average_precision_score(y, p))):
        assert bounded.least[0] - 1e-12 <= theirs <= bounded.most[0] + 1e-12
    band = np.minimum(np.floor(p * bins) * 10 // bins, 9)
    error = sum(abs(p[band == b].sum() - y[band == b].sum()) for b in range(10)) / len(y)
    assert expected_calibration_error(binned(counts), binned(counts, "score"))[0] == pytest.approx(error, abs=1e-12)
    assert lift(binned(counts), 1.0)[0] == pytest.approx(1)


@settings(max_examples=15, deadline=None)
@given(tables, parts_of)
def test_areas_and_losses_of_groups_are_fairlearns(frame, part):
    ours, wide = gaps(in_parts(frame, part).by(["g"]), ["roc_auc", "log_loss", "brier_score_loss"]), frame.to_dict(as_series=False)
    theirs = fl.MetricFrame(metrics={"roc_auc": sk.roc_auc_score, "log_loss": lambda y, p: sk.log_loss(y, p, labels=[0, 1]), "brier_score_loss": sk.brier_score_loss}, y_true=[int(y) for y in wide["label"]], y_pred=wide["score"], sensitive_features=wide["g"])
    for name in ("roc_auc", "log_loss", "brier_score_loss"):
        for form, value in (("difference", theirs.difference()), ("group_min", theirs.group_min()), ("group_max", theirs.group_max()), ("to_overall_difference", theirs.difference(method="to_overall"))):
            assert ours[f"{name}_{form}"].value == pytest.approx(value[name], abs=1e-12), (name, form)


@settings(max_examples=15, deadline=None)
@given(tables, parts_of)
def test_a_scorecard_of_counts_is_that_of_the_rows(frame, part):
    y, p, d = (frame[c].to_numpy() for c in ("label", "score", "decision"))
    ours, theirs = scorecard_of_counts(in_parts(frame, part), draws=2), scorecard(y.astype(int), p, d, frame.select("g", "h"))
    for name, m in theirs.overall.items():
        assert ours.overall[name].value == pytest.approx(m.value, abs=1e-12), name
        for group in theirs.by_group: assert ours.by_group[group][name].value == pytest.approx(theirs.by_group[group][name].value, abs=1e-12), (group, name)
        if name in ("accuracy", "precision", "recall", "base_rate"): assert (ours.overall[name].low, ours.overall[name].high) == pytest.approx((m.low, m.high), abs=1e-12)


CLASSES = ("cat", "dog", "fish", "newt")


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(CLASSES), st.sampled_from(CLASSES), st.sampled_from([0.5, 2.0])), min_size=1, max_size=40), st.integers(0, 40))
def test_metrics_of_many_classes_are_those_of_scikit_learn(rows, cut):
    y, d, w = (np.array(x) for x in zip(*rows, strict=True))
    parts = [count(None, y[at], d[at], weights=w[at], classes=CLASSES) for at in (slice(cut), slice(cut, None)) if len(y[at])]
    matrix = confusion(merged(parts))[0]
    assert np.allclose(matrix, sk.confusion_matrix(y, d, labels=CLASSES, sample_weight=w))
    ours = class_rates(matrix)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = {"accuracy": sk.accuracy_score(y, d, sample_weight=w), "balanced_accuracy": sk.balanced_accuracy_score(y, d, sample_weight=w), "matthews_corrcoef": sk.matthews_corrcoef(y, d, sample_weight=w)}
        for name, theirs in (("precision", sk.precision_score), ("recall", sk.recall_score), ("f1", sk.f1_score)):
            for average in ("macro", "micro"): expected[f"{name}_{average}"] = theirs(y, d, average=average, sample_weight=w, zero_division=np.nan)
    for name, value in expected.items(): assert ours[name] == pytest.approx(value, abs=1e-12, nan_ok=True), name
    against = merged(parts).against_all("dog")
    assert RATES["recall"](confusion(against))[0] == pytest.approx(sk.recall_score(y == "dog", d == "dog", sample_weight=w, zero_division=np.nan), abs=1e-12, nan_ok=True)


def test_a_folder_is_counted_as_its_rows(tmp_path):
    rng = np.random.default_rng(0)
    frame = pl.DataFrame({"g": rng.choice(np.array(["a", "b", None]), 30_000).tolist(), "label": rng.random(30_000) < 0.3, "decision": rng.random(30_000) < 0.4, "score": rng.random(30_000, dtype=np.float32)})
    for i in range(3): frame[i * 10_000:(i + 1) * 10_000].write_parquet(tmp_path / f"{i}.parquet")
    lazy, direct = count_rows(pl.scan_parquet(tmp_path / "*.parquet"), ["g"], score="score"), count_rows(frame, ["g"], score="score")
    assert lazy.rows == 30_000 and [g for (g,) in groups_of(lazy)] == ["a", "b", "missing"]
    assert np.array_equal(binned(lazy), binned(direct)) and np.allclose(binned(lazy, "log_loss"), binned(direct, "log_loss"), rtol=1e-12)


@pytest.mark.ray
@pytest.mark.xdist_group("ray")
def test_blocks_of_ray_data_are_counted_where_they_lie(ray_cluster):
    import ray
    rng = np.random.default_rng(0)
    frame = pl.DataFrame({"g": rng.choice(["a", "b"], 5000), "label": rng.random(5000) < 0.3, "decision": rng.random(5000) < 0.4})
    blocks = ray.data.from_arrow(frame.to_arrow()).repartition(4).map_batches(lambda block: {"counts": [count_rows(pl.from_arrow(block), ["g"])]}, batch_format="pyarrow", batch_size=None)
    parts = [r["counts"] for r in blocks.take_all()]
    assert len(parts) == 4 and merged(parts).cells.equals(count_rows(frame, ["g"]).cells)


# ---- bad input has a defined answer ----------------------------------------------------------------------------------

Y, D, P = np.array([0, 1, 1, 0, 1]), np.array([0, 1, 0, 1, 1]), np.array([0.1, 0.9, 0.4, 0.6, 0.8])


@pytest.mark.parametrize(("change", "says"), [
    ({"labels": np.array([0, 1, 2, 0, 1])}, "1 of 5 rows cannot be counted: their 'the label' is none of 0, 1"), ({"labels": np.array([0, 1, 0.5, 0, np.nan])}, "2 of 5"),
    ({"decisions": np.array(["0", "1", "x", "y", "1"])}, "2 of 5 rows cannot be counted: their 'the decision'"), ({"scores": np.array([0.1, np.nan, 0.4, 1.2, -0.1])}, "3 of 5 rows cannot be counted: their 'the score' is no number in [0, 1]"),
    ({"weights": np.array([1, -1, np.nan, np.inf, 0])}, "3 of 5 rows cannot be counted: their 'the weight'"), ({"weights": np.ones(4)}, "the weight was given for 4 rows"), ({"groups": pl.DataFrame({"g": ["a"]})}, "groups for 1 rows"),
    ({"classes": ("1", "1")}, "named once"), ({"classes": ("0",)}, "two or more"), ({"classes": ("0", "1", "2")}, "two classes"), ({"bins": 0}, "65536"), ({"bins": 70_000}, "65536")])
def test_what_cannot_be_counted_is_refused(change, says):
    with pytest.raises(DataError) as refused: count(**{"groups": None, "labels": Y, "decisions": D, "scores": P, **change})
    assert says in str(refused.value)


def test_names_that_do_not_exist_are_suggested():
    frame = pl.DataFrame({"sex": ["f"], "label": [1], "decision": [1]})
    for call in (lambda: count_rows(frame, ["sx"]), lambda: count_rows(frame, ["sex"]).by(["sx"]), lambda: count_numbers(frame, {"x": pl.col("label")}, ["sx"])):
        with pytest.raises(DataError, match="Did you mean 'sex'"): call()
    with pytest.raises(DataError, match="differ in their slices"): count_rows(frame, ["sex"]) + count_rows(frame)
    with pytest.raises(DataError, match="hold no scores"): binned(count_rows(frame))
    with pytest.raises(DataError, match="Did you mean 'accuracy'"): fairness_report(count_rows(frame, ["sex"]), rates=["acuracy"])


def nothing_wrong(counts):
    "Every face and number can be made, and what does not exist is NaN."
    card, report = scorecard_of_counts(counts, draws=20), fairness_report(counts, draws=20)
    for shown in (counts, card, report): assert isinstance(shown._repr_markdown_(), str)
    for m in [*card.overall.values(), *report.measures.values()]:
        assert math.isnan(m.value) or math.isnan(m.low) or m.low - 1e-12 <= m.value <= m.high + 1e-12
    return card, report


@pytest.mark.parametrize("groups", [["a", "a", "a", "a", "a"], ["a", "b", "b", "b", "b"], [None, "a", None, "a", "a"]])
@pytest.mark.parametrize("labels", [Y, np.zeros(5, int), np.ones(5, int)])
@pytest.mark.parametrize("weights", [None, np.zeros(5), np.array([0, 0, 1, 1, 2.0])])
def test_small_and_empty_groups(groups, labels, weights):
    counts = count(pl.DataFrame({"g": groups, "constant": ["k"] * 5}), labels, D, P, weights)
    card, report = nothing_wrong(counts)
    assert math.isnan(card.overall["roc_auc"].value) == (len(set(labels)) < 2 or (weights is not None and not weights.any()))
    assert math.isnan(report.values["demographic_parity_difference[constant]"]), "one group alone is far from nobody"
    if weights is not None and not weights.any(): assert all(math.isnan(m.value) for m in card.overall.values())
    else: assert card.overall["base_rate"].value == pytest.approx(np.average(labels, weights=weights))


def test_a_rule_may_name_any_rate_and_any_depth():
    metrics = ["precision_group_min", "demographic_parity_ratio", "roc_auc", "false_positive_rate_group_max", "f1_to_overall_difference", "equalized_odds_difference"]
    assert rates_named(metrics) == (*JUDGED, "precision", "f1")
    counts = count(pl.DataFrame({c: ["a", "b", "a", "b", "b"] for c in "xyz"}), Y, D, P)
    report = fairness_report(counts, 1, depth=3, rates=rates_named(metrics), draws=0)
    for metric in metrics[:2] + metrics[3:]: assert f"{metric}[x,y,z]" in report.values
    assert less_is_better("false_positive_rate_group_max[sex]") and less_is_better("accuracy_to_overall_difference") and not less_is_better("precision_group_min") and not less_is_better("selection_rate_ratio")
    assert less_is_better("latency_p95_seconds") and less_is_better("cost_per_1000") and less_is_better("bundle_megabytes") and not less_is_better("revenue")


def test_an_empty_window():
    frame = pl.DataFrame(schema={"g": pl.String, "label": pl.Boolean, "decision": pl.Boolean, "score": pl.Float64})
    counts = count_rows(frame, ["g"], score="score")
    card, report = nothing_wrong(counts)
    assert counts.rows == 0 and all(math.isnan(v) for v in card.values.values()) and all(math.isnan(v) for v in report.values.values())
    assert (counts + counts).rows == 0 and scorecard(np.array([]), np.array([]), np.array([])).rows == 0
    assert math.isnan(quantile(np.array([]), 0.5).value) and worst_slices(pl.DataFrame({"g": pl.Series([], dtype=pl.String)}), np.array([])).found == ()


def test_a_column_of_ten_thousand_groups():
    rng = np.random.default_rng(0)
    groups = pl.DataFrame({"g": np.concatenate([np.arange(10_000).astype(str), rng.choice(50, 20_000).astype(str)])})
    y, p = rng.random(30_000) < 0.4, rng.random(30_000)
    counts = count(groups, y, p > 0.5, p)
    report, card = fairness_report(counts), scorecard_of_counts(counts, draws=20, most_groups=20)
    assert len(report.divisions["g"].groups) == 10_000 and "9960 smaller groups of g not listed" in report._repr_markdown_() and report.measures["accuracy_difference[g]"].value < 0.5
    assert len(card.by_group) == 20 and card.left_out == {"g": 9980} and "9980 smaller groups of g not measured" in card._repr_markdown_()
    assert scorecard(y, p, p > 0.5, groups, most_groups=20).left_out == {"g": 9980}
    assert {g for (g,) in groups_of(largest_slices(counts, 50))} == {str(i) for i in range(50)}
    hidden = suppress(counts, 100)
    assert hidden.suppressed == (9950, 9950) and hidden.rows + 9950 == counts.rows and "9950 slices with 9950 rows suppressed" in hidden._repr_markdown_()
    assert not worst_slices(groups, (y != (p > 0.5)).astype(float)).tested > 100, "values of one row are no conditions"


def test_groups_of_classes_are_bounded_as_those_of_decisions_are():
    truth, groups = np.arange(300) % 3, pl.DataFrame({"count": [str(i) for i in range(150)] * 2}) # a column may be called so, too
    card = classes_scorecard(truth, np.eye(3)[truth], truth, ["a", "b", "c"], groups)
    assert len(card.by_group) == 100 and card.left_out == {"count": 50} and scorecard(truth > 0, truth / 2, truth > 0, groups).left_out == {"count": 50}


def test_a_class_that_was_ruled_out_costs_what_scikit_learn_says():
    truth, scores = np.array([0, 1, 2, 2]), np.array([[0.0, 0.5, 0.5], [0.2, 0.7, 0.1], [0.1, 0.9, 0.0], [0.0, 0.0, 1.0]])
    assert class_measures(truth, scores, scores.argmax(1), ["a", "b", "c"])["log_loss"].value == pytest.approx(sk.log_loss(truth, scores), rel=1e-9)
    labels, said = np.array([[1, 0], [0, 1]]), np.array([[0.0, 0.5], [1.0, 0.5]])
    assert label_measures(labels, said, said > 0.5, ["x", "y"])["log_loss"].value == pytest.approx(np.mean([sk.log_loss(labels[:, i], said[:, i], labels=[0, 1]) for i in (0, 1)]), rel=1e-9)


def test_without_groups_there_is_nothing_to_compare():
    report = fairness_report(count(None, Y, D, P))
    assert report.values == {} and isinstance(report._repr_markdown_(), str)
    with pytest.raises(DataError, match="no rate"): report.chart()
    card = scorecard_of_counts(count(None, Y, D, P), draws=20).plus({"latency_p95_seconds": 0.02})
    assert card.by_group == {} and card.values["latency_p95_seconds"] == 0.02 and "latency_p95_seconds" in card._repr_markdown_()


def test_slices_may_be_called_anything():
    names = ["label", "decision", "bin", "rows", "weight", "score", "slice:g", "at"]
    groups = pl.DataFrame({n: ["a", "b", "a", "b", "b"] for n in names})
    counts = count(groups, Y, D, P)
    assert counts.by(["weight", "rows"]).columns == ("weight", "rows") and len(groups_of(counts)) == 2 and counts.at("score", "a").rows == 2
    assert means(count_numbers(groups.with_columns(x=pl.Series(P)), {"weight": pl.col("x")}, ["rows"]))[("a",)][1]["weight"].value == pytest.approx(0.25)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.text(max_size=3), st.text(max_size=2), st.booleans()), min_size=1, max_size=30))
def test_any_text_is_a_group(rows):
    g, h, y = zip(*rows, strict=True)
    counts = count(pl.DataFrame({"g": g, "h": h}, schema={"g": pl.String, "h": pl.String}), np.array(y), np.array(y))
    for at, group in enumerate(groups_of(counts)): assert confusion(counts, "rows")[at].sum() == sum((a, b) == group for a, b in zip(g, h, strict=True))


def test_numbers_that_are_none_are_refused():
    frame = pl.DataFrame({"label": [1.0, 2.0, None], "prediction": [1.0, float("nan"), 3.0]})
    with pytest.raises(DataError, match="their label is not a finite number"): count_errors(frame)
    with pytest.raises(DataError, match="are not finite"): quantile(np.array([1, np.nan]), 0.5)
    alone = regression(count_errors(pl.DataFrame({"label": [2.0], "prediction": [3.0]})))[()]
    assert alone["mean_squared_error"].value == 1 and math.isnan(alone["r2"].value) and math.isnan(alone["bias"].low)
    constant = regression(count_errors(pl.DataFrame({"label": [2.0, 2.0], "prediction": [3.0, 1.0]})))[()]
    assert math.isnan(constant["r2"].value) and constant["mean_absolute_error"].value == 1
    assert scorecard_of_errors(count_errors(pl.DataFrame(schema={"label": pl.Float64, "prediction": pl.Float64}))).rows == 0


# ---- intervals cover ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("n", [50, 200, 1000])
def test_wilson_covers(n):
    "Exactly, over rates from a tenth to nine tenths."
    k = np.arange(n + 1)
    low, high = wilson_intervals(k / n, np.full(n + 1, n))
    covered = [binom.pmf(k, n, p)[(low <= p) & (p <= high)].sum() for p in np.linspace(0.1, 0.9, 81)]
    assert abs(np.mean(covered) - 0.95) < 0.005 and min(covered) > 0.92


def coverage(truth, draw, times=1500, seed=0):
    rng = np.random.default_rng(seed)
    found = [draw(rng) for _ in range(times)]
    return sum(m.low <= truth <= m.high for m in found) / times


@pytest.mark.parametrize(("name", "how"), [("f1", "multinomial"), ("f1", "poisson"), ("matthews_corrcoef", "multinomial"), ("balanced_accuracy", "multinomial")])
def test_the_bootstrap_covers(name, how):
    shares = np.array([[0.45, 0.1], [0.08, 0.37]])

    def draw(rng):
        seen = rng.multinomial(600, shares.ravel()).reshape(2, 2)
        from mlray.measures.intervals import spread_of
        return spread_of(float(RATES[name](seen.astype(float))), RATES[name](bootstrap(seen, 400, rng, how=how)))
    assert abs(coverage(float(RATES[name](shares)), draw) - 0.95) < 0.02


@pytest.mark.parametrize(("rates", "exact"), [((0.5, 0.6), True), ((0.2, 0.5, 0.5, 0.5, 0.8), True), ((0.5, 0.5), True), ((0.4, 0.5, 0.5, 0.5, 0.6), False), ((0.5,) * 5, False)])
def test_the_interval_of_a_gap_covers(rates, exact):
    "Within two points where the groups farthest apart stand out or all are equal; more often than promised in between, and never less."
    p, n = np.array(rates), 300

    def draw(rng):
        hits = rng.binomial(n, p)
        share = lambda c: c[..., 0] / c.sum(-1)
        seen = np.stack([hits, n - hits], -1)
        return largest(in_pairs(share(seen)), in_pairs(share(bootstrap(seen, 400, rng))))
    found = coverage(p.max() - p.min(), draw, 800)
    assert found > 0.93 and (not exact or found < 0.97)


def test_areas_losses_and_means_cover():
    rng = np.random.default_rng(0)
    shift = 1.2 # of normal scores: the area is Φ(shift / √2)
    area, seen = 0.5 * (1 + math.erf(shift / 2)), []
    for _ in range(400):
        y = rng.random(400) < 0.4
        x = rng.normal(shift * y, 1)
        p = 1 / (1 + np.exp(-(shift * x - shift**2 / 2 + math.log(0.4 / 0.6)))) # the true probability
        card = scorecard_of_counts(count(None, y, p >= 0.5, p), draws=100).overall
        seen.append((card["roc_auc"].low <= area <= card["roc_auc"].high, card["brier_score_loss"].value, card["brier_score_loss"].low, card["brier_score_loss"].high, card["log_loss"].value, card["log_loss"].low, card["log_loss"].high))
    areas, brier, b_low, b_high, loss, l_low, l_high = (np.array(x, float) for x in zip(*seen, strict=True))
    assert abs(areas.mean() - 0.95) < 0.025 # 400 times: one standard error is one point
    for value, low, high in ((brier.mean(), b_low, b_high), (loss.mean(), l_low, l_high)): assert abs(((low <= value) & (value <= high)).mean() - 0.95) < 0.025


def test_quantiles_cover():
    for at in (0.5, 0.95): assert abs(coverage(-math.log(1 - at), lambda rng, at=at: quantile(rng.exponential(size=400), at)) - 0.95) < 0.02


def test_weighted_draws_vary_as_rows_do():
    rng = np.random.default_rng(0)
    y, d, w = rng.integers(0, 2, 400), rng.integers(0, 2, 400), rng.exponential(size=400)
    counts = count(None, y, d, weights=w)
    ours = bootstrap(confusion(counts)[0], 4000, 1, confusion(counts, "weight_squared")[0])
    rows = np.array([np.bincount(2 * y + d, w * rng.poisson(1, 400), 4).reshape(2, 2) for _ in range(4000)])
    assert np.allclose(ours.mean(0), rows.mean(0), rtol=0.02) and np.allclose(ours.std(0), rows.std(0), rtol=0.06)


# ---- two models --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("n", [1, 7, 20])
def test_mcnemar_is_the_sum_over_all_ways_to_fall(n):
    for a in range(n + 1):
        p = binom.pmf(np.arange(n + 1), n, 0.5)
        tail = p[:a].sum() + p[a] / 2
        assert mcnemar(a, n - a) == pytest.approx(min(1, 2 * min(tail, 1 - tail)), abs=1e-12)


def test_equal_models_are_rarely_told_apart():
    rng, told = np.random.default_rng(0), []
    for _ in range(600):
        truth = rng.random(300)
        y = (rng.random(300) < truth).astype(int)
        p, q = (np.clip(truth + rng.normal(0, 0.2, 300), 0, 1) for _ in range(2))
        told.append([paired_proportion((p > 0.5) == y, (q > 0.5) == y).p_value < 0.05, paired_roc_auc(y, p, q).p_value < 0.05, paired_mean((p - y)**2, (q - y)**2).p_value < 0.05])
    assert (np.mean(told, axis=0) < 0.07).all() and (np.mean(told, axis=0) > 0.02).all()


def test_a_model_is_as_good_as_itself_and_bad_input_is_refused():
    same = compare(Y, (P, D), (P, D), pl.DataFrame({"g": ["a", "b", "a", None, "b"]}))
    assert all(d.difference.value == 0 and d.p_value == 1 for d in same.overall.values()) and "g=a" in same.by_group
    assert isinstance(same._repr_markdown_(), str) and "<svg" in same.chart().svg
    with pytest.raises(DataError, match="not numbers"): compare(Y, (P, D), (np.full(5, np.nan), D))
    assert math.isnan(compare(np.ones(5, int), (P, D), (P, D)).overall["roc_auc"].difference.value)


# ---- the worst slice ---------------------------------------------------------------------------------------------------

def test_slices_are_those_found_by_trying_all():
    rng = np.random.default_rng(3)
    rows = pl.DataFrame({c: rng.choice(list("xyz"), 900) for c in "abcd"})
    loss = rng.exponential(size=900) + 2 * ((rows["a"] == "x") & (rows["c"] == "y")).to_numpy()
    found = worst_slices(rows, loss)
    assert found.tested == sum(3**k * math.comb(4, k) for k in (1, 2, 3)) - sum(rows.group_by(list(c)).len().filter(pl.col("len") < 30).height for k in (1, 2, 3) for c in combinations("abcd", k))
    assert dict(found.found[0].where) == {"a": "x", "c": "y"}
    for s in found.found:
        at = rows.select(pl.all_horizontal(pl.col(c) == v for c, v in s.where)).to_series().to_numpy()
        a, b = loss[at], loss[~at]
        assert (s.rows, s.loss, s.elsewhere) == pytest.approx((len(a), a.mean(), b.mean()))
        error = math.sqrt(a.var(ddof=1) / len(a) + b.var(ddof=1) / len(b))
        assert s.difference.low == pytest.approx(a.mean() - b.mean() - 1.959963984540054 * error)


def test_chance_finds_hardly_a_slice():
    "Searched in nothing: in at most about one of twenty searches anything is told."
    told = []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        told.append(len(worst_slices(pl.DataFrame({c: rng.choice(list("xyz"), 1500) for c in "abcd"}), (rng.random(1500) < 0.2).astype(float)).found) > 0)
    assert np.mean(told) <= 0.1


def test_conditions_of_odd_columns():
    frame = pl.DataFrame({"n": [None, float("nan"), *range(18)], "constant": [7] * 20, "zero": [0] * 19 + [5], "b": [True, None] * 10, "wide": list(range(20))}, strict=False)
    worded = conditions(frame)
    assert worded["n"].to_list()[:2] == ["missing", "missing"] and worded["constant"].unique().to_list() == ["7"] and set(worded["b"]) == {"true", "missing"} and worded["wide"].n_unique() == 4
    assert worst_slices(worded.select("constant"), np.arange(20.0), least=2).found == ()
    with pytest.raises(DataError, match="not finite"): worst_slices(worded, np.full(20, np.nan))


def test_counts_made_elsewhere_are_counts():
    ours = tabulated(("g",), {("a",): (3, 1, 2, 4), ("b",): (0, 0, 0, 5)})
    rows = [("a", 1, 1)] * 3 + [("a", 0, 1)] + [("a", 1, 0)] * 2 + [("a", 0, 0)] * 4 + [("b", 0, 0)] * 5
    frame = pl.DataFrame(rows, schema=["g", "label", "decision"], orient="row")
    assert isinstance(ours, Counts) and ours.cells.equals(count_rows(frame, ["g"]).cells)


def test_a_few_cells_are_added_as_a_query_would_add_them():
    "The short way for one request's counts, and the query, give the same cells whatever is new."
    from mlray.measures.counts import _added, _added_to
    rng = np.random.default_rng(0)
    def some(rows, groups): return count(pl.DataFrame({"g": rng.choice(groups, rows)}), rng.integers(0, 2, rows), rng.integers(0, 2, rows), rng.integers(0, 8, rows) / 8, bins=8)
    so_far, ways = some(500, ["a", "b"]), set()
    for rows, groups in ((1, ["a"]), (1, ["new"]), (3, ["a", "b"]), (40, ["b"]), (5000, ["a", "b"])):
        for one in (some(rows, groups) for _ in range(5)):
            both = pl.concat([so_far.cells, one.cells])
            assert (so_far + one).cells.equals(_added(both, ("g",))) and (one + so_far).cells.equals(_added(both, ("g",)))
            ways.add(_added_to(so_far.cells, one.cells, ["slice:g"]) is None)
    assert ways == {True, False}
