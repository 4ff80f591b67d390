"""Every kind of target, from a spec to an answer: one of two, one of several, any of several, a number, its quantiles."""
import json
import math
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch
from fastcore.test import expect_fail
from hypothesis import given, settings as hypothesis_settings, strategies as st

from mlray.governance.access import new_key
from mlray.governance.registry import bundle_of, open_registry
from mlray.judgement.adversarial import adversarial
from mlray.judgement.gate import less_is_better
from mlray.learning.contract import Contract, labels
from mlray.learning.loss import loss_of, pinball, row_weights, valid_loss
from mlray.learning.model import epochs
from mlray.learning.network import build, logits_of
from mlray.measures.gaps import class_terms, gap_report, label_terms
from mlray.measures.score_of_classes import class_measures, label_measures
from mlray.measures.score_of_numbers import number_measures, quantile_measures, weighted_mean
from mlray.monitoring.alert import advance
from mlray.monitoring.archive import _FEEDBACK
from mlray.monitoring.feedback import label_sets
from mlray.monitoring.keeping import Keys, answer_columns, kept, plan
from mlray.monitoring.monitor import watched
from mlray.monitoring.windows import Window, count_window
from mlray.running.evaluation import evaluate, read_candidate, rules_of
from mlray.running.explanation import Wish, explain, output_of, shaken, tolerance_of, what_if
from mlray.running.run import make_job, train
from mlray.running.white_box import attacked, network_of
from mlray.samples import diabetes as patients
from mlray.serving.served import Served
from mlray.serving.service import Service
from mlray.shipping.answer import predictions
from mlray.shipping.bundle import decide, load_bundle, pack, predict
from mlray.sources.rows import read_rows
from mlray.values.errors import BundleError, DataError, MlrayError, SpecError, TrainingError
from mlray.values.recipe import Train
from mlray.values.settings import Settings, shipped
from mlray.values.spec import Alert, parse_spec, read_spec
from mlray.values.task import BINARY, Task

KINDS = ("multiclass", "multilabel", "regression", "quantile")
FEATURES = """
  age: {type: integer, sensitive: true, bands: [40, 55]}
  sex: {type: category, values: [group 1, group 2], sensitive: true}
  bmi: {type: number}
  blood_pressure: {type: number}
  triglycerides_log: {type: number}
"""
TARGETS = {
    "binary": "  progression: {type: number, role: target, positive_above: 140.5}",
    "multiclass": "  course: {type: category, role: target, values: [slow, middling, fast]}",
    "multilabel": "  fast: {type: boolean, role: target}\n  high_glucose: {type: boolean, role: target}",
    "regression": "  progression: {type: number, role: target}",
    "quantile": "  progression: {type: number, role: target}",
}
RULES = {"multiclass": "{metric: accuracy, at_least: 0.45}, {metric: accuracy_difference, by: [sex], at_most: 0.5}", "multilabel": "{metric: roc_auc_macro, at_least: 0.7}, {metric: hamming_loss, at_most: 0.35}",
         "regression": "{metric: r2, at_least: 0.25}, {metric: bias_difference, by: [sex], at_most: 60}", "quantile": "{metric: coverage, at_least: 0.6}, {metric: mean_pinball_loss, at_most: 20}"}


def rows() -> pl.DataFrame:
    "The patients, asked about in every way."
    course = pl.when(pl.col("progression") < 100).then(pl.lit("slow")).when(pl.col("progression") < 180).then(pl.lit("middling")).otherwise(pl.lit("fast"))
    return patients().with_columns(course.alias("course"), (pl.col("progression") > 140.5).alias("fast"), (pl.col("glucose") > 95).alias("high_glucose"), (pl.col("age") / 10).alias("weight"))


def spec_of(kind: str, more: str = "", columns: str = ""):
    model = "model: {members: 4, hidden: [32], quantiles: [0.1, 0.5, 0.9]}" if kind == "quantile" else "model: {members: 4, hidden: [32]}"
    gates = f"gates: {{quality: [{RULES[kind]}]}}" if kind in RULES else ""
    return parse_spec(f"name: patients\nmin_group: 10\ndata: {{train: {{call: tests.test_targets:rows}}, split: {{test: 0.3, seed: 8}}}}\ncontract:{FEATURES}{TARGETS[kind]}\n{columns}\n{model}\n{gates}\n{more}")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    "A run of each kind, made once."
    made = {}

    def run_of(kind: str):
        if kind not in made:
            root = tmp_path_factory.mktemp(kind)
            settings = Settings(root=root, home=root / "home", object_store_mb=100, tracking="disabled")
            made[kind] = settings, train(spec_of(kind), settings)
        return made[kind]

    return run_of


def bundle_of_run(settings, run): return bundle_of(open_registry(settings), run.version)


# A spec is enough.

