"""`mlray predict`: every row once, answered or refused, in its place; the same bytes however it is cut, killed or spread."""
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from mlray.command_line.batch_cli import predict_batch
from mlray.governance.registry import bundle_of, open_registry
from mlray.learning.contract import Contract
from mlray.monitoring.journal import line_of
from mlray.running.explanation import explain
from mlray.samples import diabetes
from mlray.serving import batch as pieces_of
from mlray.serving.batch import ROW, Finished, cut, read_piece
from mlray.serving.batch_run import in_process, predict_file
from mlray.shipping.bundle import decide, predict
from mlray.sources.rows import flat
from mlray.values.column import Column
from mlray.values.data import Csv
from mlray.values.errors import DataError, RegistryError, Unavailable
from mlray.values.settings import Settings
from tests.conftest import running_below

QUIET = type("Quiet", (), {"start": lambda *a, **k: None, "add": lambda *a, **k: None, "finish": lambda *a, **k: None})


@pytest.fixture
def small(monkeypatch): monkeypatch.setattr(pieces_of, "_MOST", 50)


def answers(folder: Path) -> pl.DataFrame: return pl.read_parquet(sorted(folder.glob("part-*.parquet")))
def refused(folder: Path) -> pl.DataFrame: return pl.read_parquet(sorted((folder / "refused").glob("part-*.parquet")))
def digests(folder: Path) -> dict[str, bytes]: return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("part-*.parquet"))}


def spoilt(frame: pl.DataFrame) -> pl.DataFrame:
    "Some rows break the contract: 3 by a limit, 11 by a category, 200 by a missing value."
    at = pl.int_range(pl.len())
    return frame.with_columns(pl.when(at == 3).then(7000).otherwise("bmi").alias("bmi"), pl.when(at == 11).then(pl.lit("group 9")).otherwise("sex").alias("sex"), pl.when(at == 200).then(None).otherwise("glucose").alias("glucose"))


def written(frame: pl.DataFrame, path: Path) -> Path:
    getattr(frame, {".csv": "write_csv", ".parquet": "write_parquet", ".jsonl": "write_ndjson", ".arrow": "write_ipc"}[path.suffix])(path)
    return path


def test_text_is_read_as_the_spec_says_it_is_written(tmp_path):
    "With decimal commas and other dates, as it was where the model learned; and nested lines as flat ones."
    (tmp_path / "rows.csv").write_text("income;opened\n1.234,5;31.05.2024\n900;unknown\n")
    csv = Csv(separator=";", decimal_comma=("income", "wage"), dates={"opened": "%d.%m.%Y"})
    contract = Contract({"income": Column(type="number"), "opened": Column(type="date")})
    assert pl.concat(read_piece(p, contract, csv) for p in cut([str(tmp_path / "rows.csv")], contract, csv)).rows() == [(1, "1234.5", "2024-05-31"), (2, "900", "unknown")]
    (tmp_path / "rows.jsonl").write_text('{"who": {"plan": "a"}, "tags": ["x", "y"]}\n{"who": null, "tags": []}\n')
    nested = Contract({"who_plan": Column(type="text"), "tags": Column(type="text")})
    assert pl.concat(read_piece(p, nested, csv) for p in cut([str(tmp_path / "rows.jsonl")], nested, csv)).rows() == [(1, "a", "x y"), (2, None, "")]


def test_durations_can_be_answered_and_refused():
    "Parquet has them, and refused rows are told as text."
    assert flat(pl.DataFrame({"stay": [timedelta(hours=27), None]})).rows() == [("P1DT3H",), (None,)]


