"""Gates against real papermill and real kernels: every way to end without a verdict is a failure with its reason."""
import hashlib
import json
import shutil
import subprocess
from pathlib import Path

import nbformat
import pytest

from mlray.engines.gate_on_papermill import gate_path, run_gate, run_gates
from mlray.governance.registry import Policy, add_evidence, events, evidence, open_registry, promote, version
from mlray.values.errors import GateError, RegistryError
from tests.conftest import gone, running_below


def page(path: Path, *cells: str, parameters: str = "version: str = 'diabetes'") -> Path:
    first = nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})
    nbformat.write(nbformat.v4.new_notebook(cells=[first, *map(nbformat.v4.new_code_cell, cells)], metadata={"kernelspec": {"name": "python3", "display_name": "", "language": "python"}}), path)
    return path


GOOD = "from mlray.judgement.gate import judge\nfrom mlray.values.spec import Rule\njudge({'x': 1.0}, [Rule(metric='x', at_least=0)])"


@pytest.mark.parametrize(("cells", "reason"), [
    ([GOOD], ""), ([GOOD, "1 / 0"], "ZeroDivisionError"), (["import sys\nsys.exit(0)", GOOD], "left before its last cell"), (["import os\nos._exit(1)"], "kernel died"),
    (["import time\ntime.sleep(60)"], "longer than 2 s"), (["1 + 1"], "shows no verdict"), (["raise SystemExit"], "left before its last cell"),
    ([GOOD.replace("at_least=0", "at_least=2")], "")], ids=["good", "raises after its verdict", "exits", "dies", "hangs", "silent", "leaves", "fails"])
def test_every_end(tmp_path, cells, reason):
    run = run_gate(page(tmp_path / "g.ipynb", *cells), {}, timeout=2 if "longer" in reason else 120)
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


@pytest.fixture
def own(trained, tmp_path):
    "The trained version in a home of one's own: what is promoted here is promoted nowhere else."
    shutil.copytree(trained[0].home, tmp_path / "home")
    return trained[0].model_copy(update={"home": tmp_path / "home"}), trained[1]


def test_the_gates_that_ship(own):
    settings, run = own
    registry = open_registry(settings)
    with pytest.raises(RegistryError, match="no verdict of the gate"): promote(registry, run.version)
    done = {g.gate: g for g in run_gates(registry, run.version, ["quality", "fairness"], settings)}
    assert not any(g.broken for g in done.values())
    assert done["quality"].verdict + done["fairness"].verdict == run.verdict, "the gate and the run judge the same"
    kept = evidence(registry, run.version)
    for gate, proof in kept.items():
        stored = (registry.store.path(proof.page) / f"{gate}.ipynb").read_bytes()
        assert stored == done[gate].page and str(settings.home).encode() not in stored and json.loads(stored)["cells"]
        said = registry.attestor.read(proof.statement, "statement.json")
        about = json.loads(said)["predicate"]["mlray"]
        assert about["notebook"] == {"before": hashlib.sha256(gate_path(gate, settings).read_bytes()).hexdigest(), "after": proof.page} and about["parameters"] == {"version": "diabetes/1"}
        assert about["rows"] == run.rows.fingerprints and about["started"] < about["finished"] and len(about["software"]) == 64 and str(settings.home).encode() not in said
    assert promote(registry, run.version) == 1 and version(registry, "diabetes@production") == version(registry, "diabetes/1")
    assert [r[1] for r in events(registry).rows] == ["register", "refuse", "gate", "gate", "promote"]


