"""Everything that has pages, in a real browser: it looks as it should (pictures are kept), axe finds no serious fault, and nobody outside is asked."""
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import threading
import time
from contextlib import contextmanager, suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from mlray.command_line.commands import gate_version
from mlray.governance.registry import bundle_of, open_registry, promote
from mlray.monitoring.journal import Entry, Feedback, Journal
from mlray.monitoring.keeping import answer_columns, kept, plan, read_keys
from mlray.pages.gate_report import write_reports
from mlray.running.run import train
from mlray.shipping.answer import predictions
from mlray.shipping.bundle import decide, predict
from mlray.values.settings import Settings, shipped
from mlray.values.spec import read_spec
from tests.conftest import free_port

pytestmark = pytest.mark.chaos
ROOT = Path(__file__).parents[1]
PICTURES = Path(os.environ.get("MLRAY_PICTURES", ROOT / ".pictures"))
AXE = "4.14.1"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def axe():
    "axe-core's script, fetched once."
    at = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "mlray-tests"
    script = at / f"axe-{AXE}.min.js"
    if not script.is_file():
        if not shutil.which("npm"): pytest.skip("npm is not installed, so axe-core cannot be fetched")
        at.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(["npm", "pack", f"axe-core@{AXE}", "--silent"], cwd=at, capture_output=True, text=True, timeout=300)
        if done.returncode: pytest.skip(f"axe-core cannot be fetched: {done.stderr[-200:]}")
        with tarfile.open(at / f"axe-core-{AXE}.tgz") as packed: script.write_bytes(packed.extractfile("package/axe.min.js").read())
    return script.read_text()


@pytest.fixture(scope="module")
def chromium():
    sync = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install -e '.[browser]'")
    if not CHROMIUM: pytest.skip("there is no chromium: apt-get install chromium")
    with sync.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield browser
        browser.close()


class Looker:
    "A page, and what went wrong on it."

    def __init__(self, browser, axe, **more):
        self.context = browser.new_context(viewport={"width": 1280, "height": 900}, **more)
        self.page, self.axe, self.wrong = self.context.new_page(), axe, []
        self.page.on("request", lambda r: None if re.match(r"http://(127\.0\.0\.1|localhost)[:/]|data:|file:|blob:", r.url) else self.wrong.append(f"asked {r.url}"))
        self.page.on("requestfailed", lambda r: self.wrong.append(f"failed {r.url}"))
        self.page.on("response", lambda r: self.wrong.append(f"{r.status} {r.url}") if r.status >= 500 else None)
        self.page.on("pageerror", lambda e: self.wrong.append(f"raised {e}"))
        self.page.on("console", lambda m: self.wrong.append(m.text) if m.type == "error" else None)

    def told(self) -> str: return "\n".join(dict.fromkeys(self.wrong))

    def faults(self) -> list[str]:
        "What axe finds serious; through the debugger, because the pages let no foreign script in."
        tools = self.context.new_cdp_session(self.page)
        tools.send("Runtime.evaluate", {"expression": self.axe})
        said = tools.send("Runtime.evaluate", {"expression": "axe.run(document, {resultTypes: ['violations']}).then(r => JSON.stringify(r.violations.map(v => [v.impact, v.id, v.nodes.slice(0, 3).map(n => n.html.slice(0, 200))])))", "awaitPromise": True, "returnByValue": True})
        tools.detach()
        return [f"{self.page.url} {v}" for v in json.loads(said["result"]["value"]) if v[0] in ("serious", "critical")]

    def look(self, url: str, name: str) -> None:
        "Light and dark, with a picture of each."
        for scheme in ("light", "dark"):
            self.page.emulate_media(color_scheme=scheme)
            self.page.goto(url)
            PICTURES.mkdir(exist_ok=True)
            self.page.screenshot(path=PICTURES / f"{name}-{scheme}.png", full_page=self.page.evaluate("document.documentElement.scrollHeight") < 6000)
            self.wrong += self.faults()


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    "Two versions, real gates, three days of answers, some of them labelled, a look at them."
    root = tmp_path_factory.mktemp("browser")
    (root / "settings.ini").write_text("[local]\ntracking = disabled\njournal = on\n")
    settings = Settings(root=root, home=root / ".mlray", tracking="disabled", journal=True)
    alert = 'monitor.alerts=[{metric: accuracy, at_least: 0.99, minimum: 20, looks: 1, owner: on call}]'
    runs = [train(read_spec(shipped("configs") / "diabetes.yaml", more), settings) for more in ([alert], ["train.seed=3", "train.epochs=2"])]
    registry = open_registry(settings)
    gated = gate_version(registry, runs[0].version, ("data", "quality", "fairness", "explanation"), settings)
    write_reports(list(gated.values()), "diabetes/1", settings.home / "gates/diabetes/1")
    gate_version(registry, runs[1].version, ("quality",), settings)
    bundle, people, rng = bundle_of(registry, runs[0].version), runs[0].rows.parts.train, np.random.default_rng(0)
    scores = predict(bundle, people, people.height)
    columns, answers = kept(plan(bundle.contract, bundle.profile, read_keys(settings)), people.to_dict(as_series=False)), answer_columns(predictions(bundle.task, scores, decide(bundle, scores, people)))
    journal, said, now = Journal[Entry](settings.home / "journal/segments"), Journal[Feedback](settings.home / "journal/feedback/segments"), time.time()
    for k, at in enumerate(sorted([*(now - rng.random(1200) * 3 * 86400), *(now - rng.random(300) * 3600)])):
        i = int(rng.integers(people.height))
        journal.write(Entry(f"req-{k}", int(at * 1e9), "diabetes", "1", bundle.digest, seconds=float(rng.gamma(2, 0.001)), rows=1, columns={n: [v[i]] for n, v in columns.items()}, answers={n: [v[i]] for n, v in answers.items()}))
        if rng.random() < 0.3: said.write(Feedback(f"req-{k}", int(at * 1e9) + 5, number=float(people[bundle.contract.target][i])))
    journal.close()
    said.close()
    return root


