"""From a score to a decision: calibration keeps the order and the bits, a line is the best there is, and what was chosen on validation rows is what answers."""
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings as hypothesis, strategies as st

from mlray.governance.registry import bundle_of, open_registry
from mlray.learning.calibration import Curve, calibrate, calibrated, expected_calibration_error
from mlray.learning.contract import labels as labels_of
from mlray.learning.estimator_graph import Mixture, model_of, session_of
from mlray.learning.mitigation import constraint_of, exponentiated_gradient, reweighing
from mlray.learning.model import dump_state, epochs, load_state
from mlray.learning.reduction import mean_under, violation
from mlray.measures.fairness import count, fairness_report
from mlray.measures.threshold import choose, choose_by_group, lines, rates_of
from mlray.running.card import dossier, model_card
from mlray.running.explanation import explain
from mlray.running.reproduce import reproduce
from mlray.running.run import LocalBackend, make_job, train
from mlray.running.white_box import attacked, own_importances
from mlray.serving.served import Served
from mlray.shipping.bundle import decide, predict
from mlray.sources.fetch import find
from mlray.sources.rows import read_rows
from mlray.values.decision import Cost, Mitigation, Threshold
from mlray.values.errors import BundleError, ExplanationError, SpecError, TrainingError
from mlray.values.settings import Settings, read_settings
from mlray.values.spec import read_spec

SPEC, LOGISTIC = "configs/diabetes.yaml", "model.estimator=sklearn.linear_model:LogisticRegression"
scored = st.lists(st.tuples(st.floats(0, 1, width=32), st.booleans()), min_size=4, max_size=40).map(lambda rows: (np.array([s for s, _ in rows], np.float32), np.array([y for _, y in rows])))


@pytest.fixture(scope="module")
def place(tmp_path_factory): return Settings(env="local", home=tmp_path_factory.mktemp("home"))


def trained(place, *overrides):
    run = train(read_spec(SPEC, overrides), place)
    return run, bundle_of(open_registry(place), run.version)


def through(curve, scores):
    from onnx import TensorProto, helper
    graph = model_of([helper.make_node("Identity", ["x"], ["score"])], {"x": (TensorProto.FLOAT, ["rows"])}, {"score": (TensorProto.FLOAT, ["rows"])}, {}, "g")
    return session_of(calibrated(graph.SerializeToString(), curve)).run(["score"], {"x": scores.astype(np.float32)})[0]


@hypothesis(max_examples=100, deadline=None)
@given(scored, st.sampled_from(["temperature", "platt", "isotonic"]))
def test_calibration_never_falls_and_the_graph_is_the_curve(rows, method):
    scores, labels = rows
    try: curve = calibrate(method, scores, labels)
    except TrainingError: assume(False)
    asked = np.sort(np.concatenate([scores, np.linspace(0, 1, 300, dtype=np.float32)]))
    answers = through(curve, asked) # onnxruntime's Sigmoid is off by up to 3e-8, and may fall by that
    assert (np.diff(answers) >= -1e-7).all() and answers.min() >= 0 and answers.max() <= 1
    np.testing.assert_allclose(answers, curve(asked), atol=1e-5)


@hypothesis(max_examples=30, deadline=None)
@given(st.sampled_from(["temperature", "platt", "isotonic"]), st.integers(0, 1000))
def test_calibration_gives_the_same_bits_in_every_batch(method, seed):
    draws = np.random.default_rng(seed)
    scores = draws.random(1500).astype(np.float32)
    curve = calibrate(method, scores, draws.random(1500) < scores**2)
    together = through(curve, scores)
    for size in (1, 2, 3, 7, 64, 1000):
        for at in range(0, min(1500, size * 30), size): np.testing.assert_array_equal(through(curve, scores[at:at + size]) if size > 7 or at < 60 else together[at:at + size], together[at:at + size])


@pytest.mark.parametrize("method", ["temperature", "platt", "isotonic"])
def test_calibration_brings_bold_scores_back(method):
    draws = np.random.default_rng(1)
    odds = draws.normal(size=8000)
    truth, bold = draws.random(8000) < 1 / (1 + np.exp(-odds)), (1 / (1 + np.exp(-4 * odds))).astype(np.float32)
    curve = calibrate(method, bold[:4000], truth[:4000])
    before, after = (expected_calibration_error(truth[4000:], s) for s in (bold[4000:], through(curve, bold[4000:])))
    assert after < before / 4 and after < 0.03


