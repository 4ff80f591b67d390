"""Gates as tasks of a real cluster: they join it, a lost worker is replaced, and a notebook that breaks is not tried twice."""
import os
import shutil

import pytest

from mlray.engines.gate_on_papermill import run_gates
from mlray.governance.registry import evidence, open_registry
from mlray.running.gate_page import Needs, needs_of
from mlray.values.errors import GateError
from tests.test_gates import GOOD, page

pytestmark = [pytest.mark.ray, pytest.mark.xdist_group("gates_on_ray")]

JOINS = "import os, ray\nray.init(address=os.environ['RAY_ADDRESS'], log_to_driver=False)\nray.get(ray.remote(lambda: 6 * 7).options(num_cpus=0).remote())"
COUNTS = "with open({tries!r}, 'a') as f: f.write('x')\n"
KILLS_ITS_WORKER = COUNTS + "import os, pathlib, signal, time\nif len(pathlib.Path({tries!r}).read_text()) == 1:\n    os.kill(os.getppid(), signal.SIGKILL)\n    time.sleep(600)"
DIES = COUNTS + "import os\nos._exit(1)"


@pytest.fixture
def gated(trained, tmp_path):
    "A project with gates of its own, which share a folder with the cluster."
    shutil.copytree(trained[0].home, tmp_path / "home")
    settings = trained[0].model_copy(update={"home": tmp_path / "home", "root": tmp_path})
    (tmp_path / "nbs/gates").mkdir(parents=True)
    def gate(name, *cells, tags=()):
        path = page(tmp_path / f"nbs/gates/{name}.ipynb", *(c.format(tries=str(tmp_path / name)) if "{tries" in c else c for c in cells))
        if tags: path.write_text(path.read_text().replace('"parameters"\n', '"parameters", ' + ", ".join(f'"{t}"' for t in tags) + "\n"))
        return name
    return settings, trained[1].version, open_registry(settings), gate


def test_gates_run_as_tasks_join_the_cluster_and_outlive_a_worker(gated, ray_cluster, tmp_path):
    from mlray.engines.gate_on_ray import on_ray
    settings, found, registry, gate = gated
    named = [gate("joins", JOINS, "assert os.environ['POLARS_MAX_THREADS'] == '2'", GOOD, tags=["num_cpus=2"]), gate("reads", "from mlray.governance.registry import open_registry, version\nfrom mlray.values.settings import read_settings\nassert version(open_registry(read_settings()), '" + str(found) + "').digest == '" + found.digest + "'", GOOD),
             gate("kills", KILLS_ITS_WORKER, GOOD), gate("dies", DIES, GOOD), gate("fails", GOOD.replace("at_least=0", "at_least=2"))]
    said = []
    runs = {r.gate: r for r in run_gates(registry, found, named, settings, runner=on_ray, note=lambda g, where: said.append((g, where)))}
    assert {n: (r.verdict.passed, r.broken) for n, r in runs.items()} == {"joins": (True, ""), "reads": (True, ""), "kills": (True, ""), "dies": (False, "its kernel died (out of memory?)"), "fails": (False, "")}
    assert (tmp_path / "kills").read_text() == "xx", "a gate whose worker was killed is run again"
    assert (tmp_path / "dies").read_text() == "x", "a gate whose kernel died is not"
    assert {g for g, _ in said} == set(named) and set(evidence(registry, found)) >= set(named)
    assert runs["joins"].notebook == settings.root / "nbs/gates/joins.ipynb"
    again = {r.gate: bool(r.reused) for r in run_gates(registry, found, ["joins", "dies"], settings, runner=on_ray)}
    assert again == {"joins": True, "dies": False} and str(tmp_path) not in runs["reads"].page.decode() and os.uname().nodename not in runs["joins"].page.decode()


def test_waiting_for_a_node_is_said_and_ends_with_the_run(gated, ray_cluster):
    from mlray.engines.gate_on_ray import on_ray
    settings, found, registry, gate = gated
    said, running = [], run_gates(registry, found, [gate("large", GOOD, tags=["num_gpus=3"]), gate("small", GOOD)], settings, runner=on_ray, note=lambda g, where: said.append((g, where)))
    assert next(running).gate == "small" and ("large", "waits for a node with 1 CPUs, 3 GPUs") in said
    running.close()


@pytest.mark.parametrize(("tags", "words"), [(["num_cpu=2"], "Did you mean 'num_cpus'"), (["num_cpus=many"], "a number from 0"), (["timeout_s=1.5"], "a number from 0")])
def test_needs_are_read_strictly(gated, tags, words):
    settings, found, registry, gate = gated
    gate("g", GOOD, tags=tags)
    with pytest.raises(GateError, match=words): next(run_gates(registry, found, ["g"], settings))
    gate("g", GOOD, tags=["num_cpus=0.5", "num_gpus=1", "memory_gb=2", "timeout_s=9"])
    assert needs_of(settings.root / "nbs/gates/g.ipynb") == Needs(0.5, 1, 2, 9)