@pytest.mark.parametrize("kind", KINDS)
def test_from_a_spec_to_a_verdict(runs, kind):
    settings, run = runs(kind)
    assert run.verdict.passed and run.verdict.findings, run.verdict.table()
    bundle = bundle_of_run(settings, run)
    assert bundle.task.kind == kind and evaluate(bundle, run.rows.parts.test).values == pytest.approx(run.evaluation.values, nan_ok=True)
    assert json.loads(json.dumps(run.as_dict(), allow_nan=False))["verdict"]["passed"]
    assert {f"sex={g}" for g in ("group 1", "group 2")} <= set(run.evaluation.scorecard.by_group)
    for page in (run._repr_markdown_(), run.evaluation.fairness.groups_table()._repr_markdown_()): assert "group 1" in page


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 2, 7, 64])
def test_a_row_alone_is_the_row_in_a_batch(runs, kind, size):
    settings, run = runs(kind)
    bundle, every = bundle_of_run(settings, run), run.rows.checked["train"].good
    whole = predict(bundle, every, every.height)
    pieces = np.concatenate([predict(bundle, every[i:i + size], min(size, every.height - i)) for i in range(0, every.height, size)])
    assert whole.dtype == np.float32 and whole.tobytes() == pieces.tobytes() and len(np.unique(whole, axis=0)) > 100


def test_answers_are_what_their_kind_promises(runs):
    answers, chosen, test = {}, {}, runs("regression")[1].rows.parts.test
    for kind in KINDS:
        bundle = bundle_of_run(*runs(kind))
        answers[kind] = predict(bundle, test, test.height)
        chosen[kind] = decide(bundle, answers[kind])
    rows_ = len(answers["regression"])
    assert {k: a.shape for k, a in answers.items()} == {"multiclass": (rows_, 3), "multilabel": (rows_, 2), "regression": (rows_,), "quantile": (rows_, 3)}
    assert np.allclose(answers["multiclass"].sum(1), 1, atol=1e-6) and (chosen["multiclass"] == answers["multiclass"].argmax(1)).all()
    assert ((answers["multilabel"] > 0) & (answers["multilabel"] < 1)).all() and (chosen["multilabel"] == (answers["multilabel"] >= 0.5)).all()
    assert 40 < answers["regression"].min() < answers["regression"].max() < 350 and (np.diff(answers["quantile"], axis=1) >= 0).all()
    assert (chosen["quantile"] == answers["quantile"][:, 1]).all()


@pytest.mark.parametrize("kind", ["binary", *KINDS])
def test_the_wire(runs, kind):
    settings, run = runs(kind)
    bundle, test = bundle_of_run(settings, run), run.rows.parts.test.head(5)
    key, secret = new_key("admin")
    served = Served("1", bundle)
    body = json.dumps({"instances": [{n: r[n] for n in bundle.contract.features} for r in test.to_dicts()]}).encode()
    reply = Service({"patients": served}, (key,)).answer("patients", body, secret, "r")
    named, said = dict(zip(bundle.task.names, range(9), strict=False)), json.loads(reply.body)["predictions"]
    expected = {
        "binary": lambda s: {"label": ">140.5" if s >= 0.5 else "<=140.5", "score": s},
        "multiclass": lambda s: {"label": ("slow", "middling", "fast")[int(np.argmax(s))], "scores": {n: s[i] for n, i in named.items()}},
        "multilabel": lambda s: {"labels": [n for n, i in named.items() if s[i] >= 0.5], "scores": {n: s[i] for n, i in named.items()}},
        "regression": lambda s: {"value": s},
        "quantile": lambda s: {"value": s[1], "quantiles": {"0.1": s[0], "0.5": s[1], "0.9": s[2]}}}[kind]
    assert reply.status == 200 and said == [expected(s) for s in predict(bundle, test, 5).tolist()]
    from mlray.engines.serve_on_ray import describe
    schema = json.dumps(describe(Service({"patients": served}, (key,)))["components"]["schemas"])
    assert all(f'"{field}"' in schema for field in said[0])


# Every other verb copes.

def test_a_gate_reads_a_candidate_of_another_kind(runs):
    settings, _ = runs("regression")
    candidate = read_candidate("patients/1", settings)
    assert candidate.judge("quality").passed
    assert {"single_feature_roc_auc", "duplicate_share", "moved_share"} <= set(candidate.inspection.values)
    assert 0.6 < candidate.inspection.leakage.values["single_feature_roc_auc[bmi]"] < 0.9


def test_a_number_that_gives_itself_away_is_a_leak():
    from mlray.judgement.leakage import leakage_report
    contract = Contract(spec_of("regression", columns="  copy: {type: number}").contract)
    frame = rows().with_columns((pl.col("progression") * 2 + 1).alias("copy"))
    assert leakage_report(contract, frame.head(300), frame.tail(142)).values["single_feature_roc_auc[copy]"] == 1
    classes = Contract({"course": contract.columns["sex"].model_copy(update={"sensitive": False, "values": ()}), "y": task_column("multiclass")})
    assert leakage_report(classes, frame.rename({"progression": "p"}).with_columns(pl.col("course").alias("y")), frame.with_columns(pl.col("course").alias("y"))).values["single_feature_roc_auc"] == 1


def task_column(kind: str): return next(c for c in spec_of(kind).contract.values() if c.role == "target")


def test_going_on_from_a_parent_keeps_its_scale(runs):
    settings, run = runs("regression")
    again = train(spec_of("regression", "train: {from: patients/1, epochs: 2}"), settings)
    assert bundle_of_run(settings, again).task == bundle_of_run(settings, run).task and again.evaluation.values["r2"] > 0.25
    with expect_fail(TrainingError, contains="the same target"): train(spec_of("quantile", "train: {from: patients/1, epochs: 1}"), settings)