def test_evidence_names_the_commit_and_the_lock_file(own, tmp_path):
    settings, run = own[0].model_copy(update={"root": tmp_path / "project"}), own[1]
    (tmp_path / "project/nbs/gates").mkdir(parents=True)
    page(tmp_path / "project/nbs/gates/mine.ipynb", GOOD)
    (tmp_path / "project/uv.lock").write_text("version = 1\n")
    git = lambda *words: subprocess.run(["git", "-C", str(tmp_path / "project"), "-c", "user.name=ada", "-c", "user.email=ada@localhost", *words], check=True, capture_output=True, text=True).stdout.strip()
    for words in (["init"], ["add", "."], ["commit", "-m", "first"]): git(*words)
    registry = open_registry(settings)
    def said() -> dict:
        done, = run_gates(registry, run.version, ["mine"], settings, again=True)
        assert not done.broken
        return json.loads(registry.attestor.read(evidence(registry, run.version)["mine"].statement, "statement.json"))["predicate"]["mlray"]
    about = said()
    assert about["source"] == {"commit": git("rev-parse", "HEAD"), "dirty": False} and about["lock"] == {"name": "uv.lock", "sha256": hashlib.sha256(b"version = 1\n").hexdigest()}
    (tmp_path / "project/new.py").write_text("x = 1\n")
    assert said()["source"]["dirty"]


def test_newer_evidence_counts(own):
    from mlray.judgement.gate import judge
    from mlray.values.spec import Rule
    settings, run = own
    registry = open_registry(settings)
    for value, allowed in ((0.9, True), (0.1, False), (0.9, True)):
        add_evidence(registry, run.version, "extra", judge({"x": value}, [Rule(metric="x", at_least=0.5)]), b"{}")
        if allowed: promote(registry, run.version, "staging", gates=["extra"])
        else:
            with pytest.raises(RegistryError, match="failed the gate extra"): promote(registry, run.version, "staging", gates=["extra"])


def test_the_next_version_is_held_against_production(own, diabetes):
    "A worse candidate is told how much worse it is, by the run and by the gate."
    from mlray.running.run import train
    settings, first = own
    registry = open_registry(settings)
    for gate in settings.gates: add_evidence(registry, first.version, gate, first.verdict, b"{}")
    promote(registry, first.version, gates=settings.gates)
    worse = train(diabetes.model_copy(update={"train": diabetes.train.model_copy(update={"epochs": 1, "learning_rate": 1e-5})}), settings)
    finding = worse.verdict.findings[0]
    assert finding.measure == "roc_auc" and not finding.passed and "production has" in finding.why
    [run] = run_gates(registry, worse.version, ["quality"], settings)
    assert run.verdict.findings[0] == finding and not run.broken
    with pytest.raises(RegistryError, match="failed the gate quality"): promote(registry, worse.version, gates=["quality"])


RESULT = "from mlray.judgement.gate import Verdict\nVerdict(())"
FORGED = "from IPython.display import display\ndisplay({'application/vnd.mlray.verdict+json': {'findings': [{'measure': 'x'}]}}, raw=True)"


@pytest.mark.parametrize(("cells", "reason"), [
    ([GOOD, RESULT], "without a finding"), ([GOOD, FORGED], "cannot be read"), ([GOOD, FORGED.replace("{'measure': 'x'}", "dict(measure='x', rule='', value=1, passed='no', why='')")], "cannot be read"),
    ([GOOD, "exit()", "1 + 1"], "asked to leave"), (["quit()", GOOD], "asked to leave"), ([GOOD, "def"], "SyntaxError"), ([GOOD, "import sys; sys.exit(2)"], "SystemExit"), ([GOOD, "from concurrent.futures import ThreadPoolExecutor as T\nlist(T(1).map(int, ['x']))"], "ValueError")],
    ids=["empty result", "damaged result", "result that says no in words", "exit() that does not stop", "quit() before the result", "syntax", "exit 2", "error in a thread"])
def test_a_result_alone_is_not_enough(tmp_path, cells, reason):
    run = run_gate(page(tmp_path / "g.ipynb", *cells), {}, timeout=120)
    assert reason in run.broken and not run.verdict.passed


@pytest.mark.parametrize("tag", ["skip-execution", "raises-exception"])
def test_a_tag_hides_nothing(tmp_path, tag):
    path = page(tmp_path / "g.ipynb", GOOD, "1 / 0")
    notebook = nbformat.read(path, as_version=4)
    notebook["cells"][-1]["metadata"]["tags"] = [tag]
    nbformat.write(notebook, path)
    assert run_gate(path, {}).broken


