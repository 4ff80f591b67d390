"""Estimators travel like networks: the same bits for every size of batch, the same bytes for the same spec, no library of theirs needed to answer."""
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings as hypothesis, strategies as st
from onnx import TensorProto, helper

from mlray.governance.registry import bundle_of, open_registry
from mlray.learning.estimator import check_batches, fit, front, make_estimator, score_of
from mlray.learning.estimator_graph import answer, model_of
from mlray.learning.features import Category, Features, Matrix, Number
from mlray.running.reproduce import reproduce
from mlray.running.run import LocalBackend, train
from mlray.shipping.bundle import decide, predict
from mlray.values.errors import SpecError, TrainingError
from mlray.values.settings import Settings
from mlray.values.spec import read_spec

KINDS = {"sklearn.ensemble:HistGradientBoostingClassifier": {"max_iter": 30}, "lightgbm:LGBMClassifier": {"n_estimators": 40, "min_child_samples": 5}, "xgboost:XGBClassifier": {"n_estimators": 30},
         "sklearn.linear_model:LogisticRegression": {"C": 0.5}, "sklearn.ensemble:RandomForestClassifier": {"n_estimators": 20}}
EXTRA = {"lightgbm", "xgboost"}


def available(name):
    module = name.split(":")[0].split(".")[0]
    if module in EXTRA: pytest.importorskip(module)


def rows_of(count, seed, classes=2):
    "Numbers with holes, ties and large values, categories with missing and unknown ones, and labels that hang on both."
    draws = np.random.default_rng(seed)
    numbers = draws.normal(size=(count, 5)).astype(np.float32) * np.array([1, 1, 1e-3, 1e5, 1], np.float32)
    numbers[:, 1] = numbers[:, 1].round(1)
    codes = np.column_stack([draws.integers(0, 7, count), draws.integers(2, 14, count)]).astype(np.int64)
    score = numbers[:, 0] + (codes[:, 0] % 3) + np.nan_to_num(numbers[:, 1]) + draws.normal(size=count) * 0.5
    labels = (np.digitize(score, np.quantile(score, np.linspace(0, 1, classes + 1)[1:-1])) if classes else 2.5 * score).astype(np.float32)
    numbers[draws.random(numbers.shape) < 0.1] = np.nan
    return Matrix(numbers, codes, np.empty((len(numbers), 0), np.float32), np.empty((len(numbers), 0), np.int64)), labels


FEATURES = Features(tuple(Number(n, 0.0, (), (), ()) for n in "abcde"), (Category("f", tuple("uvwxy")), Category("g", tuple("ABCDEFGHIJKL"))))


def fitted(name, parameters, classes=2, seed=0, **more):
    rows, labels = rows_of(1500, seed, classes)
    estimator = make_estimator(name, parameters, 0, classes=tuple(map(str, range(classes))) if classes else ())
    return fit(estimator, FEATURES, rows[:1000], labels[:1000], rows[1000:], labels[1000:], **more), rows, labels, estimator


@pytest.mark.parametrize("name", KINDS)
def test_a_row_gets_the_same_bits_alone_and_in_any_batch(name):
    available(name)
    made, _, _, _ = fitted(name, KINDS[name])
    asked, _ = rows_of(4096 + 7, 1)
    together = answer(made.graph, asked)
    for size in (1, 2, 3, 7, 64, 1000, 4096):
        for at in range(0, min(len(asked), size * 40), size): np.testing.assert_array_equal(answer(made.graph, asked[at:at + size]), together[at:at + size])
    assert np.isfinite(together).all() and together.std() > 0.1


@pytest.mark.parametrize("name", KINDS)
def test_a_graph_answers_as_its_estimator_for_rows_it_never_saw(name):
    available(name)
    made, rows, labels, estimator = fitted(name, KINDS[name])
    before = front(type(estimator).__name__, FEATURES, rows[:1000])
    asked, _ = rows_of(3000, 2)
    np.testing.assert_allclose(answer(made.graph, asked), score_of(estimator, answer(before, asked)), atol=1e-5)
    assert ((made.answers >= 0.5) == labels[1000:]).mean() > 0.8