def test_the_same_spec_gives_the_same_bytes(runs, tmp_path):
    settings, run = runs("multiclass")
    assert train(spec_of("multiclass"), settings.model_copy(update={"home": tmp_path / "elsewhere"})).version.digest == run.version.digest


def test_a_bundle_of_an_older_format_says_so(runs, tmp_path):
    import shutil
    settings, run = runs("regression")
    bundle = bundle_of_run(settings, run)
    folder = tmp_path / "old"
    shutil.copytree(bundle.path, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"format": 1}))
    with expect_fail(BundleError, contains="has format 1; this mlray reads 2. Train it again"): load_bundle(folder)


@pytest.mark.parametrize("name", ["wine", "progression"])
def test_the_specs_that_ship(settings, name):
    run = train(read_spec(shipped("configs") / f"{name}.yaml"), settings)
    assert run.verdict.passed, run.verdict.table()


@pytest.mark.ray
def test_two_ray_workers_learn_classes_with_weights(ray_cluster, settings):
    from mlray.engines.train_on_ray import RayBackend
    run = train(spec_of("multiclass", "train: {class_weight: balanced, epochs: 12}", "  weight: {type: number, role: weight, min: 0}"), settings, RayBackend(2))
    assert run.evaluation.values["balanced_accuracy"] > 0.45 and "weighted_accuracy" in run.evaluation.values


# It is as good as what else there is.

def test_quality_beside_scikit_learn(runs):
    from sklearn.linear_model import Ridge
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    _, run = runs("regression")
    numbers = lambda frame: frame.select("age", (pl.col("sex") == "group 1").cast(pl.Float64), "bmi", "blood_pressure", "triglycerides_log").to_numpy()
    parts = run.rows.parts
    learned = pl.concat([parts.train, parts.valid])
    ridge = make_pipeline(StandardScaler(), Ridge(1.0)).fit(numbers(learned), learned["progression"].to_numpy())
    assert run.evaluation.values["r2"] > ridge.score(numbers(parts.test), parts.test["progression"].to_numpy()) - 0.08


# Losses are torch's and scikit-learn's.

LOGITS, RNG = torch.randn(6, 3, 4, generator=torch.Generator().manual_seed(0)), np.random.default_rng(0)


@pytest.mark.parametrize(("task", "target", "one"), [
    (BINARY, torch.tensor([0.0, 1, 1, 0, 1, 0]), lambda logits, y: torch.nn.functional.binary_cross_entropy_with_logits(logits[:, 0], y)),
    (Task("multiclass", ("y",), tuple("abcd")), torch.tensor([0.0, 1, 2, 3, 2, 0]), lambda logits, y: torch.nn.functional.cross_entropy(logits, y.long())),
    (Task("multilabel", tuple("abcd"), tuple("abcd")), (LOGITS[:, 0] > 0).float(), lambda logits, y: torch.nn.functional.binary_cross_entropy_with_logits(logits, y)),
    (Task("regression", ("y",), ("y",), (), 10.0, 2.0), torch.tensor([9.0, 10, 11, 12, 8, 14]), lambda logits, y: torch.nn.functional.mse_loss(logits[:, 0] * 2 + 10, y) / 4),
], ids=lambda x: x.kind if isinstance(x, Task) else "")
def test_losses_are_the_mean_over_members(task, target, one):
    logits = LOGITS[..., :task.outputs]
    assert loss_of(task)(logits, target, None) == pytest.approx(float(torch.stack([one(logits[:, m], target) for m in range(3)]).mean()), rel=1e-5)
    assert loss_of(task)(logits, target, torch.ones(6)) == pytest.approx(float(loss_of(task)(logits, target, None)), rel=1e-6)


def test_pinball_and_validation_losses_are_scikit_learns():
    from sklearn.metrics import log_loss, mean_pinball_loss, mean_squared_error
    y, q = RNG.normal(size=50).astype(np.float32), np.sort(RNG.normal(size=(50, 2)).astype(np.float32), axis=1)
    found = pinball(torch.from_numpy(y), torch.from_numpy(q), (0.1, 0.9)).mean(0)
    for i, share in enumerate((0.1, 0.9)): assert float(found[i]) == pytest.approx(mean_pinball_loss(y, q[:, i], alpha=share), rel=1e-5)
    p, codes = RNG.dirichlet(np.ones(4), 50).astype(np.float32), RNG.integers(0, 4, 50)
    assert valid_loss(Task("multiclass", ("y",), tuple("abcd")), torch.from_numpy(p), torch.from_numpy(codes.astype(np.float32))) == pytest.approx(log_loss(codes, p, labels=range(4)), rel=1e-4)
    assert valid_loss(Task("regression", ("y",), ("y",), (), 0.0, 2.0), torch.from_numpy(q[:, 0]), torch.from_numpy(y)) == pytest.approx(mean_squared_error(y, q[:, 0]) / 4, rel=1e-5)


# Measures are scikit-learn's.

