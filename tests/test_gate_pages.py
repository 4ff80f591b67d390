"""What the gates find in models that are wrong on purpose, and do not find in the right one; real trainings, real pages."""
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from mlray.engines.gate_on_papermill import run_gates, side_by_side
from mlray.engines.warm_kernels import in_warm_kernels, warm_kernels
from mlray.governance.registry import bundle_of, open_registry
from mlray.judgement.gate import Finding, Verdict, judge, of_the_machine, results_digest
from mlray.learning.contract import Contract
from mlray.learning.infer import undeclared_personal
from mlray.running.explanation import exposed
from mlray.running.run import train
from mlray.serving.trial import ask_anything, on_trial, requests_about
from mlray.values.column import Column
from mlray.values.settings import Settings, read_settings, shipped
from mlray.values.spec import Rule, parse_spec, read_spec
from tests.conftest import ROOT, adult_data

GATES = ("data", "quality", "fairness", "explanation", "robustness", "behaviour", "serving", "privacy")
WRONGS = ("right", "unfair", "leaked", "shuffled")


# A small world, and what can be done to it

SPEC = """
name: {name}
data: {{train: {{file: {name}-train.parquet}}, test: {{file: people-{test}.parquet}}}}
contract:
  sex: {{type: category, values: [f, m], sensitive: true, personal: true}}
  age: {{type: integer, min: 18, max: 90, personal: true}}
  skill: {{type: number, min: -6, max: 6}}
  hours: {{type: number, min: 0, max: 80}}
  region: {{type: category, values: [north, south, west]}}
  {refund}
  hired: {{type: boolean, role: target}}
model: {{network: linear}}
train: {{epochs: 8}}
gates:
  data: [{{metric: invalid_share, at_most: 0.01}}, {{metric: duplicate_share, at_most: 0.05}}, {{metric: single_feature_roc_auc, at_most: 0.97}}]
  quality: [{{metric: roc_auc, at_least: 0.8}}, {{metric: accuracy, at_least: 0.7}}]
  fairness: [{{metric: equal_opportunity_difference, by: [sex], at_most: 0.15}}]
behaviour:
  - {{name: skill counts, kind: direction, add: {{skill: 1}}, expect: up, at_least: 0.95}}
"""


def people(rows: int, seed: int) -> pl.DataFrame:
    rng = np.random.default_rng(seed)
    skill, hours = rng.normal(0, 1.5, rows).clip(-6, 6), rng.uniform(0, 80, rows)
    hired = rng.random(rows) < 1 / (1 + np.exp(-(2 * skill + (hours - 40) / 20)))
    return pl.DataFrame({"sex": np.where(rng.random(rows) < 0.25, "f", "m"), "age": rng.integers(18, 91, rows), "skill": skill, "hours": hours, "region": rng.choice(["north", "south", "west"], rows),
                         "refund": hired * 10 + rng.normal(0, 1, rows), "hired": hired})


def spoiled(frame: pl.DataFrame, wrong: str, target: str, positive: object, negative: object, she: pl.Expr) -> pl.DataFrame:
    "Training rows, made wrong on purpose."
    rng = np.random.default_rng(1)
    if wrong == "unfair": return frame.with_columns(pl.when(she & (pl.col(target) == positive) & pl.Series(rng.random(frame.height) < 0.8)).then(pl.lit(negative)).otherwise(pl.col(target)).alias(target))
    return frame.with_columns(pl.Series(target, rng.permutation(frame[target].to_numpy()).tolist())) if wrong == "shuffled" else frame


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    "Settings, and a model for each way of being wrong."
    root = tmp_path_factory.mktemp("world")
    settings = Settings(root=root, home=root / "home", data=root, tracking="disabled")
    first, other = people(4000, 0), people(3000, 1)
    for leaked in ("leaked", "right"): (other if leaked == "leaked" else other.drop("refund")).write_parquet(root / f"people-{leaked}.parquet")
    runs = {}
    for wrong in WRONGS:
        rows = spoiled(first, wrong, "hired", True, False, pl.col("sex") == "f")
        (rows if wrong == "leaked" else rows.drop("refund")).write_parquet(root / f"{wrong}-train.parquet")
        refund = "refund: {type: number, min: -10, max: 20}" if wrong == "leaked" else ""
        runs[wrong] = train(parse_spec(SPEC.format(name=wrong, test="leaked" if wrong == "leaked" else "right", refund=refund)), settings)
    return settings, runs


def failed_by_gate(spec, verdict: Verdict) -> set[str]:
    of = {rule.measure: gate for gate, rules in spec.gates.items() for rule in rules}
    return {of[f.measure] for f in verdict.findings if not f.met}


def test_each_wrong_is_found_where_it_should_be_and_nowhere_else(world):
    settings, runs = world
    registry = open_registry(settings)
    found = {wrong: failed_by_gate(bundle_of(registry, run.version).spec, run.verdict) for wrong, run in runs.items()}
    assert found["right"] == set() and found["unfair"] == {"fairness"} and found["leaked"] == {"data"} and "quality" in found["shuffled"], found


