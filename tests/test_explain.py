"""Explanations: lime's own answer, the same bytes everywhere, weights that add up, changes that flip, and a clear word where none of it can be had."""
import json
import math
import subprocess
import sys
import warnings
from functools import reduce
from itertools import permutations
from operator import add

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings, strategies as st

from mlray.governance.registry import bundle_of, open_registry
from mlray.judgement.counterfactual import counterfactual
from mlray.judgement.explain import Explanation, background, keeping, lime_table
from mlray.judgement.explain_image import lime_image, squares
from mlray.judgement.explain_row import lime_row
from mlray.judgement.explain_text import cosine_weights, lime_text
from mlray.judgement.importance import Summary, permutation_importance, summary
from mlray.judgement.local_line import draws, line, on_grid, words_of
from mlray.judgement.shapley import shapley
from mlray.learning.contract import Contract
from mlray.learning.profile import profile
from mlray.running.explanation import explain, explain_rows, known_rows, what_if
from mlray.shipping.bundle import decide, predict
from mlray.values.column import Column
from mlray.values.errors import ContractError, ExplanationError

NAMES = ["a", "b", "c", "d", "e"]
CONTRACT = Contract({n: Column(type="number") for n in NAMES} | {"t": Column(type="boolean", role="target")})
RNG = np.random.default_rng(0)
ROWS = pl.DataFrame(RNG.normal(size=(300, 5)), schema=NAMES)
KNOWN = background(CONTRACT, ROWS)
ROW = ROWS.row(3, named=True)


def model(frame: pl.DataFrame) -> np.ndarray:
    a, b, c = (frame[n].to_numpy() for n in "abc")
    return 1 / (1 + np.exp(-2 * a + b * c))


# lime

def fed(monkeypatch) -> dict:
    "What lime hands to its regression, and what comes back."
    from lime.lime_base import LimeBase
    seen, real = {}, LimeBase.explain_instance_with_data

    def spy(self, data, labels, distances, label, count, **more):
        seen.update(data=np.asarray(data), scores=labels[:, label], weights=self.kernel_fn(distances), answer=real(self, data, labels, distances, label, count, **more))
        return seen["answer"]
    monkeypatch.setattr(LimeBase, "explain_instance_with_data", spy)
    return seen


def same(seen: dict, count: int | None) -> None:
    mine = line(seen["data"].astype(bool), seen["scores"], seen["weights"], count)
    intercept, weights, fidelity, _ = seen["answer"]
    assert {int(i) for i, _ in weights} == set(mine.chosen.tolist())
    theirs = dict((int(i), w) for i, w in weights)
    assert max(abs(theirs[i] - w) for i, w in zip(mine.chosen.tolist(), mine.weights, strict=True)) < 1e-6 * np.abs(seen["scores"]).max()
    assert abs(intercept - mine.intercept) < 1e-6 and abs(fidelity - mine.fidelity) < 1e-5


@pytest.mark.parametrize("count", [8, 12])
def test_tables_are_explained_as_lime_does(monkeypatch, count):
    from lime.lime_tabular import LimeTabularExplainer
    seen, x = fed(monkeypatch), np.random.default_rng(1).normal(size=(400, 12))
    w = np.random.default_rng(2).normal(size=12)
    both = lambda z: np.stack([1 - 1 / (1 + np.exp(-z @ w)), 1 / (1 + np.exp(-z @ w))], axis=1)
    LimeTabularExplainer(x, random_state=0).explain_instance(x[0], both, num_features=count)
    assert seen["data"].shape == (5000, 12)
    same(seen, count if count < 12 else None)


def test_with_weights_on_the_grid_it_is_lime_to_twelve_digits(monkeypatch):
    "What is left of the difference is the grid of 24 bits, and nothing else."
    from lime.lime_base import LimeBase
    data = np.random.default_rng(0).random((2000, 9)) < 0.5
    data[0] = True
    weights = np.rint(np.random.default_rng(1).random(2000) * 2**24) / 2**24
    scores, unit = on_grid(data @ np.arange(9) / 40 + data[:, 0] * data[:, 1] / 10)
    scores = scores * unit
    base = LimeBase(lambda d: weights, random_state=0)
    intercept, found, fidelity, _ = base.explain_instance_with_data(data.astype(float), scores[:, None], np.zeros(2000), 0, 9, feature_selection="none")
    mine = line(data, scores, weights)
    assert np.abs(mine.weights - np.array([w for _, w in sorted(found)])).max() < 1e-12 and abs(mine.intercept - intercept) < 1e-12 and abs(mine.fidelity - fidelity) < 1e-12