@pytest.mark.parametrize("value", ["'; raise SystemExit #", '"""\nimport os\nos._exit(1)\n"""', "a\\", "{x}\n%%bash\nfalse"])
def test_a_value_stays_a_value(tmp_path, value):
    run = run_gate(page(tmp_path / "g.ipynb", f"assert version == {value!r}", GOOD), {"version": value})
    assert not run.broken and run.verdict.passed


@pytest.mark.parametrize("name", ["../quality", "/etc/passwd", "quality.ipynb", "a/b", "", "quality\n", "$(id)"])
def test_a_gate_is_a_name(settings, name):
    with pytest.raises(GateError, match="no name of a gate"): gate_path(name, settings)


def test_a_page_keeps_no_secret_and_no_place(tmp_path, monkeypatch):
    monkeypatch.setenv("WAREHOUSE_PASSWORD", "correct horse battery")
    monkeypatch.setenv("MLRAY_HOME", str(tmp_path / "home"))
    leak = "import os, socket, sys\nprint(os.environ['WAREHOUSE_PASSWORD'])\nprint('postgresql://ada:lovelace1815@db/rows')\nprint(os.environ['MLRAY_HOME'], socket.gethostname(), sys.prefix)\n'ghp_' + 'a1B2' * 9"
    run = run_gate(page(tmp_path / "g.ipynb", GOOD, leak), {}, named=["WAREHOUSE_PASSWORD"])
    assert not run.verdict.passed and "WAREHOUSE_PASSWORD" in run.broken and "form of a key" in run.broken
    import socket
    import sys
    text = run.page.decode()
    for told in ("correct horse battery", "lovelace1815", "a1B2a1B2", str(tmp_path), f"<home> {socket.gethostname()}", sys.prefix): assert told not in text
    assert "<home>" in text and "<host>" in text
    raised = run_gate(page(tmp_path / "h.ipynb", GOOD, "raise ValueError(os.environ['WAREHOUSE_PASSWORD'] + os.environ['MLRAY_HOME'])", parameters="import os\nversion: str = ''"), {}, named=["WAREHOUSE_PASSWORD"])
    assert "battery" not in raised.page.decode() + raised.broken + str(raised.verdict) and str(tmp_path) not in raised.page.decode() + raised.broken


SEEN = "import os, pathlib\nseen = os.environ.keys() | {v.partition('=')[0] for v in pathlib.Path('/proc/self/environ').read_text().split(chr(0))}\n"


@pytest.mark.parametrize("warm", [False, True])
def test_a_kernel_gets_no_secret_that_nobody_named(tmp_path, monkeypatch, warm):
    "Nor can it read one in the environment that its process began with."
    from contextlib import nullcontext

    from jupyter_client import AsyncKernelManager

    from mlray.engines.warm_kernels import warm_kernels
    kept = ("MLRAY_SIGNING_KEY", "MLRAY_AUDIT_KEY", "MLRAY_API_KEY", "MLRAY_JOURNAL_KEYS", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "WAREHOUSE_URI", "GITHUB_TOKEN")
    for name in (*kept, "HF_TOKEN", "LAKE_URI"): monkeypatch.setenv(name, "a value of its own")
    monkeypatch.setenv("MLRAY_ENV", "staging")
    path = page(tmp_path / "g.ipynb", SEEN + f"assert not seen & set({kept!r}), seen\nassert os.environ['MLRAY_ENV'] == 'staging' and {{'HF_TOKEN', 'LAKE_URI', 'PATH', 'HOME'}} <= os.environ.keys()", GOOD)
    path.write_text(path.read_text().replace('"parameters"\n', '"parameters", "variables=HF_TOKEN"\n'))
    with warm_kernels() if warm else nullcontext(AsyncKernelManager) as kind: run = run_gate(path, {}, kind=kind, named=["LAKE_URI", "MLRAY_SIGNING_KEY"])
    assert run.verdict.passed, run.broken


