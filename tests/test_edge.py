"""`mlray export`: a folder without mlray, and a page in a browser, say what mlray says."""
import json
import os
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import msgspec
import numpy as np
import polars as pl
import pytest

from mlray.governance.registry import bundle_of, open_registry
from mlray.running.run import train
from mlray.serving.edge_folder import differences, expected, export_folder, rows_of_every_kind
from mlray.serving.served import Served
from mlray.shipping.bundle import Bundle, predict
from mlray.shipping.export import plain
from mlray.values.errors import BundleError
from mlray.values.settings import shipped
from mlray.values.spec import changed, parse_spec, read_spec

ALL = """
name: loans
data: {{train: {{file: "{file}"}}, split: {{test: 0.1, valid: 0.2}}}}
contract:
  id: {{type: category, role: id}}
  income: {{type: number, min: 0, nullable: true}}
  owes: {{type: integer, min: 0, max: 90}}
  place: {{type: category, nullable: true, sensitive: true}}
  age: {{type: integer, min: 18, max: 99, sensitive: true, bands: [30, 50]}}
  member: {{type: boolean, nullable: true, sensitive: true}}
  born: {{type: date, min: 1920-01-01, max: 2020-12-31, nullable: true}}
  asked: {{type: datetime, min: "2019-01-01T00:00:00"}}
  paid: {{type: datetime, time_zone: Europe/Berlin, nullable: true}}
  waited: {{type: duration, min: 0, max: 100000}}
  letter: {{type: text, nullable: true}}
  code: {{type: text, pattern: "[A-Z]{{2}}[0-9]+"}}
  signal: {{type: array, length: 4, min: -5, max: 5, nullable: true}}
  late: {{type: boolean, role: target}}
features: {{share: owes / income, double: {{sql: owes * 2 - age}}, old: {{sql: "age >= 50 AND NOT member"}}}}
rules: {{sane: owes <= income + 60 OR income IS NULL, both: "member OR age >= 18"}}
mitigation: {{method: thresholds, constraint: demographic_parity, by: [age, member], eps: 0.9}}
model: {{network: mlp, hidden: [8], embedding: 4}}
train: {{epochs: 2}}
"""


def loans(path: Path, rows: int = 1500) -> Path:
    draw = np.random.default_rng(3)
    words = np.array(["late", "again", "Ünïcode", "漢字", "x1", "thanks", "never"])
    late = draw.random(rows) < .5
    pl.DataFrame({"id": [f"n{i}" for i in range(rows)], "income": np.where(draw.random(rows) < .1, np.nan, draw.lognormal(4, 1, rows).round(2)), "owes": draw.integers(0, 60, rows), "place": draw.choice(["a", "b", "c"], rows),
                  "age": draw.integers(18, 99, rows), "member": draw.random(rows) < .5, "born": [f"19{y}-0{m}-1{d}" for y, m, d in draw.integers([30, 1, 0], [99, 9, 9], (rows, 3))],
                  "asked": [f"20{y}-0{m}-1{d}T0{h}:15:00" for y, m, d, h in draw.integers([20, 1, 0, 0], [25, 9, 9, 9], (rows, 4))], "paid": [f"20{y}-0{m}-1{d}T0{h}:45:00+00:00" for y, m, d, h in draw.integers([20, 1, 0, 0], [25, 9, 9, 9], (rows, 4))],
                  "waited": [f"PT{s}S" for s in draw.integers(0, 90000, rows)], "letter": [" ".join(draw.choice(words, 4)) for _ in range(rows)], "code": [f"AB{i}" for i in range(rows)],
                  "signal": [json.dumps(v.round(2).tolist()) for v in draw.uniform(-4, 4, (rows, 4))], "late": late}).with_columns(pl.col("income").fill_nan(None)).write_csv(path)
    return path


def of(name: str, settings) -> Bundle:
    "A bundle of a spec that ships, hardly trained."
    changes = {"progression": {"model.quantiles": [0.1, 0.5, 0.9]}}.get(name, {})
    spec = parse_spec(ALL.format(file=loans(settings.root / "loans.csv"))) if name == "loans" else changed(read_spec(shipped("configs") / f"{name}.yaml"), {"train.epochs": 2, **changes})
    return bundle_of(open_registry(settings), train(spec, settings).version)


