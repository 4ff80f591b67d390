"""The shape of the house: numbers are floors, one vendor stands in one file, importing does nothing."""
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "nbs").glob("[0-9]*.ipynb"))


def code(path: Path) -> list[str]:
    return ["".join(c["source"]) for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]


def exported(path: Path) -> list[str]: return [c for c in code(path) if re.match(r"\s*#\|\s*export", c)]
def module(path: Path) -> str: return next(m[1] for c in code(path) if (m := re.search(r"^#\|\s*default_exp\s+(\S+)", c, re.M)))


MODULES = {module(p): p for p in NOTEBOOKS}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_imports_only_smaller_numbers(path):
    for name in {m for c in code(path) for m in re.findall(r"^\s*from mlray\.(\w+) import", c, re.M)}:
        assert MODULES[name].stem < path.stem, f"{path.name} imports {name}, which stands above or beside it"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_is_a_page(path):
    cells = json.loads(path.read_text())["cells"]
    assert sum(c.count("\n") + 1 for c in exported(path)) <= 300
    assert max(c.count("\n") + 1 for c in exported(path)) <= 65
    assert cells[0]["cell_type"] == "markdown" and "\n> " in "".join(cells[0]["source"])
    assert path.stem.split("_", 1)[1] == module(path), "file name and module differ"


def test_the_layers_are_the_numbers():
    layers = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]["layers"]
    listed = [name for layer in reversed(layers) for name in sorted(layer.split(" | "), key=lambda n: MODULES[n].stem)]
    assert listed == [module(p) for p in NOTEBOOKS]


def test_the_readme_maps_every_module():
    page = (ROOT / "README.md").read_text().partition("## What is where")[2]
    assert not set(MODULES) - set(re.findall(r"\w+", page))
    assert not set(MODULES) - set(re.findall(r"`mlray\.(\w+)`", (ROOT / "nbs/llms.txt").read_text())), "a module's docstring needs two lines below its title to be listed"


def test_every_module_has_its_notebook():
    generated = {p.stem for p in (ROOT / "mlray").glob("*.py")} - {"__init__", "_modidx"}
    assert generated == set(MODULES)


@pytest.mark.parametrize(("vendor", "pattern"), [("wandb", {"track_on_wandb"}), ("papermill", {"gate_on_papermill"}), ("sqlalchemy", {"database"}),
                                                 ("fastapi", {"serve_on_ray"}), ("grpc", {"grpc_on_ray"}), ("opentelemetry", {"trace_on_opentelemetry"}), ("typer", {"cli", "first_screen", "cluster_cli", "console_cli", "lab_cli", "delivery_cli", "papers_cli", "proof_cli", "release_cli", "schedule_cli", "rollout_cli", "region_cli", "serve_cli", "submit_cli", "watch_cli", "batch_cli", "export_cli", "optimise_cli", "backup_cli"}), ("alembic", {"database"}), ("optuna", {"search"})])
def test_one_vendor_one_file(vendor, pattern):
    found = {p.stem for p in (ROOT / "mlray").glob("*.py") if re.search(rf"^\s*(import|from) {vendor}\b", p.read_text(), re.M)}
    assert found == pattern


def test_ray_stands_in_the_ray_files():
    found = {p.stem for p in (ROOT / "mlray").glob("*.py") if re.search(r"^\s*(import|from) ray\b", p.read_text(), re.M)}
    assert found and all(name.endswith("_on_ray") for name in found)


def loaded_after(statement: str) -> set[str]:
    done = subprocess.run([sys.executable, "-c", f"{statement}\nimport sys, json\nprint(json.dumps(sorted(sys.modules)))"], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout))


@pytest.mark.parametrize(("statement", "absent"), [
    ("import mlray", {"torch", "ray", "pandas", "sklearn", "polars"}), ("import mlray.cli", {"torch", "ray", "polars", "rich.table"}),
    ("import mlray.service", {"torch", "ray", "pandas", "sklearn", "fastapi"}), ("import mlray.evaluation", {"torch", "ray", "pandas", "sklearn"}),
    ("import mlray.haproxy", {"ray", "polars"}), ("import mlray.gate_on_papermill, mlray.warm_kernels, mlray.trace_on_openlineage, mlray.gate_report, mlray.portrait", {"torch", "ray", "pandas", "sklearn"})])
def test_importing_brings_nothing_heavy(statement, absent):
    assert not absent & loaded_after(statement)


def test_importing_leaves_no_trace(tmp_path):
    subprocess.run([sys.executable, "-c", "import mlray, mlray.cli, mlray.run, mlray.serve_on_ray"], cwd=tmp_path, check=True)
    assert not list(tmp_path.iterdir())


def test_the_public_names_are_there():
    import mlray
    assert {"read_spec", "train", "judge", "load_bundle", "Service"} <= set(mlray.__all__)
    for name in mlray.__all__: assert callable(getattr(mlray, name))


def test_nothing_is_unpickled():
    for path in (ROOT / "mlray").rglob("*.py"):
        assert not re.search(r"\bpickle\b|cloudpickle|joblib|torch\.load|allow_pickle|shell=True|os\.system", path.read_text()), path


def test_the_top_level_is_what_it_should_be():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    top = {name.split("/")[0] for name in listed}
    assert {t for t in top if not t.startswith(".")} == {"pyproject.toml", "README.md", "nbs", "mlray", "configs", "cluster", "tests", "settings.ini", "LICENSE", "Makefile"}


def test_workers_do_not_pay_for_jupyterlab():
    assert subprocess.run([sys.executable, "-c", "import rfc3987_syntax"], capture_output=True).returncode, \
        "rfc3987-syntax (JupyterLab brings it) adds a second to every Ray process: pip uninstall rfc3987-syntax, and use `make lab`"