def test_what_a_spec_names_is_given_and_keys_never(settings, diabetes, tmp_path):
    from mlray.running.gate_page import known_to, needs_of, reached_by
    from mlray.values.data import Source
    at = lambda **source: diabetes.model_copy(update={"data": diabetes.data.model_copy(update={"train": Source(**source)})})
    assert reached_by(diabetes, settings) == () and reached_by(at(sql={"uri_env": "LAKE_URI", "query": "select 1"}), settings) == ("LAKE_URI",)
    remote = settings.model_copy(update={"store": "gs://bucket/x", "registry": "postgresql://ada@db/r", "gate_variables": ("HF_TOKEN",)})
    assert reached_by(at(file="s3://bucket/rows.parquet"), remote) == ("GOOGLE_", "PG", "AWS_", "HF_TOKEN")
    assert set(known_to(("PG", "AWS_"), dict.fromkeys(("PGPASSWORD", "AWS_SESSION_TOKEN", "AWSX", "MLRAY_AUDIT_KEY", "https_proxy"), "x"))) == {"PGPASSWORD", "AWS_SESSION_TOKEN", "https_proxy"}
    path = page(tmp_path / "g.ipynb", GOOD)
    path.write_text(path.read_text().replace('"parameters"\n', '"parameters", "variables=MLRAY_SIGNING_KEY"\n'))
    with pytest.raises(GateError, match="any variable but the keys of mlray"): needs_of(path)


def test_the_same_gate_twice_is_the_same_page(tmp_path):
    from mlray.judgement.gate import results_digest
    path = page(tmp_path / "g.ipynb", GOOD)
    first, second = run_gate(path, {}), run_gate(path, {})
    assert first.page == second.page and results_digest(first.verdict) == results_digest(second.verdict)


def test_a_page_too_large_to_keep_is_a_failure(tmp_path, monkeypatch):
    monkeypatch.setattr("mlray.engines.gate_on_papermill._LARGEST", 2**20)
    run = run_gate(page(tmp_path / "g.ipynb", GOOD, "print('x' * 2_000_000)"), {})
    assert "larger than 1 MiB" in run.broken and not run.verdict.passed and len(run.page) < 2**20


def test_an_output_that_no_notebook_can_hold_is_a_failure(tmp_path):
    "papermill dies of it when it saves the page."
    odd = "from IPython.display import display\ndisplay({'application/vnd.vegalite.v6.json': {'mark': 'bar'}, 'text/plain': 7}, raw=True)"
    run = run_gate(page(tmp_path / "g.ipynb", GOOD, odd), {})
    assert run.broken and not run.verdict.passed


WARM = {"good": ([GOOD], ""), "exits": (["import sys\nsys.exit(0)", GOOD], "left before its last cell"), "dies": (["import os\nos._exit(1)"], "kernel died"), "killed": (["import os, signal\nos.kill(os.getpid(), signal.SIGKILL)"], "kernel died"),
        "hangs": (["import time\ntime.sleep(60)"], "longer than 2 s"), "raises": ([GOOD, "1 / 0"], "ZeroDivisionError"), "leaves": ([GOOD, "exit()"], "asked to leave"),
        "alone": (["import os, sys, numpy\nassert 'papermill' not in sys.modules and os.environ['WHERE'] == 'here' and os.environ['POLARS_MAX_THREADS'] == '1'\nnumpy.random.random()", GOOD], "")}


def test_every_end_in_a_warm_kernel_and_nothing_left(tmp_path):
    "One stem for all of them: what one kernel does to itself does nothing to the next."
    from concurrent.futures import ThreadPoolExecutor

    import psutil

    from mlray.engines.warm_kernels import warm_kernels
    paths = {name: page(tmp_path / f"{name}.ipynb", *cells) for name, (cells, _) in WARM.items()}
    with warm_kernels() as kind, ThreadPoolExecutor(3) as pool:
        runs = dict(zip(paths, pool.map(lambda path: run_gate(path, {}, 2 if path.stem == "hangs" else 120, environment={"WHERE": "here"}, kind=kind), paths.values()), strict=True))
        stem = next(p for p in psutil.Process().children() if "warm_kernels" in running_below().get(p, ""))
    for name, (_, reason) in WARM.items(): assert (reason in runs[name].broken if reason else not runs[name].broken) and runs[name].verdict.passed == (not reason), (name, runs[name].broken)
    assert gone(stem)
    assert run_gate(paths["good"], {}).page == runs["good"].page, "a page does not show how its kernel was started"