def test_reasons_of_a_row_are_those_of_explain_wherever_it_stands(trained, monkeypatch, tmp_path):
    "Cut otherwise, the same; refused rows have none; a batch that was begun without cannot go on with."
    settings, run = trained
    bundle, rows = bundle_of(open_registry(settings), run.version), written(spoilt(diabetes()).head(6), tmp_path / "rows.parquet")
    monkeypatch.setattr(pieces_of, "_MOST", 2)
    predict_file("diabetes/1", rows, tmp_path / "cut", settings, progress=QUIET(), reasons=3)
    monkeypatch.setattr(pieces_of, "_MOST", 50)
    predict_file("diabetes/1", rows, tmp_path / "whole.csv", settings, progress=QUIET(), reasons=3)
    cut_, whole = answers(tmp_path / "cut"), pl.read_csv(tmp_path / "whole.csv")
    assert cut_["row"].to_list() == [1, 2, 3, 5, 6] and cut_["reasons"].list.join("; ").to_list() == whole["reasons"].to_list()
    row = next(diabetes().select(bundle.contract.features).slice(4, 1).iter_rows(named=True))
    assert cut_["reasons"][3].to_list() == [f"{r.said} ({r.weight:+.3g})" for r in explain(bundle, row).reasons[:3]]
    predict_file("diabetes/1", rows, tmp_path / "bare", settings, progress=QUIET())
    assert "reasons" not in answers(tmp_path / "bare").columns
    with pytest.raises(DataError, match="begun with 0 reasons"): predict_file("diabetes/1", rows, tmp_path / "bare", settings, progress=QUIET(), reasons=1)


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".jsonl", ".arrow"])
def test_every_row_comes_out_once_with_the_bits_of_predict(trained, small, tmp_path, suffix):
    settings, run = trained
    frame, bundle = spoilt(diabetes()), bundle_of(open_registry(settings), run.version)
    done = predict_file("diabetes/1", written(frame, tmp_path / f"rows{suffix}"), tmp_path / "out", settings, progress=QUIET())
    found, bad = answers(tmp_path / "out"), refused(tmp_path / "out")
    assert (done.parts, done.answered, done.refused) == (9, 439, 3)
    assert sorted([*found["row"], *bad["row"]]) == list(range(1, 443)) and found["row"].is_sorted()
    assert dict(zip(bad["row"], bad["problem"], strict=True)) == {4: "bmi: max", 12: "sex: values", 201: "glucose: missing"}
    good = diabetes().filter(~pl.int_range(pl.len()).is_in([3, 11, 200]))
    scores = predict(bundle, good, good.height)
    assert found["score"].to_numpy().tobytes() == scores.tobytes() and found["threshold"].unique().to_list() == [bundle.threshold]
    assert found["label"].to_list() == [bundle.task.names[int(d)] for d in decide(bundle, scores, good)] and found["version"].unique().to_list() == ["diabetes/1"]
    assert pl.read_parquet_metadata(tmp_path / "out/part-000000.parquet")["mlray.bundle"] == run.version.digest


def test_text_is_cut_where_a_record_ends(diabetes, tmp_path, small):
    "Quotes with line breaks inside, blank lines, CRLF, a comment, a byte-order mark, no last line break: the numbers are those of a parser that sees the whole."
    from mlray.learning.contract import Contract
    from mlray.values.data import Csv
    contract = Contract({"a": diabetes.contract["age"].model_copy(update={"type": "text", "min": None, "max": None, "sensitive": False, "bands": (), "personal": False}), "b": diabetes.contract["bmi"]})
    draw = random.Random(7)
    for end, comment in (("\n", None), ("\r\n", None), ("\n", "#")):
        lines = ["\ufeff a ,b"]
        for i in range(400):
            if comment and draw.random() < .05: lines.append("# a remark")
            lines.append(draw.choice([f"x{i},{i}", f'"with ""quotes"", {i}{end}and a break",{i}', "", f'"{end}{end}",{i}', f",{i}"]))
        path = tmp_path / "rows.csv"
        path.write_bytes(end.join(lines).encode())
        read = pl.concat(read_piece(p, contract, Csv(comment=comment)) for p in cut([str(path)], contract, Csv(comment=comment)))
        whole = pl.read_csv(path, infer_schema=False, comment_prefix=comment).rename(str.strip).with_row_index(ROW, 1).filter(pl.col("b").is_not_null() | pl.col("a").is_not_null())
        assert read.equals(whole.select(ROW, "a", "b")) and read.height > 200


def test_a_line_that_is_no_row_is_refused_and_the_others_are_answered(trained, small, tmp_path):
    csv = written(diabetes().head(120), tmp_path / "rows.csv").read_bytes().split(b"\n")
    (tmp_path / "rows.csv").write_bytes(b"\n".join([*csv[:61], csv[61] + b",1,2,3", b"\xff\xfe" + csv[62], *csv[63:]]))
    lines = written(diabetes().head(120), tmp_path / "rows.jsonl").read_bytes().split(b"\n")
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join([*lines[:60], lines[60][:30], b"[1, 2]", b"\xff", b"", *lines[63:]]))
    for name, bad in (("rows.csv", [61, 62]), ("rows.jsonl", [61, 62, 63])):
        out = tmp_path / f"{name}.out"
        done = predict_file("diabetes/1", tmp_path / name, out, trained[0], progress=QUIET())
        assert refused(out)["row"].to_list() == bad and done.answered == 120 - len(bad) and refused(out)["problem"].str.contains("what came instead of a row").all()
        assert answers(out)["row"].to_list() == [n for n in range(1, 121) if n not in bad]