@pytest.mark.filterwarnings("ignore")
def test_texts_are_explained_as_lime_does(monkeypatch):
    from lime.lime_text import LimeTextExplainer
    seen = fed(monkeypatch)
    score = lambda texts: np.array([[1 - p, p] for p in (0.1 + 0.5 * ("good" in t) + 0.2 * ("wine" in t and "food" in t) for t in texts)])
    LimeTextExplainer(random_state=0).explain_instance("good food and good wine for all of us here", score, num_features=7, num_samples=1000)
    same(seen, 7)
    assert np.abs(cosine_weights(seen["data"].astype(bool), 25, 100) - seen["weights"]).max() < 1e-9


def test_images_are_explained_as_lime_does(monkeypatch):
    from lime.lime_image import LimeImageExplainer
    seen, image, patches = fed(monkeypatch), np.random.default_rng(0).random((12, 12, 3)), squares(12, 12, 4)
    monkeypatch.setattr("lime.lime_image.tqdm", lambda x: x)
    score = lambda images: np.stack([images.mean((1, 2, 3)), images[:, :4, :4].mean((1, 2, 3)) ** 2], axis=1)
    LimeImageExplainer(random_state=0).explain_instance(image, score, labels=(1,), top_labels=None, hide_color=0, num_samples=500, segmentation_fn=lambda _: patches)
    same(seen, None)
    assert np.abs(cosine_weights(seen["data"].astype(bool), 0.25) - seen["weights"]).max() < 1e-9


# bytes

CHILD = """
import sys; sys.path.insert(0, {root!r})
from tests.test_explain import *
print(lime_table(model, KNOWN, ROW, "m").json()); print(shapley(model, KNOWN, ROW, "m").json()); print(lime_text(lambda ts: np.array([0.1 * len(t) for t in ts]), "one two three", "m").json())
"""


@pytest.mark.parametrize("changes", [{"OPENBLAS_CORETYPE": "Nehalem"}, {"OPENBLAS_NUM_THREADS": "3"}, {"NPY_DISABLE_CPU_FEATURES": "AVX512F AVX512CD AVX512_SKX AVX2 FMA3"}], ids=["another BLAS kernel", "threads", "no vector units"])
def test_the_same_bytes_on_another_machine(changes):
    "Another BLAS, another number of threads, a CPU without AVX: the sums come out the same, to the bit."
    import os
    from pathlib import Path
    root = str(Path(__file__).parents[1])
    here = [lime_table(model, KNOWN, ROW, "m").json(), shapley(model, KNOWN, ROW, "m").json(), lime_text(lambda ts: np.array([0.1 * len(t) for t in ts]), "one two three", "m").json()]
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", CHILD.format(root=root)], env={**os.environ, **changes}, capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.splitlines() == here


def test_the_draws_are_what_they_were():
    "Raw words are promised by numpy; if these change, every explanation does."
    assert draws(words_of({"age": 39}, "model"), (10,), 6).tolist() == [5, 3, 3, 2, 0, 5, 2, 5, 4, 1]


def test_order_of_neighbours_does_not_matter():
    rng = np.random.default_rng(0)
    near, scores, weights = rng.random((999, 6)) < 0.5, rng.normal(size=999) * 1e5, rng.random(999)
    one, other = (line(near[o], scores[o], weights[o]) for o in (np.arange(999), rng.permutation(999)))
    assert (one.weights == other.weights).all() and one.intercept == other.intercept and one.fidelity == other.fidelity


def test_another_row_or_model_has_other_draws():
    why = {lime_table(model, KNOWN, ROW, digest, perturbations=100).json() for digest in "ab"}
    assert len(why) == 2 and lime_table(model, KNOWN, {n: ROW[n] for n in reversed(NAMES)}, "a", perturbations=100).json() in why


# figures

def test_stability_tells_chance_from_effect():
    noisy = lambda frame: np.random.default_rng(0).random(frame.height)
    assert lime_table(noisy, KNOWN, ROW).stability < 0.5 < 0.98 < lime_table(model, KNOWN, ROW).stability


