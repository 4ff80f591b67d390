"""The documentation site: every notebook has a page, every link leads somewhere, and reading it asks nobody else."""
import importlib
import json
import re
import runpy
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))


class Links(HTMLParser):
    "What a page points at, and what it loads."
    def __init__(self, page: Path):
        super().__init__()
        self.to: list[str] = []
        self.loads: list[str] = []
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        if tag == "a" and given.get("href"): self.to.append(given["href"])
        if tag in ("script", "img", "iframe", "source") and given.get("src"): self.loads.append(given["src"])
        if tag == "link" and given.get("rel") in ("stylesheet", "preload", "preconnect") and given.get("href"): self.loads.append(given["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site") / "site"
    subprocess.run([sys.executable, "tests/site.py", str(folder)], cwd=ROOT, check=True, capture_output=True, timeout=300)
    return folder


def test_every_notebook_has_a_page_that_says_what_it_says(site):
    notebooks = [p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts]
    assert len(list(site.rglob("*.html"))) >= len(notebooks)
    assert "compare-and-set token" in (site / "explanations/glossary.html").read_text()
    assert 'href="../judgement/gate.html"' in (site / "explanations/glossary.html").read_text(), "a module's name leads nowhere"


def test_the_first_run_is_the_first_tutorial_and_shows_what_it_comes_to(site):
    page = (site / "tutorials/first_run.html").read_text()
    for shown in ("442 of 442 rows keep the contract", "<progress", "epoch 31/60", "roc_auc", "may not be promoted to production", "Verdict: passed", "by diabetes/1"): assert shown in page, shown
    tutorials = re.findall(r'href="(?:\.\./tutorials/|tutorials/|\./)?(\w+)\.html"', page.partition("Tutorials")[2].partition("Explanations")[0])
    assert tutorials and tutorials[0] == "first_run" and tutorials.index("season") == 1, tutorials[:4]


def test_every_link_leads_somewhere_and_nothing_is_loaded_from_elsewhere(site):
    lost, foreign = [], []
    for page in site.rglob("*.html"):
        if page.name == "404.html": continue
        links = Links(page)
        foreign += [(page.name, at) for at in links.loads if re.match(r"(https?:)?//", at)]
        for at in links.to:
            path = unquote(at.split("#")[0].split("?")[0])
            if path and not re.match(r"\w+:", path) and not (page.parent / path).exists(): lost.append((str(page.relative_to(site)), at))
    assert not foreign and not lost, (foreign[:5], lost[:20])


def test_flowcharts_are_drawn_without_a_script(site):
    drawn = runpy.run_path(str(ROOT / "tests/site.py"))["drawn"] # `import site` is Python's own
    first = (site / "index.html").read_text()
    assert "flowchart LR" not in first and "<b>gates<small>quality, fairness</small></b><span>verdict, executed page →</span><b>registry</b>" in first
    assert drawn("a\n```mermaid\nflowchart LR\n  a[one<br/>& two] -- why --> b([B])\n  b --> a\n```\nz") == "a\n<div class='flow'><b>one<small>&amp; two</small></b><span>why →</span><b>B</b></div>\n<div class='flow'><b>B</b><span> →</span><b>one<small>&amp; two</small></b></div>\nz"
    with pytest.raises(ValueError, match=r"-\.-> b', where an arrow"): drawn("```mermaid\nflowchart LR\n  a -.-> b\n```")


def test_the_glossary_names_modules_that_there_are():
    text = "".join("".join(c["source"]) for c in json.loads((ROOT / "nbs/explanations/glossary.ipynb").read_text())["cells"])
    names = set(re.findall(r"`(mlray\.[\w.]+)`", text))
    assert len(names) > 15
    for name in names: importlib.import_module(name)