def test_calibration_says_what_is_wrong():
    with pytest.raises(TrainingError, match="both classes"): calibrate("platt", np.array([0.1, 0.2], np.float32), np.array([1, 1]))
    with pytest.raises(TrainingError, match="turning the model around"): calibrate("platt", np.array([0.1, 0.2, 0.8, 0.9] * 20, np.float32), np.array([1, 1, 0, 0] * 20))


AIMS = [*(Threshold(maximise=m) for m in ("accuracy", "balanced_accuracy", "f1")), Threshold(cost=Cost(false_positive=1, false_negative=5)), Threshold(metric="recall", at_least=0.7), Threshold(metric="selection_rate", at_most=0.4)]


def _value(aim, line, scores, labels):
    "What a line is worth, counted row by row; None where it breaks the promise."
    chosen = scores >= np.float32(line)
    tp, fp, fn, tn = (int(x.sum()) for x in (chosen & labels, chosen & ~labels, ~chosen & labels, ~chosen & ~labels))
    recall, specificity, precision = tp / (tp + fn), tn / (tn + fp), tp / (tp + fp) if tp + fp else 0.0
    if aim.cost: return -(aim.cost.false_positive * fp + aim.cost.false_negative * fn)
    if aim.maximise: return {"accuracy": (tp + tn) / len(labels), "balanced_accuracy": (recall + specificity) / 2, "f1": 2 * tp / (2 * tp + fp + fn)}[aim.maximise]
    if aim.metric == "recall": return precision if recall >= aim.at_least - 1e-9 else None
    return recall if chosen.mean() <= aim.at_most + 1e-9 else None


@hypothesis(max_examples=200, deadline=None)
@given(scored, st.sampled_from(AIMS))
def test_no_line_is_better_than_the_chosen_one(rows, aim):
    scores, labels = rows
    assume(0 < labels.sum() < len(labels))
    mine = _value(aim, choose(aim, scores, labels), scores, labels)
    others = [_value(aim, line, scores, labels) for line in [*scores, *np.nextafter(scores, np.float32(2)), 0.0, 0.5, 1.1]]
    assert mine is not None and mine >= max(v for v in others if v is not None) - 1e-9


@hypothesis(max_examples=100, deadline=None)
@given(scored, st.floats(0.05, 1))
def test_a_promise_is_kept_or_said_to_be_out_of_reach(rows, wanted):
    scores, labels = rows
    assume(0 < labels.sum() < len(labels))
    best = rates_of(lines(scores, labels))["precision"].max()
    try: line = choose(Threshold(metric="precision", at_least=wanted), scores, labels)
    except TrainingError as error: assert best < wanted and "Ask for less" in str(error)
    else: assert labels[scores >= np.float32(line)].mean() >= wanted - 1e-9


@hypothesis(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(["demographic_parity", "equal_opportunity", "false_positive_rate_parity"]), st.floats(0.03, 0.3))
def test_lines_of_groups_hold_their_constraint(seed, constraint, eps):
    draws = np.random.default_rng(seed)
    group, labels = draws.choice(["a", "b", "c"], 600), draws.random(600) < 0.4
    scores = np.clip(draws.normal(0.4 + 0.2 * labels - 0.1 * (group == "b"), 0.2), 0, 1).astype(np.float32)
    drawn = choose_by_group(Mitigation(method="thresholds", by=("g",), constraint=constraint, eps=eps), scores, labels, group)
    chosen = scores >= np.array([drawn[g] for g in group], np.float32)
    of = {"demographic_parity": np.ones(600, bool), "equal_opportunity": labels, "false_positive_rate_parity": ~labels}[constraint]
    rates = [chosen[of & (group == g)].mean() for g in "abc"]
    assert max(rates) - min(rates) <= eps + 1e-9


def test_weights_of_a_mixture_sum_to_one_and_the_gap_falls():
    from sklearn.linear_model import LogisticRegression
    draws = np.random.default_rng(3)
    who = draws.random(3000) < 0.5
    rows = np.column_stack([draws.normal(size=3000) + who, draws.normal(size=3000)]).astype(np.float32)
    labels = (rows.sum(1) + draws.normal(size=3000) > 1).astype(int)
    mixture = exponentiated_gradient(Mitigation(method="exponentiated_gradient", by=("who",), eps=0.02), LogisticRegression(), rows, labels, np.where(who, "a", "b"))
    gap = lambda d: abs(d[who].mean() - d[~who].mean())
    assert isinstance(mixture, Mixture) and np.isclose(sum(mixture.weights), 1) and min(mixture.weights) > 0
    assert gap(mixture.predict_proba(rows)[:, 1] >= 0.5) < 0.4 * gap(LogisticRegression().fit(rows, labels).predict(rows))
    with pytest.raises(TrainingError, match="group 'a' have the same label"): exponentiated_gradient(Mitigation(method="exponentiated_gradient", by=("who",)), LogisticRegression(), rows, np.where(who, 1, labels), np.where(who, "a", "b"))


