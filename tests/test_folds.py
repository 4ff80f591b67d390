"""Networks that each keep other rows back: dealt fairly, resumed and spread to the same bits, calibrated on answers that nobody had seen, and refused where a network would see what it is held against."""
import json
import threading
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings as hypothesis, strategies as st

from mlray.governance.registry import bundle_of, open_registry
from mlray.learning.calibration import calibrate
from mlray.learning.contract import Contract
from mlray.learning.features import apply
from mlray.learning.folds import deal, epochs_of, kept_back, out_of_fold
from mlray.learning.model import dump_state, load_state
from mlray.learning.network import fitted, scores
from mlray.measures.threshold import choose
from mlray.running.card import dossier, model_card
from mlray.running.data_sheet import data_sheet
from mlray.running.reproduce import reproduce
from mlray.running.run import LocalBackend, make_job, train
from mlray.running.tracking import MemoryTracker
from mlray.running.white_box import attacked
from mlray.shipping.bundle import predict
from mlray.sources.rows import read_rows
from mlray.values.column import Column
from mlray.values.data import Split
from mlray.values.decision import Threshold
from mlray.values.errors import DataError, SpecError, TrainingError
from mlray.values.settings import Settings
from mlray.values.spec import changed, parse_spec, read_spec
from tests.test_targets import KINDS, spec_of

SPEC = "configs/diabetes.yaml"
SMALL = ("model={network: mlp, hidden: [16], embedding: 4, bins: 4}", "train={folds: 3, epochs: 6, patience: 2, learning_rate: 0.01}")