@pytest.mark.parametrize(("name", "classes"), [("sklearn.ensemble:HistGradientBoostingClassifier", 3), ("lightgbm:LGBMClassifier", 3), ("sklearn.linear_model:LogisticRegression", 3),
                                               ("sklearn.ensemble:HistGradientBoostingRegressor", 0), ("lightgbm:LGBMRegressor", 0), ("sklearn.linear_model:Ridge", 0), ("sklearn.ensemble:RandomForestRegressor", 0)])
def test_several_classes_and_numbers(name, classes):
    available(name)
    made, rows, labels, _ = fitted(name, {}, classes)
    answers = answer(made.graph, rows[1000:])
    assert answers.shape == ((500, 3) if classes else (500,))
    if classes: np.testing.assert_allclose(answers.sum(1), 1, atol=1e-5)
    right = (answers.argmax(1) == labels[1000:]).mean() if classes else np.corrcoef(answers, labels[1000:])[0, 1]
    assert right > 0.6


@hypothesis(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 12), st.booleans())
def test_trees_of_any_shape_are_written_out_exactly(seed, leaves, early):
    "Histogram boosting is converted here: thresholds, missing numbers, and categories, seen or not."
    made, rows, _, estimator = fitted("sklearn.ensemble:HistGradientBoostingClassifier", {"max_iter": 8, "max_leaf_nodes": leaves, "min_samples_leaf": 3}, seed=seed, **({"patience": 2} if early else {}))
    before, (asked, _) = front("HistGradientBoosting", FEATURES, rows), rows_of(500, seed + 1)
    asked.codes[:50] = [[1, 0]] * 50 # unknown, missing
    np.testing.assert_allclose(answer(made.graph, asked), score_of(estimator, answer(before, asked)), atol=1e-6)


def test_a_graph_whose_answer_depends_on_the_others_is_refused():
    nodes = [helper.make_node("ReduceMean", ["numbers", "one"], ["each"], keepdims=0), helper.make_node("ReduceMax", ["numbers"], ["most"], keepdims=0), helper.make_node("Sub", ["each", "most"], ["score"])]
    graph = model_of(nodes, {"numbers": (TensorProto.FLOAT, ["rows", 5])}, {"score": (TensorProto.FLOAT, ["rows"])}, {"one": np.array([1])}, "g").SerializeToString()
    rows = Matrix(np.random.default_rng(0).normal(size=(40, 5)).astype(np.float32), np.zeros((40, 0), np.int64), np.empty((40, 0), np.float32), np.empty((40, 0), np.int64))
    with pytest.raises(TrainingError, match="Odd answers a row otherwise in a batch of 1 than in one of 40"): check_batches(graph, rows, "Odd")


@pytest.mark.parametrize(("name", "parameters", "classes", "said"), [
    ("sklearn.ensemble:HistGradientBostingClassifier", {}, 2, "Did you mean 'HistGradientBoostingClassifier'"), ("sklearn.linear_model:LogisticRegression", {"c": 1}, 2, "no parameter 'c'"),
    ("lightgbm:LGBMClassifier", {"n_estimatos": 9}, 2, "Did you mean 'n_estimators'"), ("nowhere:Model", {}, 2, "cannot be imported"), ("sklearn.svm:LinearSVC", {}, 2, "gives no probabilities"),
    ("lightgbm:LGBMClassifier", {}, 0, "is a classifier"), ("sklearn.linear_model:Ridge", {}, 2, "gives no probabilities")])
def test_what_cannot_be_made_is_a_letter(name, parameters, classes, said):
    available(name)
    with pytest.raises(SpecError, match=said): make_estimator(name, parameters, 0, classes=("a", "b")[:classes])


