"""Sources, their formats and versions; rules across columns; splits in time. What a lesson does not show."""
import json
import sqlite3
from datetime import UTC, date, datetime, timedelta

import polars as pl
import pytest
from hypothesis import given, settings as hypothesis_settings, strategies as st

from mlray.learning.contract import Contract, check
from mlray.learning.table import fingerprint, split
from mlray.sources.rows import check_sources, quarantine, read_rows
from mlray.sources.source import call_source, query_sql, read_source
from mlray.values.column import Column
from mlray.values.data import Csv, Source, Split, Sql
from mlray.values.errors import ContractError, DataError, SpecError, Unavailable
from mlray.values.spec import parse_spec

COLUMNS = {"id": Column(type="integer", role="id", unique=True), "x": Column(type="number"), "c": Column(type="category", nullable=True), "b": Column(type="boolean"),
           "d": Column(type="date", role="time"), "w": Column(type="datetime", role="ignored", time_zone="UTC")}
ROWS = pl.DataFrame({"id": range(90), "x": [i / 7 for i in range(90)], "c": [None if i % 5 == 0 else "abc"[i % 3] for i in range(90)], "b": [i % 2 == 0 for i in range(90)],
                     "d": [date(2024, 1, 1) + timedelta(i) for i in range(90)], "w": [datetime(2024, 1, 1, tzinfo=UTC) + timedelta(seconds=i) for i in range(90)]})


def named(source: dict, settings) -> tuple:
    "Fingerprint of the checked rows of a source."
    frame, version = read_source(Source(**source), Csv(), list(COLUMNS), settings)
    checked = check(Contract(COLUMNS), frame)
    assert not checked.problems
    return fingerprint(checked.good, version)