@hypothesis_settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.integers(12, 80), st.integers(3, 5))
def test_measures_of_classes(seed, count, classes):
    from sklearn import metrics
    rng = np.random.default_rng(seed)
    y, p = np.concatenate([np.arange(classes), rng.integers(0, classes, count)]), rng.dirichlet(np.ones(classes), count + classes)
    d = p.argmax(1)
    found, names = class_measures(y, p, d, tuple(map(str, range(classes)))), range(classes)
    theirs = {"accuracy": metrics.accuracy_score(y, d), "balanced_accuracy": metrics.balanced_accuracy_score(y, d), "log_loss": metrics.log_loss(y, p), "roc_auc_ovr": metrics.roc_auc_score(y, p, multi_class="ovr")}
    for average in ("macro", "weighted", "micro"):
        for name in ("precision", "recall", "f1"): theirs[f"{name}_{average}"] = getattr(metrics, f"{name}_score")(y, d, average=average, zero_division=0)
    for name, value in theirs.items(): assert found[name].value == pytest.approx(value, abs=1e-9), name
    for c in names: assert found[f"recall[{c}]"].value == pytest.approx(metrics.recall_score(y, d, average=None)[c])
    assert all(m.low <= m.value + 1e-12 and m.value <= m.high + 1e-12 for m in found.values() if not math.isnan(m.low))


@hypothesis_settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000))
def test_measures_of_labels(seed):
    from sklearn import metrics
    rng = np.random.default_rng(seed)
    y, p = np.concatenate([np.eye(3, dtype=int), rng.integers(0, 2, (40, 3))]), rng.uniform(size=(43, 3))
    d, found = p >= 0.5, label_measures(y, p, p >= 0.5, ("a", "b", "c"))
    theirs = {"accuracy": metrics.accuracy_score(y, d), "hamming_loss": metrics.hamming_loss(y, d), "roc_auc_macro": metrics.roc_auc_score(y, p)}
    for average in ("macro", "weighted", "micro"):
        for name in ("precision", "recall", "f1"): theirs[f"{name}_{average}"] = getattr(metrics, f"{name}_score")(y, d, average=average, zero_division=0)
    for name, value in theirs.items(): assert found[name].value == pytest.approx(value, abs=1e-9), name


@hypothesis_settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 60))
def test_measures_of_numbers(seed, count):
    from sklearn import metrics
    rng = np.random.default_rng(seed)
    y = rng.normal(5, 3, count)
    p = y + rng.normal(0.5, 1, count)
    found = number_measures(y, p)
    theirs = {"r2": metrics.r2_score(y, p), "mean_absolute_error": metrics.mean_absolute_error(y, p), "mean_squared_error": metrics.mean_squared_error(y, p),
              "root_mean_squared_error": metrics.root_mean_squared_error(y, p), "median_absolute_error": metrics.median_absolute_error(y, p), "bias": (p - y).mean()}
    for name, value in theirs.items(): assert found[name].value == pytest.approx(value), name
    several = quantile_measures(y, np.stack([p - 1, p, p + 1], 1), (0.1, 0.5, 0.9))
    assert several["mean_pinball_loss[0.9]"].value == pytest.approx(metrics.mean_pinball_loss(y, p + 1, alpha=0.9))
    assert several["coverage"].value == pytest.approx((abs(p - y) <= 1).mean()) and several["interval_width"].value == pytest.approx(2)


def test_intervals_of_numbers_cover_the_truth():
    "In 19 of 20 samples, give or take: the interval of R² and of a weighted mean."
    rng, hits, weighted = np.random.default_rng(0), 0, 0
    for _ in range(400):
        y = rng.normal(size=300)
        measure = number_measures(y, y * 0.5 + rng.normal(0, 0.5, 300))["r2"] # truly 1 - (0.25 + 0.25)
        hits += measure.low <= 0.5 <= measure.high
        w = rng.exponential(size=300)
        found = weighted_mean(y + w, w) # truly E[w²]/E[w] = 2
        weighted += found.low <= 2 <= found.high
    assert 0.91 <= hits / 400 <= 0.985 and 0.89 <= weighted / 400 <= 0.985


def test_gaps_agree_with_fairlearn_where_there_are_two_classes():
    from fairlearn.metrics import demographic_parity_difference, equal_opportunity_difference, equalized_odds_difference
    y, d, sex = RNG.integers(0, 2, 400), RNG.integers(0, 2, 400), RNG.choice(["a", "b", "c"], 400)
    theirs = {"demographic_parity": demographic_parity_difference, "equal_opportunity": equal_opportunity_difference, "equalized_odds": equalized_odds_difference}
    found = gap_report(pl.DataFrame({"sex": sex}), label_terms(y[:, None], d[:, None]), 1).values
    for name, one in theirs.items(): assert found[f"{name}_difference[sex]"] == pytest.approx(one(y, d, sensitive_features=sex)), name
    worst = max(abs((d[sex == g] == c).mean() - (d[sex == h] == c).mean()) for c in (0, 1) for g in "abc" for h in "abc")
    assert gap_report(pl.DataFrame({"sex": sex}), class_terms(y, d, 2), 1).values["demographic_parity_difference[sex]"] == pytest.approx(worst)


def test_a_group_that_is_too_small_is_not_judged():
    report = gap_report(pl.DataFrame({"sex": ["a"] * 40 + ["b"] * 5}), {"bias": np.arange(45.0)}, 10)
    assert math.isnan(report.values["bias_difference[sex]"]) and report.groups[("sex",)][("b",)]["rows"] == 5


def test_which_way_is_better():
    less = {n: less_is_better(n) for n in ("mean_absolute_error", "root_mean_squared_error", "hamming_loss", "mean_pinball_loss[0.1]", "bias_difference", "coverage_error", "interval_width")}
    more = {n: less_is_better(n) for n in ("r2", "balanced_accuracy", "f1_macro", "recall[third]", "coverage")}
    assert all(less.values()) and not any(more.values())


