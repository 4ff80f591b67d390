"""Papers say what is kept and nothing else: cards that Hugging Face reads, pages that ask nobody, commands that exist, gaps that are named. And the catalogue knows what came of every data set."""
import hashlib
import json
import re
import shlex
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from mlray.governance.catalogue import catalogue, data_sets
from mlray.governance.registry import Version, add_evidence, bundle_of, open_registry, promote, register, version, versions
from mlray.judgement.gate import judge
from mlray.running.card import Paper, Section, dossier, model_card
from mlray.running.compliance import ARTICLES, compliance
from mlray.running.data_sheet import data_sheet
from mlray.running.runbook import runbook, sample_row
from mlray.shipping.bundle import load_bundle, predict
from mlray.values.about import About
from mlray.values.display import table
from mlray.values.errors import RegistryError
from mlray.values.settings import Settings, shipped
from mlray.values.spec import Rule, read_spec

PASSED = judge({"roc_auc": 0.9}, [Rule(metric="roc_auc", at_least=0.8)])
HOSTILE = "</style><script>alert(1)</script> [a](javascript:b) ![i](http://evil/x.png) | # `x` --- \n---\nlicense: mit"


@pytest.fixture
def home(trained, tmp_path) -> Settings:
    "A copy of one trained version, in a home of one's own."
    shutil.copytree(trained[0].home, tmp_path / "home")
    return Settings(root=tmp_path, home=tmp_path / "home", tracking="disabled")


def papers(settings: Settings, reference: str = "diabetes/1") -> dict[str, Paper]:
    found = dossier(open_registry(settings), reference)
    return {p.kind: p for p in (model_card(found), data_sheet(found), runbook(found), compliance(found))}