BLOCKED = "import sys\nfor name in ('mlray', 'polars', 'torch', 'ray', 'msgspec', 'pydantic', 'pandas', 'pyarrow', 'onnx', 'sklearn'): sys.modules[name] = None\n"


@pytest.fixture(scope="module")
def edge(trained, tmp_path_factory):
    settings, run = trained
    bundle = bundle_of(open_registry(settings), run.version)
    folder = tmp_path_factory.mktemp("edge") / "folder"
    export_folder(bundle, "1", folder)
    return bundle, folder


def test_texts_with_spaces_around_are_read_as_training_does(edge):
    bundle, folder = edge
    rows = [r for r in rows_of_every_kind(plain(bundle, "1"), 300, seed=4) if isinstance(r, dict)]
    spaced = [{n: f"\u2003{v}\n " if isinstance(v, str) else v for n, v in r.items()} for r in rows]
    assert differences(folder, bundle, spaced) == [] and expected(bundle, spaced) == expected(bundle, rows) and any(r != s for r, s in zip(rows, spaced, strict=True))


def test_ten_thousand_rows_without_any_library_of_ours(edge, tmp_path, monkeypatch):
    "Good and bad rows, asked in a process that can import numpy, onnxruntime and the standard library alone."
    bundle, folder = edge
    monkeypatch.setattr("mlray.serving.edge_folder._TRIAL", BLOCKED + __import__("mlray.serving.edge_folder").serving.edge_folder._TRIAL)
    rows = rows_of_every_kind(plain(bundle, "1"), 10_000, seed=9)
    said = expected(bundle, rows)
    assert differences(folder, bundle, rows) == [] and 2500 < sum(isinstance(s, list) for s in said) < 5000
    good = [r for r, s in zip(rows, said, strict=True) if isinstance(s, dict)]
    assert np.array([s["score"] for s in said if isinstance(s, dict)], np.float32).tobytes() == predict(bundle, {n: [r[n] for r in good] for n in good[0]}, len(good)).tobytes(), "the bits of bundle.predict"
    for row, s in zip(rows[:2000], said[:2000], strict=True): # what the folder refuses, the service's decoder refuses, and nothing else
        try: msgspec.json.decode(json.dumps(row).encode(), type=Served("1", bundle).row) if isinstance(row, dict) else None
        except msgspec.ValidationError: assert isinstance(s, list)


def test_a_folder_that_would_differ_is_not_written(edge, tmp_path, monkeypatch):
    real = __import__("mlray.serving.edge_folder").serving.edge_folder.script
    monkeypatch.setattr("mlray.serving.edge_folder.script", lambda model: real(model).replace("said >= thresholds(rows)", "said > thresholds(rows) + 0.2"))
    with pytest.raises(BundleError, match=r"would say .* where mlray says"): export_folder(edge[0], "1", tmp_path / "edge")
    assert not list(tmp_path.iterdir())
    with pytest.raises(BundleError, match="is there already"): export_folder(edge[0], "1", edge[1])


