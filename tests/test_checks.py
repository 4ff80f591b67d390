"""The checks can fail: each of them, against a copy of this project with one thing made wrong."""
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def copy(tmp_path) -> Path:
    "The project, without its environment."
    names = ["pyproject.toml", "settings.ini", "README.md", "nbs", "mlray", "tests", "configs"]
    for name in names:
        if (ROOT / name).is_dir(): shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
        else: shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def run(copy: Path, *words: str) -> tuple[int, str]:
    done = subprocess.run([sys.executable, *words], cwd=copy, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def test_a_notebook_edited_without_export_is_found(copy):
    change(copy / "nbs/03_judgement/17_gate.ipynb", "not low >= rule.at_least", "not low > rule.at_least")
    status, said = run(copy, "-c", "import sys; from tests.checks import out_of_step; sys.exit(out_of_step())")
    assert status == 1 and "mlray/judgement/gate.py: differs from its notebook" in said


def test_an_import_upwards_is_found(copy):
    notebook = json.loads((copy / "nbs/02_measures/11_fairness.ipynb").read_text())
    cell = next(c for c in notebook["cells"] if "from mlray.values.display import" in "".join(c["source"]))
    cell["source"] = "".join(cell["source"]) + "\nfrom mlray.judgement.gate import judge"
    (copy / "nbs/02_measures/11_fairness.ipynb").write_text(json.dumps(notebook))
    run(copy, "-c", "from tests.checks import fix; fix()")
    status, said = run(copy, "-c", "import sys; from importlinter.cli import lint_imports_command; lint_imports_command()")
    assert status == 1 and "mlray.measures is not allowed to import mlray.judgement" in said
    status, said = run(copy, "-m", "pytest", "-q", "tests/test_floors.py", "-k", "smaller_numbers")
    assert status == 1 and "11_fairness.ipynb imports judgement.gate" in said


@pytest.mark.parametrize(("old", "new"), [('_meta({"ge": low, "le": high})', '_meta({"ge": low})'), ("value not in column.values", "value in ()"),
                                          ('"min" if low is not None and value < low else ', "")])
def test_a_broken_law_of_the_contract_is_found(copy, old, new):
    change(copy / "mlray/learning/request.py", old, new)
    status, said = run(copy, "-m", "pytest", "-q", "tests/test_laws.py", "-k", "frame_and_request_agree")
    assert status == 1 and "1 failed" in said, said[-2000:]