def again(settings: Settings, **changes) -> Version:
    "The same model under a changed spec, packed by hand: another version, with the results of the first."
    registry = open_registry(settings)
    first = version(registry, "diabetes/1")
    folder = settings.root / f"made{len(versions(registry))}"
    shutil.copytree(registry.store.path(first.digest), folder)
    about = json.loads((folder / "bundle.json").read_text())
    about["spec"] = bundle_of(registry, first).spec.model_copy(update=changes).model_dump(mode="json")
    data = json.dumps(about).encode()
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["bundle.json"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
    (folder / "bundle.json").write_bytes(data)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return register(registry, load_bundle(folder), first.results)


class Page(HTMLParser):
    "Tags that are open, and every address that a browser would ask."

    def __init__(self) -> None:
        super().__init__()
        self.open, self.tags, self.asks = list[str](), list[str](), list[str]()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in ("meta", "br", "link"): self.open.append(tag)
        self.asks += [v for k, v in attrs if k in ("src", "href", "action", "srcset", "data") and not (v or "").startswith(("#", "data:,"))] # an empty icon, so that none is asked for

    def handle_endtag(self, tag): assert self.open.pop() == tag


def read(html: str) -> Page:
    page = Page()
    page.feed(html)
    page.close()
    return page


def test_every_paper_in_every_form(home):
    for kind, paper in papers(home).items():
        page = read(paper.html())
        assert not page.open and not page.asks and "script" not in page.tags and "default-src 'none'" in paper.html() and "color-scheme: light dark" in paper.html() and "http" not in re.sub(r"http-equiv", "", paper.html()), kind
        said = json.loads(json.dumps(paper.as_dict(), allow_nan=False))
        assert said["kind"] == kind and [s["title"] for s in said["sections"]] == [s.title for s in paper.sections] and said["missing"] == list(paper.missing)
        text = paper.markdown()
        assert all(f"\n## {s.title}\n" in text for s in paper.sections) and text.count("**Missing:**") == len(paper.missing)
    assert papers(home)["card"].markdown() == papers(home)["card"].markdown(), "the same registry, the same paper"


def test_numbers_in_a_card_are_those_that_were_measured(home, trained):
    run, card = trained[1], papers(home)["card"].as_dict()
    rows = {r[0]: r[1:] for s in card["sections"] if s["title"] == "How good" for r in s["tables"][0]["rows"]}
    assert rows.keys() == run.evaluation.scorecard.overall.keys()
    for name, m in run.evaluation.scorecard.overall.items(): assert rows[name] == [None if x != x else x for x in (m.value, m.low, m.high)]
    groups = next(s for s in card["sections"] if s["title"] == "How good for whom")["tables"]
    assert {r[0] for r in groups[0]["rows"]} == run.evaluation.scorecard.by_group.keys()
    apart = {r[0]: r[1] for r in groups[1]["rows"]}
    assert apart["demographic_parity_difference[sex]"] == run.evaluation.fairness.measures["demographic_parity_difference[sex]"].value
    front = card["front"]["model-index"][0]["results"][0]["metrics"]
    assert {m["type"]: m["value"] for m in front}["roc_auc"] == run.evaluation.scorecard.overall["roc_auc"].value


def test_hugging_face_reads_the_card(home):
    hub = pytest.importorskip("huggingface_hub", reason="pip install huggingface_hub")
    read = hub.ModelCard(papers(home)["card"].markdown())
    results = {r.metric_type: r.metric_value for r in read.data.eval_results}
    assert read.data.library_name == "mlray" and read.data.pipeline_tag == "tabular-classification" and results["roc_auc"] > 0.5 and read.text.lstrip().startswith("# Model card: diabetes/1")


def test_what_is_said_and_proved_is_not_missing(home, diabetes):
    before = papers(home)
    words = {n: ("one", "two") if n in ("out_of_scope", "limits") else f"the {n}" for n in About.model_fields}
    assert diabetes.model_copy(update={"about": About(**words)}).id == diabetes.id, "what people say changes no intent"
    registry, new = open_registry(home), again(home, about=About(**words))
    for gate in ("quality", "fairness", "explanation", "robustness", "data"): add_evidence(registry, new, gate, PASSED, gate.encode())
    promote(registry, new)
    after = papers(home, "diabetes@production")
    assert {m for m in after["card"].missing} == {"an approval: the audit has none of this version that holds"} and not after["data-sheet"].missing
    assert len(after["compliance"].missing) < len(before["compliance"].missing) and all(n in after["card"].markdown() for n in ("the owner", "one; two", "the oversight"))
    assert after["card"].front["license"] == "the licence" and any(e[0] == "promote" for s in after["card"].sections if s.title == "Who let it out" for e in s.tables[0].rows)
    add_evidence(registry, new, "fairness", judge({"roc_auc": 0.7}, [Rule(metric="roc_auc", at_least=0.8)]), b"again")
    failed = papers(home, "diabetes/2")
    assert "The gate fairness has failed." in failed["card"].markdown() and any("it has failed" in m and "Art. 10" in m for m in failed["compliance"].missing)


def test_an_approval_that_was_withdrawn_is_none(home):
    registry = open_registry(home)
    with registry.database.change() as c: registry._log(c, "approve", "diabetes/1", alias="production", role="owner", note="it is good")
    assert "| it is good" in papers(home)["card"].markdown() or "note it is good" in papers(home)["card"].markdown()
    assert not any("approval" in m for paper in papers(home).values() for m in paper.missing)
    with registry.database.change() as c: registry._log(c, "withdraw", "diabetes/1", alias="production", approvals=[registry.database.entries(c)[-1].seq], note="it is not")
    assert any("approval" in m for m in papers(home)["card"].missing) and any("approval" in m for m in papers(home)["compliance"].missing)


def test_no_article_is_called_fulfilled(home):
    page = compliance(dossier(open_registry(home), "diabetes/1"))
    rows = [r for s in page.sections for t in s.tables for r in t.rows]
    assert len(rows) == len(ARTICLES) and {r[3] for r in rows} <= {"missing", "partly", "nothing is missing that could be here"} and not re.search(r"\b(compliant|conforms|fulfilled|certified)\b", page.markdown())
    assert "no legal advice" in page.markdown() and all(any(m.startswith(r[0]) for m in page.missing) for r in rows if r[3] != "nothing is missing that could be here")


def test_names_that_mean_harm_stay_text(home, diabetes):
    again(home, description=HOSTILE, about=About(owner=HOSTILE, licence="MIT\nevil: true", limits=(HOSTILE,)), contract={**diabetes.contract, "bmi": diabetes.contract["bmi"].model_copy(update={"description": HOSTILE})})
    for paper in papers(home, "diabetes/2").values():
        page, text = read(paper.html()), paper.markdown()
        assert not page.open and not page.asks and "script" not in page.tags and "img" not in page.tags
        body = text.partition("\n---\n")[2] if paper.front else text
        assert "<script" not in body and "](javascript" not in body and "](http" not in body
        if paper.front:
            head = yaml.safe_load(text.split("\n---\n")[0].removeprefix("---\n"))
            assert head["license"] == "mit\nevil: true" and "evil" not in head
    odd = Paper("card", HOSTILE, "x/1", "0" * 64, 1, (Section(HOSTILE, (HOSTILE,), (table([HOSTILE], [(HOSTILE,)], HOSTILE),), ((HOSTILE, "mlray models"),), (HOSTILE,)),))
    assert not read(odd.html()).asks and "script" not in read(odd.html()).tags and "<script" not in odd.markdown() and "](javascript" not in odd.markdown()


def test_every_command_of_a_runbook_exists(home):
    "Read by the door itself, words and options, with the names that are in it."
    import typer.main

    from mlray.cli import app
    again(home, description="the second")
    registry, root = open_registry(home), typer.main.get_command(app)
    for reference in ("diabetes/1", "diabetes/2"):
        for gate in ("quality", "fairness"): add_evidence(registry, version(registry, reference), gate, PASSED, b"{}")
        promote(registry, version(registry, reference))
    page = runbook(dossier(registry, "diabetes@production"))
    lines = [line for s in page.sections for _, line in s.commands]
    assert len(lines) >= 20 and not any("go back to" in m for m in page.missing) and "mlray retire diabetes/2 --why 'one sentence, for the audit' --successor diabetes/1" in lines
    for line in lines:
        program, *words = shlex.split(line)
        assert program == "mlray"
        command, context = root, None
        while hasattr(command, "commands") and words and words[0] in command.commands: command, context, words = command.commands[words[0]], None, words[1:]
        context = command.make_context("mlray", list(words), resilient_parsing=False)
        assert context.info_name
    found = dossier(registry, "diabetes/2")
    row = sample_row(found)
    assert predict(found.bundle, {n: [v] for n, v in row.items()}, 1).shape == (1,)
    from mlray.running.explanation import explain
    assert explain(found.bundle, row).weights


def test_a_runbook_of_numbers_has_commands_that_work(tmp_path):
    "A number has no other answer by itself, so the command says which one is wished; columns keep their names, whatever they are."
    from mlray.running.explanation import Wish, what_if
    from mlray.running.run import train
    settings = Settings(root=tmp_path, home=tmp_path / "home", tracking="disabled")
    spec = read_spec(shipped("configs") / "progression.yaml", ["train.epochs=1"])
    odd = spec.model_copy(update={"contract": {n: c.model_copy(update={"description": "told"}) if n != "bmi" else c.model_copy(update={"description": ""}) for n, c in spec.contract.items()}})
    found = dossier(open_registry(settings), str(train(odd, settings).version))
    lines = [shlex.split(line) for s in runbook(found).sections for _, line in s.commands]
    (asked,) = [words for words in lines if "counterfactual" in words]
    assert what_if(found.bundle, json.loads(asked[3]), wish=Wish(at_least=float(asked[asked.index("--at-least") + 1]))).score is not None
    assert not any(line != line.strip() for s in runbook(found).sections for _, line in s.commands)
    assert any(m == "descriptions of columns: bmi" for m in data_sheet(found).missing)
    assert not [m for m in compliance(found).missing if "counterfactual" in m]


@pytest.mark.parametrize("kind", ["category", "boolean", "integer", "number", "text", "date", "datetime", "duration", "array"])
def test_a_sample_row_keeps_its_contract(kind):
    import polars as pl

    from mlray.learning.contract import Contract, check
    from mlray.running.runbook import _typical
    from mlray.values.column import Column
    column = Column(type=kind, length=3 if kind == "array" else None, min=5 if kind in ("integer", "number", "array", "duration") else None)
    for c in (column, column.model_copy(update={"personal": True})):
        value = _typical(c, None)
        frame = pl.DataFrame({"x": [value], "y": ["true"]})
        assert kind == "duration" or not check(Contract({"x": c, "y": Column(type="boolean", role="target")}), frame).problems, value


def test_the_catalogue_tells_what_came_of_rows(home, diabetes):
    registry = open_registry(home)
    about = About(data_owner="the clinic", data_licence="CC-BY-4.0")
    for seed in (9, 10): again(home, about=about, data=diabetes.data.model_copy(update={"split": diabetes.data.split.model_copy(update={"seed": seed})}))
    found = catalogue(registry)
    (one,) = found.sets
    assert one.name == "mlray.samples:diabetes" and one.versions == ("diabetes/1", "diabetes/2", "diabetes/3") and one.owners == ("the clinic",) and one.personal == ("age", "sex") and set(one.features) == set(bundle_of(registry, versions(registry)[0]).contract.features)
    (state,) = one.states
    assert state.rows == 442 and state.digest == bundle_of(registry, versions(registry)[0]).provenance["sources"]["train"]["digest"] and state.first < state.last, "divided twice, and the same rows"
    for name in (one.name, "diabetes", "diabetes/3", state.digest[:8]): assert data_sets(found, name) == (one,)
    for name in ("diabetis", state.digest[:5], ""):
        with pytest.raises(RegistryError, match="no data set"): data_sets(found, name)
    assert json.loads(json.dumps(found.as_dict()))["data"][0]["columns"]["age"]["personal"] is True
    damaged = registry.store.path(version(registry, "diabetes/2").digest) / "model.onnx"
    damaged.write_bytes(b"x" + damaged.read_bytes()[1:])
    assert catalogue(registry).unknown == ("diabetes/2",) and catalogue(registry).sets[0].versions == ("diabetes/1", "diabetes/3")


def test_a_version_of_before_says_what_was_not_kept(home):
    "Registered without intervals and groups, as older versions are."
    registry = open_registry(home)
    with registry.database.change() as c: c.exec_driver_sql("UPDATE versions SET results='{\"values\": {\"roc_auc\": 0.8}, \"verdict\": {\"passed\": false, \"findings\": []}}'")
    assert register(registry, bundle_of(registry, version(registry, "diabetes/1")), {}).number == 1
    found = papers(home)
    assert any("intervals" in m for m in found["card"].missing) and "| roc_auc | 0.8 | – | – |" in found["card"].markdown() and any("how many rows broke" in m for m in found["data-sheet"].missing)
    assert any("what each group gets" in m for m in found["compliance"].missing) and any("measures with intervals" in m for m in found["compliance"].missing)


def test_papers_at_the_door(home, monkeypatch, capsys):
    import sys

    from mlray.cli import main

    def mlray(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mlray", *words])
        with pytest.raises(SystemExit) as left: main()
        out, err = capsys.readouterr()
        return left.value.code or 0, out, err

    monkeypatch.setenv("MLRAY_HOME", str(home.home))
    monkeypatch.chdir(home.root)
    assert mlray("card", "diabetes/1")[1].startswith("---\nlibrary_name: mlray") and mlray("card", "diabetes", "--compliance", "--format", "html")[1].startswith("<!doctype html>")
    assert json.loads(mlray("card", "diabetes/1", "--runbook", "--json")[1])["kind"] == "runbook" and json.loads(mlray("card", "diabetes/1", "--format", "json")[1])["kind"] == "card"
    said = json.loads(mlray("card", "diabetes/1", "--data-sheet", "--out", "papers", "--json")[1])
    assert Path(said["path"]).name == "diabetes-1-data-sheet.md" and Path(said["path"]).read_text().startswith("# Data sheet") and [p.name for p in Path("papers").iterdir()] == ["diabetes-1-data-sheet.md"]
    assert json.loads(mlray("data", "--json")[1])["data"][0]["versions"] == ["diabetes/1"] and json.loads(mlray("data", "diabetes", "--json")[1])[0]["states"][0]["rows"] == 442
    assert "1 data set" in mlray("data")[1] and "Columns of" in mlray("data", "diabetes/1")[1]
    assert json.loads(mlray("registry", "gc", "--dry-run", "--json")[1]) == {"taken": False, "bytes": 0, "blobs": []} and "0 blobs" in mlray("registry", "gc")[1]
    Path("file").write_text("")
    for words, letter in [(("card", "diabetes/7"), "no version"), (("card", "diabetes/1", "--format", "pdf"), "not understood"), (("card", "diabetes/1", "--runbook", "--compliance"), "One paper at a time"),
                          (("card", "diabetes/1", "--out", "file"), "could not be written"), (("data", "nothing"), "no data set"), (("registry", "gc", "--hours", "-1"), "0 or more")]:
        code, out, err = mlray(*words)
        assert code == 2 and not out and letter in err and "Traceback" not in err
    assert shipped("configs").is_dir() and read_spec(shipped("configs") / "diabetes.yaml").about == About()
