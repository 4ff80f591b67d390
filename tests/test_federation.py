"""Rows stay with their holders: what leaves is counted here, and what comes of it is as good as from all rows together."""
import json
import threading
from dataclasses import asdict

import numpy as np
import polars as pl
import pytest
import yaml

from mlray.governance.registry import bundle_of, open_registry
from mlray.learning.contract import Contract
from mlray.learning.features import learn
from mlray.learning.network import build, sensible
from mlray.learning.summary import learn_from, summarize
from mlray.running.run import train
from mlray.sources.rows import check_sources, read_rows
from mlray.values.errors import DataError, SpecError
from mlray.values.spec import parse_spec
from tests.conftest import running_below

CANARY_WORD, CANARY_NUMBER = "Zanzibar-7719", 83_461.75


def made(rows: int, seed: int, shift: float = 0.0) -> pl.DataFrame:
    "Customers: the answer depends on both numbers, and on the city."
    draw = np.random.default_rng(seed)
    age, wage, city = draw.integers(18, 80, rows), draw.lognormal(8 + shift, 0.8, rows).round(2), draw.choice(["Bonn", "Kiel", "Rom"], rows, p=[0.5, 0.3, 0.2])
    chance = 1 / (1 + np.exp(-(0.06 * (age - 45) + 1.5 * (np.log(wage) - 8) + 1.2 * (city == "Rom") - 0.3)))
    return pl.DataFrame({"age": age, "wage": wage, "city": city, "bought": np.where(draw.random(rows) < chance, "yes", "no")})


def spec_of(folder, pooled: bool = False, **train_):
    data = {"train": {"file": str(folder / "all.parquet")} if pooled else {"holders": {n: {"file": str(folder / f"{n}.parquet")} for n in ("east", "north", "west")}},
            "test": {"file": str(folder / "test.parquet")}, "split": {"valid": 0.2}}
    contract = {"age": {"type": "integer", "min": 0, "max": 120}, "wage": {"type": "number", "min": 0, "max": 1_000_000}, "city": {"type": "category", "sensitive": True, "values": ["Bonn", "Kiel", "Rom", CANARY_WORD]},
                "bought": {"type": "category", "values": ["no", "yes"], "positive": "yes", "role": "target"}}
    return parse_spec(yaml.safe_dump({"name": "shop", "data": data, "contract": contract, "model": {"network": "mlp", "hidden": [32], "dropout": 0.0, "bins": 16}, "gates": {"quality": [{"metric": "roc_auc", "at_least": 0.7}]},
                                      "train": {"epochs": 10, "patience": 10, "batch_size": 64, "learning_rate": 0.003, **train_}}), [], "shop")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "Three holders, of different sizes and of different people."
    root = tmp_path_factory.mktemp("holders")
    parts = {"east": made(2000, 1), "north": made(900, 2, shift=0.5), "west": made(1500, 3, shift=-0.4)}
    parts["east"] = parts["east"].with_columns(wage=pl.when(pl.int_range(pl.len()) == 7).then(CANARY_NUMBER).otherwise(pl.col("wage")), city=pl.when(pl.int_range(pl.len()) == 7).then(pl.lit(CANARY_WORD)).otherwise(pl.col("city")))
    for name, frame in (parts | {"all": pl.concat(parts.values()), "test": made(4000, 4)}).items(): frame.write_parquet(root / f"{name}.parquet")
    return root


def holder_of(spec, name, settings):
    from mlray.engines.federate_on_ray import Holder
    holders = spec.data.train.holders
    return Holder(spec, holders[name], settings, list(holders).index(name))


def everything(holder, plan, weights) -> list:
    "All that a holder ever answers."
    return [holder.size(), holder.summary(), holder.learn(plan, weights, 1), holder.validate(plan, weights)]


def plan_of(spec, holder):
    from mlray.engines.federate_on_ray import Plan
    model, pace = sensible(spec.model, spec.train, 2000)
    plan = Plan(learn_from(Contract(spec.contract), holder.summary(), 16), model, pace, spec.task)
    return plan, {n: w.numpy() for n, w in build(plan.features, model, 0).state_dict().items()}


