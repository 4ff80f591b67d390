"""`mlray optimise`: a smaller bundle keeps the laws of every bundle, and becomes a version only where the rules of its spec hold."""
import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from onnxruntime.quantization import quantize_dynamic
from typer.testing import CliRunner

from mlray.cli import app
from mlray.governance.registry import bundle_of, history, open_registry, promote, version, versions
from mlray.learning.estimator_graph import answer
from mlray.learning.features import apply
from mlray.learning.network import scores
from mlray.running.optimised import held_to_parent, optimised
from mlray.running.reproduce import repeatable
from mlray.running.run import train
from mlray.running.white_box import network_of
from mlray.serving.edge_folder import export_folder
from mlray.shipping.bundle import load_bundle, pack, predict
from mlray.shipping.optimise import _matrices, optimise, pruned
from mlray.values.errors import BundleError, Refused, TrainingError
from mlray.values.settings import Settings, shipped
from mlray.values.spec import Rule, read_spec

SPEC = read_spec(shipped("configs") / "diabetes.yaml", ["train.epochs=10", "model.hidden=[64, 64]"])
QUALITY = {"quality": (Rule(metric="roc_auc", at_least=0.6, within=0.05), Rule(metric="log_loss", at_most=0.9, within=0.01))}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    root = tmp_path_factory.mktemp("optimise")
    settings = Settings(root=root, home=root / "home", tracking="disabled")
    return settings, train(SPEC.model_copy(update={"gates": QUALITY}), settings)


@pytest.fixture(scope="module")
def parent(home): return bundle_of(open_registry(home[0]), home[1].version)


@pytest.fixture(scope="module")
def rows(home, parent): return apply(parent.features, home[1].rows.parts.train, home[1].rows.parts.train.height)


@pytest.fixture(scope="module")
def small(parent, rows, tmp_path_factory): return optimise(parent, tmp_path_factory.mktemp("small") / "bundle", rows, int8=True, prune=0.3)


def test_a_row_alone_and_a_row_among_others_get_the_same_bits_in_int8(home, small):
    test = home[1].rows.parts.test
    whole, names = predict(small, test, test.height), small.contract.features
    for size in (1, 2, 5, 32):
        for at in range(0, 64, size):
            part = test[at:at + size]
            assert predict(small, {n: part[n].to_list() for n in names}, part.height).tobytes() == whole[at:at + size].tobytes()


def test_scales_that_depend_on_the_request_are_not_packed(parent, rows, tmp_path):
    quantize_dynamic(onnx.load(parent.path / "model.onnx"), str(tmp_path / "dynamic.onnx"))
    graph = (tmp_path / "dynamic.onnx").read_bytes()
    with pytest.raises(BundleError, match="another answer in a request of 1"):
        pack(tmp_path / "bundle", parent.spec, parent.features, graph, {}, {}, rows, answer(graph, rows), task=parent.task)
    assert not (tmp_path / "bundle").exists()


def test_a_quantised_graph_is_smaller_and_answers_nearly_alike(home, parent, small):
    test = home[1].rows.parts.test
    kinds = [n.op_type for n in onnx.load(small.path / "model.onnx").graph.node]
    assert kinds.count("QuantizeLinear") == 2 and kinds.count("DequantizeLinear") == 4
    assert (small.path / "model.onnx").stat().st_size < 0.85 * (parent.path / "model.onnx").stat().st_size
    assert 0 < np.abs(predict(small, test, test.height) - predict(parent, test, test.height)).max() < 0.1
    assert load_bundle(small.path, small.digest).threshold == parent.threshold and small.provenance["parent"] == parent.digest


