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
from typer.testing import CliRunner

from mlray.access import new_key
from mlray.journal import Journal
from mlray.keeping import Recorder, read_keys
from mlray.monitor import gauges, monitor, page
from mlray.plan import plan_of
from mlray.registry import bundle_of, open_registry, promote, version
from mlray.run import train
from mlray.served import Served
from mlray.service import Service
from mlray.settings import Settings
from mlray.spec import parse_spec
from mlray.track_on_wandb import WandbTracker
from mlray.traffic import Line
from mlray.wire import Asked, at_once

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
        from mlray.commands import gate_version
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
    said.append(caplog.text)
    if not whole: return settings, said
    report = monitor(settings, bundle, "1", time.time() + 7200)
    said.extend([page(report), gauges(report), *report.sentences])
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
    assert streets and all(name.startswith("journal/") for name in streets), f"what is kept raw is in the journal, and nowhere else: {({k: sorted(v)[:3] for k, v in streets.items()})}"
    aside = settings.home / "quarantine"
    assert found(aside, SECRET) and aside.stat().st_mode & 0o777 == 0o700 and all(p.stat().st_mode & 0o777 == 0o600 for p in aside.iterdir()), "rows put aside are as they came, for their owner alone"
    erased = (0, 1, 40, 41, 80, 119)
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
    gone = [v[i] for i in (*erased, *by_column) for v in (NAMES, MAILS, list(map(str, NUMBERS)), STREETS, PEOPLE)]
    assert not (left := found(settings.home, gone)), left
    assert found(settings.home, [STREETS[2]]), "of others nothing is taken"