def test_a_kernel_that_dies_before_its_first_cell_is_started_again(tmp_path):
    "As when another process has taken one of its ports in the meantime; not for ever, and not once a cell has begun."
    from jupyter_client import AsyncKernelManager
    starts = []
    class Unlucky(AsyncKernelManager):
        async def _async_launch_kernel(self, cmd, **kw):
            starts.append(1)
            await super()._async_launch_kernel([*cmd[:1], "-c", "raise SystemExit(1)"] if len(starts) <= self.deaths else cmd, **kw)
    for Unlucky.deaths, passes in ((1, True), (9, False)):
        starts.clear()
        run = run_gate(page(tmp_path / "g.ipynb", GOOD), {}, kind=Unlucky)
        assert run.verdict.passed == passes and len(starts) == (2 if passes else 3) and passes == (not run.broken)


def test_a_stem_that_dies_takes_no_verdict_with_it(tmp_path):
    from mlray.engines.warm_kernels import warm_kernels
    kill = "import os, signal, time\nos.kill(os.getppid(), signal.SIGKILL)\ntime.sleep(30)"
    with warm_kernels() as kind:
        first, after = (run_gate(page(tmp_path / f"{n}.ipynb", *cells), {}, kind=kind) for n, cells in (("kills", [GOOD, kill]), ("after", [GOOD])))
    assert "kernel died" in first.broken and "starts kernels has died" in after.broken and not first.verdict.passed and not after.verdict.passed


@pytest.fixture
def gated(trained, tmp_path):
    "A registry of one's own with two gates in a project, one of which reads the candidate."
    shutil.copytree(trained[0].home, tmp_path / "home")
    settings = trained[0].model_copy(update={"home": tmp_path / "home", "root": tmp_path})
    (tmp_path / "nbs/gates").mkdir(parents=True)
    for name in ("one", "two"): page(tmp_path / f"nbs/gates/{name}.ipynb", GOOD)
    return settings, trained[1].version, open_registry(settings)


def test_unchanged_gates_are_not_run_again(gated, monkeypatch):
    settings, found, registry = gated
    def runs(**more): return {g.gate: g for g in run_gates(registry, found, ["one", "two"], settings, **more)}
    first, before = runs(), len(events(registry).rows)
    with monkeypatch.context() as m:
        m.setattr("papermill.execute_notebook", lambda *a, **k: pytest.fail("a kernel was started"))
        second = runs()
    assert all(g.reused and not first[n].reused and (g.page, g.verdict) == (first[n].page, first[n].verdict) for n, g in second.items()) and len(events(registry).rows) == before
    assert not any(g.reused for g in runs(again=True).values())
    page(settings.root / "nbs/gates/two.ipynb", GOOD, "2 + 2")
    assert {n: bool(g.reused) for n, g in runs().items()} == {"one": True, "two": False}


def test_what_a_verdict_stands_on_ends_its_use(gated, monkeypatch):
    settings, found, registry = gated
    def reused(): return [bool(g.reused) for g in run_gates(registry, found, ["one"], settings)]
    assert reused() == [False] and reused() == [True]
    registry.policy = Policy(gates=("one",))
    promote(registry, found)
    assert reused() == [False] and reused() == [True], "another version in production is another question"
    monkeypatch.setattr("mlray.engines.gate_on_papermill._software", lambda: "another mlray")
    assert reused() == [False] and reused() == [True]
    proof = evidence(registry, found)["one"]
    stored = registry.store.path(proof.page) / "one.ipynb"
    stored.chmod(0o644)
    stored.write_bytes(stored.read_bytes().replace(b"at_least", b"at_leest"))
    assert reused() == [False], "a page that was touched proves nothing"


