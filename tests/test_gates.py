"""Gates against real papermill and real kernels: every way to end without a verdict is a failure with its reason."""
import json
import shutil
from pathlib import Path

import nbformat
import pytest

from mlray.errors import GateError, RegistryError
from mlray.gate_on_papermill import gate_path, run_gate, run_gates
from mlray.registry import add_evidence, events, evidence, open_registry, promote, version


def page(path: Path, *cells: str, parameters: str = "version: str = 'diabetes'") -> Path:
    first = nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})
    nbformat.write(nbformat.v4.new_notebook(cells=[first, *map(nbformat.v4.new_code_cell, cells)], metadata={"kernelspec": {"name": "python3", "display_name": "", "language": "python"}}), path)
    return path


GOOD = "from mlray.gate import judge\nfrom mlray.spec import Rule\njudge({'x': 1.0}, [Rule(metric='x', at_least=0)])"


@pytest.mark.parametrize(("cells", "reason"), [
    ([GOOD], ""), ([GOOD, "1 / 0"], "ZeroDivisionError"), (["import sys\nsys.exit(0)", GOOD], "left before its last cell"), (["import os\nos._exit(1)"], "kernel died"),
    (["import time\ntime.sleep(60)"], "longer than 2 s"), (["1 + 1"], "shows no verdict"), (["raise SystemExit"], "left before its last cell"),
    ([GOOD.replace("at_least=0", "at_least=2")], "")], ids=["good", "raises after its verdict", "exits", "dies", "hangs", "silent", "leaves", "fails"])
def test_every_end(tmp_path, cells, reason):
    run = run_gate(page(tmp_path / "g.ipynb", *cells), {}, timeout=2)
    assert (reason in run.broken) if reason else not run.broken
    assert run.verdict.passed == (cells == [GOOD])


@pytest.mark.parametrize(("given", "words"), [({"versoin": "a/1"}, "Did you mean 'version'"), ({"version": 3}, "is str; int"), ({"version": ("a",)}, "is str; tuple"), ({"x = 1; import os #": 1}, "no parameter")])
def test_wrong_parameters_start_no_kernel(tmp_path, given, words, monkeypatch):
    monkeypatch.setattr("papermill.execute_notebook", lambda *a, **k: pytest.fail("a kernel was started"))
    with pytest.raises(GateError, match=words): run_gate(page(tmp_path / "g.ipynb", GOOD), given)


def test_a_projects_own_gate_comes_first(settings, tmp_path):
    (tmp_path / "nbs/gates").mkdir(parents=True)
    mine = page(tmp_path / "nbs/gates/quality.ipynb", GOOD)
    assert gate_path("quality", settings) == mine and gate_path("fairness", settings) != mine
    with pytest.raises(GateError, match="Did you mean 'fairness'"): gate_path("fairnes", settings)


def test_the_gates_that_ship(trained):
    settings, run = trained
    registry = open_registry(settings)
    with pytest.raises(RegistryError, match="no verdict of the gate"): promote(registry, run.version)
    done = {g.gate: g for g in run_gates(registry, run.version, ["quality", "fairness"], settings)}
    assert not any(g.broken for g in done.values())
    assert done["quality"].verdict + done["fairness"].verdict == run.verdict, "the gate and the run judge the same"
    kept = evidence(registry, run.version)
    for gate, proof in kept.items():
        stored = (registry.store.path(proof.page) / f"{gate}.ipynb").read_bytes()
        assert stored == done[gate].page and str(settings.home).encode() not in stored and json.loads(stored)["cells"]
    assert promote(registry, run.version) == 1 and version(registry, "diabetes@production") == version(registry, "diabetes/1")
    assert [r[1] for r in events(registry).rows] == ["register", "refuse", "gate", "gate", "promote"]


def test_newer_evidence_counts(trained):
    from mlray.gate import judge
    from mlray.spec import Rule
    settings, run = trained
    registry = open_registry(settings)
    for value, allowed in ((0.9, True), (0.1, False), (0.9, True)):
        add_evidence(registry, run.version, "extra", judge({"x": value}, [Rule(metric="x", at_least=0.5)]), b"{}")
        if allowed: promote(registry, run.version, "staging", gates=["extra"])
        else:
            with pytest.raises(RegistryError, match="failed the gate extra"): promote(registry, run.version, "staging", gates=["extra"])


def test_the_next_version_is_held_against_production(trained, diabetes, tmp_path):
    "A worse candidate is told how much worse it is, by the run and by the gate."
    from mlray.run import train
    shutil.copytree(trained[0].home, tmp_path / "home")
    settings, first = trained[0].model_copy(update={"home": tmp_path / "home"}), trained[1]
    registry = open_registry(settings)
    for gate in settings.gates: add_evidence(registry, first.version, gate, first.verdict, b"{}")
    promote(registry, first.version, gates=settings.gates)
    worse = train(diabetes.model_copy(update={"train": diabetes.train.model_copy(update={"epochs": 1, "learning_rate": 1e-5})}), settings)
    finding = worse.verdict.findings[0]
    assert finding.measure == "roc_auc" and not finding.passed and "production has" in finding.why
    [run] = run_gates(registry, worse.version, ["quality"], settings)
    assert run.verdict.findings[0] == finding and not run.broken
    with pytest.raises(RegistryError, match="failed the gate quality"): promote(registry, worse.version, gates=["quality"])
