"""The tutorial that needs a cluster, cell by cell on a real one, in a process of its own; the other tutorials run where all notebooks do."""
import json
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from tests.conftest import ROOT

pytestmark = [pytest.mark.ray, pytest.mark.xdist_group("gates_on_ray")]
RUN = """
import sys, time
from fastcore.nbio import read_nb, write_nb
from execnb.shell import CaptureShell
page, shell = read_nb(sys.argv[1]), CaptureShell(sys.argv[1])
for cell in page.cells:
    began = time.monotonic()
    shell.cell(cell)
    if shell.exc: raise shell.exc
    if cell.cell_type == "code": print(f"{time.monotonic() - began:6.1f} s  {cell.source.splitlines()[-1][:100]}", flush=True)
write_nb(page, sys.argv[2])
"""


def test_from_a_notebook_to_a_cluster(tmp_path):
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", RUN, "to_a_cluster.ipynb", str(tmp_path / "done.ipynb")], cwd=ROOT / "nbs/tutorials", capture_output=True, text=True, timeout=900)
    print(f"\n{done.stdout}{time.monotonic() - began:6.1f} s in all")
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]

    def shown() -> Iterator[str]:
        for cell in json.loads((tmp_path / "done.ipynb").read_text())["cells"]:
            for output in cell.get("outputs", ()): yield "".join(output.get("data", {}).get("text/plain", output.get("text", "")))

    said = "\n".join(shown())
    assert "{'weights.safetensors': True, 'model.onnx': True, 'profile.json': True}" in said, "one worker, and other bits"
    assert "({'weights.safetensors': False" in said, "two workers and the same bits: were there two?"
    assert "{'data': True, 'quality': True}" in said