def test_the_error_is_that_of_other_draws():
    "The jackknife's standard error against the spread of forty explanations that differ in their draws alone."
    many = [lime_table(model, KNOWN, ROW, str(i), perturbations=500) for i in range(40)]
    for name in NAMES:
        spread = np.std([e.weights[name] for e in many], ddof=1)
        told = np.mean([r.error for e in many for r in e.reasons if r.feature == name])
        assert 0.6 < told / spread < 1.6, name


def test_fidelity_is_that_of_a_line():
    flat = lambda frame: 0.3 * (frame["a"].to_numpy() > np.median(ROWS["a"].to_numpy())) + 0.1
    bent = lambda frame: np.sign(frame["a"].to_numpy() * frame["b"].to_numpy()) * 0.5
    assert lime_table(flat, KNOWN, ROW).fidelity > 0.2 > lime_table(bent, KNOWN, ROW).fidelity


# shapley

def test_sampled_values_are_those_of_all_orders():
    "Every order of five features, by the definition."
    small = background(CONTRACT, ROWS.head(20))
    def worth(known: set) -> float: return float(model(small.frame.with_columns(pl.lit(ROW[n]).alias(n) for n in known)).mean())
    exact = dict.fromkeys(NAMES, 0.0)
    for order in permutations(NAMES):
        for i, n in enumerate(order): exact[n] += (worth({*order[:i + 1]}) - worth({*order[:i]})) / math.factorial(5)
    for method, close in (("exact", 1e-6), ("permutation", 0.03), ("sampling", 0.05)):
        found = shapley(model, small, ROW, method=method, pairs=400)
        assert max(abs(found.weights[n] - exact[n]) for n in NAMES) < close, method
        assert abs(found.base + sum(found.weights.values()) - found.score) < 5e-6
    assert exact["d"] == 0 == shapley(model, small, ROW).weights["d"]


@settings(max_examples=30, deadline=None)
@given(scale=st.sampled_from([1e-9, 1.0, 1e9]), shift=st.floats(-5, 5), method=st.sampled_from(["permutation", "sampling"]))
def test_weights_add_up_on_every_scale(scale, shift, method):
    found = shapley(lambda frame: scale * (model(frame) + shift), KNOWN, ROW, method=method, pairs=10)
    assert abs(found.base + sum(found.weights.values()) - found.score) <= 1e-5 * scale * (abs(shift) + 2)


# counterfactuals

def test_the_smallest_change_is_the_smallest():
    "On a step in one feature the change ends just behind the step, and one feature is changed where one is enough."
    step = lambda frame: np.where(frame["a"].to_numpy() > 1.0, 0.9, 0.1)
    found = counterfactual(step, KNOWN, {**ROW, "a": 0.0})
    assert list(found.changes) == ["a"] and 1.0 < found.changes["a"][1] < 1.05
    both = lambda frame: np.where((frame["a"].to_numpy() > 1) & (frame["b"].to_numpy() > 0.5), 0.9, 0.1)
    assert set(counterfactual(both, KNOWN, {**ROW, "a": 0.0, "b": 0.0}).changes) == {"a", "b"}
    assert not counterfactual(both, KNOWN, {**ROW, "a": 0.0, "b": 0.0}, most=1).found


def test_a_counterfactual_keeps_rules_across_columns():
    contract = Contract({"net": Column(type="integer", min=0), "gross": Column(type="integer", min=0), "t": Column(type="boolean", role="target")}, {"sane": "net <= gross"})
    known = background(contract, pl.DataFrame({"net": list(range(100)), "gross": [x + 5 for x in range(100)]}))
    found = counterfactual(lambda f: 1 / (1 + np.exp(-(f["net"].to_numpy() - 50.5))), known, {"net": 10, "gross": 20})
    changed = {"net": 10, "gross": 20} | {n: after for n, (_, after) in found.changes.items()}
    assert found.found and changed["net"] == 51 and changed["gross"] >= 51


# bad input

def raises(words: str, call, kind=ExplanationError) -> None:
    with pytest.raises(kind, match=words): call()