def mlray(*words: str, cwd: Path, **more):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MLRAY_") or k == "MLRAY_DATA"} | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-c", "from mlray.cli import main; main()", *words], cwd=cwd, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **more)


@contextmanager
def console_of(root: Path):
    "`mlray console`, and its link."
    running = mlray("console", "--no-open", "--port", "0", cwd=root)
    try: yield running.stderr.readline().strip()
    finally:
        running.terminate()
        running.communicate(timeout=60)


def test_the_console(project, chromium, axe):
    registry = open_registry(Settings(root=project, home=project / ".mlray", tracking="disabled"))
    from mlray.governance.registry import version
    promote(registry, version(registry, "diabetes/1"), "canary", gates=())
    watched = mlray("monitor", "diabetes/1", "--html", str(project / "monitor.html"), cwd=project)
    assert watched.communicate(timeout=300) and watched.returncode in (0, 1)
    with console_of(project) as link:
        see, base = Looker(chromium, axe), link.partition("/enter")[0]
        see.look(f"{base}/login", "login")
        see.page.goto(link)
        assert see.page.url == base and "link=" not in see.page.url
        # by keyboard alone: to the content, to the version, to the promotion
        see.page.keyboard.press("Tab")
        assert see.page.evaluate("document.activeElement.className") == "skip"
        see.page.goto(f"{base}/models/diabetes/1")
        see.page.locator("#alias").focus()
        see.page.keyboard.type("prod")
        see.page.keyboard.press("Tab")
        see.page.keyboard.press("Enter")
        see.page.get_by_role("status").wait_for()
        assert "diabetes@production is diabetes/1 (generation 1)" in see.page.get_by_role("status").inner_text()
        see.page.screenshot(path=PICTURES / "promoted.png")
        for name, at in {"models": "", "model": "/models/diabetes", "version": "/models/diabetes/1", "version-failed": "/models/diabetes/2", "watch": "/models/diabetes/1/watch", "card": "/models/diabetes/1/papers/card", "compliance": "/models/diabetes/1/papers/compliance",
                         "proof": "/models/diabetes/1/proof", "traffic": "/traffic", "alerts": "/alerts", "journal": "/journal", "data": "/data", "audit": "/audit"}.items(): see.look(base + at, name)
        assert not see.wrong, see.told()
        see.page.goto(f"{base}/models/diabetes/2") # a refusal, in the registry's words
        see.page.locator("#alias").select_option("production")
        see.page.get_by_role("button", name="Promote diabetes/2").click()
        assert "may not be promoted to production" in see.page.get_by_role("alert").inner_text()
        see.page.screenshot(path=PICTURES / "refused.png")
        see.page.goto(f"{base}/journal")
        see.page.get_by_label("Id of the request").fill("req-7")
        see.page.get_by_role("button", name="Look").click()
        see.page.get_by_text("req-7, row 0").wait_for()
        see.page.screenshot(path=PICTURES / "found.png", full_page=True)
        assert "req-7" not in see.page.url and see.faults() == []
        see.page.goto(f"{base}/traffic") # it lives: what is answered now appears by itself
        before = see.page.locator("#live td").nth(3).inner_text()
        journal = Journal[Entry](project / ".mlray/journal/segments")
        for i in range(5): journal.write(Entry(f"new-{i}", time.time_ns(), "diabetes", "1", rows=1, columns={}, answers={}))
        journal.close()
        see.page.wait_for_function("before => document.querySelectorAll('#live td')[3].innerText !== before", arg=before, timeout=60_000)
        for at in ("", "/models/diabetes", "/models/diabetes/1", "/audit", "/traffic"): # a telephone: nothing is wider than it
            see.page.set_viewport_size({"width": 390, "height": 800})
            see.page.goto(base + at)
            assert see.page.evaluate("document.documentElement.scrollWidth") <= 390, at
        see.page.screenshot(path=PICTURES / "narrow.png")
        apart = Looker(chromium, axe, bypass_csp=True) # an executed notebook stands in a sandbox, where axe cannot run either
        apart.context.add_cookies(see.context.cookies())
        apart.look(f"{base}/models/diabetes/1/gates/fairness", "gate")
        assert not apart.wrong, apart.told()
        asked = []
        see.page.goto("about:blank") # the page of the traffic goes on asking until it is left
        see.page.on("request", lambda r: asked.append(r.url))
        see.page.goto(f"{base}/models/diabetes/1/gates/explanation")
        assert asked == [see.page.url]


