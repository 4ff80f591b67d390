"""The shape of the house: chapters and numbers are floors, one vendor stands in one file, importing does nothing."""
import ast
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CONTRACTS = [c for c in tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"] if c["type"] == "layers"]
LAYERS = [name for layer in reversed(CONTRACTS[0]["layers"]) for name in layer.split(" | ")] # chapters, and what stands beside them; from the first to the last
FOLDERS = sorted((ROOT / "nbs").glob("[0-9]*"))
CHAPTERS = [f.name.split("_", 1)[1] for f in FOLDERS]
NOTEBOOKS = [*sorted((ROOT / "nbs").glob("[0-9]*/*.ipynb")), *(p for p in sorted((ROOT / "nbs").glob("*.ipynb")) if p.name != "index.ipynb")]


def code(path: Path) -> list[str]:
    return ["".join(c["source"]) for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]


def exported(path: Path) -> list[str]: return [c for c in code(path) if re.match(r"\s*#\|\s*export", c)]
def module(path: Path) -> str: return next(m[1] for c in code(path) if (m := re.search(r"^#\|\s*default_exp\s+(\S+)", c, re.M)))


def place(path: Path) -> tuple[int, str]: return LAYERS.index(module(path).split(".")[0]), path.stem


MODULES = {module(p): p for p in NOTEBOOKS}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_imports_only_smaller_numbers(path):
    cells = code(path) if path.parent in FOLDERS else exported(path) # a lesson about samples may train a network
    for name in {m for c in cells for m in re.findall(r"^\s*from mlray\.([\w.]+) import", c, re.M)} - set(CHAPTERS):
        assert place(MODULES[name]) < place(path), f"{path.name} imports {name}, which stands above or beside it"
    for name in {f"{a}.{n.split(' ')[0]}" for c in cells for a, names in re.findall(r"^\s*from mlray\.(\w+) import (.+)$", c, re.M) if a in CHAPTERS for n in names.split(", ")} - {module(path)}:
        assert place(MODULES[name]) < place(path), f"{path.name} imports {name}, which stands above or beside it"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_is_a_page(path):
    cells = json.loads(path.read_text())["cells"]
    assert sum(c.count("\n") + 1 for c in exported(path)) <= 300
    assert max(c.count("\n") + 1 for c in exported(path)) <= 65
    assert cells[0]["cell_type"] == "markdown" and "\n> " in "".join(cells[0]["source"])
    name = path.stem if path.parent == ROOT / "nbs" else f"{path.parent.name.split('_', 1)[1]}.{path.stem.split('_', 1)[1]}"
    assert module(path) == (f"{name.split('.')[0]}.__init__" if path.stem.startswith("00_") else name), "folder or file name, and module, differ"


def test_the_layers_are_the_numbers():
    assert [name for name in LAYERS if name in CHAPTERS] == CHAPTERS and set(LAYERS) - set(CHAPTERS) == {p.stem for p in NOTEBOOKS if p.parent == ROOT / "nbs"}
    assert [c["containers"] for c in CONTRACTS[1:]] == [[f"mlray.{name}"] for name in CHAPTERS]
    for folder, contract in zip(FOLDERS, CONTRACTS[1:], strict=True):
        stems = {p.stem.split("_", 1)[1]: p.stem for p in sorted(folder.glob("*.ipynb"))[1:]}
        assert [name for layer in reversed(contract["layers"]) for name in sorted(layer.split(" | "), key=stems.__getitem__)] == list(stems)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda f: f.name)
def test_a_chapter_begins_with_a_page_that_lists_it(folder):
    name = folder.name.split("_", 1)[1]
    first, *others = sorted(folder.glob("*.ipynb"))
    assert first.stem == f"00_{name}" and len(others) < 32, "a chapter of more notebooks is two"
    said = "\n".join("".join(c["source"]) for c in json.loads(first.read_text())["cells"])
    for path in others:
        title = next(line[2:].strip() for line in "".join(json.loads(path.read_text())["cells"][0]["source"]).splitlines() if line.startswith("> "))
        assert f"- [{path.stem.split('_', 1)[1]}]({path.name}): {title}\n" in said, f"{first.name} does not list {path.name} with its title"
    assert set(re.findall(r"\]\((\d\w+\.ipynb)\)", said)) == {p.name for p in others}, f"{first.name} lists what is not there"
    page = ast.get_docstring(ast.parse((ROOT / "mlray" / name / "__init__.py").read_text()))
    assert page and len(page.splitlines()) >= 4, f"help(mlray.{name}) says too little"