def same(a, b): return set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def place(tmp_path_factory): return Settings(env="local", home=tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def job(place):
    spec = read_spec(SPEC, SMALL)
    return make_job(spec, read_rows(spec, place))


@pytest.fixture(scope="module")
def told(job): return list(epochs_of(job))


CONTRACT = Contract({"x": Column(type="number"), "who": Column(type="integer", role="id"), "y": Column(type="boolean", role="target")})


@hypothesis(max_examples=30, deadline=None)
@given(st.integers(2, 8), st.integers(0, 10_000), st.booleans())
def test_rows_are_dealt_once_evenly_and_in_any_order(folds, seed, grouped):
    rng = np.random.default_rng(seed)
    frame = pl.DataFrame({"x": rng.normal(size=160), "who": rng.integers(0, 60, 160), "y": rng.random(160) < 0.3})
    how = Split(key=("who",)) if grouped else Split()
    dealt, order = deal(CONTRACT, frame, how, folds), rng.permutation(160)
    assert set(dealt) == set(range(folds)) and (dealt[order] == deal(CONTRACT, frame[order], how, folds)).all()
    if grouped: assert frame.with_columns(fold=dealt).group_by("who").agg(pl.col("fold").n_unique())["fold"].max() == 1
    else:
        sizes, positive = np.bincount(dealt), np.bincount(dealt, frame["y"].to_numpy())
        assert np.ptp(sizes) <= 1 and np.ptp(positive) <= 1


def test_equal_rows_stay_together():
    frame = pl.DataFrame({"x": np.arange(40) % 20 * 1.0, "who": np.arange(40) % 20, "y": np.arange(40) % 20 % 2 == 0})
    dealt = deal(CONTRACT, frame, Split(), 4)
    assert (dealt[:20] == dealt[20:]).all()


def test_too_few_rows_or_one_class_are_told():
    frame = pl.DataFrame({"x": np.arange(12.0), "who": np.arange(12) // 4, "y": np.arange(12) < 1})
    with pytest.raises(DataError, match="5 folds need as many groups of rows that agree in who, and there are 3"): deal(CONTRACT, frame, Split(key=("who",)), 5)
    with pytest.raises(DataError, match=r"the network that keeps fold . of 3 back has too little left to learn from.*same 'y'"): deal(CONTRACT, frame, Split(), 3)


def test_no_network_sees_what_it_keeps_back(job, told):
    networks = [kept_back(job, number) for number in range(3)]
    assert sum(len(n.valid_labels) for n in networks) == len(job.labels) and all(len(n.labels) + len(n.valid_labels) == len(job.labels) for n in networks)
    assert len({n.train.seed for n in networks}) == 3
    turned = replace(job, labels=np.where(job.folds == 1, 1 - job.labels, job.labels)) # labels of one fold the wrong way round
    other = list(epochs_of(replace(turned, train=job.train.model_copy(update={"patience": 6}))))
    calm = list(epochs_of(replace(job, train=job.train.model_copy(update={"patience": 6}))))
    assert same(other[-1].state.folds[1].now, calm[-1].state.folds[1].now) and not same(other[-1].state.folds[0].now, calm[-1].state.folds[0].now)


def test_a_killed_run_goes_on_with_each_network_where_it_was(job, told):
    for before in (told[0], told[len(told) // 2], told[-1]):
        again = list(epochs_of(job, load_state(dump_state(before.state))))
        assert [e.metrics for e in again] == [e.metrics for e in told[before.number:]]
        assert same((again[-1] if again else before).state.best, told[-1].state.best) and same(load_state(dump_state(before.state)).best, before.state.best)


def test_networks_that_have_ended_wait_with_the_loss_they_ship(job, told):
    last = told[-1]
    ended = [one for one in last.state.folds if one.epoch < last.number]
    running = [one for one in last.state.folds if one.epoch == last.number]
    assert last.metrics["folds"] == len(running) and {k for k in last.metrics if "/" in k} == {f"fold_{k}/valid_loss" for k, one in enumerate(last.state.folds, 1) if one.epoch == last.number}
    assert last.metrics["valid_loss"] == pytest.approx(np.mean([*(one.best_loss for one in ended), *(one.history[-1]["valid_loss"] for one in running)]))


def side_by_side(job, start, world):
    "Workers as threads of which one computes at a time, since all share torch's generator; they wait for each other as processes would."
    gate, turn, slots, results = threading.Barrier(world, timeout=300), threading.Lock(), [None] * world, [None] * world

    def work(rank):
        def together(found):
            slots[rank] = found
            turn.release()
            gate.wait()
            every = torch.cat(slots)
            gate.wait() # nobody puts in what comes next before all have read
            turn.acquire()
            return every
        with turn: results[rank] = list(epochs_of(job, start, rank, world, together=together))
    workers = [threading.Thread(target=work, args=(rank,)) for rank in range(world)]
    for each in workers: each.start()
    for each in workers: each.join()
    return results


@pytest.mark.parametrize("world", [2, 3])
def test_any_number_of_workers_comes_to_the_same_bits(job, told, world):
    results = side_by_side(job, None, world)
    assert all([e.metrics for e in each] == [e.metrics for e in told] for each in results)
    assert same(results[0][-1].state.best, told[-1].state.best) and all(e.state is None for each in results[1:] for e in each) and results[0][-1].state.workers == (world,) * len(told)
    resumed = side_by_side(job, load_state(dump_state(results[0][1].state)), 5 - world) # and go on with another number
    assert same(resumed[0][-1].state.best, told[-1].state.best)


@pytest.fixture(scope="module")
def shipped(place):
    listened = MemoryTracker()
    run = train(read_spec(SPEC, [*SMALL, "model={network: mlp, hidden: [16], embedding: 4, bins: 4, calibration: platt, threshold: {maximise: f1}}", "mitigation={method: reweighing, by: [sex]}"]), place, tracker=listened)
    return run, bundle_of(open_registry(place), run.version), listened


def test_one_graph_answers_with_the_mean_and_is_calibrated_on_what_nobody_had_seen(place, shipped):
    run, bundle, _ = shipped
    job = make_job(bundle.spec, run.rows)
    *_, last = epochs_of(job)
    unseen = out_of_fold(job, last.state)
    inputs = [*map(torch.from_numpy, job.rows.tensors)]
    for number, one in enumerate(last.state.folds):
        answers = scores(fitted(job.features, job.model, one.best), *inputs).numpy()
        np.testing.assert_allclose(unseen[job.folds == number], answers[job.folds == number], atol=1e-6)
    curve = calibrate("platt", unseen, job.labels)
    assert bundle.provenance["calibration"]["slope"] == curve.slope and bundle.threshold == choose(Threshold(maximise="f1"), curve(unseen), job.labels)
    mean = np.mean([scores(fitted(job.features, job.model, one.best), *inputs).numpy() for one in last.state.folds], 0)
    frame = run.rows.parts.train
    np.testing.assert_allclose(predict(bundle, frame, frame.height), curve(mean), atol=1e-5)
    assert predict(bundle, frame[3:4], 1).tobytes() == predict(bundle, frame, frame.height)[3:4].tobytes()
    assert {"model.onnx", "weights.safetensors"} <= {p.name for p in bundle.path.iterdir()} and attacked(bundle, run.rows.parts.test[:20]).values


def test_rows_are_counted_once_and_a_version_says_its_folds(place, shipped):
    run, bundle, listened = shipped
    whole = read_rows(read_spec(SPEC), place)
    assert run.rows.parts.train.height == whole.parts.train.height + whole.parts.valid.height and run.rows.fingerprints["test"] == whole.fingerprints["test"]
    assert sum(bundle.provenance["folds"]["rows"]) == bundle.profile.rows == run.rows.parts.train.height
    assert any(f"training on {run.rows.parts.train.height} rows in 3 folds" in n for n in listened.notes) and sum(n.startswith("fold ") for n in listened.notes) == 3 and "fold_3/valid_loss" in listened.logged[0]
    assert any("chosen on" in n and "rows that were kept back" in n for n in listened.notes)
    found = dossier(open_registry(place), str(run.version))
    assert "the mean of 3 networks" in repr(model_card(found)) and "each row for validation once, in 3 folds" in repr(data_sheet(found))
    assert reproduce(bundle, str(run.version), place, LocalBackend()).identical


def test_a_mixture_of_folds_is_no_parent(place, shipped):
    run, *_ = shipped
    with pytest.raises(TrainingError, match=r"Name a version without train\.folds"): train(read_spec(SPEC, [*SMALL[:1], f"train={{epochs: 2, from: {run.version}}}"]), place)


def folded(kind, place):
    spec = changed(spec_of(kind), {"train.folds": 2, "train.epochs": 2, "model.network": "linear", "model.hidden": None, "gates": {}})
    rows = read_rows(spec, place)
    return spec, rows, make_job(spec, rows)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_target_has_its_mean(kind, place):
    _, _, job = folded(kind, place)
    *_, last = epochs_of(job)
    inputs = [*map(torch.from_numpy, job.rows.tensors)]
    of = lambda weights: scores(fitted(job.features, job.model, weights, job.task.outputs), *inputs, task=job.task).numpy()
    mean, unseen = of(last.state.best), out_of_fold(job, last.state)
    np.testing.assert_allclose(mean, (of(last.state.folds[0].best) + of(last.state.folds[1].best)) / 2, rtol=1e-5, atol=1e-6)
    assert job.task.kind == kind and unseen.shape == mean.shape and (unseen != mean).any()
    if job.task.classes: assert mean.min() >= 0 and mean.max() <= 1
    if kind == "quantile": assert (np.diff(mean, axis=1) >= 0).all()


@pytest.mark.chaos # a graph takes seconds
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_target_is_shipped_as_one_graph(kind, place):
    spec, rows, job = folded(kind, place)
    bundle = bundle_of(open_registry(place), train(spec, place).version)
    *_, last = epochs_of(job)
    frame = rows.parts.test
    said = scores(fitted(job.features, job.model, last.state.best, job.task.outputs), *map(torch.from_numpy, apply(job.features, frame, frame.height).tensors), task=job.task).numpy()
    np.testing.assert_allclose(predict(bundle, frame, frame.height), said, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("overrides", "said"), [
    ("data.split={by: age}", "later than those it is held against"), ("data.valid={call: 'mlray.samples:diabetes'}", "rows of their own"), ("train={folds: 3, rows: stream}", "no train.rows: stream"),
    ("train={folds: 3, privacy: {epsilon: 3}}", "spend the budget"), ("train={folds: 3, from: diabetes/1}", "learn anew"), ("model={estimator: 'sklearn.linear_model:LogisticRegression'}", "folds are of networks"),
    ("mitigation={method: exponentiated_gradient, by: [sex]}", "a mean of networks by itself"), ("train={folds: 3, parallel: fsdp}", "one worker's"), ("search={trials: 2, space: {train.folds: {choices: [2, 5]}}}", "is not searched"),
    ("retrain={start: warm}", "leave it full"), ("train.folds=1", "greater than or equal to 2")])
def test_what_would_not_be_honest_is_refused(overrides, said):
    with pytest.raises(SpecError, match=said): read_spec(SPEC, ["train.folds=3", overrides])


def test_a_spec_without_folds_keeps_its_name():
    spec = read_spec(SPEC)
    assert spec.id == parse_spec(json.dumps(spec.model_dump(mode="json"))).id != read_spec(SPEC, ["train.folds=5"]).id