def test_what_cannot_be_explained_is_refused():
    nan = lambda frame: np.where(np.arange(frame.height) % 2, np.nan, 0.5)
    for explained in (lambda f: lime_table(f, KNOWN, ROW), lambda f: shapley(f, KNOWN, ROW), lambda f: counterfactual(f, KNOWN, ROW), lambda f: permutation_importance(f, ROWS, np.zeros(300), lambda y, p: 0.0),
                      lambda f: lime_text(lambda texts: f(pl.DataFrame({"t": texts})), "one two"), lambda f: lime_image(lambda images: f(pl.DataFrame({"i": range(len(images))})), np.zeros((4, 4)))):
        raises("NaN or infinite" if explained is not None else "", lambda e=explained: e(lambda frame: np.full(frame.height, np.nan)))
        raises("answered with an array of shape", lambda e=explained: e(lambda frame: np.zeros(frame.height + 1)))
    raises("2500 of 5000 scores", lambda: lime_table(nan, KNOWN, ROW))
    for rows in (0, 1): raises("needs two at least", lambda r=rows: background(CONTRACT, ROWS.head(r)))
    raises("no column 'a'", lambda: background(CONTRACT, ROWS.drop("a")))
    raises("a: expected", lambda: lime_table(model, KNOWN, {**ROW, "a": "high"}), ContractError)
    raises("never missing|expected", lambda: shapley(model, KNOWN, {n: v for n, v in ROW.items() if n != "a"}), ContractError)
    raises("not a feature", lambda: counterfactual(model, KNOWN, {**ROW, "t": True}), ContractError)
    raises("Between 50", lambda: lime_table(model, KNOWN, ROW, perturbations=10))
    raises("output=0 to 2", lambda: lime_table(lambda f: np.zeros((f.height, 3)), KNOWN, ROW))
    raises("output 3 is asked for", lambda: lime_table(lambda f: np.zeros((f.height, 3)), KNOWN, ROW, output=3))


def test_a_constant_column_weighs_nothing():
    rows = ROWS.with_columns(d=pl.lit(2.0))
    known, row = background(CONTRACT, rows), {**ROW, "d": 2.0}
    assert lime_table(model, known, row).weights["d"] == 0 == shapley(model, known, row).weights["d"]
    assert permutation_importance(model, rows, model(rows) > 0.5, lambda y, p: float((y == (p > 0.5)).mean())).as_dict()["d"] == 0


def test_one_of_several_outputs():
    three = lambda frame: np.stack([model(frame), 1 - model(frame), 0 * model(frame)], axis=1)
    first, second = (lime_table(three, KNOWN, ROW, output=i) for i in (0, 1))
    assert first == lime_table(model, KNOWN, ROW) and all(abs(first.weights[n] + second.weights[n]) < 2e-6 for n in NAMES)
    assert set(lime_table(three, KNOWN, ROW, output=2).weights.values()) == {0.0}


@settings(max_examples=40, deadline=None)
@given(values=st.lists(st.tuples(st.none() | st.floats(-1e12, 1e12), st.none() | st.text(max_size=3), st.none() | st.booleans(), st.integers(-5, 5)), min_size=2, max_size=8))
def test_any_lawful_rows_are_a_background(values):
    contract = Contract({"x": Column(type="number", nullable=True), "c": Column(type="category", nullable=True), "b": Column(type="boolean", nullable=True), "i": Column(type="integer")} | {"t": Column(type="boolean", role="target")})
    frame = pl.DataFrame(values, schema={"x": pl.Float64, "c": pl.String, "b": pl.Boolean, "i": pl.Int64}, orient="row")
    if not keeping(contract, frame).all(): return
    known, row = background(contract, frame), frame.row(0, named=True)
    def score(asked):
        assert keeping(contract, asked).all()
        return (asked["i"] + asked["x"].is_null()).to_numpy().astype(float)
    for why in (lime_table(score, known, row, perturbations=60), shapley(score, known, row, pairs=4)):
        assert Explanation.from_dict(json.loads(why.json())) == why and 0 <= why.stability <= 1 and why.fidelity <= 1
        assert why._repr_html_().count("<svg") == 4 and "<script" not in why._repr_html_()


def test_a_face_shows_text_and_not_markup():
    contract = Contract({"c": Column(type="category"), "t": Column(type="boolean", role="target")})
    known = background(contract, pl.DataFrame({"c": ["<script>alert(1)</script>", "b"]}))
    assert "<script" not in lime_table(lambda f: (f["c"] == "b").to_numpy() * 1.0, known, {"c": "<script>alert(1)</script>"})._repr_html_()