def test_a_module_is_found_by_its_own_name_too():
    names = [name.split(".")[-1] for name in MODULES if not name.endswith("__init__")]
    assert len(names) == len(set(names)) and not set(names) & set(CHAPTERS), "a name that was written down would lead to two places"
    said = "import sys, mlray, mlray.spec, mlray.samples, mlray.cluster_cli as c, mlray.command_line.cluster_cli as d; from importlib import import_module, reload; from mlray.values import spec as s; " \
           "print(mlray.spec is s, mlray.spec.RunSpec.__module__, s.__spec__.name, c is d, reload(s) is s)\ntry: import mlray.nothing_here\nexcept ModuleNotFoundError as error: print(error)"
    assert subprocess.run([sys.executable, "-c", said], capture_output=True, text=True, check=True).stdout == "True mlray.values.spec mlray.values.spec True True\nNo module named 'mlray.nothing_here'\n"


def test_the_readme_maps_every_module():
    page = (ROOT / "README.md").read_text().partition("## What is where")[2]
    assert not {name.split(".")[-1] for name in MODULES} - {"__init__"} - set(re.findall(r"\w+", page))
    assert not {name for name in MODULES if not name.endswith("__init__")} - set(re.findall(r"`mlray\.([\w.]+)`", (ROOT / "nbs/llms.txt").read_text())), "a module's docstring needs two lines below its title to be listed"


def test_every_module_has_its_notebook():
    generated = {".".join(p.relative_to(ROOT / "mlray").with_suffix("").parts) for p in (ROOT / "mlray").rglob("*.py") if "migrations" not in p.parts} - {"__init__", "_modidx"}
    assert generated == set(MODULES)


@pytest.mark.parametrize(("vendor", "pattern"), [("wandb", {"track_on_wandb"}), ("papermill", {"gate_on_papermill"}), ("sqlalchemy", {"database"}),
                                                 ("fastapi", set()), ("grpc", {"grpc_on_ray"}), ("opentelemetry", {"trace_on_opentelemetry"}), ("typer", {"cli", "first_screen", "cluster_cli", "console_cli", "lab_cli", "delivery_cli", "papers_cli", "proof_cli", "release_cli", "schedule_cli", "rollout_cli", "region_cli", "serve_cli", "submit_cli", "watch_cli", "batch_cli", "export_cli", "optimise_cli", "backup_cli"}), ("alembic", {"database"}), ("optuna", {"search"})])
def test_one_vendor_one_file(vendor, pattern):
    found = {p.stem for p in (ROOT / "mlray").rglob("*.py") if "migrations" not in p.parts and re.search(rf"^\s*(import|from) {vendor}\b", p.read_text(), re.M)}
    assert found == pattern


def test_ray_stands_in_the_ray_files():
    found = {p.stem for p in (ROOT / "mlray").rglob("*.py") if "migrations" not in p.parts and re.search(r"^\s*(import|from) ray\b", p.read_text(), re.M)}
    assert found and all(name.endswith("_on_ray") for name in found)


def loaded_after(statement: str) -> set[str]:
    done = subprocess.run([sys.executable, "-c", f"{statement}\nimport sys, json\nprint(json.dumps(sorted(sys.modules)))"], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout))


@pytest.mark.parametrize(("statement", "absent"), [
    ("import mlray", {"torch", "ray", "pandas", "sklearn", "polars"}), ("import mlray.cli", {"torch", "ray", "polars", "rich.table", "jsonschema"}),
    ("import mlray.serving.service", {"torch", "ray", "pandas", "sklearn", "fastapi"}), ("import mlray.running.evaluation", {"torch", "ray", "pandas", "sklearn"}),
    ("import mlray.engines.haproxy", {"ray", "polars"}), ("import mlray.engines.gate_on_papermill, mlray.engines.warm_kernels, mlray.engines.trace_on_openlineage, mlray.pages.gate_report, mlray.running.portrait", {"torch", "ray", "pandas", "sklearn"})])
def test_importing_brings_nothing_heavy(statement, absent):
    assert not absent & loaded_after(statement)


def test_importing_leaves_no_trace(tmp_path):
    subprocess.run([sys.executable, "-c", "import mlray, mlray.cli, mlray.running.run, mlray.engines.serve_on_ray"], cwd=tmp_path, check=True)
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