def test_pages_that_are_files(project, chromium, axe):
    see, out = Looker(chromium, axe, bypass_csp=True), project / "pages"
    for kind in ("", "--data-sheet", "--runbook", "--compliance"):
        made = mlray("card", "diabetes/1", "--format", "html", "--out", str(out), *([kind] if kind else []), cwd=project)
        assert made.communicate(timeout=120) and made.returncode == 0
    if not (project / "monitor.html").is_file(): mlray("monitor", "diabetes/1", "--html", str(project / "monitor.html"), cwd=project).communicate(timeout=300)
    for path in [*sorted(out.glob("*.html")), project / "monitor.html", *sorted((project / ".mlray/gates/diabetes/1").glob("*.html"))]: see.look(path.as_uri(), f"file-{path.stem}")
    assert not see.wrong, see.told()


def test_the_documentation(chromium, axe, tmp_path):
    subprocess.run([sys.executable, "tests/site.py", str(tmp_path / "site")], cwd=ROOT, check=True, capture_output=True, timeout=600)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=tmp_path / "site")) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        see = Looker(chromium, axe, bypass_csp=True)
        for name in ("index", "tutorials/first_run", "running/index", "running/run", "measures/fairness", "explanations/glossary"):
            see.look(f"http://127.0.0.1:{server.server_port}/{name}.html", f"site-{name.replace('/', '-')}")
            assert see.page.locator("body").get_attribute("data-md-color-scheme") == "slate", f"{name} is not dark where the system is"
        server.shutdown()
    assert not see.wrong, see.told()


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *words): pass


# JupyterLab

@contextmanager
def lab_of(root: Path):
    "`mlray lab`, and its address with the token."
    from mlray.command_line.lab_cli import FOLDER, find_lab, make_lab
    program = find_lab(ROOT) if (ROOT / FOLDER).exists() else make_lab(ROOT)
    (root / FOLDER).symlink_to(program.parents[1])
    said = root / "lab.log"
    with said.open("w") as log:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("MLRAY_") or k == "MLRAY_DATA"} | {"PYTHONPATH": str(ROOT)}
        running = subprocess.Popen([sys.executable, "-c", "from mlray.cli import main; main()", "lab", "--no-open", "--port", str(free_port())], cwd=root, env=environment, stdout=log, stderr=log)
    try:
        end = time.monotonic() + 240
        while not (found := re.search(r"(http://127\.0\.0\.1:\d+/lab)\?token=(\w+)", said.read_text())):
            assert running.poll() is None and time.monotonic() < end, said.read_text()[-3000:]
            time.sleep(0.2)
        yield found[1], found[2]
    finally:
        running.terminate()
        running.wait(60)