def test_it_goes_on_behind_the_last_whole_part(trained, small, tmp_path):
    rows = written(spoilt(diabetes()), tmp_path / "rows.csv")
    predict_file("diabetes/1", rows, tmp_path / "whole", trained[0], progress=QUIET())
    made: list[int] = []

    def dying(work, pieces):
        for one in in_process(work, pieces):
            made.append(one.number)
            yield one
            if len(made) == 4: raise Unavailable("the power is gone")
    out = tmp_path / "out"
    with pytest.raises(Unavailable, match="power"): predict_file("diabetes/1", rows, out, trained[0], dying, progress=QUIET())
    with open(out / "finished.log", "ab") as log: log.write(line_of(Finished(7, 1, 0, "0" * 64, ""))[:-9]) # torn
    (out / "part-000001.parquet").write_bytes(b"rot") # and one that the disk has lost
    done = predict_file("diabetes/1", rows, out, trained[0], progress=QUIET())
    assert done.resumed == 3 and digests(out) == digests(tmp_path / "whole") and not [p for p in out.rglob(".*") if p.is_file()]
    again = predict_file("diabetes/1", rows, out, trained[0], progress=QUIET())
    assert again.resumed == again.parts == 9 and (again.answered, again.refused) == (439, 3)


def test_what_is_not_the_same_batch_is_said(trained, diabetes, tmp_path):
    settings, rows, out = trained[0], written(spoilt(globals()["diabetes"]()), tmp_path / "rows.csv"), tmp_path / "out"
    predict_file("diabetes/1", rows, out, settings, progress=QUIET())
    def letter(match: str, *words: object, error=DataError) -> None:
        with pytest.raises(error, match=match): predict_file(*(words or ("diabetes/1", rows, out)), settings, progress=QUIET())
    os.utime(rows) # touched, and the same
    assert predict_file("diabetes/1", rows, out, settings, progress=QUIET()).resumed == 1
    about = json.loads((out / "batch.json").read_text())
    (out / "batch.json").write_text(json.dumps({**about, "digest": "0" * 64, "version": "diabetes/7"}))
    letter("begun with diabetes/7, and now diabetes/1")
    (out / "batch.json").write_text(json.dumps(about))
    rows.write_text(rows.read_text().replace("group 1", "group 2", 1))
    letter(r"rows.csv has changed since")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("!")
    letter("something else than a batch", "diabetes/1", rows, tmp_path / "other")
    letter("is a file", "diabetes/1", rows, rows.rename(tmp_path / "rows.txt"))
    letter("no column 'bmi'", "diabetes/1", written(globals()["diabetes"]().drop("bmi"), tmp_path / "less.csv"), tmp_path / "two")
    letter("no file 'nowhere.csv'", "diabetes/1", "nowhere.csv", tmp_path / "two")
    letter("no version 'diabetes@production'", "diabetes", tmp_path / "rows.txt", tmp_path / "two", error=RegistryError)


def test_one_file_and_its_refused_rows(trained, small, tmp_path, monkeypatch):
    settings = trained[0].model_copy(update={"home": Path(shutil.copytree(trained[0].home, tmp_path.with_name(f"{tmp_path.name}-home")))}) # the journal is ours
    monkeypatch.chdir(tmp_path)
    for i, part in enumerate((spoilt(diabetes())[:200], spoilt(diabetes())[200:])): written(part, tmp_path / f"in-{i}.parquet")
    for suffix, read in ((".csv", pl.read_csv), (".parquet", pl.read_parquet), (".jsonl", pl.read_ndjson)):
        done = predict_batch("diabetes/1", "in-*.parquet", f"answers{suffix}", settings=settings, journal=suffix == ".csv", progress=QUIET())
        found, bad = read(tmp_path / f"answers{suffix}"), read(tmp_path / f"answers.refused{suffix}")
        assert found["row"].to_list() == [n for n in range(1, 443) if n not in (4, 12, 201)] and bad["row"].to_list() == [4, 12, 201] and done.refused_at == f"answers.refused{suffix}"
        (tmp_path / f"answers.refused{suffix}").unlink()
    assert {p.name for p in tmp_path.iterdir()} == {"answers.csv", "answers.jsonl", "answers.parquet", "in-0.parquet", "in-1.parquet"}
    with pytest.raises(DataError, match="is there already"): predict_batch("diabetes/1", "in-*.parquet", "answers.csv", settings=settings, progress=QUIET())
    from mlray.monitoring.archive import journaled
    kept = journaled(settings.home / "journal", "diabetes", "1").collect()
    assert kept.height == 439 and kept["arm"].unique().to_list() == ["batch"] and np.array_equal(np.sort(kept["answer:score"].to_numpy().astype(np.float32)), np.sort(pl.read_parquet(tmp_path / "answers.parquet")["score"].to_numpy()))


GO = """
import sys
from pathlib import Path
from mlray.serving import batch
from mlray.command_line.batch_cli import predict_batch
from mlray.values.settings import Settings
batch._MOST = int(sys.argv[5])
home = Path(sys.argv[1])
predict_batch("diabetes/1", sys.argv[2], sys.argv[3], sys.argv[4], settings=Settings(root=home, home=home / "home", tracking="disabled", object_store_mb=100))
"""