def test_reweighing_makes_group_and_label_independent():
    groups, labels = np.array(["f"] * 6 + ["m"] * 4), np.array([1, 0, 0, 0, 0, 0, 1, 1, 1, 0])
    weights = reweighing(groups, labels)
    np.testing.assert_allclose([np.average(labels[groups == g], weights=weights[groups == g]) for g in "fm"], [0.4, 0.4], atol=1e-6)


@pytest.mark.parametrize(("override", "said"), [
    ("model.threshold={maximise: f2}", "model.threshold.maximise: Input should be 'accuracy'"), ("model.threshold={metric: precision}", "precision goes with at_least"), ("model.threshold={metric: selection_rate, at_least: 0.1}", "goes with at_most"),
    ("model.threshold={maximise: f1, cost: {false_negative: 2}}", "chosen in one of these ways"), ("model.threshold=1.5", "model.threshold: Input should be less than 1"), ("model.threshold={cost: {false_positive: 0, false_negative: 0}}", "must cost something"),
    ("model.calibration=plat", "Input should be 'none', 'temperature', 'platt' or 'isotonic'"), ("mitigation={method: reweighing, by: [bmi]}", "'bmi' is not a sensitive column"), ("mitigation={method: exponentiated_gradient, by: [sex], rounds: 1}", "mitigation.rounds"), ("train.class_weight=balanced mitigation={method: exponentiated_gradient, by: [sex]}", "weighs rows itself"),
    ("train.rows=stream mitigation={method: exponentiated_gradient, by: [sex]}", "labels and weighs all rows anew"), ("search={trials: 2, space: {train.learning_rate: {low: 0.001, high: 0.01}}} mitigation={method: exponentiated_gradient, by: [sex]}", "every trial would fit a mixture"),
    ("mitigation={method: thresholds, by: [sex], constraint: equalized_odds}", "without a lottery"), ("mitigation={method: reweighing, by: [sex], constraint: equalized_odds}", "reweighing makes group and label independent"), ("mitigation={method: reweighing, by: []}", "mitigation.by")])
def test_a_spec_that_decides_nothing_clear_is_a_letter(override, said):
    with pytest.raises(SpecError, match=said): read_spec(SPEC, re.split(r" (?=mitigation=)", override))


def test_only_two_classes_are_calibrated():
    with pytest.raises(SpecError, match="between two classes"): read_spec("configs/wine.yaml", ["model.calibration=platt"])


def test_the_chosen_line_is_that_of_validation_rows_and_stands_in_the_bundle(place):
    run, bundle = trained(place, LOGISTIC, "model.threshold={cost: {false_positive: 1, false_negative: 5}}")
    valid = run.rows.parts.valid
    scores, truth = predict(bundle, valid, valid.height), labels_of(bundle.contract, valid).to_numpy()
    assert bundle.threshold == choose(bundle.spec.model.threshold, scores, truth) != 0.5
    assert run.evaluation.values["selection_rate"] == decide(bundle, predict(bundle, run.rows.parts.test, run.rows.parts.test.height)).mean()
    assert reproduce(bundle, "x", place, LocalBackend()).identical


@pytest.mark.parametrize("model", ["model.network=linear", LOGISTIC])
@pytest.mark.parametrize("method", ["temperature", "platt", "isotonic"])
def test_calibration_ships_in_the_graph(place, model, method):
    run, bundle = trained(place, model, f"model.calibration={method}", "train.epochs=3") if "network" in model else trained(place, model, f"model.calibration={method}")
    _, plain = trained(place, model, *(["train.epochs=3"] if "network" in model else []))
    test = run.rows.parts.test
    raw, scores = predict(plain, test, test.height), predict(bundle, test, test.height)
    order = np.argsort(raw)
    assert (np.diff(scores[order]) >= 0).all() and not np.allclose(raw, scores, atol=1e-3)
    np.testing.assert_array_equal(np.concatenate([predict(bundle, test[i], 1) for i in range(10)]), scores[:10])
    about = bundle.provenance["calibration"]
    assert about["method"] == method and {"before", "after"} == set(about["expected_calibration_error"])
    if method != "isotonic": np.testing.assert_allclose(Curve(method, about["slope"], about["shift"])(raw), scores, atol=1e-5)


