"""Personal values that cannot be mistaken are planted in the rows that a model learns from and answers; they are looked for in every byte that is left behind."""
import base64
import io
import json
import logging
import re
import sqlite3
import time
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import yaml
from starlette.testclient import TestClient
from typer.testing import CliRunner

from mlray.engines.track_on_wandb import WandbTracker
from mlray.governance.access import new_key
from mlray.governance.registry import add_key, bundle_of, open_registry, promote, version
from mlray.monitoring.journal import Journal
from mlray.monitoring.keeping import Recorder, read_keys
from mlray.monitoring.monitor import gauges, monitor, page
from mlray.running.run import train
from mlray.serving.plan import plan_of
from mlray.serving.routes import CONSOLE
from mlray.serving.served import Served
from mlray.serving.service import Service
from mlray.serving.traffic import Line
from mlray.serving.wire import Asked, at_once
from mlray.values.settings import Settings
from mlray.values.spec import parse_spec
from tests.conftest import free_port
from tests.test_lineage import Recorder as Listener

ROWS = 480
NAMES, MAILS, NUMBERS = [f"Wilhelmina Quzzabel{i:03}" for i in range(ROWS)], [f"quzz{i:03}@planted.example" for i in range(ROWS)], [913_700_000 + 7 * i * i + 113 for i in range(ROWS)]
STREETS, PEOPLE = [f"Quuxgasse {i:03}" for i in range(ROWS)], [f"person-zq{i:03}" for i in range(ROWS)]
SECRET = ("Quzzabel", "@planted.example", "person-zq", *map(str, NUMBERS)) # what all names, addresses and people have in common, and each number

CONTRACT = {
    "person": {"type": "text", "role": "id", "personal": True},
    "name": {"type": "text", "personal": True},                             # nothing of it is kept
    "mail": {"type": "category", "personal": True, "journal": "pseudonym"},
    "number": {"type": "integer", "personal": True, "min": 913_000_000, "max": 999_999_999, "journal": "bucket"},
    "street": {"type": "category", "personal": True, "journal": "raw"},     # kept as it is, until somebody is erased
    "sex": {"type": "category", "values": ["f", "m"], "sensitive": True, "personal": True, "journal": "bucket"},
    "income": {"type": "number"}, "hours": {"type": "number"}, "good": {"type": "boolean", "role": "target"}}
SPEC = {"name": "loans", "data": {"train": {"file": "source.csv"}, "split": {"test": 0.3, "valid": 0.2}}, "contract": CONTRACT, "train": {"epochs": 3}, "min_group": 15,
        "gates": {"quality": [{"metric": "roc_auc", "at_least": 0.5}], "fairness": [{"metric": "accuracy_difference", "by": ["sex"], "at_most": 0.9}], "data": [{"metric": "invalid_share", "at_most": 0.2}]},
        "monitor": {"window": "1h", "over": "1d", "alerts": [{"metric": "moved_share", "at_most": 0.1, "minimum": 10}, {"metric": "accuracy", "at_least": 0.99, "minimum": 10}]}}

SHORT = SPEC | {"contract": CONTRACT | {"name": {"type": "category", "personal": True}}, "model": {"estimator": "sklearn.linear_model:LogisticRegression"}} # which takes no texts; a network's graph takes long to write


def people() -> pl.DataFrame:
    rng = np.random.default_rng(5)
    income, hours = rng.normal(50, 12, ROWS).round(1), rng.normal(38, 6, ROWS).round(1)
    return pl.DataFrame({"person": PEOPLE, "name": NAMES, "mail": MAILS, "number": NUMBERS, "street": STREETS, "sex": rng.choice(["f", "m"], ROWS), "income": income, "hours": hours, "good": income + hours + rng.normal(0, 6, ROWS) > 88})


# ---- every byte -----------------------------------------------------------------------------------------------------