def test_a_gate_that_broke_is_tried_again(gated):
    settings, found, registry = gated
    page(settings.root / "nbs/gates/one.ipynb", "raise SystemExit(0)")
    for _ in range(2):
        [run] = run_gates(registry, found, ["one"], settings)
        assert run.broken and not run.reused


def test_reports_point_at_the_cell_and_are_read_by_others(tmp_path):
    "JUnit as pytest's and GitHub's readers take it; an annotation leads to the very line of the notebook's file."
    import xml.etree.ElementTree as xml

    from mlray.pages.gate_report import annotations, junit, summary, tell_github, write_reports
    (tmp_path / "nbs/gates").mkdir(parents=True)
    raised = run_gate(page(tmp_path / "nbs/gates/raises.ipynb", "from mlray.judgement.gate import judge\n\njudge({}, 5)"), {})
    failed = run_gate(page(tmp_path / "nbs/gates/fails.ipynb", GOOD.replace("at_least=0", "at_least=2")), {})
    passed = run_gate(page(tmp_path / "nbs/gates/passes.ipynb", GOOD), {})
    runs = [raised, failed, passed]
    for run, text in ((raised, "judge({}, 5)"), (failed, "from mlray.judgement.gate import judge")):
        place = next(iter(annotations(run, tmp_path)))
        assert text in (tmp_path / place.file).read_text().splitlines()[place.line - 1]
    import mlray.judgement.gate
    inside = list(annotations(raised, tmp_path))[1]
    assert inside.file == "mlray/judgement/gate.py" and "for rule in rules" in Path(mlray.judgement.gate.__file__).read_text().splitlines()[inside.line - 1]
    assert not list(annotations(passed, tmp_path))
    suites = {s.get("name"): s for s in xml.fromstring(junit(runs, "a/1"))}
    assert {n: (s.get("tests"), s.get("failures"), len(s.findall("testcase/failure"))) for n, s in suites.items()} == {"raises": ("1", "1", 1), "fails": ("1", "1", 1), "passes": ("1", "0", 0)}
    assert suites["passes"].find("properties/property[@name='x']").get("value") == "1.0"
    told = tell_github(runs, "a/1", tmp_path, {"GITHUB_ACTIONS": "true", "GITHUB_STEP_SUMMARY": str(tmp_path / "step.md")})
    assert len(told) == 3 and all(line.startswith("::error file=") and "\n" not in line for line in told) and (tmp_path / "step.md").read_text() == summary(runs, "a/1")
    assert tell_github(runs, "a/1", tmp_path, {}) == []
    files = write_reports(runs, "a/1", tmp_path)
    shown = files["index"].read_text()
    assert "a/1: failed" in shown and all((tmp_path / f"{n}.html").stat().st_size > 500 and f"{n}.html" in shown for n in suites)