def test_a_line_for_each_group_is_drawn_from_the_request(place):
    run, bundle = trained(place, LOGISTIC, "mitigation={method: thresholds, by: [sex], eps: 0.08}")
    assert set(bundle.thresholds) == {"group 1", "group 2"} and len(set(bundle.thresholds.values())) == 2
    test = run.rows.parts.test
    scores, low, high = predict(bundle, test, test.height), *sorted(bundle.thresholds, key=bundle.thresholds.get)
    chosen = decide(bundle, scores, test)
    np.testing.assert_array_equal(chosen, scores >= np.array([bundle.thresholds[s] for s in test["sex"]], np.float32))
    with pytest.raises(BundleError, match="needs the columns sex"): decide(bundle, scores)
    served = Served("1", bundle)
    between = next(r for r, s in zip(test.to_dicts(), scores, strict=True) if bundle.thresholds[low] < s)
    body = json.dumps({"instances": [{k: v for k, v in (between | {"sex": group}).items() if k in bundle.contract.features} for group in (low, high)]}).encode()
    answers = served.predictions(served.decoder.decode(body).instances)
    asked = [predict(bundle, {k: [v] for k, v in (between | {"sex": group}).items()}, 1)[0] for group in (low, high)]
    assert [a.label == ">140.5" for a in answers] == [s >= np.float32(bundle.thresholds[g]) for s, g in zip(asked, (low, high), strict=True)]


@pytest.mark.parametrize("mitigation", ["{method: reweighing, by: [sex]}", "{method: exponentiated_gradient, by: [sex], eps: 0.02}"])
def test_mitigation_is_trained_shipped_and_made_again(place, mitigation):
    run, bundle = trained(place, LOGISTIC, f"mitigation={mitigation}")
    assert reproduce(bundle, str(run.version), place, LocalBackend()).identical
    plain, train_rows = trained(place, LOGISTIC)[1], run.rows.parts.train
    gap = lambda b: fairness_report(count(train_rows.select("sex"), labels_of(b.contract, train_rows).to_numpy(), decide(b, predict(b, train_rows, train_rows.height))), 1).values["demographic_parity_difference[sex]"]
    assert gap(bundle) < gap(plain)


MIXED = ("model={network: mlp, hidden: [16], embedding: 4, bins: 4}", "train={epochs: 15, patience: 15, learning_rate: 0.01}", "mitigation={method: exponentiated_gradient, by: [sex], eps: 0.02, rounds: 6}")


@pytest.fixture(scope="module")
def mixed(place): return trained(place, *MIXED)


def test_a_mixture_of_networks_is_one_graph_that_keeps_its_bits(place, mixed):
    run, bundle = mixed
    rows, plain = run.rows.parts.train, trained(place, *MIXED[:2])[1]
    gap = lambda b: fairness_report(count(rows.select("sex"), labels_of(b.contract, rows).to_numpy(), decide(b, predict(b, rows, rows.height))), 1).values["demographic_parity_difference[sex]"]
    assert gap(bundle) < min(0.5 * gap(plain), 0.08) and bundle.provenance["epochs"] == bundle.provenance["best_epoch"] == 16
    assert reproduce(bundle, str(run.version), place, LocalBackend()).identical
    networks = bundle.provenance["mixture"]["networks"]
    assert bundle.provenance["mixture"]["fitted"] <= 6 and f"exponentiated gradient by sex, for demographic parity: a mean of {networks} of" in repr(model_card(dossier(open_registry(place), str(run.version))))
    together = predict(bundle, rows, rows.height)
    np.testing.assert_array_equal(np.concatenate([predict(bundle, rows[i:i + 1], 1) for i in range(40)]), together[:40])
    assert sorted(p.name for p in bundle.path.iterdir()) == sorted(p.name for p in plain.path.iterdir())