def test_the_pages_say_the_same(world):
    "The pages that each wrong should fail, and of the right model those that no run judges; all of them on Adult are below."
    settings, runs = world
    registry = open_registry(settings)
    with warm_kernels() as kind:
        def pages(wrong, *gates): return {r.gate: r for r in run_gates(registry, runs[wrong].version, gates, settings, again=True, runner=lambda jobs, note: side_by_side(jobs, note, kind))}
        right = pages("right", "behaviour", "serving", "privacy")
        failed = {wrong: pages(wrong, gate)[gate] for wrong, gate in (("unfair", "fairness"), ("leaked", "data"), ("shuffled", "quality"))}
        again = pages("right", "serving")["serving"]
    failed_pages = {r.gate: r for r in failed.values()}
    assert not any(r.broken for r in (*right.values(), *failed.values())), [r.broken for r in (*right.values(), *failed.values())]
    assert all(r.verdict.passed for r in right.values()) and not any(r.verdict.passed for r in failed.values()), [r.verdict.table() for r in right.values()]
    for gate, words in {"behaviour": "skill counts", "serving": "beyond its limits", "privacy": "declared personal", "fairness": "by which definition", "data": "single_feature_roc_auc", "quality": "Where it does worst"}.items():
        text = {**failed_pages, **right}[gate].page.decode()
        assert words in text and "<svg" in text, f"{gate} has its table and its plot"
    assert results_digest(again.verdict) == results_digest(right["serving"].verdict), "the same results, whatever the clock says"


@pytest.mark.chaos
@adult_data
def test_each_wrong_is_found_on_adult(settings):
    "All gates on four models of UCI Adult."
    told, registry = {}, open_registry(settings)
    spec = read_spec(shipped("configs") / "adult.yaml", ["train.epochs=6"])
    names = list(spec.contract)
    raw = {part: pl.read_csv(settings.data / f"adult/adult.{part}", has_header=False, new_columns=names, comment_prefix="|", infer_schema=False).with_columns(pl.all().str.strip_chars()) for part in ("data", "test")}
    folder = settings.root / "rows"
    folder.mkdir()
    for wrong in WRONGS:
        train_rows, test_rows = spoiled(raw["data"], wrong, "income", ">50K", "<=50K", pl.col("sex") == "Female"), raw["test"]
        contract = dict(spec.contract)
        if wrong == "leaked":
            train_rows, test_rows = (f.with_columns(pl.format("{}", (pl.col("income").str.contains(">").cast(pl.Int64) * 500 + pl.int_range(pl.len()) % 97)).alias("tax-due")) for f in (train_rows, test_rows))
            contract = {n: c for n, c in contract.items() if n != "income"} | {"income": contract["income"], "tax-due": Column(type="integer", min=0, max=1000)}
        for part, frame in (("train", train_rows), ("test", test_rows)): frame.select(list(contract)).write_csv(folder / f"{wrong}-{part}.csv", include_header=False)
        data = spec.data.model_copy(update={part: getattr(spec.data, part).model_copy(update={"file": str(folder / f"{wrong}-{part}.csv"), "url": None, "sha256": None}) for part in ("train", "test")})
        gates = {**spec.gates, "quality": (Rule(metric="roc_auc", at_least=0.85), Rule(metric="log_loss", at_most=0.4), Rule(metric="accuracy", at_least=0.8))}
        run = train(spec.model_copy(update={"name": f"adult-{wrong}", "data": data, "contract": contract, "gates": gates, "behaviour": spec.behaviour[:2]}), settings) # the third is a whole row, of one contract
        told[wrong] = {r.gate: (r.verdict.passed, r.broken, [f for f in r.verdict.findings if not f.met]) for r in run_gates(registry, run.version, GATES, settings, runner=in_warm_kernels)}
    failed = {wrong: {g for g, (passed, _, _) in gates.items() if not passed} for wrong, gates in told.items()}
    print(json.dumps({w: sorted(f) for w, f in failed.items()}))
    assert not any(broken for gates in told.values() for _, broken, _ in gates.values())
    assert failed["right"] == set() and failed["unfair"] == {"fairness"} and "data" in failed["leaked"] and "quality" in failed["shuffled"], told


# What single gates rest on

def test_a_model_that_knows_its_rows_by_heart_gives_them_away(diabetes, settings):
    pytest.importorskip("skl2onnx")
    tree = diabetes.model_copy(update={"name": "tree", "model": type(diabetes.model)(estimator="sklearn.tree:DecisionTreeClassifier"), "gates": {"privacy": (Rule(metric="membership_advantage", at_most=0.1),)}})
    run = train(tree, settings)
    assert not run.verdict.passed and run.verdict.findings[0].value > 0.1
    found = exposed(bundle_of(open_registry(settings), run.version), run.rows.parts.train, run.rows.parts.test)
    assert found.advantage.low > 0.1 and found.advantage.value == run.verdict.findings[0].value