def test_so_many_weights_are_nothing_and_the_network_beside_the_graph_is_that_of_the_graph(home, parent, rows, tmp_path):
    made = optimise(parent, tmp_path / "pruned", rows, prune=0.4)
    for tensor in _matrices(onnx.load(made.path / "model.onnx")): assert np.mean(numpy_helper.to_array(tensor) == 0) == pytest.approx(0.4, abs=0.01)
    few = rows[:50]
    said = lambda bundle: scores(network_of(bundle), *map(torch.from_numpy, few.tensors), task=bundle.task).detach().numpy()
    assert np.abs(said(made) - answer((made.path / "model.onnx").read_bytes(), few)).max() < 1e-5 < np.abs(said(parent) - said(made)).max()


def test_what_holds_is_the_next_version_with_its_parent_and_goes_out_by_its_own_gates(home):
    settings, run = home
    found = optimised(str(run.version), int8=True, settings=settings)
    registry = open_registry(settings)
    made = version(registry, found.version)
    assert (made.parent, made.number) == (run.version.digest, run.version.number + 1) and made.results["verdict"]["passed"]
    assert made.lineage["run"] == f"optimised from {run.version}" and made.lineage["cost"]["after"]["size"] < made.lineage["cost"]["before"]["size"]
    assert [e.details["parent"] for e in history(registry) if e.action == "register" and e.object == str(made)] == [run.version.digest]
    assert optimised(str(run.version), int8=True, settings=settings).version == found.version # the same bytes are the same version
    with pytest.raises(Refused): promote(registry, made)
    with pytest.raises(TrainingError, match="mlray optimise"): repeatable(bundle_of(registry, made), str(made))


def test_what_loses_too_much_is_refused_by_name_and_amount_and_leaves_nothing(home, monkeypatch):
    settings, run = home
    registry = open_registry(settings)
    before = versions(registry), len(history(registry))
    lost = optimised(str(run.version), prune=0.97, settings=settings)
    (finding,) = [f for f in lost.verdict.findings if f.measure == "log_loss"]
    theirs = run.evaluation.scorecard.overall["log_loss"].value
    assert not lost.version and not lost.verdict.passed and not finding.passed
    assert f"{run.version} has {theirs:.4g}" in lost.sentence and f"worse by {finding.value - theirs:.4g}" in lost.sentence
    assert (versions(registry), len(history(registry))) == before
    monkeypatch.chdir(settings.root)
    monkeypatch.setenv("MLRAY_HOME", str(settings.home))
    said = CliRunner().invoke(app, ["optimise", str(run.version), "--prune", "0.97"])
    assert said.exit_code == 1 and "worse by" in " ".join(said.stderr.split())


def test_without_a_rule_that_compares_quality_may_lose_a_hundredth_and_other_rules_stay():
    bare = SPEC.model_copy(update={"gates": {"quality": (Rule(metric="accuracy", at_least=0.5),), "fairness": (Rule(metric="recall_difference", by=("sex",), at_most=0.5),)}})
    held = held_to_parent(bare)
    assert held.gates["quality"][0].within == 0.01 and held.gates["fairness"] == bare.gates["fairness"]
    assert held_to_parent(SPEC) is SPEC # its roc_auc has a margin of its own


def test_letters(home, parent, rows, tmp_path):
    with pytest.raises(BundleError, match="between 0 and 1"): optimise(parent, tmp_path / "a", rows, prune=1.0)
    with pytest.raises(BundleError, match="Nothing was asked for"): optimise(parent, tmp_path / "a", rows)
    private = read_spec(shipped("configs") / "diabetes.yaml", ["train.privacy={epsilon: 3.0}"])
    with pytest.raises(BundleError, match="differential privacy"): optimise(parent.__class__(**{**vars(parent), "spec": private}), tmp_path / "a", rows, int8=True)
    tree = onnx.load(parent.path / "model.onnx")
    for node in tree.graph.node: node.op_type = "Add" if node.op_type == "MatMul" else node.op_type
    with pytest.raises(BundleError, match="diabetes/1 multiplies by no matrix"): pruned(tree.SerializeToString(), 0.5, {}, "diabetes/1")
    assert not (tmp_path / "a").exists()


def test_the_edge_says_what_a_quantised_version_says(small, tmp_path): assert export_folder(small, "2", tmp_path / "edge").compared > 0