def test_a_mixture_of_networks_is_explained_from_outside_and_is_no_parent(place, mixed):
    run, bundle = mixed
    rows = run.rows.parts.test
    row = {n: rows[n][0] for n in bundle.contract.features}
    assert all(explain(bundle, row, method, perturbations=400).weights for method in ("lime", "shap")) and 0 <= attacked(bundle, rows[:40]).values["flip_rate[pgd]"] <= 1
    with pytest.raises(ExplanationError, match="Only mlray's own networks"): own_importances(bundle, rows)
    with pytest.raises(TrainingError, match="the parent is a mixture of networks"): trained(place, *MIXED[:1], f"train={{epochs: 2, from: {run.version}}}")


def test_a_killed_mixture_goes_on_from_its_first_network(place):
    spec = read_spec(SPEC, MIXED)
    job = make_job(spec, read_rows(spec, place))
    *before, last = told = list(epochs(job))
    first = load_state(dump_state(before[-1].state))
    again, = epochs(job, first)
    assert [e.number for e in told] == list(range(1, 17)) and again.metrics == last.metrics and not list(epochs(job, last.state))
    assert all(torch.equal(again.state.best[k], v) for k, v in load_state(dump_state(last.state)).best.items())


@hypothesis(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(["demographic_parity", "equal_opportunity", "equalized_odds", "false_positive_rate_parity"]))
def test_a_violation_is_what_fairlearn_bounds(seed, constraint):
    import pandas as pd
    draws = np.random.default_rng(seed)
    labels, groups, decided = draws.integers(0, 2, 200), draws.integers(0, 3, 200), draws.integers(0, 2, 200)
    assume(all(len(np.unique(labels[groups == g])) == 2 for g in range(3)))
    moment = constraint_of(Mitigation(method="exponentiated_gradient", by=("g",), constraint=constraint))
    moment.load_data(np.zeros((200, 1)), pd.Series(labels), sensitive_features=pd.Series(groups))
    np.testing.assert_allclose(violation(constraint, decided, labels, groups), moment.gamma(lambda rows: decided).max(), atol=1e-12)


def test_no_more_networks_are_fitted_than_the_budget_allows():
    draws = np.random.default_rng(0)
    who, truth = draws.random(1000) < 0.5, draws.random(1000) < 0.4
    calls = []

    def fit(labels, weights):
        calls.append(weights)
        return len(calls), np.clip(labels * 0.6 + draws.random(1000) * 0.4 * who, 0, 1)
    mean = mean_under(Mitigation(method="exponentiated_gradient", by=("who",), rounds=5), fit, truth.astype(np.float32), np.where(who, "a", "b"))
    assert len(calls) == mean.fitted <= 5 and set(mean.models) <= set(range(1, 6)) and sum(mean.shares) + mean.always <= 1 + 1e-9
    assert all(np.isclose(w.mean(), 1, atol=1e-5) for w in calls)


@pytest.mark.chaos # a minute of CPU: UCI Adult, a sixth of its training rows and half of its test rows
def test_a_mixture_of_networks_closes_the_gap_on_adult(place, tmp_path):
    spec = read_spec("configs/adult.yaml")
    for source, every in ((spec.data.train, 6), (spec.data.test, 2)):
        lines = find(source, read_settings()).read_text().splitlines()
        (tmp_path / Path(source.file).name).write_text("\n".join(lines[::every]) + "\n")
    told = {}
    for name, more in {"plain": [], "mixed": ["mitigation={method: exponentiated_gradient, by: [sex], eps: 0.01, rounds: 10}"]}.items():
        run = train(read_spec("configs/adult.yaml", [f"data.train={{file: {tmp_path}/adult.data}}", f"data.test={{file: {tmp_path}/adult.test}}", "gates={}", *more]), place)
        bundle, rows = bundle_of(open_registry(place), run.version), run.rows.parts.test
        truth, decided = labels_of(bundle.contract, rows).to_numpy(), decide(bundle, predict(bundle, rows, rows.height))
        told[name] = (fairness_report(count(rows.select("sex"), truth, decided), 1).values["demographic_parity_difference[sex]"], float((decided == truth).mean()))
    print(f"gap and accuracy on {rows.height} test rows: {told}")
    assert told["mixed"][0] < 0.25 * told["plain"][0] and told["mixed"][1] > told["plain"][1] - 0.04


def test_reweighing_reaches_networks(place):
    weighed, plain = (trained(place, "model.network=linear", "train.epochs=3", *more)[1] for more in (["mitigation={method: reweighing, by: [sex]}"], []))
    assert weighed.digest != plain.digest and (weighed.path / "model.onnx").read_bytes() != (plain.path / "model.onnx").read_bytes()