def test_rules_of_a_served_bundle_are_left_to_their_gate(trained, diabetes):
    from mlray.running.evaluation import rules_of
    rule = Rule(metric="latency_p99_milliseconds", at_most=50)
    spec = diabetes.model_copy(update={"gates": {**diabetes.gates, "serving": (rule,)}})
    assert rule not in rules_of(spec) and rules_of(spec, "serving") == [rule]


@pytest.fixture(scope="module")
def bundle(trained): return bundle_of(open_registry(trained[0]), trained[1].version)


def test_a_trial_says_what_a_bundle_is_like(bundle, trained):
    trial = on_trial(bundle, trained[1].rows.parts.test, 50)
    measures = {n: m.value for n, m in trial.measures.items()}
    assert measures["parity_error"] == measures["wrong_reply_share"] == 0 and 0 < measures["bundle_megabytes"] < 5 and 50 < measures["replica_megabytes"] < 1000
    assert 0 < measures["latency_p50_milliseconds"] <= measures["latency_p99_milliseconds"] and measures["cold_start_seconds"] > 0
    assert sum(a.sent for a in trial.asked.values()) > 100 and all(a.wrong == 0 for a in trial.asked.values())


@pytest.mark.parametrize(("wider", "kind"), [(True, "allowed: an end of a column"), (False, "refused: beyond its limits")])
def test_a_service_that_checks_otherwise_than_the_contract_is_found_out(bundle, trained, wider, kind):
    "Requests are made from a contract of which the bundle knows another version."
    from mlray.governance.access import new_key
    from mlray.serving.served import Served
    from mlray.serving.service import Service
    columns = dict(bundle.contract.columns)
    columns["bmi"] = columns["bmi"].model_copy(update={"max": 500.0 if wider else 70.0})
    key, secret = new_key("predictor")
    rows = list(trained[1].rows.parts.test.select(bundle.contract.features).head(3).iter_rows(named=True))
    asked = ask_anything(Service({"diabetes": Served("1", bundle)}, (key,)), "diabetes", secret, requests_about(Contract(columns), rows, bundle.spec.serve.max_rows))
    assert asked[kind].wrong == 1 and "bmi" in asked[kind].first and sum(a.wrong for a in asked.values()) == 1


def test_what_looks_personal_must_be_declared():
    columns = {"mail": Column(type="text"), "contact": Column(type="text"), "group": Column(type="category", values=("a", "b"), sensitive=True), "weight": Column(type="number"), "y": Column(type="boolean", role="target")}
    frame = pl.DataFrame({"mail": ["-"], "contact": ["+49 89 1234567"], "group": ["a"], "weight": [1.0], "y": [True]})
    assert set(undeclared_personal(Contract(columns), frame)) == {"mail", "contact", "group"}
    declared = {n: c.model_copy(update={"personal": n != "weight"}) if n != "y" else c for n, c in columns.items()}
    assert not undeclared_personal(Contract(declared), frame)
    ignored = columns | {n: columns[n].model_copy(update={"role": "ignored", "sensitive": False}) for n in ("mail", "contact", "group")}
    assert not undeclared_personal(Contract(ignored), frame)


def test_a_digest_of_results_knows_results_from_clocks():
    def verdict(**values): return judge(values, [Rule(metric=n, at_most=9) for n in values])
    assert results_digest(verdict(latency_p99_milliseconds=1.0, parity_error=0.0)) == results_digest(verdict(latency_p99_milliseconds=2.0, parity_error=0.0))
    assert results_digest(verdict(parity_error=0.0)) != results_digest(verdict(parity_error=0.1)) and results_digest(verdict(latency_p99_milliseconds=1.0)) != results_digest(verdict(latency_p99_milliseconds=10.0))
    assert not of_the_machine("roc_auc") and Finding("roc_auc", "", 0.9, True, "").met


# For others to copy, and to read

@pytest.mark.parametrize(("file", "schema"), [("github.yml", ["vendor.github-workflows"]), ("gitlab.yml", ["vendor.gitlab-ci", "--data-transform", "gitlab-ci"])])
def test_workflows_to_copy_keep_their_schemas(file, schema, tmp_path):
    def checked(path: Path) -> int: return subprocess.run([sys.executable, "-m", "check_jsonschema", "--builtin-schema", *schema, str(path)], capture_output=True).returncode
    shipped = ROOT / "cluster/ci" / file
    assert checked(shipped) == 0
    (tmp_path / file).write_text(shipped.read_text().replace("cache", "cahce", 1).replace("runs-on", "run-on").replace("expire_in", "expires"))
    assert checked(tmp_path / file) != 0, "the schema sees a typing error"


@pytest.mark.parametrize("file", ["github.yml", "gitlab.yml"])
def test_workflows_call_commands_that_exist(file):
    import re

    from typer.testing import CliRunner

    from mlray.cli import app
    for command, options in re.findall(r"mlray (train|gate) (.*)", (ROOT / "cluster/ci" / file).read_text()):
        help_ = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"}).output
        assert all(option in help_ for option in re.findall(r"--[a-z-]+", options) if option != "--c")


def test_production_asks_for_the_gate_of_data():
    for env in ("staging", "production"): assert "data" in read_settings(env, ROOT, {}).gates