def test_junit_is_read_by_those_who_read_pytests(tmp_path):
    "By junitparser, beside a report that pytest has written of itself: the same elements, and none that the reader does not know."
    import subprocess
    import sys

    from junitparser import Failure, JUnitXml

    from mlray.engines.gate_on_papermill import GateRun
    from mlray.judgement.gate import Finding, Verdict
    from mlray.pages.gate_report import junit
    runs = [GateRun("quality", Verdict((Finding("roc_auc", "at least 0.8", 0.7, False, "0.7 is below 0.8"), Finding("accuracy", "at least 0.5", 0.6, True, "kept"))), b"{}", 1.5),
            GateRun("data", Verdict((Finding("moved_share", "at most 0.25", 0.5, False, "moved", "ada until 2030-01-01: known"),)), b"{}", 2.0), GateRun("empty", Verdict(()), b"{}", 0.1, "it shows no verdict")]
    (tmp_path / "gates.xml").write_bytes(junit(runs, "a/1"))
    (tmp_path / "test_x.py").write_text("def test_a(record_property):\n    record_property('x', 1)\n    assert False\ndef test_b(): pass\n")
    subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", "/dev/null", "--rootdir", str(tmp_path), f"--junitxml={tmp_path / 'pytest.xml'}", str(tmp_path / "test_x.py")], capture_output=True, cwd=tmp_path)
    ours, theirs = (JUnitXml.fromfile(str(tmp_path / f"{n}.xml")) for n in ("gates", "pytest"))
    suites = {s.name: s for s in ours}
    assert {n: (s.tests, s.failures, s.errors) for n, s in suites.items()} == {"quality": (2, 1, 0), "data": (1, 0, 0), "empty": (1, 1, 0)}
    assert sum(len(list(s)) for s in ours) == 4 and suites["quality"].time == 1.5
    failed = [case for suite in ours for case in suite if any(isinstance(r, Failure) for r in case.result)]
    assert [c.classname for c in failed] == ["gate.quality", "gate.empty"] and failed[0].result[0].message == "0.7 is below 0.8"
    assert {p.name: p.value for p in suites["quality"].properties()}["roc_auc"] == "0.7"
    def elements(tree): return {e.tag for e in tree.iter()}
    import xml.etree.ElementTree as xml
    assert elements(xml.parse(tmp_path / "gates.xml")) <= elements(xml.parse(tmp_path / "pytest.xml")) | {"properties", "property", "system-out"} and len(list(theirs)) == 1


def test_a_report_survives_what_a_gate_may_say(tmp_path):
    import xml.etree.ElementTree as xml

    from mlray.engines.gate_on_papermill import GateRun
    from mlray.judgement.gate import Finding, Verdict
    from mlray.pages.gate_report import Place, index, junit
    run = GateRun("g", Verdict((Finding("a<b>", "\x1b[31m\x00 & more", 1.0, False, "100 %\n::error::<script>"),)), b"{}", 1.0)
    assert xml.fromstring(junit([run], "a/1")).find(".//failure") is not None and "<script>" not in index([run], "a/1")
    assert Place("a,b", 1, "x:y", "100 %\n::stop").command() == "::error file=a%2Cb,line=1,title=x%3Ay::100 %25%0A::stop"


def test_a_verdict_in_the_lab(gated, monkeypatch):
    "`%load_ext mlray` in a shell as notebooks have it; the value of `%gate` is the verdict, and shows itself."
    from IPython.core.interactiveshell import InteractiveShell

    from mlray.judgement.gate import MIME
    settings, found, registry = gated
    monkeypatch.setattr("mlray.command_line.lab.settings_of", lambda env: settings)
    shell = InteractiveShell()
    shell.run_line_magic("load_ext", "mlray")
    done = shell.run_cell(f"%gate one two {found}")
    assert done.success and len(done.result.findings) == 2 and set(evidence(registry, found)) >= {"one", "two"}
    shown, _ = shell.display_formatter.format(done.result)
    assert "Verdict: passed" in shown["text/html"] and shown[MIME]["passed"]
    assert isinstance(shell.run_cell(f"%gate --agin one {found}").error_in_exec, GateError)


def test_a_kernel_does_not_outlive_the_process_that_it_was_forked_from(tmp_path):
    import os
    import time

    import psutil
    from jupyter_client.connect import write_connection_file

    from mlray.engines.warm_kernels import _Stem
    stem = _Stem()
    connection, ports = write_connection_file(str(tmp_path / "kernel.json"))
    kernel = psutil.Process(stem.fork(arguments=["-f", connection], environment=dict(os.environ), folder=str(tmp_path)))
    end = time.monotonic() + 60
    while not any(c.laddr.port == ports["shell_port"] for c in kernel.net_connections()): # until it listens
        assert time.monotonic() < end and kernel.is_running()
        time.sleep(0.1)
    stem.process.kill()
    stem.process.wait()
    end = time.monotonic() + 60 # it looks once a second
    while not gone(kernel) and time.monotonic() < end: time.sleep(0.1)
    left = not gone(kernel)
    if left: kernel.kill()
    assert not left
