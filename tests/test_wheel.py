"""The wheel, in an environment that has never seen this folder: from a CSV to a served answer."""
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from tests.conftest import DATA, ROOT, free_port
from tests.test_project import ADULT, loans

NOT_OURS = ("tests/", "nbs/", ".mlray/")


def run(*command: str, where: Path, **variables: str) -> str:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("MLRAY_", "PYTHON", "VIRTUAL"))}
    done = subprocess.run(command, cwd=where, env=kept | {"MLRAY_TRACKING": "disabled", **variables}, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    where = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", str(ROOT), "--no-deps", "--quiet", "--wheel-dir", str(where), where=where)
    return next(where.glob("mlray-*.whl"))


@pytest.mark.chaos
def test_what_is_in_it(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert not [n for n in names if n.startswith(NOT_OURS)]
    for needed in ("mlray/cli.py", "mlray/gates/fairness.ipynb", "mlray/configs/diabetes.yaml", "mlray/cluster/constraints.txt", "mlray/migrations/env.py"): assert needed in names, needed


@pytest.mark.chaos
@pytest.mark.ray
def test_from_a_file_to_an_answer(wheel, tmp_path):
    "Four commands, on UCI Adult where it is at hand."
    began = time.monotonic()
    run(sys.executable, "-m", "venv", str(tmp_path / "env"), where=tmp_path)
    binaries = tmp_path / "env/bin"
    pip = (str(binaries / "pip"), "install", "--quiet", "-c", str(ROOT / "cluster/constraints.txt"))
    run(*pip, "torch==2.13.0", where=tmp_path)
    run(*pip, f"{wheel}[estimators]", "pytest", where=tmp_path)
    print(f"installed in {time.monotonic() - began:.0f} s")
    path, began = f"{binaries}:{os.environ['PATH']}", time.monotonic()
    adult = DATA / "adult/adult.data" if DATA else None
    if adult and adult.is_file(): flags = ("--from", str(adult), "--columns", ADULT, "--target", "income", "--positive", ">50K", "--sensitive", "sex")
    else: flags = ("--from", str(loans(tmp_path)), "--target", "repaid", "--positive", "yes", "--sensitive", "sex")
    run(str(binaries / "mlray"), "new", "mine", *flags, where=tmp_path, PATH=path)
    told = run(str(binaries / "mlray"), "demo", "configs/mine.yaml", "--port", str(free_port()), where=tmp_path / "mine", PATH=path)
    print(f"from a file to an answer in {time.monotonic() - began:.0f} s; load {os.getloadavg()[0]:.0f}")
    assert "from mine/1" in told
    print(run(str(binaries / "python"), "-m", "pytest", "-q", where=tmp_path / "mine", PATH=path)[-300:])