def test_production_of_another_target_is_named():
    from mlray.judgement.gate import judge
    from mlray.values.spec import Rule
    verdict = judge({"r2": 0.5}, [Rule(metric="r2", within=0.1)], {"roc_auc": 0.9})
    assert not verdict.passed and "same target" in verdict.findings[0].why


# Weights.

def test_balanced_classes_are_scikit_learns():
    from sklearn.utils.class_weight import compute_sample_weight
    y = np.array([0, 0, 0, 0, 1, 1, 2], np.float32)
    ours = row_weights(Task("multiclass", ("y",), tuple("abc")), Train(class_weight="balanced"), y)
    theirs = compute_sample_weight("balanced", y)
    assert np.allclose(ours, theirs / theirs.mean()) and ours.mean() == pytest.approx(1)


def test_a_weight_of_two_is_the_row_twice():
    task, logits = Task("multiclass", ("y",), tuple("abcd")), LOGITS
    target, twice = torch.tensor([0.0, 1, 2, 3, 2, 0]), [0, 1, 1, 2, 3, 4, 5, 5]
    weights = row_weights(task, Train(), target.numpy(), np.array([1.0, 2, 1, 1, 1, 2]))
    assert float(loss_of(task)(logits, target, torch.from_numpy(weights))) == pytest.approx(float(loss_of(task)(logits[twice], target[twice], None)), rel=1e-5)


def test_weights_change_what_is_learned(runs, settings):
    plain = runs("binary")[1].evaluation.values
    heavy = train(spec_of("binary", 'train: {class_weight: {">140.5": 20}}', "  weight: {type: number, role: weight, min: 0}"), settings)
    assert heavy.evaluation.values["recall"] > plain["recall"] + 0.05 and heavy.evaluation.values["selection_rate"] > plain["selection_rate"]
    test = heavy.rows.parts.test
    bundle = bundle_of_run(settings, heavy)
    right = decide(bundle, predict(bundle, test, test.height)) == labels(heavy.rows.contract, test).to_numpy()
    assert heavy.evaluation.values["weighted_accuracy"] == pytest.approx(np.average(right, weights=test["weight"].to_numpy()))
    assert "weight" not in bundle.contract.features