def test_its_doors(edge, tmp_path):
    bundle, folder = edge
    def run(*words: str, **more): return subprocess.run([sys.executable, "-I", "-B", str(folder / "answer.py"), *words], capture_output=True, text=True, **more)
    row = json.loads((folder / "model.json").read_text())["example"]
    assert json.loads(run(json.dumps(row)).stdout) == expected(bundle, [row])[0] == json.loads(run("-", input=json.dumps([row])).stdout)[0]
    bad = run(json.dumps(row | {"bmi": "x" * 9}))
    assert bad.returncode == 2 and "bmi: a finite number" in bad.stderr and "Traceback" not in bad.stderr
    assert run('{"age": 1, "age": 2}').returncode == run("{").returncode == run('{"age": NaN}').returncode == 2
    assert subprocess.run(["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=folder).returncode == 0 and run("--check").returncode == 0
    spoilt = shutil.copytree(folder, tmp_path / "spoilt")
    (spoilt / "model.onnx").write_bytes((spoilt / "model.onnx").read_bytes()[:-1] + b"!")
    asked = subprocess.run([sys.executable, "-I", "-B", str(spoilt / "answer.py"), json.dumps(row)], capture_output=True, text=True)
    assert asked.returncode == 1 and "not the file that was exported" in asked.stderr
    door = subprocess.Popen([sys.executable, "-I", "-B", "-u", str(folder / "answer.py"), "--http", "0"], stdout=subprocess.PIPE, text=True)
    try:
        url = f"{door.stdout.readline().split(' at ')[1].split()[0]}/v1/models/diabetes"
        def post(body: bytes, to: str = ":predict") -> tuple[int, dict]:
            try:
                with urllib.request.urlopen(url + to, body, timeout=60) as said: return said.status, json.load(said)
            except urllib.error.HTTPError as error: return error.code, json.load(error)
        status, said = post(json.dumps({"instances": [row, row]}).encode())
        assert status == 200 and said["predictions"] == expected(bundle, [row, row]) and said["digest"] == bundle.digest
        status, said = post(json.dumps({"instances": [row, row | {"sex": "group 9"}]}).encode())
        assert status == 422 and said["problems"] == [{"row": 1, "column": "sex", "expected": "one of group 1, group 2"}]
        assert [post(b"{")[0], post(b'{"instances": []}')[0], post(b"[" * 100_000)[0], post(b" " * 2**23)[0], post(b"{}", ":explain")[0]] == [400, 422, 400, 413, 404]
    finally:
        door.terminate()
        door.wait()


KINDS = ("wine", "progression", "digits", "docstrings", "loans")


@pytest.mark.chaos
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_column_and_target(name, settings, tmp_path):
    bundle = of(name, settings)
    export_folder(bundle, "1", tmp_path / "edge")
    rows = rows_of_every_kind(plain(bundle, "1"), 10_000, seed=5)
    odd = differences(tmp_path / "edge", bundle, rows)
    wrong = sum(isinstance(s, list) for s in expected(bundle, rows))
    print(f"\n{name} ({bundle.task.kind}): {len(odd)} differences over {len(rows):,} rows, {wrong:,} of them bad; answer.py has {(tmp_path / 'edge/answer.py').read_text().count(chr(10))} lines")
    assert odd == []


@pytest.mark.chaos
def test_in_a_fresh_environment(edge, tmp_path):
    "pip install -r requirements.txt, and nothing else."
    bundle, folder = edge
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = str(tmp_path / "venv/bin/python")
    subprocess.run([python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "-r", str(folder / "requirements.txt")], check=True)
    rows = rows_of_every_kind(plain(bundle, "1"), 10_000, seed=4)
    there = subprocess.run([python, "-m", "pip", "list", "--format=freeze", "--disable-pip-version-check"], capture_output=True, text=True, check=True).stdout.split()
    assert differences(folder, bundle, rows, python) == [] and not {"mlray", "torch", "polars", "ray"} & {p.split("==")[0] for p in there}
    print(f"\n0 differences over {len(rows):,} rows in an environment of {', '.join(there)}")


TRIAL = r"""
import { answer, problems } from "./answer.mjs";
const rows = await (await fetch("/rows")).json(), wrong = rows.map(problems), good = rows.filter((_, i) => !wrong[i].length), said = [];
for (let at = 0; at < good.length; at += 64) said.push(...await answer(good.slice(at, at + 64)));
const alone = await answer(good.slice(0, 1));
const frame = document.createElement("iframe");
Object.assign(frame, { src: "index.html", width: 1200, height: 900 });
document.body.append(frame);
while (frame.contentDocument?.body?.dataset.ready !== "yes") await new Promise(r => setTimeout(r, 20));
const page = frame.contentDocument, inputs = [...page.querySelectorAll("form input, form select, form textarea")], text = () => page.querySelector("#said").textContent;
const first = text(), labelled = inputs.every(i => i.labels.length === 1 && i.getAttribute("aria-describedby").split(" ").every(id => page.getElementById(id)));
const number = inputs.find(i => i.type === "number" && i.max) ?? inputs[0];
if (number.max) number.value = String(Number(number.max) + 1);
page.querySelector("button[type=submit]").click();
await new Promise(r => setTimeout(r, 300));
const refused = { text: text(), invalid: number.getAttribute("aria-invalid"), focused: page.activeElement === number, why: page.getElementById(number.id + "-problem").textContent };
page.querySelector("#example").click();
await new Promise(r => setTimeout(r, 300));
const loaded = [...frame.contentWindow.performance.getEntriesByType("resource"), ...performance.getEntriesByType("resource")].map(e => e.name);
await fetch("/done", { method: "POST", body: JSON.stringify({ wrong, said, alone, first, again: text(), labelled, refused, foreign: loaded.filter(n => !n.startsWith(location.origin) && !n.startsWith("blob:")) }) });
"""


def in_browser(folder: Path, rows: list, tmp_path: Path) -> dict:
    "What the page says, in a real Chromium."
    import threading
    from functools import partial
    from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
    said, done = dict[str, dict](), threading.Event()
    (folder / "trial.html").write_text('<!doctype html><body><script type="module" src="trial.mjs"></script>')
    (folder / "trial.mjs").write_text(TRIAL)

    class Door(SimpleHTTPRequestHandler):
        extensions_map = {**SimpleHTTPRequestHandler.extensions_map, ".mjs": "text/javascript", ".wasm": "application/wasm"} # noqa: RUF012
        def log_message(self, *_): pass
        def do_GET(self):
            if self.path != "/rows": return super().do_GET()
            body = json.dumps(rows).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
        def do_POST(self):
            said["it"] = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(204)
            self.end_headers()
            done.set()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Door, directory=str(folder))) as door:
        threading.Thread(target=door.serve_forever, daemon=True).start()
        browser = subprocess.Popen([shutil.which("chromium") or "chromium", "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'browser'}", f"http://127.0.0.1:{door.server_port}/trial.html"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try: assert done.wait(240), "the page has not come to its end"
        finally:
            browser.kill()
            browser.wait()
            door.shutdown()
    return said["it"]


def near(a, b, names=("score", "value", "scores", "quantiles")) -> float:
    "How far two predictions are apart; of numbers, in parts of themselves."
    off = [0.0]
    for name in names:
        if name in a: off += [abs(x - y) / max(1, abs(y)) for x, y in ([(a[name], b[name])] if isinstance(a[name], float | int) else zip(a[name].values(), b[name].values(), strict=True))]
    return max(off)


@pytest.mark.chaos
@pytest.mark.skipif(not shutil.which("chromium"), reason="chromium is not installed")
@pytest.mark.parametrize("name", ("diabetes", *KINDS))
def test_the_page_in_a_real_browser(name, settings, tmp_path):
    from mlray.serving.edge_page import add_page, runtime
    downloads = Path(os.environ.get("MLRAY_DOWNLOADS", tmp_path / "downloads"))
    bundle = of(name, settings)
    export_folder(bundle, "1", tmp_path / "edge")
    names = add_page(tmp_path / "edge", runtime(downloads))
    assert subprocess.run(["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=tmp_path / "edge").returncode == 0 and "page/ort/ort-wasm-simd-threaded.wasm" in names
    rows = rows_of_every_kind(plain(bundle, "1"), 1000, seed=8)
    right, there = expected(bundle, rows), in_browser(tmp_path / "edge/page", rows, tmp_path)
    wrong = [[list(p) for p in s] if isinstance(s, list) else [] for s in right]
    assert [(r, a, b) for r, a, b in zip(rows, wrong, there["wrong"], strict=True) if a != b] == []
    good = [s for s in right if isinstance(s, dict)]
    off = max(near(a, b) for a, b in zip(there["said"], good, strict=True))
    assert off < 1e-5 and [(a.get("label"), a.get("labels")) for a in there["said"]] == [(b.get("label"), b.get("labels")) for b in good]
    assert there["alone"][0].keys() == good[0].keys() and near(there["alone"][0], good[0]) < 1e-5
    assert there["labelled"] and there["foreign"] == [] and there["first"] == there["again"] and "being opened" not in there["first"]
    if any(c["max"] is not None and c["type"] in ("integer", "number") for c in plain(bundle, "1")["columns"]):
        assert there["refused"]["invalid"] == "true" and there["refused"]["focused"] and "at most" in there["refused"]["why"] and "not keep the contract" in there["refused"]["text"]
    print(f"\n{name} ({bundle.task.kind}) in Chromium: labels and refusals equal over 1,000 rows, scores within {off:.1g}; nothing loaded from elsewhere")
