"""Collects notebooks as pytest items, one each, and runs their cells in this process.

--nb-pkg   run the lessons against the exported package: `#| export` cells are skipped and their names come from the module
"""
import os
import shutil
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def pytest_addoption(parser):
    parser.getgroup("notebooks").addoption("--nb-pkg", action="store_true", help="run lessons against the exported package")


def pytest_collect_file(parent, file_path):
    if file_path.suffix != ".ipynb" or ".ipynb_checkpoints" in file_path.parts or (file_path.parent / ".notest").exists(): return None
    return NotebookFile.from_parent(parent, path=file_path)


class NotebookFile(pytest.File):
    def collect(self) -> Iterator["Notebook"]:
        yield Notebook.from_parent(self, name=self.path.relative_to(ROOT).as_posix())


class CellFailed(Exception): pass


SCRATCH = pytest.StashKey[str]()


@contextmanager
def scratch(config: pytest.Config) -> Iterator[None]:
    "What a lesson leaves in the folder for temporary files goes when the session ends."
    if SCRATCH not in config.stash:
        config.stash[SCRATCH] = tempfile.mkdtemp(prefix="nb-") # short: paths of sockets are at most 108 bytes
        config.add_cleanup(lambda: shutil.rmtree(config.stash[SCRATCH], ignore_errors=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", config.stash[SCRATCH])
        patch.setattr(tempfile, "tempdir", config.stash[SCRATCH])
        yield


class Notebook(pytest.Item):
    def runtest(self) -> None:
        from execnb.shell import CaptureShell
        from nbdev.config import get_config
        from nbdev.process import NBProcessor
        from nbdev.test import _skip_cell
        config, package = get_config(ROOT), self.config.option.nb_pkg
        cells = NBProcessor(self.path, rm_directives=False, process=True).nb
        skipped = _skip_cell(cells, str(config.get("tst_flags", "")).split(), [])
        module = next((c.directives_["default_exp"] for c in cells.cells if "default_exp" in (c.get("directives_") or {})), None)
        before = os.getcwd()
        os.chdir(self.path.parent)
        shell = CaptureShell(self.path)
        try:
            with scratch(self.config):
                if package and module: shell.run(f"import mlray.{module.removesuffix('.__init__')} as _m\nglobals().update({{k: v for k, v in vars(_m).items() if not k.startswith('__')}})")
                for cell in cells.cells:
                    if skipped(cell) or (package and {"export", "exports", "exporti"} & set(cell.directives_)): continue
                    shell.cell(cell, timeout=config.cell_timeout)
                    if shell.exc: raise CellFailed(cell, shell.exc)
        finally:
            shell.close()
            os.chdir(before)

    def repr_failure(self, excinfo):
        if not isinstance(excinfo.value, CellFailed): return super().repr_failure(excinfo)
        cell, error = excinfo.value.args
        lines = [line for line in traceback.format_exception(error) if "execnb" not in line and "IPython/core" not in line]
        return f"cell {cell['id']} of {self.name}\n\n" + "\n".join("    " + line for line in cell.source.splitlines()) + "\n\n" + "".join(lines)

    def reportinfo(self): return self.path, 0, self.name


sys.path.insert(0, str(ROOT)) if str(ROOT) not in sys.path else None