@pytest.mark.parametrize("kind", KINDS)
def test_two_workers_give_the_same_gradient(runs, kind):
    "Weighted rows computed at once, or in two shares whose gradients are averaged."
    spec = spec_of(kind, "", "  weight: {type: number, role: weight, min: 0}")
    job = make_job(spec, read_rows(spec, runs(kind)[0]))
    network = build(job.features, job.model, 0, job.task.outputs).eval()
    inputs, y, w, loss = [torch.from_numpy(a) for a in job.rows.tensors], torch.from_numpy(job.labels), torch.from_numpy(job.weights), loss_of(job.task)

    def gradient(at):
        network.zero_grad()
        loss(network(*(i[at] for i in inputs)), y[at], w[at]).backward()
        return torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])

    even = torch.arange(len(y) // 2 * 2)
    assert torch.allclose(gradient(even), (gradient(even[::2]) + gradient(even[1::2])) / 2, atol=1e-5)


# A loss of one's own.

def absolute(logits, target): return (logits - target).abs()
def averaged(logits, target): return (logits - target).abs().mean()
def wrong(logits, target): return (logits - target).abs()[:3]
def clumsy(logits, target): return (logits @ target.unsqueeze(0)).abs()
class Needy(torch.nn.Module):
    def __init__(self, gamma): super().__init__()
def no_tensor(logits, target): return 1.0


def test_a_loss_by_import_path(runs, settings):
    plain = runs("regression")[1].evaluation.values
    for name in ("tests.test_targets:absolute", "tests.test_targets:averaged", "torch.nn.functional:huber_loss"):
        values = train(spec_of("regression", f"train: {{loss: '{name}', epochs: 30}}"), settings).evaluation.values
        assert values["r2"] > 0.25 and values["mean_absolute_error"] != plain["mean_absolute_error"]
    assert train(spec_of("multiclass", "train: {loss: 'torch.nn.functional:multi_margin_loss', epochs: 30}"), settings).evaluation.values["accuracy"] > 0.45


@pytest.mark.parametrize(("name", "letter"), [("nothing", "is written module:function"), ("nothing.here:f", "cannot be imported"), ("torch.nn.functional:nothing", "cannot be imported"),
                                              ("math:pi", "is no function"), (":f", "cannot be imported"), ("tests.test_targets:Needy", "cannot be made without arguments (TypeError: ")])
def test_a_loss_that_is_none(name, letter):
    with expect_fail(SpecError, contains=letter): loss_of(BINARY, Train(loss=name))


def test_a_loss_of_another_shape():
    task, y = Task("regression", ("y",), ("y",)), torch.zeros(6)
    with expect_fail(TrainingError, contains="answered with shape (3,) where (18,)"): loss_of(task, Train(loss="tests.test_targets:wrong"))(LOGITS[..., :1], y)
    with expect_fail(TrainingError, contains="answered with float where (18,)"): loss_of(task, Train(loss="tests.test_targets:no_tensor"))(LOGITS[..., :1], y)
    with expect_fail(TrainingError, contains="rows cannot be weighted"): loss_of(task, Train(loss="tests.test_targets:averaged"))(LOGITS[..., :1], y, torch.ones(6))


def test_a_loss_that_is_a_class_and_one_that_fails():
    "torch's losses are classes as well as functions; and what goes wrong in one is a letter that says both shapes."
    task, y, weights = Task("regression", ("y",), ("y",)), torch.arange(6.0), torch.arange(6.0)
    one, other = (loss_of(task, Train(loss=name))(LOGITS[..., :1], y, weights) for name in ("torch.nn:SmoothL1Loss", "torch.nn.functional:smooth_l1_loss"))
    assert one == other
    with expect_fail(TrainingError, contains="failed on logits of shape (18,) and labels of shape (18,), torch.float32: RuntimeError: "): loss_of(task, Train(loss="tests.test_targets:clumsy"))(LOGITS[..., :1], y)


# What is wrong is said.

@pytest.mark.parametrize(("shape", "outputs"), [((6,), 1), ((5, 1), 1), ((6, 3), 4), ((6, 3, 3), 4), ((6, 2, 3, 4), 4), ((6, 3, 2), 1)])
def test_a_network_of_another_shape_says_both(shape, outputs):
    with pytest.raises(TrainingError) as caught: logits_of(torch.zeros(shape), outputs, 6)
    assert f"shape {shape}" in str(caught.value) and "where (6, members" in str(caught.value)


def test_a_graph_of_another_shape_is_not_packed(runs, tmp_path):
    settings, run = runs("multiclass")
    bundle = bundle_of_run(settings, run)
    job = make_job(bundle.spec, run.rows)
    graph = (bundle.path / "model.onnx").read_bytes()
    with expect_fail(BundleError, contains="answers with shape"):
        pack(tmp_path / "b", bundle.spec, bundle.features, graph, {}, {}, job.valid_rows, np.zeros(len(job.valid_rows), np.float32), task=bundle.task)


def test_a_loss_that_is_no_number_names_its_batch(runs):
    job = make_job(spec_of("regression"), runs("regression")[1].rows)
    broken = job.labels.copy()
    broken[7] = np.nan
    with expect_fail(TrainingError, contains="in the batch"): list(epochs(replace(job, labels=broken)))


BAD = {
    "  y: {type: category, role: target, values: [a, b]}": "needs either positive",
    "  y: {type: category, role: target}": "found 0 values",
    "  y: {type: boolean, role: target}\n  z: {type: number, role: target}": "each of type boolean, and 'z' is of type 'number'",
    "  y: {type: number, role: target, positive: a}": "write positive_above",
    "  y: {type: number, role: target, nullable: true}": "a target is not nullable",
    "  y: {type: text, role: target}": "a target cannot be of type 'text'",
    "  y: {type: number}": "a column with role 'target'",
    "  y: {type: boolean, role: target}\nmodel: {quantiles: [0.5]}": "those of a number",
    "  y: {type: number, role: target}\nmodel: {quantiles: [0.9, 0.1]}": "quantiles must rise",
    "  y: {type: number, role: target}\nmodel: {quantiles: [0.0, 0.5]}": "greater than 0",
    "  y: {type: number, role: target}\ntrain: {class_weight: balanced}": "is a number and has no classes",
    "  y: {type: category, role: target, values: [a, bb, c]}\ntrain: {class_weight: {b: 2}}": "there is no class 'b'. Did you mean 'bb'",
    "  y: {type: category, role: target, values: [a, b, c]}\ntrain: {class_weight: {a: -2}}": "the weight of a class is more than 0",
    "  y: {type: category, role: target, values: [a, b, c]}\ntrain: {class_weight: even}": "is balanced, or a number for each class",
    "  y: {type: boolean, role: target}\n  w: {type: number, role: weight}": "min of 0 or more",
    "  y: {type: boolean, role: target}\n  w: {type: category, role: weight}": "is a number",
    "  y: {type: boolean, role: target}\n  w: {type: number, role: weight, min: 0}\n  v: {type: number, role: weight, min: 0}": "one column may have the role 'weight'; found 2",
}


@pytest.mark.parametrize(("text", "letter"), BAD.items(), ids=range(len(BAD)))
def test_a_spec_that_says_two_things(text, letter):
    with expect_fail(SpecError, contains=letter): parse_spec(f"name: bad\ndata: {{train: {{file: x.csv}}}}\ncontract:\n  x: {{type: number}}\n{text}")


def test_a_class_weight_of_a_boolean_may_be_written_as_yaml_does():
    spec = parse_spec("name: b\ndata: {train: {file: x.csv}}\ncontract:\n  x: {type: number}\n  y: {type: boolean, role: target}\ntrain: {class_weight: {true: 3}}")
    assert spec.train.class_weight == {"true": 3.0} and np.allclose(row_weights(spec.task, spec.train, np.array([0, 1], np.float32)), [0.5, 1.5])


def test_rows_that_cannot_teach_it(settings):
    for target, found, letter in [(TARGETS["multiclass"].replace("fast]", "fast, faster]"), {}, "No train row has 'faster'"),
                                  (TARGETS["regression"], {"progression": pl.lit(7.0)}, "nothing can be learned or judged from one value")]:
        spec = parse_spec(f"name: p\ndata: {{train: {{file: rows.parquet}}}}\ncontract:{FEATURES}{target}")
        rows().with_columns(**found).write_parquet(settings.root / "rows.parquet")
        with expect_fail(DataError, contains=letter): read_rows(spec, settings)


def test_what_needs_probabilities_of_two_classes_refuses_others(runs):
    from mlray.judgement.estimate import estimate
    settings, run = runs("regression")
    bundle, test = bundle_of_run(settings, run), run.rows.parts.test
    values = predict(bundle, test, test.height)
    with expect_fail(MlrayError, contains="two classes only"): estimate(values, values > 150)


# Why, what if, and how fragile: asked of every target.

WISHES = {"multiclass": ("fast", None), "multilabel": ("high_glucose", None), "regression": (None, 200.0), "quantile": (None, 200.0)}


def decision(bundle, row, schema): return decide(bundle, predict(bundle, pl.DataFrame([row], schema=schema), 1))[0]


@pytest.mark.parametrize("kind", KINDS)
def test_every_answer_is_explained_and_could_be_another(runs, kind):
    settings, run = runs(kind)
    bundle, frame = bundle_of_run(settings, run), run.rows.parts.test
    features = frame.select(bundle.contract.features)
    answer, least = WISHES[kind]
    wish, found = Wish(answer, least), []
    for row in features.head(6).iter_rows(named=True):
        why = explain(bundle, row, perturbations=400)
        place = output_of(bundle, row)
        scores = predict(bundle, pl.DataFrame([row], schema=features.schema), 1).reshape(-1)
        assert abs(why.score - scores[place or 0]) < 1e-3 * max(1, abs(why.score)) and set(why.weights) == set(bundle.contract.features)
        before = decision(bundle, row, features.schema)
        try: other = what_if(bundle, row, wish=wish)
        except MlrayError as error:
            assert "what was wished already" in str(error) and (before >= least if least else before == task_column(kind).values.index(answer) if kind == "multiclass" else False)
            continue
        if not other.found: continue
        after = decision(bundle, row | {n: new for n, (_, new) in other.changes.items()}, features.schema)
        label = {"multilabel": lambda d: d[1]}.get(kind, lambda d: d)
        assert after >= least if least else label(after) == 2 if kind == "multiclass" else label(after) != label(before)
        assert not {"age", "sex"} & set(other.changes) and other.answers[0] != other.answers[1]
        found.append(other)
    assert found and json.dumps(found[0].as_dict()) and "would be" in found[0].sentence


@pytest.mark.parametrize("kind", KINDS)
def test_every_answer_can_be_attacked(runs, kind):
    settings, run = runs(kind)
    bundle, frame = bundle_of_run(settings, run), run.rows.parts.test
    report = adversarial(network_of(bundle), bundle.features, bundle.contract, frame, bundle.threshold, (0.02, 0.5), bundle.task, tolerance_of(bundle))
    for method in ("fgsm", "pgd"): assert report.cells[method, 0.02].flipped <= report.cells[method, 0.5].flipped > 0
    noisy = shaken(bundle, frame)
    assert report.cells["pgd", 0.5].flip_rate.value > noisy.values["flip_rate[noise]"] >= 0 and attacked(bundle, frame).values.keys() == {"flip_rate[fgsm]", "flip_rate[pgd]"}


def test_a_wish_that_makes_no_sense_is_a_letter(runs):
    for kind, wish, letter in [("regression", Wish(), "at least, or at most"), ("multiclass", Wish(at_least=3.0), "predicts no number"), ("multiclass", Wish("fsat"), "Did you mean 'fast'"), ("regression", Wish(at_least=-1e9), "wished already")]:
        settings, run = runs(kind)
        bundle = bundle_of_run(settings, run)
        with expect_fail(MlrayError, contains=letter): what_if(bundle, run.rows.parts.test.select(bundle.contract.features).row(0, named=True), wish=wish)


def test_the_gates_of_a_number_speak_of_it(runs):
    from mlray.engines.gate_on_papermill import run_gates
    settings, run = runs("regression")
    done = {g.gate: g for g in run_gates(open_registry(settings), run.version, ["explanation", "robustness"], settings)}
    assert not any(g.broken for g in done.values()) and b"would be" in done["explanation"].page and {f.measure for f in done["robustness"].verdict.findings} == {"flip_rate[noise]"}


# ---- live traffic -------------------------------------------------------------------------------------------------

def journaled_rows(bundle, rows: pl.DataFrame, start: int, change=lambda said: said) -> pl.DataFrame:
    "Rows and answers as the journal gives them."
    scores = predict(bundle, rows, rows.height)
    kept_ = kept(plan(bundle.contract, bundle.profile, Keys({"1": b"key"})), rows.to_dict(as_series=False))
    said, n = change(answer_columns(predictions(bundle.task, scores, decide(bundle, scores, rows)))), rows.height
    about = {"id": [f"r{start}-{i}" for i in range(n)], "row": [0] * n, "time": [(start + i) * 10**9 for i in range(n)], "status": [200] * n, "seconds": [0.002] * n, "rows": [1] * n, "lost": [0] * n, "arm": ["production"] * n}
    return pl.DataFrame({**about, **{f"column:{k}": v for k, v in kept_.items()}, **{f"answer:{k}": v for k, v in said.items()}})


def labels_said(bundle, rows: pl.DataFrame, start: int) -> pl.DataFrame:
    "What is true of each of them, as feedback says it."
    n, targets = rows.height, bundle.task.targets
    if bundle.task.kind == "multilabel": said = {"text": [",".join(t for t in targets if row[t]) for row in rows.select(targets).iter_rows(named=True)], "number": [None] * n}
    elif bundle.task.classes: said = {"text": rows[targets[0]].to_list(), "number": [None] * n}
    else: said = {"text": [None] * n, "number": rows[targets[0]].cast(pl.Float64).to_list()}
    return pl.DataFrame({"id": [f"r{start}-{i}" for i in range(n)], "row": [0] * n, "time": [0] * n, "kind": ["label"] * n, **said, "source": [""] * n, "key": [""] * n, "caller": [""] * n}, schema=_FEEDBACK)


HOURS = [1_700_000_000 // 3600 * 3600 + 3600 * i for i in range(3)]


def kept_raw(bundle):
    "Its journal keeps the sensitive columns as they are."
    contract = {n: c.model_copy(update={"journal": "raw"} if c.role == "feature" else {}) for n, c in bundle.spec.contract.items()}
    return replace(bundle, spec=bundle.spec.model_copy(update={"contract": contract}))


def live(bundle, people: pl.DataFrame, change=lambda said: said):
    "Three hours of traffic, put away and read again, all labelled."
    hours = [people[i::3] for i in range(3)]
    windows = [count_window(bundle, journaled_rows(bundle, rows, start, change), labels_said(bundle, rows, start), Window("patients", "1", "production", start, start + 3600)) for start, rows in zip(HOURS, hours, strict=True)]
    return watched(bundle, "1", [Window.from_dict(json.loads(json.dumps(w.as_dict()))) for w in windows])


@pytest.mark.parametrize("kind", KINDS)
def test_the_promises_of_the_gate_are_measured_live_as_there(runs, kind):
    "The same terms over the same rows, from three windows instead of a table."
    settings, run = runs(kind)
    bundle, people = kept_raw(bundle_of_run(settings, run)), run.rows.checked["train"].good
    gate, seen = evaluate(bundle, people), live(bundle, people)
    assert gate.fairness.values and len(gate.fairness.values) >= 9
    for name, measure in gate.fairness.measures.items():
        found = seen.measures[name].found
        assert found.value == pytest.approx(measure.value, rel=1e-9, abs=1e-9, nan_ok=True), name
        if not np.isnan(measure.high): assert found.high == pytest.approx(measure.high, rel=0.15, abs=0.01), name # drawn, and fewer times
    rates = {n: f for n, f in gate.measures.items() if isinstance(f, dict) and n.partition("[")[0] in ("accuracy", "bias", "mean_absolute_error", "mean_prediction")}
    for name, groups_ in rates.items():
        if kind != "multilabel": assert {g: m.value for g, m in seen.measures[name].found.items()} == pytest.approx({g: m.value for g, m in groups_.items()}, nan_ok=True), name
    asked = [r for r in rules_of(bundle.spec) if r.by]
    assert [f.measure for f in seen.verdict.findings] == [r.measure for r in asked] and (seen.verdict.passed or not asked) and not seen.waiting and seen._repr_html_()


def test_a_gap_for_one_class_is_found_and_named(runs):
    "From some day on one group is never told that it goes fast; accuracy hardly moves, and the promise about that class breaks."
    settings, run = runs("multiclass")
    bundle, people = kept_raw(bundle_of_run(settings, run)), run.rows.checked["train"].good
    promise = {"metric": "equal_opportunity_difference", "by": ["sex"], "at_most": 0.45}
    bundle = replace(bundle, spec=bundle.spec.model_validate(bundle.spec.model_dump(mode="json") | {"gates": {"fairness": [promise]}}))
    alerts = (Alert(metric="equal_opportunity_difference", by=("sex",), at_most=0.45), Alert(metric="demographic_parity_difference", by=("sex",), at_most=0.3))
    sex = {f"r{start}-{i}": s for k, start in enumerate(HOURS) for i, s in enumerate(people["sex"][k::3])}
    hours = iter(HOURS)
    def unfair(said):
        start = next(hours)
        return said | {"label": ["middling" if v == "fast" and sex[f"r{start}-{i}"] == "group 2" else v for i, v in enumerate(said["label"])]}
    before, after = live(bundle, people), live(bundle, people, unfair)
    assert before.verdict.passed and not advance({}, alerts, before)[1]
    assert not after.verdict.passed and after.measures["equal_opportunity_difference[sex]"].found.low > 0.45
    told = {t.measure: t.whom for t in advance({}, alerts, after)[1]}
    assert told["equal_opportunity_difference[sex]"] == "sex=group 2: fast" and told["demographic_parity_difference[sex]"] in ("sex=group 2: fast", "sex=group 1: middling")


def test_labels_in_words_are_sets():
    task = Task("multilabel", ("fast", "high_glucose"), ("fast", "high_glucose"))
    said = pl.DataFrame({"text": ["fast, high_glucose", "", "high_glucose", "slow", "fast,slow", None]})
    assert label_sets(task, said).to_list() == [["fast", "high_glucose"], [], ["high_glucose"], None, None, None] and label_sets(task, said.clear()).to_list() == []