def go(settings: Settings, rows: Path, out: Path, on: str = "local", most: int = 500) -> list[str]: return [sys.executable, "-c", GO, str(settings.root), str(rows), str(out), on, str(most)]


@pytest.mark.chaos
def test_twenty_kills_leave_no_trace(trained, tmp_path):
    rows = written(pl.concat([spoilt(diabetes())] * 300), tmp_path / "rows.csv")
    began = time.monotonic()
    subprocess.run(go(trained[0], rows, tmp_path / "whole"), check=True, capture_output=True)
    undisturbed, draw, kills, log = time.monotonic() - began, random.Random(3), 0, tmp_path / "out/finished.log"
    while kills < 20:
        process = subprocess.Popen(go(trained[0], rows, tmp_path / "out"), stderr=subprocess.DEVNULL)
        before = log.read_bytes().count(b"\n") if log.exists() else 0
        wanted = before + draw.randrange(0, 14) # parts; or none: while it starts
        while process.poll() is None and (log.read_bytes().count(b"\n") if log.exists() else 0) < wanted: time.sleep(.002)
        time.sleep(draw.random() * (.05 if wanted > before else undisturbed / 4))
        assert process.poll() is None, "it was done before it was killed 20 times"
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
    subprocess.run(go(trained[0], rows, tmp_path / "out"), check=True, capture_output=True)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole") and not [p for p in (tmp_path / "out").rglob(".*") if p.is_file()]
    print(f"\n{kills} kills; {answers(tmp_path / 'out').height:,} answers and {refused(tmp_path / 'out').height:,} refused rows of {300 * 442:,}, the bytes of an undisturbed batch in {len(digests(tmp_path / 'out'))} files")


@pytest.mark.chaos
@pytest.mark.ray
@pytest.mark.xdist_group("ray")
def test_on_ray_the_same_bytes_through_killed_workers(ray_cluster, trained, tmp_path, monkeypatch):
    from mlray.engines.predict_on_ray import on_ray
    monkeypatch.setattr(pieces_of, "_MOST", 2000)
    rows, killed = written(pl.concat([spoilt(diabetes())] * 300), tmp_path / "rows.csv"), list[int]()

    def murdered(work, pieces):
        for i, one in enumerate(on_ray(work, pieces)):
            yield one
            if i % 16 == 3:
                workers = [p for p, name in running_below().items() if name.startswith("ray::MapBatch")]
                for p in workers[:1]:
                    os.kill(p.pid, signal.SIGKILL)
                    killed.append(p.pid)
    here = predict_file("diabetes/1", rows, tmp_path / "here", trained[0], progress=QUIET())
    there = predict_file("diabetes/1", rows, tmp_path / "there", trained[0], murdered, progress=QUIET())
    assert killed and digests(tmp_path / "here") == digests(tmp_path / "there")
    assert replace(here, out="", refused_at="", seconds=0) == replace(there, out="", refused_at="", seconds=0)
    (tmp_path / "bad.parquet").write_bytes(rows.read_bytes()[:1000])
    with pytest.raises(DataError, match="cannot be read"): predict_file("diabetes/1", tmp_path / "bad.parquet", tmp_path / "bad", trained[0], on_ray, progress=QUIET())
    print(f"\n{len(killed)} workers killed; {there.answered:,} answers, {there.refused:,} refused, {there.parts} parts: the bytes of one process")


BIG = """
import sys
from pathlib import Path
from mlray.serving.batch_run import predict_file
from mlray.values.settings import Settings
home = Path(sys.argv[1])
done = predict_file("diabetes/1", sys.argv[2], sys.argv[3], Settings(root=home, home=home / "home", tracking="disabled"))
print(done.rows, done.seconds, next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.chaos
def test_larger_than_memory(trained, tmp_path):
    "The peak of a file of a gigabyte is that of a third of it, and far below its size."
    peaks = {}
    for times in (300, 1_000):
        wide = diabetes().with_columns(pl.lit("a remark that no model reads, " * 90).alias("remark"))
        path, block = tmp_path / f"{times}.csv", wide.write_csv(include_header=False).encode()
        with open(path, "wb") as file:
            file.write((",".join(wide.columns) + "\n").encode())
            for _ in range(times): file.write(block)
        said = subprocess.run([sys.executable, "-c", BIG, str(trained[0].root), str(path), str(tmp_path / f"{times}-out")], check=True, capture_output=True, text=True).stdout.split()
        peaks[times] = int(said[2]) / 2**10, path.stat().st_size / 2**20
        print(f"\n{int(said[0]):,} rows, {peaks[times][1]:,.0f} MiB in {float(said[1]):.0f} s; peak memory {peaks[times][0]:,.0f} MiB; load {os.getloadavg()[0]:.1f}")
    assert peaks[1_000][1] > 1000 and peaks[1_000][0] < 1.3 * peaks[300][0]