# bundles

def test_a_bundle_is_explained_from_itself_alone(trained):
    from typer.testing import CliRunner

    from mlray.cli import app
    settings_, run = trained
    bundle = bundle_of(open_registry(settings_), run.version)
    frame = run.rows.parts.test.select(bundle.contract.features)
    row = frame.row(0, named=True)
    why = explain(bundle, row)
    assert why.json() == explain(bundle, row, known=known_rows(bundle)).json() and abs(why.score - predict(bundle, frame.head(1), 1)[0]) < 1e-6
    found = what_if(bundle, row)
    if found.found:
        changed = pl.DataFrame([row | {n: after for n, (_, after) in found.changes.items()}], schema=frame.schema)
        assert decide(bundle, predict(bundle, changed, 1))[0] != decide(bundle, predict(bundle, frame.head(1), 1))[0] and not {"age", "sex"} & set(found.changes)
    env = {"MLRAY_HOME": str(settings_.home)}
    for method in ("lime", "shap"):
        said = CliRunner().invoke(app, ["explain", "diabetes/1", json.dumps(row), "--method", method, "--json"], env=env)
        assert said.exit_code == 0 and json.loads(said.stdout) == explain(bundle, row, method).as_dict() | {"reasons": [vars(r) for r in explain(bundle, row, method).reasons]}
    refused = CliRunner().invoke(app, ["explain", "diabetes/1", json.dumps({**row, "age": 300})], env=env)
    assert isinstance(refused.exception, ContractError) and "age: expected at most 120" in str(refused.exception)


def test_summaries_do_not_hang_on_the_division(trained):
    settings_, run = trained
    bundle = bundle_of(open_registry(settings_), run.version)
    frame = run.rows.parts.test.head(7)
    whole = explain_rows(bundle, frame, perturbations=200)
    parts = reduce(add, (explain_rows(bundle, part, perturbations=200) for part in (frame[5:], frame[:2], frame[2:5])))
    assert whole == parts and Summary.from_dict(json.loads(json.dumps(whole.as_dict()))) == whole and whole.rows == 7


@pytest.mark.ray
def test_ray_explains_as_one_process_does(trained, ray_cluster):
    from mlray.engines.explain_on_ray import explain_on_ray
    settings_, run = trained
    bundle = bundle_of(open_registry(settings_), run.version)
    frame = run.rows.parts.test.head(20)
    assert explain_on_ray(bundle, frame, perturbations=200, batch=6) == explain_rows(bundle, frame, perturbations=200)
    assert explain_on_ray(bundle, frame.head(0)).rows == 0