def opened(page, url: str) -> None:
    "A notebook, with its kernel."
    page.goto(url)
    page.wait_for_selector(".jp-Notebook", timeout=120_000)
    page.wait_for_selector('.jp-Notebook-ExecutionIndicator[data-status="idle"]', timeout=120_000)
    for button in page.locator(".jp-toast-button, .Toastify button").filter(has_text="No").all(): button.click() # no news
    page.get_by_text("mlray | Idle").wait_for(timeout=120_000)


def run_all(page) -> None:
    "Every cell, to its end."
    for _ in range(12): # "idle" may be said before the kernel listens, and what is sent then is lost
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        try: page.wait_for_function("() => [...document.querySelectorAll('.jp-CodeCell .jp-InputArea-prompt')].some(e => /[\\d*]/.test(e.textContent))", timeout=15_000)
        except Exception: continue
        break
    page.wait_for_function("""() => { const all = [...document.querySelectorAll('.jp-CodeCell .jp-InputArea-prompt')].map(e => e.textContent); return all.length && all.every(t => /\\[\\d+\\]/.test(t)); }""", timeout=400_000)


def saved(page, notebook: Path, code: int) -> None:
    "As it was executed, on the disk."
    page.keyboard.press("Control+s")
    end = time.monotonic() + 120
    while True:
        with suppress(json.JSONDecodeError): # it is being written
            if sum(c.get("execution_count") is not None for c in json.loads(notebook.read_text())["cells"]) >= code: return
        assert time.monotonic() < end, "the notebook was not saved as it was executed"
        time.sleep(0.2)


def test_the_first_run_in_jupyterlab(chromium, tmp_path):
    with lab_of(tmp_path) as (url, key):
        see = Looker(chromium, "")
        page, notebook = see.page, tmp_path / "tutorials/first_run.ipynb"
        page.set_viewport_size({"width": 1300, "height": 1100})
        page.on("response", lambda r: see.wrong.append(f"{r.status} {r.url}") if 400 <= r.status < 500 else None)
        opened(page, f"{url}/tree/first_run.ipynb?token={key}&reset")
        started = time.monotonic()
        run_all(page)
        cells = page.locator(".jp-Notebook .jp-Cell")
        source = json.loads((ROOT / "nbs/tutorials/first_run.ipynb").read_text())["cells"]
        code = [i for i, c in enumerate(source) if c["cell_type"] == "code"]
        took = time.monotonic() - started
        saved(page, notebook, len(code))
        shown = 0
        for i in range(cells.count()):
            cells.nth(i).scroll_into_view_if_needed()
            areas = cells.nth(i).locator(".jp-OutputArea-output")
            for k in range(areas.count()):
                box = areas.nth(k).bounding_box()
                assert box and box["height"] > 4 and box["width"] > 50, f"an output of cell {i} is not to be seen"
                shown += 1
        PICTURES.mkdir(exist_ok=True)
        for name, i in (("lab-rows", code[3]), ("lab-scorecard", code[4]), ("lab-verdict", code[6]), ("lab-answer", code[-2])):
            cells.nth(i).scroll_into_view_if_needed()
            cells.nth(i).screenshot(path=PICTURES / f"{name}.png")
        page.screenshot(path=PICTURES / "lab.png")
        done = json.loads(notebook.read_text())["cells"]
        outputs = [o for c in done for o in c.get("outputs", ())]
        assert not [o for o in outputs if o["output_type"] == "error"] and len(outputs) >= 10 and shown >= len(outputs) - 1, (shown, len(outputs))
        assert "by diabetes/1" in json.dumps(outputs), "the service has answered"
        print(f"{len(code)} cells in {took:.0f} s at a load of {os.getloadavg()[0]:.0f}; {shown} outputs to be seen")
        assert not see.wrong, see.told()


