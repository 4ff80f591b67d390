"""What pages and letters say of commands, modules, files and variables is there: the README, every notebook, and the words of the code itself."""
import json
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import typer.main

from mlray.cli import app
from mlray.governance.statement import Conditions
from mlray.values.settings import Settings
from tests.conftest import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "nbs").rglob("*.ipynb"))]
BESIDE = [ROOT / "settings.ini", ROOT / "Makefile", *sorted((ROOT / "configs").glob("*.yaml")), *sorted(p for p in (ROOT / "cluster").rglob("*") if p.is_file())]
OF_A_PROJECT = {"nbs/00_source.ipynb", "nbs/01_network.ipynb", "nbs/gates/worth.ipynb", "nbs/gates/costs.ipynb", "configs/credit.yaml"} # what `mlray new` and the lessons write
CLAIMED = {*Conditions.__dataclass_fields__, "gate", "verdict"} # of a gate's statement, below `mlray`
OTHERS = {"RAY_USE_TLS", "RAY_SERVE_HAPROXY_HEALTH_CHECK_INTER", "RAY_SERVE_HAPROXY_LOG_TARGET"} # Ray's own, which nothing here sets


@cache
def cells(page: Path) -> tuple[tuple[bool, str], ...]:
    "Whether each is prose, and what it says."
    if page.suffix != ".ipynb": return ((page.suffix == ".md", page.read_text()),)
    return tuple((c["cell_type"] == "markdown", "".join(c["source"])) for c in json.loads(page.read_text())["cells"])


def commands(text: str) -> Iterator[list[str]]:
    "What begins with `mlray`, a line each, without its comment."
    for line in text.splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["mlray"]: yield words[1:]


def said(page: Path) -> Iterator[list[str]]:
    "Every command of a page: in blocks, in sentences, and in letters, whose holes are filled."
    for prose, text in cells(page):
        if prose: yield from (words for block in re.findall(r"^```sh\n(.*?)^```", text, re.M | re.S) for words in commands(block))
        for span in re.findall(r"`(mlray [^`\n…]+)`", text):
            if re.search(r"^mlray {|{[^}]*(['\"]| if | \+ )", span): continue # a hole that is more than a name
            yield from (words for words in commands(re.sub(r"{\w[^}]*}", "NAME", span)) if words)


def understood(words: list[str]) -> None:
    "Parse a command to its last option, without doing it."
    command = app_command()
    context = command.make_context("mlray", list(words), resilient_parsing=True)
    while hasattr(command, "resolve_command") and words:
        if words[0] == "--help": return
        name, command, words = command.resolve_command(context, words)
        assert command, f"there is no command {name}"
        context = command.make_context(name, list(words), parent=context, **({"resilient_parsing": True} if hasattr(command, "resolve_command") else {}))


app_command = cache(lambda: typer.main.get_command(app))
SPOKEN_OF = r"Missing parameter|requires an argument" # `mlray train` or `mlray new --from` in a sentence


def test_commands_exist_with_their_options():
    wrong, tried = [], 0
    for page in PAGES:
        for words in said(page):
            tried += 1
            try: understood(words)
            except (Exception, SystemExit) as error:
                if not (len(words) <= 3 and re.search(SPOKEN_OF, str(error), re.I)): wrong.append(f"{page.relative_to(ROOT)}: mlray {shlex.join(words)}: {error}")
    assert tried > 300 and not wrong, "\n".join(wrong)


@cache
def module(name: str) -> Path | None:
    "The file of a module or a chapter; a module may be named without its chapter."
    package = ROOT / "mlray"
    for at in (package.joinpath(*name.split(".")), *(package.glob(f"*/{name}") if "." not in name else ())):
        if (at / "__init__.py").is_file(): return at / "__init__.py"
    found = [package.joinpath(*name.split(".")).with_suffix(".py"), *(package.glob(f"*/{name}.py") if "." not in name else ())]
    return next((p for p in found if p.is_file()), None)


def there(name: str) -> bool:
    "Whether `mlray.NAME` is a module, or what a module defines."
    if module(name): return True
    where, _, what = name.rpartition(".")
    at = module(where) if where else ROOT / "mlray/__init__.py"
    if at is None: return bool(where) and there(where) # an attribute of what a module defines
    return re.search(rf"^(class|def|async def) {what}\b|^{what}\b.*=|^__{what.strip('_')}__ =|[\"']{what}[\"']", at.read_text(), re.M) is not None


def test_modules_exist_with_what_is_named_of_them():
    named = {(page, name) for page in PAGES for _, text in cells(page) for name in re.findall(r"`mlray\.([a-z]\w*(?:\.\w+)*)[`(\]]", text)}
    named |= {(page, name.replace(":", ".")) for page in (*PAGES, *BESIDE) for _, text in cells(page) for name in re.findall(r"(?<![\w/.-])mlray\.([a-z]\w+:\w+)", text) if "nothing" not in name}
    wrong = sorted(f"{page.relative_to(ROOT)}: mlray.{name}" for page, name in named if not there(name) and not (page.stem in ("04_statement", "20_proof") and name.split(".")[0] in CLAIMED))
    assert len(named) > 100 and not wrong, "\n".join(wrong)
    assert there("judgement.gate.judge") and not there("judgement.gate.judged_nobody") and not there("no_such.thing")


def test_files_that_are_named_are_there():
    named = {(page, path) for page in (*PAGES, *BESIDE) for _, text in cells(page) for path in re.findall(r"(?<![\w/.@-])((?:nbs|tests|configs|cluster)/[\w./-]+\.\w+)", text)}
    wrong = [f"{page.relative_to(ROOT)}: {path}" for page, path in named if path not in OF_A_PROJECT and not (ROOT / path).exists()]
    for page in PAGES:
        folder = ROOT if page.stem == "index" else page.parent # which becomes the README
        links = {at.split("#")[0] for prose, text in cells(page) if prose for at in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"\w+:|#", at)}
        wrong += [f"{page.relative_to(ROOT)} leads to {at}" for at in links if not (folder / at).exists()]
    assert len(named) > 50 and not wrong, "\n".join(sorted(wrong))


def test_variables_and_settings_are_read_by_something():
    code = "\n".join(p.read_text() for folder in ("mlray", "tests", "cluster") for p in sorted((ROOT / folder).rglob("*")) if p.suffix in (".py", ".yaml", ".yml") and p != Path(__file__)) + (ROOT / "Makefile").read_text()
    keys = set(Settings.model_fields)
    wrong = {(page.name, name) for page in PAGES for prose, text in cells(page) if prose for name in re.findall(r"\b((?:MLRAY|RAY)_[A-Z][A-Z0-9_]*[A-Z0-9])\b", text)
             if name not in code and name.removeprefix("MLRAY_").lower() not in keys and name not in OTHERS}
    wrong |= {(page.name, key) for page in PAGES if page.parent.name in ("nbs", "tutorials", "explanations") for prose, text in cells(page) if prose
              for block in [*re.findall(r"^```ini\n(.*?)^```", text, re.M | re.S), *re.findall(r"`(\w+ = [^`]*)`", text)] for key in re.findall(r"^(\w+) =", block, re.M) if key not in keys}
    assert not wrong


@pytest.mark.parametrize("made_up", ["mlray trane x", "mlray train x --nothing", "mlray key frobnicate"])
def test_what_is_not_there_is_noticed(made_up):
    with pytest.raises((Exception, SystemExit)): understood(shlex.split(made_up)[1:])