def test_parameters_that_do_not_fit_are_a_letter():
    with pytest.raises(TrainingError, match="HistGradientBoostingClassifier cannot be fitted: The 'max_iter' parameter"): fitted("sklearn.ensemble:HistGradientBoostingClassifier", {"max_iter": -3})
    with pytest.raises(SpecError, match="cannot stop early"): fitted("sklearn.linear_model:LogisticRegression", {}, patience=3)
    with pytest.raises(SpecError, match="takes no weights"): fitted("sklearn.neighbors:KNeighborsClassifier", {}, weights=np.ones(1000, np.float32))


@pytest.mark.parametrize(("override", "said"), [
    (["model.estimator=lightgbm:LGBMClassifier", "model.members=4"], "members belongs to a network"), (["model.parameters={a: 1}"], "parameters are those of an estimator"), (["model.estimator=LGBMClassifier"], "model.estimator"),
    (["model.estimator=lightgbm:LGBMClassifier", "train.from=diabetes/1"], "fitted anew each time"), (["model.estimator=lightgbm:LGBMClassifier", "train.loss=a:b"], "train.loss is that of a network"),
    (["model.estimator=lightgbm:LGBMClassifier", "search={trials: 2, space: {model.depth: {low: 1, high: 2}}}"], "there is no 'model.depth' to search")])
def test_a_spec_that_mixes_network_and_estimator_is_a_letter(override, said):
    with pytest.raises(SpecError, match=said): read_spec("configs/diabetes.yaml", override)


@pytest.fixture(scope="module")
def place(tmp_path_factory): return Settings(env="local", home=tmp_path_factory.mktemp("home"))


@pytest.mark.parametrize("name", ["sklearn.ensemble:HistGradientBoostingClassifier", "lightgbm:LGBMClassifier"])
def test_an_estimator_is_trained_shipped_and_made_again_to_the_bit(name, place):
    available(name)
    run = train(read_spec("configs/diabetes.yaml", [f"model.estimator={name}"]), place)
    bundle = bundle_of(open_registry(place), run.version)
    assert run.evaluation.values["roc_auc"] > 0.7 and {p for p in bundle.provenance["packages"]} >= {"scikit-learn", "skl2onnx"}
    again = reproduce(bundle, str(run.version), place, LocalBackend())
    assert again.identical and not again.differences
    scores = predict(bundle, run.rows.parts.test, run.rows.parts.test.height)
    alone = np.concatenate([predict(bundle, run.rows.parts.test[i], 1) for i in range(20)])
    np.testing.assert_array_equal(alone, scores[:20])
    assert decide(bundle, scores).dtype == bool


def test_whoever_answers_needs_no_library_of_estimators(place):
    run = train(read_spec("configs/diabetes.yaml", ["model.estimator=sklearn.ensemble:HistGradientBoostingClassifier", "model.calibration=platt"]), place)
    path = bundle_of(open_registry(place), run.version).path
    code = (f"import sys\nfrom mlray.shipping.bundle import load_bundle, predict\nb = load_bundle({str(path)!r})\nprint(predict(b, {{n: [None] for n in b.contract.features}}, 1)[0])\n"
            "print(sorted({'torch', 'sklearn', 'pandas', 'fairlearn', 'skl2onnx', 'lightgbm', 'xgboost', 'onnxmltools', 'onnx'} & set(sys.modules)))")
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split("\n")
    assert 0 < float(said[0]) < 1 and said[1] == "[]"


def test_parameters_can_be_searched():
    spec = read_spec("configs/diabetes.yaml", ["model.estimator=lightgbm:LGBMClassifier", "search={trials: 3, space: {model.parameters.num_leaves: {low: 4, high: 31, integer: true}}}"])
    from mlray.values.spec import changed
    assert changed(spec, {"model.parameters.num_leaves": 7}).model.parameters == {"num_leaves": 7}


def test_weights_of_classes_reach_an_estimator(place):
    plain, heavy = (train(read_spec("configs/diabetes.yaml", ["model.estimator=sklearn.linear_model:LogisticRegression", *more]), place).evaluation.values["selection_rate"]
                    for more in ([], ["train.class_weight={'>140.5': 5, '<=140.5': 1}"]))
    assert heavy > plain + 0.1