def written(text: str) -> list[bytes]:
    "A value as it may stand in a file."
    plain = text.encode()
    return [plain, text.encode("utf-16-le"), text.encode("utf-16-be"), json.dumps(text)[1:-1].encode(), *(base64.b64encode(bytes(shift) + plain)[(0, 2, 3)[shift]:][:4 * (len(plain) // 3) - 4] for shift in range(3))]


def insides(name: str, data: bytes) -> Iterator[bytes]:
    "The bytes of a file, and of what is packed in it."
    yield data
    if data[:4] == b"PAR1": yield pl.read_parquet(io.BytesIO(data)).write_json().encode()
    elif data[:6] == b"ARROW1": yield pl.read_ipc(data).write_json().encode()
    elif data[:2] == b"PK" and zipfile.is_zipfile(io.BytesIO(data)):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for inner in archive.namelist(): yield from insides(inner, archive.read(inner))
    elif data[:15] == b"SQLite format 3":
        with sqlite3.connect(f"file:{name}?mode=ro", uri=True) as database:
            for (table,) in database.execute("select name from sqlite_master where type = 'table'").fetchall():
                for row in database.execute(f'select * from "{table}"'): yield b"|".join(v if isinstance(v, bytes) else str(v).encode() for v in row)


def found(folder: Path, values: Sequence[str], but: str = "") -> dict[str, set[str]]: # file → values
    "Where values, or parts of them, stand."
    forms, digits = {form: value for value in values if not value.isdigit() for form in written(value)}, {v.encode() for v in values if v.isdigit()}
    hits: dict[str, set[str]] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and not p.is_symlink()):
        if but and but in str(path.relative_to(folder)): continue
        for data in insides(str(path), path.read_bytes()):
            seen = {value for form, value in forms.items() if form in data} | {n.decode() for n in digits.intersection(re.findall(rb"(?<![0-9a-f.])[0-9]{9}(?![0-9a-f])", data))}
            if seen: hits.setdefault(str(path.relative_to(folder)), set()).update(seen)
    return hits


def test_the_search_finds_what_is_there(tmp_path):
    mail = MAILS[7]
    (tmp_path / "a.txt").write_bytes(b"x" + mail.encode("utf-16-le"))
    (tmp_path / "b.json").write_bytes(base64.b64encode(b"ab" + mail.encode() + b"tail"))
    pl.DataFrame({"mail": [mail]}).write_parquet(tmp_path / "c.parquet", compression="zstd")
    with zipfile.ZipFile(tmp_path / "d.zip", "w", zipfile.ZIP_DEFLATED) as archive: archive.write(tmp_path / "c.parquet", "inner")
    with sqlite3.connect(tmp_path / "e.db") as database: database.execute("create table t (x)"), database.execute("insert into t values (?)", (mail.encode(),))
    (tmp_path / "f.txt").write_text(f"{NUMBERS[3]}, 0.{NUMBERS[4]}")
    for values in (SECRET, (mail, str(NUMBERS[3]))):
        hits = found(tmp_path, values)
        assert set(hits) == {"a.txt", "b.json", "c.parquet", "d.zip", "e.db", "f.txt"} and hits["f.txt"] == {str(NUMBERS[3])}


# ---- a life of a model ----------------------------------------------------------------------------------------------

def bad_request(at: Service, key: str, row: dict, caplog) -> None:
    "What the service says and logs of rows that break the contract does not carry what they hold."
    for n, broken in enumerate(({**row, "number": row["mail"]}, {**row, row["mail"]: 1}, {**row, "income": row["name"]}, {"name": row["name"]})):
        reply = at.answer("loans", json.dumps({"instances": [broken]}).encode(), key, f"bad-{n}")
        assert reply.status == 422 and not any(v.encode() in reply.body for v in (row["name"], str(row["number"]))), reply.body
    reply = at.answer("loans", b'{"instances": [{"name": "' + row["name"].encode(), key, "bad-json")
    assert reply.status == 400 and row["name"].encode() not in reply.body
    assert at.answer("loans", json.dumps({"instances": [row]}).encode(), "nobody's", "bad-key").status == 401


def console(settings: Settings) -> list[str]:
    "Every page of the console, and one answer that was searched for by its id and by its person."
    from mlray.governance.access import Caller
    from mlray.pages.console_acts import console_of
    from mlray.pages.console_alone import app_of
    from tests.test_console import csrf
    key, text = new_key("admin", "root")
    add_key(open_registry(settings, "root"), key)
    client = TestClient(app_of(console_of(settings, Caller("root"))), base_url="http://127.0.0.1")
    client.post("/console/login", data={"key": text})
    words = {"gate": ["quality"], "paper": ["card", "data-sheet", "runbook", "compliance"]}
    paths = [route.path.replace("{model}", "loans").replace("{version}", "1").replace("{word}", word) for route in CONSOLE if route.method == "GET" and route.name not in ("enter", "asset", "login") for word in words.get(route.name, [""])]
    pages = {path: client.get(path) for path in paths}
    assert sum(p.status_code == 200 for p in pages.values()) >= len(pages) - 1, {k: p.status_code for k, p in pages.items()} # where no gate ran, there is no page of one
    one = client.post("/console/journal", data={"csrf": csrf(client), "id": "r-3"})
    theirs = client.post("/console/journal", data={"csrf": csrf(client), "person": PEOPLE[3]})
    assert one.status_code == theirs.status_code == 200 and all("r-3" in p.text for p in (one, theirs)), (one.text[-400:], theirs.text[-400:])
    assert not any(v in theirs.text for v in (NAMES[3], MAILS[3], str(NUMBERS[3])))
    return [*(p.text for p in pages.values()), one.text]


def lived(root: Path, gates: tuple[str, ...], whole: bool, monkeypatch, caplog) -> tuple[Settings, list[str]]: # and what people saw
    "Checked, trained, served, told; as a `whole` also tracked, judged, watched, looked into."
    from mlray.cli import app
    tracking = "offline" if whole else "disabled"
    frame, said = people(), list[str]()
    broken = frame.with_columns(income=pl.when(pl.int_range(pl.len()) % 40 == 0).then(pl.lit("none of yours")).otherwise(pl.col("income").cast(pl.String)), number=pl.when(pl.int_range(pl.len()) % 40 == 1).then(pl.lit(5)).otherwise(pl.col("number")))
    broken.write_csv(root / "source.csv")
    (root / "loans.yaml").write_text(yaml.safe_dump(SPEC if whole else SHORT))
    settings = Settings(root=root, home=root / ".mlray", tracking=tracking, journal=True, gates=()) # what the gates say is not asked here
    monkeypatch.chdir(root)
    for name, value in {"MLRAY_HOME": settings.home, "MLRAY_TRACKING": tracking, "MLRAY_JOURNAL": "true"}.items(): monkeypatch.setenv(name, str(value))

    def command(*words: str, code: int | None = 0) -> str:
        done = CliRunner().invoke(app, list(words))
        assert code is None or done.exit_code == code, (words, done.output, done.exception)
        said.append(done.output)
        return done.output

    command("check", "loans.yaml", code=None), command("check", "loans.yaml", "--json", code=None)
    run = train(parse_spec((root / "loans.yaml").read_text()), settings, tracker=WandbTracker(settings.home / "runs") if whole else None)
    registry = open_registry(settings)
    if gates:
        from mlray.command_line.commands import gate_version
        assert all(not r.broken for r in gate_version(registry, run.version, gates, settings).values())
        command("gate", "loans/1", *(word for name in gates for word in ("--gate", name)), code=None)
        promote(registry, run.version, "production", ())
    (traffic,) = plan_of(registry, ["loans/1"]).traffic
    bundle, (asking, asks), (telling, tells) = bundle_of(registry, version(registry, "loans/1")), new_key("predictor"), new_key("feedbacker")
    answers, feedback = Journal(settings.home / "journal/segments"), Journal(settings.home / "journal/feedback/segments")
    at = Service({"loans": Line(traffic, {"1": Served("1", bundle)})}, (asking, telling), Recorder(answers, read_keys(settings)), feedback)
    for i, row in enumerate(frame.head(120).drop("good").iter_rows(named=True)):
        assert at.answer("loans", json.dumps({"instances": [row]}).encode(), asks, f"r-{i}").status == 200
        told = {"feedback": [{"request_id": f"r-{i}", "value": bool(frame["good"][i])}]}
        assert at_once(at.reply(Asked("feedback", "feedback:write", f"f-{i}", json.dumps(told).encode(), tells))).status == 202
    bad_request(at, asks, frame.drop("good").row(3, named=True), caplog)
    answers.close(), feedback.close()
    said.extend([caplog.text, *console(settings)])
    if not whole: return settings, said
    report = monitor(settings, bundle, "1", time.time() + 7200)
    said.extend([page(report), gauges(report), *report.sentences])
    with Listener() as listener: # what OpenLineage's own client sends of the same training
        monkeypatch.setenv("OPENLINEAGE_URL", listener.url)
        command("train", "loans.yaml")
        monkeypatch.delenv("OPENLINEAGE_URL")
    assert [e["eventType"] for e in listener.events][-1] == "COMPLETE"
    said.append(json.dumps(listener.events))
    told = settings.home / "told" # what leaves the house
    for words in (("errors", "loans/1"), ("registry", "mirror", "--again", "mlflow"), ("registry", "mirror", "--again", "wandb"), ("registry", "export", "loans/1", str(told / "mlflow")), ("export", "loans/1", "--to", str(told / "edge")),
                  ("registry", "backup", str(told / "backup"), "--with-keys"), ("audit", "verify"), ("delivery", "loans"), ("retrain", "loans", "--dry-run")): command(*words, code=None if words[0] in ("retrain", "delivery") else 0)
    for words in (("monitor", "loans/1"), ("monitor", "loans/1", "--html", str(settings.home / "page.html")), ("card", "loans/1"), ("card", "loans/1", "--data-sheet"), ("data",), ("show", "loans/1"), ("models",), ("worklist", "loans/1")): command(*words, code=None)
    return settings, [*said, caplog.text]


@pytest.mark.parametrize(("gates", "whole"), [
    pytest.param((), False, id="short"), pytest.param((), True, id="alone", marks=pytest.mark.chaos),
    pytest.param(("quality", "fairness", "data", "explanation", "privacy"), True, id="gates", marks=pytest.mark.chaos)])
def test_planted_values_are_nowhere(gates, whole, tmp_path, monkeypatch, caplog):
    from mlray.cli import app
    caplog.set_level(logging.DEBUG)
    settings, said = lived(tmp_path, gates, whole, monkeypatch, caplog)
    hits = found(settings.home, SECRET, but="quarantine")
    (tmp_path / "said").mkdir()
    for n, text in enumerate(said): (tmp_path / "said" / f"{n}.txt").write_text(text)
    hits |= found(tmp_path / "said", SECRET)
    files = [p for p in settings.home.rglob("*") if p.is_file()]
    print(f"\n{len(files)} files, {sum(p.stat().st_size for p in files) / 1e6:.1f} MB, {len(said)} pages and outputs: {sum(map(len, hits.values()))} planted values found {({k: sorted(v)[:3] for k, v in hits.items()})}")
    assert not hits
    streets = found(settings.home, ["Quuxgasse"], but="quarantine")
    assert streets and all(name.startswith(("journal/", "reports/")) for name in streets), f"what is kept raw is in the journal, and on the page about mistakes that shows some of it, and nowhere else: {({k: sorted(v)[:3] for k, v in streets.items()})}"
    aside = settings.home / "quarantine"
    assert found(aside, SECRET) and aside.stat().st_mode & 0o777 == 0o700 and all(p.stat().st_mode & 0o777 == 0o600 for p in aside.iterdir()), "rows put aside are as they came, for their owner alone"
    pages = "".join(p.read_text() for p in (settings.home / "reports").rglob("*.ipynb"))
    shown = [i for i in range(10, 120) if f'"r-{i}"' in pages or (f">r-{i}<" in pages and STREETS[i] in pages)]
    assert bool(shown) == whole
    erased = (0, 1, 40, 41, 80, 119, *(i for i in shown[:1] if i not in (40, 41, 80, 119)))
    for i in erased:
        done = json.loads(CliRunner().invoke(app, ["journal", "erase", PEOPLE[i], "--json"]).stdout)
        assert (done["rows"], done["feedback"], done["aside"]) == (1, 1, int(i % 40 in (0, 1))), done
    by_column = {5: f"street={STREETS[5]}", 6: f"mail={MAILS[6]}", 7: f"person={PEOPLE[7]}"} # kept as it is, as a pseudonym, and as whom callers ask about
    for what in by_column.values():
        done = json.loads(CliRunner().invoke(app, ["journal", "erase", what, "--json"]).stdout)
        assert (done["rows"], done["requests"], done["feedback"]) == (1, 1, 1), (what, done)
    for what, kept in ((f"number={NUMBERS[8]}", "as a bucket"), (f"name={NAMES[8]}", "not at all"), (f"stret={STREETS[8]}", "Did you mean 'street'")):
        letter = str(CliRunner().invoke(app, ["journal", "erase", what]).exception)
        assert kept in letter and ("send as person: `mlray journal erase PERSON`" in letter or kept.startswith("Did")), letter
    assert found(settings.home, [STREETS[8]]), "what leads to nobody erases nobody"
    assert not list((settings.home / "reports").rglob("*.*")), "a page about mistakes that showed somebody goes with them"
    gone = [v[i] for i in (*erased, *by_column) for v in (NAMES, MAILS, list(map(str, NUMBERS)), STREETS, PEOPLE)]
    assert not (left := found(settings.home, gone)), left
    assert found(settings.home, [STREETS[2]]), "of others nothing is taken"


# ---- what Ray writes ------------------------------------------------------------------------------------------------

@pytest.mark.chaos
@pytest.mark.ray
@pytest.mark.xdist_group("ray")
@pytest.mark.parametrize("placement", ["together", "apart"])
def test_logs_of_the_service_and_of_ray_hold_nothing(placement, tmp_path, monkeypatch):
    "Trained on Ray, served behind HAProxy, asked rightly and wrongly, explained, told the truth: every file of Ray's session is read."
    import httpx
    import ray

    from mlray.command_line.commands import deploy_versions, train_run
    from mlray.engines.cluster_on_ray import cluster
    frame = people()
    frame.with_columns(income=pl.when(pl.int_range(pl.len()) % 40 == 0).then(pl.lit("none of yours")).otherwise(pl.col("income").cast(pl.String))).write_csv(tmp_path / "source.csv")
    settings = Settings(root=tmp_path, home=tmp_path / "home", port=free_port(), object_store_mb=100, tracking="disabled", journal=True, gates=())
    monkeypatch.chdir(tmp_path)
    registry, ((asking, asks), (telling, tells)) = open_registry(settings), (new_key("predictor"), new_key("feedbacker"))
    for key in (asking, telling): add_key(registry, key)
    with cluster(settings):
        made = train_run(parse_spec(yaml.safe_dump(SHORT | {"model": {"hidden": [8]}, "serve": {"placement": placement}})), settings, "ray")
        promote(registry, made.version, "production", ())
        deploy_versions(["loans"], settings)
        ask = lambda path, body, key=asks: httpx.post(settings.url + path, content=body if isinstance(body, bytes) else json.dumps(body).encode(), headers={"authorization": f"Bearer {key}", "content-type": "application/json"}, timeout=120)
        rows = frame.head(40).drop("good").to_dicts()
        answers = [ask("/v1/models/loans:predict", {"instances": [row]}) for row in rows]
        assert {r.status_code for r in answers} == {200}
        for row, reply in zip(rows, answers, strict=True):
            for broken in ({**row, "number": row["mail"]}, {**row, row["mail"]: 1}, {**row, "income": row["name"]}): assert ask("/v1/models/loans:predict", {"instances": [broken]}).status_code == 422
            assert ask("/v1/models/loans:predict", b'{"instances": [{"name": "' + row["name"].encode()).status_code == 400
            assert ask("/v1/feedback", {"feedback": [{"request_id": reply.json()["request_id"], "value": True}]}, tells).status_code == 202
        assert ask("/v1/models/loans:explain", {"instances": rows[:1]}).status_code == 200
        assert ask(f"/v1/models/{rows[0]['person']}:predict", {"instances": rows[:1]}).status_code == 404, "a path that holds a name"
        session = Path(ray._private.worker._global_node.get_session_dir_path())
    logs = [p for p in (session / "logs").rglob("*") if p.is_file()]
    hits = found(session, (*SECRET, "Quuxgasse"))
    print(f"\n{len(logs)} log files of Ray's session, {sum(p.stat().st_size for p in logs) / 1e6:.1f} MB, {placement}: {sum(map(len, hits.values()))} planted values found {({k: sorted(v)[:3] for k, v in hits.items()})}")
    assert len(logs) > 20 and any("serve" in name for name in found(session / "logs", ["Gateway"])), "the service has written there, so it is the right folder"
    assert not hits
    kept = found(settings.home, SECRET, but="quarantine")
    assert not kept, kept