def test_summary_of_one():
    why = lime_table(model, KNOWN, ROW, perturbations=100)
    assert summary(why).values["fidelity"] == why.fidelity and math.isnan(Summary().values["fidelity"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Summary() + summary(why) == summary(why)


# rows of texts, pictures, dates

@pytest.fixture(scope="module")
def shipped_run(tmp_path_factory):
    "A run of a shipped spec, shortened."
    from mlray.running.run import train
    from mlray.values.settings import Settings, shipped
    from mlray.values.spec import read_spec

    def run_of(name: str):
        home = tmp_path_factory.mktemp(name)
        place = Settings(root=home, home=home / "home", tracking="disabled")
        run = train(read_spec(shipped("configs") / f"{name}.yaml", ["train.epochs=3"]), place)
        return place, run, bundle_of(open_registry(place), run.version)
    return run_of


@pytest.mark.parametrize(("name", "column"), [("digits", "pixels"), ("docstrings", "text")])
def test_pictures_and_texts_of_a_bundle_are_explained(shipped_run, name, column):
    from typer.testing import CliRunner

    from mlray.cli import app
    from mlray.engines.gate_on_papermill import run_gates
    place, run, bundle = shipped_run(name)
    frame = run.rows.parts.test.select(bundle.contract.features)
    row = frame.row(0, named=True)
    for known in (known_rows(bundle), known_rows(bundle, run.rows.parts.train)):
        why = explain(bundle, row, known=known, perturbations=1000)
        assert why.json() == explain(bundle, row, known=known, perturbations=1000).json() and len(why.reasons) > 5 and set(why.weights) == {column} and why.stability > 0.5
        assert set(explain(bundle, row, "shap", known, perturbations=100).weights) == {column}
    other = what_if(bundle, row)
    assert other.found and other.answers[0] != other.answers[1] and set(other.changes.values()) == {("there", "left out")}
    said = CliRunner().invoke(app, ["explain", f"{name}/1", json.dumps(row), "--json"], env={"MLRAY_HOME": str(place.home)})
    assert said.exit_code == 0 and json.loads(said.stdout)["reasons"][0]["feature"] == column
    if column == "text": return
    (gate,) = run_gates(open_registry(place), run.version, ["explanation"], place)
    assert not gate.broken and {f.measure for f in gate.verdict.findings} == {"stability", "fidelity", "nonsense_share"}


def test_a_patch_that_a_picture_hangs_on_is_found():
    contract = Contract({"picture": Column(type="array", length=64), "t": Column(type="boolean", role="target")})
    pictures = np.random.default_rng(0).random((400, 64))
    known = background(contract, pl.DataFrame({"picture": pl.Series(pictures, dtype=pl.Array(pl.Float64, 64))}))
    for at in (0, 27, 63):
        why = lime_row(lambda f, at=at: f["picture"].to_numpy()[:, at], known, {"picture": [1.0] * 64})
        assert why.reasons[0].said.startswith(f"picture[{at // 8}, {at % 8}]") and why.reasons[0].weight > 10 * abs(why.reasons[1].weight)


def test_a_long_text_is_taken_in_passages():
    contract = Contract({"note": Column(type="text"), "t": Column(type="boolean", role="target")})
    known = background(contract, pl.DataFrame({"note": ["a b", "c"]}))
    note = " ".join(f"word{i}" for i in range(1000))
    why = lime_row(lambda f: f["note"].str.contains(r"\bword503\b").to_numpy() * 1.0, known, {"note": note})
    assert len(why.reasons) == 50 and why.reasons[0].said == "“word500 … word519” is in note" and why.reasons[0].weight > 0.9
    assert {r.feature for r in why.reasons} == {"note"} and why.weights["note"] == pytest.approx(math.fsum(r.weight for r in why.reasons))


@pytest.mark.parametrize("value", [None, "", "…"])
def test_no_word_is_a_value_like_any_other(value):
    contract = Contract({"note": Column(type="text", nullable=True), "n": Column(type="number"), "t": Column(type="boolean", role="target")})
    known = background(contract, pl.DataFrame({"note": ["ill", None, "", "well"] * 25, "n": np.arange(100.0)}))
    why = lime_row(lambda f: f["note"].is_null().to_numpy() * 1.0, known, {"note": value, "n": 3.0})
    assert len(why.reasons) == 2 and (abs(why.weights["note"] - 1) < 0.1 if value is None else why.weights["note"] < 0)


def test_days_and_times_are_cut_like_numbers():
    from datetime import date, datetime, timedelta
    contract = Contract({"day": Column(type="date"), "moment": Column(type="datetime", time_zone="Europe/Berlin"), "local": Column(type="datetime"), "took": Column(type="duration"), "t": Column(type="boolean", role="target")})
    days = [date(2024, 1, 1) + timedelta(days=i) for i in range(200)]
    frame = pl.DataFrame({"day": days, "moment": [f"{d}T12:00:00+01:00" for d in days], "local": [datetime(d.year, d.month, d.day) for d in days], "took": [timedelta(minutes=i) for i in range(200)]}).with_columns(pl.col("moment").str.to_datetime(time_zone="Europe/Berlin"))
    def late(rows): return (rows["day"] > date(2024, 4, 10)).to_numpy() * 0.5 + (rows["took"] > timedelta(minutes=100)).to_numpy() * 0.25
    row = {"day": "2024-06-30", "moment": "2024-02-01T00:00:00Z", "local": "2024-02-01T00:00:00", "took": "PT7200S"}
    for known in (background(contract, frame), background(contract, profile(contract, frame))):
        why = lime_row(late, known, row)
        assert why.weights["day"] > 0.3 and why.weights["took"] > 0.1 and abs(why.weights["moment"]) < 0.03 and why.reasons[0].said.startswith("day > 2024-0")
        other = counterfactual(late, known, row, 0.5)
        assert other.found and set(other.changes) == {"day"} and other.changes["day"] == (date(2024, 6, 30), date(2024, 4, 10)) and json.dumps(other.as_dict())
        shapley(late, known, row, pairs=20)