def write(frame: pl.DataFrame, folder, kind: str, parts: int) -> dict:
    "The rows in some order and layout; the source that names them."
    frame = frame.sample(fraction=1, shuffle=True, seed=parts)
    if kind == "csv": frame = frame.with_columns(pl.col("w").dt.strftime("%Y-%m-%dT%H:%M:%S%z"))
    size = -(-frame.height // parts)
    for i in range(parts):
        piece, path = frame[i * size:(i + 1) * size], folder / f"{kind}-{parts}-{i}.{kind}"
        {"csv": piece.write_csv, "parquet": piece.write_parquet, "jsonl": piece.write_ndjson, "ndjson": piece.write_ndjson, "arrow": piece.write_ipc, "feather": piece.write_ipc}[kind](path)
    return {"file": f"{kind}-{parts}-*.{kind}"}


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("kind", ["csv", "parquet", "jsonl", "ndjson", "arrow", "feather"])
def test_layout_and_format_do_not_change_the_fingerprint(kind, parts, settings):
    assert named(write(ROWS, settings.root, kind, parts), settings) == fingerprint(ROWS.select(sorted(ROWS.columns)))


def test_a_uri_goes_to_polars_as_it_stands(settings):
    write(ROWS, settings.root, "parquet", 1)
    assert named({"file": f"file://{settings.root}/parquet-1-0.parquet"}, settings) == named({"file": "parquet-1-0.parquet"}, settings)


def test_a_folder_may_have_brackets(settings):
    (settings.root / "a[1]").mkdir()
    ROWS.write_parquet(settings.root / "a[1]/rows.parquet")
    here = settings.model_copy(update={"root": settings.root / "a[1]"})
    assert named({"file": "rows.parquet"}, here).rows == named({"file": "row*.parquet"}, here).rows == 90


def test_a_delta_table_is_read_at_its_version(settings):
    pytest.importorskip("deltalake", reason="pip install 'mlray[delta]'")
    table = str(settings.root / "events")
    ROWS[:40].write_delta(table)
    ROWS[40:].write_delta(table, mode="append")
    newest, first = named({"delta": "events"}, settings), named({"delta": "events", "version": 0}, settings)
    assert (newest.digest, newest.source_version) == (fingerprint(ROWS).digest, "delta:1")
    assert (first.digest, first.rows, first.source_version) == (fingerprint(ROWS[:40]).digest, 40, "delta:0")
    with pytest.raises(DataError, match="at version 7"): named({"delta": "events", "version": 7}, settings)


def test_what_dvc_recorded_is_kept(settings):
    source = write(ROWS, settings.root, "parquet", 1)
    (settings.root / "parquet-1-0.parquet.dvc").write_text("outs:\n- md5: 9a0364b9e99bb480dd25e1f0284c8555\n  path: parquet-1-0.parquet\n")
    assert named(source, settings).source_version == "md5:9a0364b9e99bb480dd25e1f0284c8555"
    (settings.root / "parquet-1-0.parquet.dvc").write_text("[1]")
    with pytest.raises(DataError, match="no file of DVC"): named(source, settings)


def test_a_query_goes_where_the_environment_says(tmp_path):
    pytest.importorskip("adbc_driver_sqlite", reason="pip install 'mlray[sql]'")
    with sqlite3.connect(tmp_path / "rows.db") as database:
        database.execute("create table credit (age integer, x real)")
        database.executemany("insert into credit values (?, ?)", [(39, 1.5), (50, None)])
    environ = {"CREDIT": f"sqlite:///{tmp_path}/rows.db"}
    assert query_sql(Sql(uri_env="CREDIT", query="select age, x from credit where age > 40"), environ).rows() == [(50, None)]
    with pytest.raises(DataError, match="no such table") as caught: query_sql(Sql(uri_env="CREDIT", query="select * from no_table"), environ)
    assert str(tmp_path) not in str(caught.value) and caught.value.__cause__ is None
    with pytest.raises(Unavailable) as caught: query_sql(Sql(uri_env="CREDIT", query="select 1"), {"CREDIT": "postgresql://me:secret-7391@127.0.0.1:1/none"})
    assert "7391" not in str(caught.value)


@pytest.mark.parametrize(("source", "said"), [
    ({"file": "a.csv", "call": "m:f"}, "either"), ({}, "either"), ({"file": "a-*.csv", "sha256": "0" * 64}, "one file"), ({"file": "s3://b/a.csv", "url": "https://b/a.csv", "sha256": "0" * 64}, "one file"),
    ({"file": "a.csv", "url": "https://me:secret@b/a.csv", "sha256": "0" * 64}, "password"), ({"holders": {"a": {"file": "a*.csv"}, "b": {"file": "b*.csv"}}, "growing": True}, "what grows"),
    ({"file": "a.csv", "version": 1}, "delta table"), ({"sql": {"uri_env": "postgresql://u:p@h/d", "query": "select 1"}}, "pattern")])
def test_a_source_is_one_thing(source, said):
    with pytest.raises(ValueError, match=said): Source(**source)


def test_only_what_the_contract_names_is_read(settings):
    ROWS.with_columns(pl.lit("x" * 100).alias("other")).write_parquet(settings.root / "wide.parquet")
    assert read_source(Source(file="wide.parquet"), Csv(), ["x", "id"], settings)[0].columns == ["x", "id"]


@pytest.mark.parametrize(("name", "content"), [("a.csv", "a,b\n1,2,3\n"), ("a.parquet", "PAR1"), ("a.jsonl", '{"a": 1\n'), ("a.arrow", "ARROW1"), ("a.csv", "")])
def test_a_damaged_file_is_said_to_be(name, content, settings):
    (settings.root / name).write_text(content)
    with pytest.raises(DataError, match=r"a\.(csv|parquet|jsonl|arrow)"): read_source(Source(file=name), Csv(), ["a"], settings)


# Rules.

SPEC = """
name: credit
data: {train: {file: rows.parquet}, split: {by: day, test: 0.25, valid: 0.25}}
contract:
  number: {type: text, role: id, pattern: 'R-\\d+', unique: true}
  day: {type: date, role: time, fresh: 30d}
  face: {type: array, length: 2, role: ignored, min: 0}
  net: {type: number}
  gross: {type: number, nullable: true}
  paid: {type: boolean, role: target}
rules: {net_below_gross: net <= gross}
"""
NOW = datetime(2024, 3, 1, tzinfo=UTC)


def invoices() -> pl.DataFrame:
    return pl.DataFrame({"number": [f"R-{i}" for i in range(40)], "day": [date(2024, 1, 10) + timedelta(i) for i in range(40)], "face": [[0.5, 1.0]] * 40, "net": [10.0] * 40,
                         "gross": [None if i % 4 == 0 else 12.0 for i in range(40)], "paid": [i % 3 == 0 for i in range(40)]})


def test_rows_in_time_and_their_names(settings):
    invoices().write_parquet(settings.root / "rows.parquet")
    rows = read_rows(parse_spec(SPEC), settings, NOW)
    assert [f.height for f in vars(rows.parts).values()] == [23, 7, 10] and rows.sources["train"].rows == 40
    assert rows.parts.train["day"].max() < rows.parts.valid["day"].min() <= rows.parts.valid["day"].max() < rows.parts.test["day"].min()


def test_a_broken_rule_across_columns_and_nested_rows_in_quarantine(settings):
    frame = invoices().with_columns(gross=pl.when(pl.col("number") == "R-5").then(1.0).otherwise("gross"), face=pl.when(pl.col("number") == "R-6").then([-1.0, 0.0]).otherwise("face"),
                                    number=pl.col("number").replace({"R-8": "R-7"}))
    frame.write_parquet(settings.root / "rows.parquet")
    checked = check_sources(parse_spec(SPEC), settings, NOW)
    assert {(p.column, p.rule): p.rows for p in checked["train"].problems} == {("number", "unique"): 2, ("face", "min"): 1, ("net, gross", "net_below_gross"): 1}
    kept = pl.read_csv(quarantine(parse_spec(SPEC), settings, checked)[0])
    assert kept["row"].to_list() == [6, 7, 8, 9] and json.loads(kept["face"][1]) == {"face": [-1.0, 0.0]} and kept["problem"][0] == "net, gross: net_below_gross"


def test_a_stale_table_stops_a_run_and_no_row_is_bad_by_it(settings):
    invoices().write_parquet(settings.root / "rows.parquet")
    later = NOW + timedelta(days=60)
    checked = check_sources(parse_spec(SPEC), settings, later)["train"]
    assert [(p.rule, p.examples) for p in checked.problems] == [("fresh", ("newest: 2024-02-18",))] and checked.bad.is_empty()
    with pytest.raises(ContractError, match="stale"): read_rows(parse_spec(SPEC), settings, later)
    assert not check(Contract(parse_spec(SPEC).contract), invoices()).problems, "without a clock, freshness is not judged"


@pytest.mark.parametrize("text", ["net <", "net + gross", "net <= 'a'", "nothing > 3", "net <= 3; drop table x"])
def test_a_rule_that_is_no_condition_is_refused(text):
    with pytest.raises(ContractError, match="Rule 'r'"): check(Contract({"net": Column(type="number"), "gross": Column(type="number")}, {"r": text}), pl.DataFrame({"net": [1.0], "gross": [1.0]}))


@pytest.mark.parametrize("column", ["number", "day", "face"])
def test_a_column_of_any_type_may_be_a_feature(column):
    text = "\n".join(line.replace("role: id", "role: feature").replace("role: time", "role: feature").replace("role: ignored", "role: feature") if line.strip().startswith(column + ":") else line for line in SPEC.splitlines())
    assert column in Contract(parse_spec(text, ["data.split={}"] if column == "day" else ()).contract).features


@pytest.mark.parametrize("override", ["data.split.by=nothing", "data.split.by=net", "data.split.key=[number]"])
def test_a_split_in_time_needs_a_time(override):
    with pytest.raises(SpecError): parse_spec(SPEC, [override])


@pytest.mark.parametrize("column", [{"type": "text", "pattern": "("}, {"type": "array"}, {"type": "date", "min": "1.5.2024"}, {"type": "number", "min": "2024-05-01"}, {"type": "datetime", "time_zone": "Mars/Base"},
                                    {"type": "number", "fresh": "7d"}, {"type": "date", "fresh": "7 days"}, {"type": "text", "role": "target"}, {"type": "category", "pattern": "a"}, {"type": "boolean", "role": "target", "positive": "false"}])
def test_a_column_does_not_contradict_itself(column):
    with pytest.raises(ValueError): Column(**column)


# Splits.

@hypothesis_settings(max_examples=100, deadline=None)
@given(times=st.lists(st.integers(0, 30), min_size=1, max_size=60), test=st.floats(0, 0.9), valid=st.floats(0, 0.9), given_parts=st.tuples(st.booleans(), st.booleans()))
def test_nothing_is_learned_from_what_came_later(times, test, valid, given_parts):
    frame = pl.DataFrame({"row": range(len(times)), "t": times})
    other = pl.DataFrame({"row": [-1], "t": [0]})
    parts = split(frame, Split(by="t", test=test, valid=valid), *(other if g else None for g in given_parts))
    drawn = [f for f in vars(parts).values() if f["row"].to_list() != [-1]]
    assert sorted(r for f in drawn for r in f["row"]) == list(range(len(times))), "disjoint and covering"
    for older, later in ((drawn[i], drawn[j]) for i in range(len(drawn)) for j in range(i + 1, len(drawn))):
        assert older.is_empty() or later.is_empty() or older["t"].max() < later["t"].min()
    assert parts.train.height >= 1 and (given_parts[0] or parts.test.height <= test * len(times))


@hypothesis_settings(max_examples=60, deadline=None)
@given(people=st.lists(st.integers(0, 9), min_size=1, max_size=40), more=st.lists(st.integers(0, 19), max_size=20), seed=st.integers(0, 5))
def test_rows_added_later_move_no_other(people, more, seed):
    both = pl.DataFrame({"row": range(len(people) + len(more)), "person": people + more})
    for how in (Split(test=0.3, valid=0.3, seed=seed), Split(test=0.3, valid=0.3, seed=seed, key=("person",))):
        before, after = split(both[:len(people)], how), split(both, how)
        for part in vars(before): assert set(getattr(before, part)["row"]) <= set(getattr(after, part)["row"])
    persons = [set(f["person"]) for f in vars(after).values()]
    assert not persons[0] & persons[1] and not persons[1] & persons[2] and not persons[0] & persons[2]


def test_given_parts_are_taken_as_they_are(settings):
    frame = invoices()
    for name, rows in (("rows", frame[:20]), ("v", frame[20:30]), ("t", frame[30:])): rows.write_parquet(settings.root / f"{name}.parquet")
    spec = parse_spec(SPEC, ["data.valid.file=v.parquet", "data.test.file=t.parquet"])
    parts = read_rows(spec, settings, datetime(2024, 2, 1, tzinfo=UTC)).parts
    assert [f.height for f in vars(parts).values()] == [20, 10, 10]


# Inference, and sources that grow.

def test_infer_writes_a_contract_once_and_never_over_one(settings, capsys, monkeypatch):
    from typer.testing import CliRunner

    from mlray.cli import app
    monkeypatch.chdir(settings.root)
    invoices().drop("face").write_csv("rows.csv")
    (settings.root / "credit.yaml").write_text("# mine\nname: credit\ndata: {train: {file: rows.csv}}\n")
    first = CliRunner().invoke(app, ["check", "--infer", "credit.yaml"])
    written = (settings.root / "credit.yaml").read_text()
    assert first.exit_code == 0 and written.startswith("# mine\n") and "role: id, unique: true" in written and "day: {type: date" in written
    assert f"# train: {{folds: 5}}    # {invoices().height} rows are few" in written
    second = CliRunner().invoke(app, ["check", "--infer", "credit.yaml", "--json"])
    assert second.exit_code == 0 and not json.loads(second.stdout)["written"] and (settings.root / "credit.yaml").read_text() == written
    spec = parse_spec(written.replace("paid: {type: boolean}", "paid: {type: boolean, role: target}"))
    assert not check_sources(spec, settings)["train"].problems


def test_infer_of_a_file_without_header(settings):
    from mlray.learning.infer import infer_contract
    (settings.root / "rows.csv").write_text("1,a\n2,b\n3,a\n4,b\n")
    frame, _ = read_source(Source(file="rows.csv"), Csv(header=False), (), settings)
    assert [c["type"] for c in infer_contract(frame).values()] == ["integer", "category"]


GROWING = """
name: visits
data: {train: {delta: visits}}
contract:
  row: {type: integer, role: time, min: 0}
  x: {type: number}
  y: {type: boolean, role: target}
"""


def visits(*rows: int) -> pl.DataFrame: return pl.DataFrame({"row": rows, "x": [float(r) for r in rows], "y": [True] * len(rows)}, schema={"row": pl.Int64, "x": pl.Float64, "y": pl.Boolean})


def test_a_delta_table_is_followed_and_compaction_brings_no_row_twice(settings):
    deltalake = pytest.importorskip("deltalake", reason="pip install 'mlray[delta]'")
    from mlray.sources.watermark import accept, next_batch, read_mark
    spec, table, seen = parse_spec(GROWING), str(settings.root / "visits"), []

    def take() -> tuple[int, int] | None:
        batch = next_batch(spec, settings)
        if batch is None: return None
        accept(spec, settings, batch)
        seen.extend(batch.good["row"])
        return batch.good.height, batch.late
    visits(0, 1, 5).write_delta(table)
    assert take() == (3, 0) and take() is None
    visits(6, -7, 2).write_delta(table, mode="append")
    visits(3, 9).write_delta(table, mode="append")
    assert take() == (4, 2) and read_mark(spec.name, settings).time == "9" and len(list((settings.home / "quarantine").iterdir())) == 1
    deltalake.DeltaTable(table).optimize.compact()
    assert take() is None
    visits(10).write_delta(table, mode="append")
    assert take() == (1, 0) and sorted(seen) == [0, 1, 2, 3, 5, 6, 9, 10]
    deltalake.DeltaTable(table).delete("row = 10")
    with pytest.raises(DataError, match="follows what is appended"): next_batch(spec, settings)


def test_a_batch_that_breaks_the_contract_does_not_count_where_the_spec_says_stop(settings):
    from mlray.sources.watermark import Mark, next_batch, read_mark
    spec = parse_spec(GROWING, ["data.train={file: v-*.parquet}", "data.on_invalid=stop"])
    visits(1, -2).write_parquet(settings.root / "v-1.parquet")
    with pytest.raises(ContractError, match="The mark was not moved"): next_batch(spec, settings)
    assert read_mark(spec.name, settings) == Mark()


def test_times_that_are_missing_move_no_mark(settings):
    from mlray.sources.watermark import accept, next_batch, read_mark
    spec = parse_spec(GROWING, ["data.train={file: v-*.parquet}", "contract.row.nullable=true"])
    for number, (rows, newest) in enumerate([((None, None), None), ((3, None), "3"), ((None,), "3")]):
        visits(*[r or 0 for r in rows]).with_columns(row=pl.Series(rows, dtype=pl.Int64)).write_parquet(settings.root / f"v-{number}.parquet")
        accept(spec, settings, next_batch(spec, settings))
        assert read_mark(spec.name, settings).time == newest


@hypothesis_settings(max_examples=25, deadline=None)
@given(arrivals=st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=5), min_size=1, max_size=6), looks=st.lists(st.booleans(), min_size=6, max_size=6))
def test_each_row_comes_once_and_late_ones_are_counted(arrivals, looks, tmp_path_factory):
    from mlray.sources.watermark import accept, next_batch
    from mlray.values.settings import Settings
    root = tmp_path_factory.mktemp("growing")
    here, spec, seen = Settings(root=root, home=root / "home"), parse_spec(GROWING, ["data.train={file: v-*.parquet}"]), []
    for i, rows in enumerate(arrivals):
        visits(*rows).write_parquet(root / f"v-{i}.parquet")
        if not looks[i]: continue
        batch = next_batch(spec, here)
        assert next_batch(spec, here).good.equals(batch.good), "not accepted, so it comes again"
        accept(spec, here, batch)
        assert batch.late == sum(row < max(seen) for row in batch.good["row"]) if seen else batch.late == 0
        seen += batch.good["row"].to_list()
    if batch := next_batch(spec, here): accept(spec, here, batch); seen += batch.good["row"].to_list()
    assert sorted(seen) == sorted(r for rows in arrivals for r in rows) and next_batch(spec, here) is None


def test_a_source_that_fails_says_in_which_line(tmp_path, monkeypatch):
    "What is wrong in a function of one's own is a letter, as it is in a spec."
    (tmp_path / "rows_of_mine.py").write_text("import polars as pl\n\ndef rows():\n    frame = pl.LazyFrame({'a': [1]})\n    return frame['a']\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"'rows_of_mine:rows' failed: TypeError: .*LazyFrame.*, in line 5 of rows_of_mine.py"): call_source("rows_of_mine:rows")