def flat(value) -> str:
    "Every number and text in an answer, in the shortest form that reads back, one a line."
    if isinstance(value, np.ndarray): return "\n".join(map(repr, value.astype(np.float64).ravel().tolist()))
    if isinstance(value, dict): return "\n".join(flat(x) for pair in value.items() for x in pair)
    return str(value) if not hasattr(value, "__dataclass_fields__") else flat({k: getattr(value, k) for k in value.__dataclass_fields__})


def test_no_row_leaves_its_holder(folder, settings):
    "A word and a number that one row alone has are in no answer, and answers do not grow with rows."
    spec = spec_of(folder)
    holder = holder_of(spec, "east", settings)
    parts = holder._parts
    assert CANARY_WORD in pl.concat([parts.train, parts.valid])["city"].to_list(), "the canary was never there"
    if CANARY_WORD not in parts.train["city"].to_list(): holder._parts = type(parts)(parts.valid, parts.train, parts.test)
    plan, weights = plan_of(spec, holder)
    said = everything(holder, plan, weights)
    assert [type(x).__name__ for x in said] == ["Size", "Summary", "Update", "Loss"]
    for answer in said: assert CANARY_WORD not in flat(answer) and str(CANARY_NUMBER) not in flat(answer).split()
    assert min(n for counts in said[1].counts.values() for n in counts.values()) >= 10 and all(isinstance(v, (float, str)) for counts in said[1].counts.values() for v in counts)
    assert {n: w.shape for n, w in said[2].weights.items()} == {n: w.shape for n, w in weights.items()}
    holder._parts = type(parts)(*(pl.concat([p] * 4) for p in vars(holder._parts).values()))
    again = everything(holder, plan, weights)
    assert sum(w.nbytes for w in again[2].weights.values()) == sum(w.nbytes for w in said[2].weights.values()) and len(flat(again[3])) < 60
    assert again[1].rows == 4 * said[1].rows and set(asdict(again[0])) == {"rows", "valid_rows", "bad_rows"}


def test_counts_of_parts_are_those_of_the_whole(folder):
    "Encoders from three summaries, against those from all rows: the same categories and common values, the same curve within two percent of its span."
    spec = spec_of(folder)
    contract, parts = Contract(spec.contract), [pl.read_parquet(folder / f"{n}.parquet") for n in ("east", "north", "west")]
    first, *more = (summarize(contract, p, hide_below=1) for p in parts)
    apart, together = learn_from(contract, sum(more, first), 16), learn(contract, pl.concat(parts), 16)
    assert apart.categories == together.categories
    age, wage = zip(apart.numbers, together.numbers, strict=True)
    assert age[0].common == age[1].common and np.allclose(age[0].edges, age[1].edges)
    grid = np.quantile(pl.concat(parts)["wage"], np.linspace(0.01, 0.99, 50))
    curve = [np.interp(grid, n.edges, n.heights) for n in wage]
    assert np.abs(curve[0] - curve[1]).max() < 0.02 * np.ptp(curve[1])


def test_rows_of_holders_are_read_by_nobody_else(folder, settings):
    spec = spec_of(folder)
    with pytest.raises(DataError, match="stay with them"): read_rows(spec, settings)
    with pytest.raises(DataError, match="stay with them"): train(spec, settings)
    assert set(check_sources(spec, settings)) == {"test"}
    without = spec.model_dump(mode="json") | {"data": {**spec.model_dump(mode="json")["data"], "test": None}}
    with pytest.raises(SpecError, match="by which the model is judged"): parse_spec(json.dumps(without), [], "shop")


