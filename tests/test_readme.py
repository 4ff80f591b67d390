"""Whatever README.md tells people to type or to write: each block is read from the page itself, and tried."""
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from datetime import date
from pathlib import Path

import polars as pl
import pytest
import typer.main
import yaml
from typer.testing import CliRunner

from mlray.cli import app
from mlray.command_line.first_screen import CHAPTERS
from mlray.values.spec import RunSpec, parse_spec
from tests.conftest import ROOT, free_port
from tests.test_prose import commands

MLRAY = str(Path(sys.executable).with_name("mlray"))


def blocks(kind: str) -> list[str]:
    "What stands between fences of a kind."
    return re.findall(rf"^```{kind}\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)


def test_the_first_screen_has_every_command_in_one_chapter():
    told = [name for names in CHAPTERS.values() for name in names]
    assert sorted(told) == sorted(typer.main.get_command(app).commands)
    said = CliRunner().invoke(app, ["--help"], terminal_width=80).output
    assert all(len(line) <= 80 and "..." not in line for line in said.splitlines() if "Usage" not in line)
    assert all(re.search(rf"^  {name} +\w", said, re.M) for name in told)


def test_what_a_spec_can_say():
    "The first block is a spec, and each of the others goes with it."
    first, *others = blocks("yaml")
    whole = yaml.safe_load(first)
    parse_spec(first)
    assert len(others) >= 10
    for text in others:
        part = yaml.safe_load(text)
        spec = {n: {**whole.get(n, {}), **v} if isinstance(v, dict) and n in ("data", "contract") else v for n, v in {**whole, **part}.items()}
        if "holders" in str(part): spec["data"].pop("split", None)
        RunSpec.model_validate(spec)


def test_in_a_notebook(tmp_path, monkeypatch):
    monkeypatch.setenv("MLRAY_HOME", str(tmp_path))
    monkeypatch.setenv("MLRAY_TRACKING", "disabled")
    monkeypatch.chdir(ROOT)
    block, _ = blocks("python")
    known: dict = {}
    exec(compile(block, "README.md", "exec"), known)
    assert known["run"].verdict.findings and "| train " in known["run"].rows._repr_markdown_()


def test_two_tables(tmp_path, monkeypatch):
    "What was known on the day, and not what is known since."
    monkeypatch.chdir(tmp_path)
    days = [date(2026, 1, 1), date(2026, 2, 1), date(2026, 3, 1)]
    pl.DataFrame({"user": ["a", "a", "b"], "day": days, "amount": [1, 2, 3]}).write_parquet("requests.parquet")
    pl.DataFrame({"user": ["a", "a", "b"], "day": [days[0], days[2], days[2]], "balance": [10, 20, 30]}).write_parquet("balances.parquet")
    known: dict = {}
    exec(compile(blocks("python")[1], "README.md", "exec"), known)
    assert known["rows"]()["balance"].to_list() == [10, 10, 30]


def test_a_first_run(tmp_path):
    line = next(words for block in blocks("sh") for words in commands(block) if words == ["train", "configs/wine.yaml"])
    done = subprocess.run([MLRAY, *line], cwd=ROOT, env=os.environ | {"MLRAY_HOME": str(tmp_path), "MLRAY_TRACKING": "disabled"}, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and "wine/1" in done.stdout, done.stderr


@pytest.mark.chaos
@pytest.mark.ray
def test_a_day(tmp_path):
    "Line by line, of the patients in place of the census, so that it takes minutes; the service runs while it is asked."
    (day,) = [b for b in blocks("sh") if "mlray serve" in b]
    (ask,) = [b for b in blocks("sh") if "mlray ask" in b]
    row = {"age": 59, "sex": "group 2", "bmi": 32.1, "blood_pressure": 101.0, "total_cholesterol": 157, "ldl": 93.2, "hdl": 38.0, "cholesterol_ratio": 4.0, "triglycerides_log": 4.8598, "glucose": 87}
    spec = yaml.safe_load((ROOT / "configs/diabetes.yaml").read_text())
    port, environment = free_port(), os.environ | {"MLRAY_HOME": str(tmp_path), "MLRAY_TRACKING": "disabled", "MLRAY_JOURNAL": "on"}
    environment["MLRAY_PORT"] = str(port)
    (tmp_path / "rows.yaml").write_text(yaml.safe_dump({"name": "rows", "data": spec["data"], "contract": {"progression": {"type": "number", "role": "target"}}}))
    pl.DataFrame([row] * 5).write_parquet(tmp_path / "rows.parquet")
    spec["search"] = {"trials": 4, "sampler": "random", "scheduler": "none", "space": {"train.learning_rate": {"low": 0.002, "high": 0.003}}} # the same winner each time: others may break a promise
    (tmp_path / "diabetes.yaml").write_text(yaml.safe_dump(spec, sort_keys=False))

    def meant(words: list[str]) -> list[str]:
        swap = {"configs/adult.yaml": str(tmp_path / "diabetes.yaml"), "rows.yaml": str(tmp_path / "rows.yaml"), "ROW": json.dumps(row), "page.html": str(tmp_path / "page.html"), "train.epochs=5": "train.epochs=40",
                "rows.parquet": str(tmp_path / "rows.parquet"), "answers/": str(tmp_path / "answers"), "edge": str(tmp_path / "edge"), "people.parquet": str(tmp_path / "rows.parquet"), "answers.parquet": str(tmp_path / "answers.parquet")} # five epochs are enough for the census, and too few to keep the promises here
        return [swap.get(w, json.dumps(row) if w.startswith("{") else w.replace("adult", "diabetes")) for w in words]

    def did(words: list[str]) -> str:
        began, done = time.monotonic(), subprocess.run([MLRAY, *meant(words)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
        print(f"{done.returncode}  {time.monotonic() - began:5.1f} s  mlray {' '.join(words)[:90]}")
        assert done.returncode == 0 or (words[0] == "doctor" and done.returncode == 1), done.stderr[-2000:]
        return done.stdout

    service = None
    try:
        for words in commands(day):
            if words[0] in ("console", "lab"): continue # they stay until somebody ends them; `test_browser` opens both
            if words[0] != "serve":
                did([w for w in words if w != "--page"]) # which asks npm
                continue
            environment["MLRAY_API_KEY"] = re.search(r"mlr_\S+", did(["key", "create"])).group()
            service = subprocess.Popen([MLRAY, *meant(words)], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
            for _ in range(600):
                try: urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=2)
                except OSError: time.sleep(0.2)
                else: break
            for asked in commands(ask): assert "score" in did(asked) or "--file" in asked
        assert (tmp_path / "page.html").stat().st_size > 1000
    finally:
        if service:
            service.send_signal(signal.SIGINT)
            service.wait(60)