PLOTS = ("from mlray.values.chart import front_chart, interval_chart, line_chart\nfrom mlray.measures.score import Measure",
         'interval_chart([("women", .71, .66, .75), ("men", .78, .75, .81), ("too few", float("nan"), float("nan"), float("nan"))], "recall by group", .75)',
         'line_chart({"train": [(e, 1 / e) for e in range(1, 30)], "valid": [(e, .2 + 1 / e) for e in range(1, 30)]}, "loss", "epoch", "loss")',
         'front_chart([(700, .56), (1500, .505), (6000, .48), (270_000, .49)], [(700, .56, "1"), (6000, .48, "3")], "loss against size", "parameters", "loss", log=True)',
         'from importlib.util import find_spec\n%load_ext mlray\nown = None\nif find_spec("altair") and find_spec("vl_convert"):\n    import altair\n    own = interval_chart([("women", .71, .66, .75)], "changed").altair().properties(title="one of my own")\nown')


def test_plots_in_jupyterlab(chromium, tmp_path):
    "They can be zoomed and read point by point, ask nobody, and are stored small and still."
    notebook = tmp_path / "tutorials/plots.ipynb"
    notebook.parent.mkdir()
    cells = [{"cell_type": "code", "id": f"plot{i}", "metadata": {}, "execution_count": None, "outputs": [], "source": source} for i, source in enumerate(PLOTS)]
    notebook.write_text(json.dumps({"cells": cells, "metadata": {"kernelspec": {"name": "python3", "display_name": "mlray", "language": "python"}}, "nbformat": 4, "nbformat_minor": 5}))
    with lab_of(tmp_path) as (url, key):
        see = Looker(chromium, "")
        page = see.page
        opened(page, f"{url}/tree/plots.ipynb?token={key}&reset")
        run_all(page)
        plots = page.locator(".jp-RenderedVegaCommon5 canvas, .jp-RenderedVegaCommon5 svg.marks")
        page.wait_for_function("() => document.querySelectorAll('.jp-RenderedVegaCommon5 canvas, .jp-RenderedVegaCommon5 svg.marks').length >= 3", timeout=120_000)
        for i in range(plots.count()):
            plot = plots.nth(i)
            plot.scroll_into_view_if_needed()
            box, before = plot.bounding_box(), plot.screenshot()
            assert box["width"] > 300 and box["height"] > 60, f"plot {i} is not to be seen"
            plot.hover(position={"x": box["width"] * 0.6, "y": box["height"] * 0.5})
            page.mouse.wheel(0, -400)
            end = time.monotonic() + 30
            while plot.screenshot() == before:
                assert time.monotonic() < end, f"plot {i} does not answer to the wheel"
                time.sleep(0.1)
            plot.dblclick(position={"x": box["width"] * 0.6, "y": box["height"] * 0.5})
        plots.nth(0).scroll_into_view_if_needed()
        box = plots.nth(0).bounding_box()
        PICTURES.mkdir(exist_ok=True)
        said = ""
        for x, y in ((x, y) for y in range(26, 42, 4) for x in range(50, int(box["width"]), 8)): # along the first row, until the pointer meets its bar
            page.mouse.move(box["x"] + x, box["y"] + y)
            said = page.evaluate("() => document.querySelector('#vg-tooltip-element.visible')?.innerText || ''")
            if "women" in said: break
        page.screenshot(path=PICTURES / "lab-plots.png")
        assert "women" in said and "0.71" in said, said
        saved(page, notebook, len(PLOTS))
        kept = [o for c in json.loads(notebook.read_text())["cells"] for o in c["outputs"] if "data" in o]
        moving = plots.count()
        assert len([o for o in kept if set(o["data"]) == {"text/html", "text/plain"} and "<svg" in "".join(o["data"]["text/html"])]) == moving >= 3, [set(o["data"]) for o in kept]
        assert max(len(json.dumps(o)) for o in kept) < 20_000, "stored, a plot is small"
        see.context.close()
        again = Looker(chromium, "") # who opens the file runs nothing, and sees the same
        opened(again.page, f"{url}/tree/plots.ipynb?token={key}&reset")
        assert again.page.locator(".jp-OutputArea-output svg[role=img]").count() >= 3
        again.page.screenshot(path=PICTURES / "lab-plots-stored.png")
        print(f"{moving} plots, each zoomed; stored in {max(len(json.dumps(o)) for o in kept)} bytes at most; load {os.getloadavg()[0]:.0f}")
        assert not see.wrong and not again.wrong, see.told() + again.told()