def test_an_update_that_does_not_fit_is_refused():
    from mlray.engines.federate_on_ray import Update, averaged
    from mlray.values.errors import TrainingError
    before = {"w": np.zeros(2, np.float32)}
    with pytest.raises(TrainingError, match=r"north does not fit: w has shape \(3,\)"): averaged(before, {"north": Update(1, {"w": np.zeros(3, np.float32)}, 0.1)})
    with pytest.raises(TrainingError, match="numbers that are none"): averaged(before, {"north": Update(1, {"w": np.array([1, np.nan], np.float32)}, 0.1)})


def test_each_holder_keeps_a_promise_of_its_own(folder, settings):
    "Under privacy a holder adds noise before anything leaves, and its encoders come from the contract."
    from mlray.engines.federate_on_ray import Plan
    from mlray.learning.declared import declared
    spec = spec_of(folder, patience=None, learning_rate=0.01, privacy={"epsilon": 2})
    holder = holder_of(spec, "north", settings)
    model, pace = sensible(spec.model, spec.train, 2000)
    plan = Plan(declared(Contract(spec.contract), 16), model, pace, spec.task)
    weights = {n: w.numpy() for n, w in build(plan.features, model, 0).state_dict().items()}
    first, second = (holder.learn(plan, weights, 1) for _ in range(2))
    assert first.loss is None and not all(np.array_equal(first.weights[n], second.weights[n]) for n in weights)


@pytest.mark.ray
@pytest.mark.xdist_group("federation")
def test_apart_is_as_good_as_together(ray_cluster, folder, settings):
    "Within 0.01 AUC of training on all rows; and a holder that is killed on the way changes no bit."
    from mlray.engines.federate_on_ray import federate
    from mlray.running.tracking import MemoryTracker
    pooled = train(spec_of(folder, pooled=True), settings)
    calm = federate(spec_of(folder), settings)
    auc = [run.evaluation.scorecard.overall["roc_auc"].value for run in (pooled, calm)]
    assert auc[1] > 0.75 and abs(auc[0] - auc[1]) <= 0.01, auc
    killed: list[int] = []

    class Killer(MemoryTracker):
        def log(self, metrics, step):
            super().log(metrics, step)
            if step == 3: threading.Thread(target=self.kill).start()
        def kill(self):
            holder = next(p for p, name in running_below().items() if "Holder" in name)
            holder.kill()
            killed.append(holder.pid)
    hurt = federate(spec_of(folder), settings, Killer())
    assert killed, "nobody was killed, so nothing was shown"
    registry = open_registry(settings)
    found = [bundle_of(registry, r.version) for r in (calm, hurt)]
    assert found[0].digest == found[1].digest and found[0].provenance["holders"]["east"]["rows"] > 1500


@pytest.mark.ray
@pytest.mark.xdist_group("federation")
def test_a_number_apart_and_again(ray_cluster, folder, settings):
    "Holders learn a number on the scale of the contract; the version can be made again to the bit, and what has changed is named where it cannot."
    from mlray.engines.federate_on_ray import federate, reproduce_federated
    tree = spec_of(folder, epochs=3).model_dump(mode="json", exclude={"gates"})
    tree["contract"] = {n: c | ({"role": "feature", "positive": None} if n == "bought" else {"role": "target", "max": 40_000} if n == "wage" else {}) for n, c in tree["contract"].items()}
    spec = parse_spec(yaml.safe_dump(tree, sort_keys=False), [], "shop")
    run = federate(spec, settings)
    bundle, test = bundle_of(open_registry(settings), run.version), pl.read_parquet(folder / "test.parquet")
    assert bundle.task.center == 20_000 and run.evaluation.scorecard.overall["mean_absolute_error"].value < (test["wage"] - 20_000).abs().mean() / 4
    again = reproduce_federated(bundle, str(run.version), settings)
    assert again.identical and not again.differences, again.finding
    before = (folder / "west.parquet").read_bytes()
    try:
        pl.read_parquet(folder / "west.parquet").head(1200).write_parquet(folder / "west.parquet")
        other = reproduce_federated(bundle, str(run.version), settings)
    finally: (folder / "west.parquet").write_bytes(before)
    assert not other.identical and "holders" in other.finding
