"""Checkpoints and journaled rows in a bucket, over the wire to an S3 that answers: the same promises as on a disk."""
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import yaml

from mlray.learning.model import Epoch, Job, State
from mlray.monitoring.archive import erase, journaled, purge, put_away
from mlray.monitoring.journal import Entry, Journal
from mlray.running.checkpoints import Checkpoints
from mlray.running.remote_checkpoints import open_checkpoints
from mlray.running.run import LocalBackend, make_job
from mlray.sources.mirror import fetch_rows, send_rows
from mlray.sources.rows import read_rows
from mlray.values.errors import SettingsError, Unavailable
from mlray.values.recipe import Train
from mlray.values.settings import Settings, shipped
from mlray.values.spec import RunSpec
from tests import buckets
from tests.conftest import running_below
from tests.test_federation import made as customers, spec_of as holders_of
from tests.test_stream import SPEC as LOANS, table as rows_that_pass_by

pytest.importorskip("moto", reason="pip install 'mlray[dev]'")


@pytest.fixture(scope="module")
def s3() -> Iterator[tuple[Any, Any]]:
    "A client, and the server to stop."
    with buckets.bucket("kept") as (client, server): yield client, server


def keys(client: Any, below: str) -> list[str]: return sorted(o["Key"] for o in client.list_objects_v2(Bucket="kept", Prefix=below).get("Contents", []) if not o["Key"].endswith("/"))


# --- checkpoints -----------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def job(diabetes: RunSpec, tmp_path_factory: pytest.TempPathFactory) -> Job:
    root = tmp_path_factory.mktemp("job")
    made = make_job(diabetes, read_rows(diabetes, Settings(root=root, home=root)))
    return replace(made, train=Train.model_validate(made.train.model_dump(by_alias=False) | {"epochs": 6, "patience": 6, "batch_size": 64}))


def last(epochs: Any) -> State:
    *_, end = epochs
    return end.state


def same(a: State, b: State) -> bool:
    import torch
    return a.epoch == b.epoch and a.history == b.history and all(torch.equal(x[n], y[n]) for x, y in ((a.now, b.now), (a.best, b.best), (a.optimizer, b.optimizer)) for n in y)


def stopped(job: Job, home: Path, after: int) -> None:
    for epoch in LocalBackend(checkpoints="s3://kept/runs").train(job, "run", home):
        if epoch.number == after: return


@pytest.mark.chaos
def test_a_run_goes_on_from_a_bucket_on_a_machine_that_has_nothing(s3, job, tmp_path):
    undisturbed = last(LocalBackend().train(job, "run", tmp_path / "local"))
    stopped(job, tmp_path / "one", 3)
    assert [k[:19] for k in keys(s3[0], "runs/run/")] == ["runs/run/epoch-0000"] * 2 and not list(tmp_path.glob("one/run/epoch-*")), "the two newest, and none on the machine that may go"
    numbers = []
    def heard(epochs: Iterator[Epoch]) -> Iterator[Epoch]:
        for epoch in epochs:
            numbers.append(epoch.number)
            yield epoch
    assert same(last(heard(LocalBackend(checkpoints="s3://kept/runs").train(job, "run", tmp_path / "another", resume=True))), undisturbed) and numbers == [1, 2, 3, 4, 5, 6]
    open_checkpoints(tmp_path / "another/run", "s3://kept/runs").clear()
    assert keys(s3[0], "runs/") == []


@pytest.mark.parametrize("damage", [
    pytest.param(lambda d: d[:-1], id="one short", marks=pytest.mark.chaos), pytest.param(lambda d: b"", id="empty", marks=pytest.mark.chaos), pytest.param(lambda d: d[:500] + bytes([d[500] ^ 1]) + d[501:], id="one bit")])
def test_a_damaged_object_is_passed_over(s3, job, tmp_path, damage):
    stopped(job, tmp_path, 3)
    key = keys(s3[0], "runs/run/")[-1]
    s3[0].put_object(Bucket="kept", Key=key, Body=damage(s3[0].get_object(Bucket="kept", Key=key)["Body"].read()))
    notes: list[str] = []
    assert open_checkpoints(tmp_path / "run", "s3://kept/runs").newest(notes.append).epoch == 2 and "epoch 3" in notes[0]


@pytest.mark.chaos
def test_a_run_anew_forgets_what_was_there(s3, job, tmp_path):
    stopped(job, tmp_path, 3)
    stopped(job, tmp_path, 1)
    assert [int(Path(k).name[6:14]) for k in keys(s3[0], "runs/run/")] == [1]


def test_a_bucket_that_is_not_there_is_a_letter(s3, job, tmp_path):
    with pytest.raises(Unavailable, match=r"s3://nowhere/runs/run could not be used for checkpoints: .* What was kept there before is whole"): next(LocalBackend(checkpoints="s3://nowhere/runs").train(job, "run", tmp_path))


def test_a_bucket_that_lets_nothing_go_is_a_letter(tmp_path, monkeypatch):
    from mlray.governance.store import Bucket
    from mlray.running.remote_checkpoints import Files, RemoteCheckpoints
    kept = RemoteCheckpoints(tmp_path / "run", url=f"file://{tmp_path}/far")
    kept.bucket.write("epoch-00000001-" + "0" * 64 + ".safetensors", b"x")
    def refused(bucket, path): raise OSError("it is held")
    monkeypatch.setattr(Bucket, "drop", refused)
    with pytest.raises(Unavailable, match="far could not be used for checkpoints: it is held"): kept.forget()
    (tmp_path / "here").mkdir()
    with pytest.raises(Unavailable, match=f"^{tmp_path} could not be used"): Files(tmp_path).read("here") # a folder where a file should be


def test_a_folder_that_all_see(job, tmp_path):
    backend = LocalBackend(checkpoints=str(tmp_path / "shared"))
    for epoch in backend.train(job, "run", tmp_path / "one"):
        if epoch.number == 2: break
    assert Checkpoints(tmp_path / "shared/run").newest().epoch == 2 and not (tmp_path / "one").exists()


def test_a_run_that_is_finished_leaves_no_folder(tmp_path, diabetes):
    from mlray.running.run import train
    settings = Settings(root=tmp_path, home=tmp_path / "home", tracking="disabled", checkpoints=str(tmp_path / "shared"))
    train(diabetes.model_copy(update={"train": diabetes.train.model_copy(update={"epochs": 1})}), settings)
    assert not list((tmp_path / "shared").iterdir()) and not list((settings.home / "runs").iterdir())


def started(home: Path, *words: str, **variables: str) -> subprocess.Popen:
    "A command with a home of its own; what it says goes to a file, for a pipe that nobody reads would stop it."
    environment = os.environ | {"MLRAY_HOME": str(home), "MLRAY_TRACKING": "disabled", "MLRAY_OBJECT_STORE_MB": "100"} | variables
    with home.with_suffix(".out").open("w") as out, home.with_suffix(".err").open("w") as err:
        return subprocess.Popen([sys.executable, "-c", "from mlray.cli import main; main()", *words, "--json"], cwd=shipped("configs").parent, env=environment, stdout=out, stderr=err)


def command(home: Path, *more: str, **variables: str) -> subprocess.Popen:
    "A training on two workers of Ray."
    return started(home, "train", str(shipped("configs") / "diabetes.yaml"), "train.epochs=40", "train.patience=40", "train.batch_size=16", "--on", "ray", *more, **{"MLRAY_WORKERS": "2"} | variables)


def printed(process: subprocess.Popen, home: Path) -> dict:
    process.wait(timeout=900)
    assert process.returncode in (0, 1), home.with_suffix(".err").read_text()[-4000:] # 1: the verdict did not pass, which is not the matter here
    return json.loads(home.with_suffix(".out").read_text())


@pytest.mark.chaos
def test_a_killed_driver_with_two_workers_on_ray_goes_on_from_the_bucket(s3, tmp_path, capsys):
    undisturbed = printed(command(tmp_path / "other"), tmp_path / "other")
    reached, kills, seconds = 0, 0, time.monotonic()
    where = {"MLRAY_CHECKPOINTS": "s3://kept/states", "MLRAY_STORE": "s3://kept/bundles"}
    for goal in (6, 20): # killed twice, each time on a machine that has nothing
        process = command(tmp_path / f"home-{goal}", *(["--resume"] if kills else []), **where)
        while reached < goal and process.poll() is None:
            reached = max([int(Path(k).name[6:14]) for k in keys(s3[0], "states/") if "/epoch-" in k] + [0])
            time.sleep(0.1)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL and goal <= reached < 40, f"it had ended at {reached}, so nothing was shown: {(tmp_path / f'home-{goal}.err').read_text()[-4000:]}"
        kills += 1
    resumed = printed(command(tmp_path / "home", "--resume", **where), tmp_path / "home")
    assert resumed["digest"] == undisturbed["digest"] and keys(s3[0], "states/") == []
    assert any(resumed["digest"] in k for k in keys(s3[0], "bundles/"))
    with capsys.disabled(): print(f"\n{kills} kills, the last at epoch {reached} of 40, the same digest {resumed['digest'][:12]}; {time.monotonic() - seconds:.0f} s, load {os.getloadavg()[0]:.0f}")


def lines(key: str, client: Any) -> int:
    try: return client.get_object(Bucket="kept", Key=key)["Body"].read().count(b"\n")
    except client.exceptions.NoSuchKey: return 0


SEARCH = """
search:
  trials: 6
  grace: 4
  space:
    train.learning_rate: {low: 1.0e-4, high: 0.1, log: true}
    model.hidden: {choices: [[16], [32], [64, 64]]}
"""


@pytest.mark.chaos
@pytest.mark.ray
@pytest.mark.parametrize("scheduler", ["asha", "pbt"])
def test_a_killed_search_goes_on_from_the_bucket_on_a_machine_that_has_nothing(s3, tmp_path, scheduler, capsys):
    "What was tried is not tried again; of a population, states that others go on from come from the bucket."
    (spec := tmp_path / "s.yaml").write_text((shipped("configs") / "diabetes.yaml").read_text() + SEARCH)
    words = ("tune", str(spec), "train.epochs=60", "train.patience=60", "train.batch_size=8", *(["search.scheduler=pbt", "search.trials=3", "search.grace=20"] if scheduler == "pbt" else []))
    where, client, began = {"MLRAY_CHECKPOINTS": "s3://kept/tried"}, s3[0], time.monotonic()
    whole = printed(started(tmp_path / "other", *words), tmp_path / "other")
    found = lambda: next((k for k in keys(client, "tried/") if k.endswith("results.jsonl")), "")
    process, wanted = started(tmp_path / "first", *words, **where), 4
    while process.poll() is None and (not found() or lines(found(), client) < wanted): time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    known = lines(found(), client) if found() else 0
    assert process.wait() == -signal.SIGKILL and wanted <= known < len(whole["trials"]), "it had ended, so nothing was shown"
    resumed = printed(started(tmp_path / "second", *words, **where), tmp_path / "second")
    said = (tmp_path / "second.err").read_text()
    assert f"{known} trials are known already" in said and said.count("  trial ") - said.count("is best") == len(whole["trials"]) - known, said
    assert [(t["key"], t["early"]) for t in resumed["trials"]] == [(t["key"], t["early"]) for t in whole["trials"]]
    if scheduler == "pbt": assert resumed["digest"] == whole["digest"]
    assert not [k for k in keys(client, "tried/") if "/states/" in k or "/epoch-" in k]
    with capsys.disabled(): print(f"\n{scheduler}: killed with {known} of {len(whole['trials'])} trials known, the rest on another machine; {time.monotonic() - began:.0f} s, load {os.getloadavg()[0]:.0f}")
    for key in keys(client, "tried/"): client.delete_object(Bucket="kept", Key=key)


def test_what_another_machine_has_tried_is_known_here(s3, tmp_path):
    "Results are a line a trial, in a bucket as on the disk; states of a population are there by name; and where settings name a folder, all of it is in that."
    from mlray.engines.tune_on_ray import _gathered, _places, _whole
    from mlray.running.search import Trial, claimed_results, keep, read_trials
    trials = [Trial(n, f"k{n}", {"train.learning_rate": n / 10}, 3, 0.5, 0.5, None, 10) for n in (1, 2, 3)]
    (one, found, states), (two, there, _) = (_places(Settings(home=tmp_path / n, checkpoints="s3://kept/found"), "wine-search") for n in ("one", "two"))
    with claimed_results(one) as file:
        assert _gathered(file, found) == {}
        for trial in trials[:2]: keep(file, trial)
        found.write("results.jsonl", _whole(file))
    states.write("k1.safetensors", b"weights")
    with claimed_results(two) as file:
        keep(file, trials[2])
        assert set(_gathered(file, there)) == {"k1", "k2", "k3"} and set(read_trials(file)) == {"k1", "k2", "k3"}, "what either knows"
    assert keys(s3[0], "found/") == ["found/wine-search/results.jsonl", "found/wine-search/states/k1.safetensors"] and states.read("k1.safetensors") == b"weights" and states.read("k2.safetensors") == b""
    states.drop()
    assert keys(s3[0], "found/") == ["found/wine-search/results.jsonl"]
    folder, shared, _ = _places(Settings(home=tmp_path, checkpoints=str(tmp_path / "all")), "wine-search")
    assert folder == shared.folder == (tmp_path / "all/wine-search").resolve() and not shared.url
    with pytest.raises(Unavailable, match=r"s3://nowhere/runs/wine-search could not be used .* `mlray tune`"): _places(Settings(home=tmp_path, checkpoints="s3://nowhere/runs"), "wine-search")[1].write("results.jsonl", b"{}")


def shop(folder: Path) -> tuple[str, ...]:
    "Rows of three holders; a command."
    for name, rows in {"east": 2000, "north": 900, "west": 1500, "test": 1000}.items(): customers(rows, rows).write_parquet(folder / f"{name}.parquet")
    (spec := folder / "shop.yaml").write_text(yaml.safe_dump(holders_of(folder, epochs=12, patience=12).model_dump(mode="json", exclude_defaults=True)))
    return "train", str(spec), "--on", "ray"


def loans(folder: Path) -> tuple[str, ...]:
    "Rows that pass by; a command."
    (spec := folder / "loans.yaml").write_text(LOANS.format(folder=rows_that_pass_by(folder / "loans", 60_000)))
    return "train", str(spec), "train.epochs=12", "train.patience=12", "--on", "ray"


@pytest.mark.chaos
@pytest.mark.ray
@pytest.mark.parametrize("kind", [shop, loans], ids=["federated", "streamed"])
def test_a_killed_run_goes_on_from_the_bucket_on_a_machine_that_has_nothing(s3, tmp_path, kind, capsys):
    words, client, began, where = kind(tmp_path), s3[0], time.monotonic(), {"MLRAY_WORKERS": "1", "MLRAY_OBJECT_STORE_MB": "200"}
    undisturbed = printed(started(tmp_path / "other", *words, **where), tmp_path / "other")
    where["MLRAY_CHECKPOINTS"] = f"s3://kept/{kind.__name__}"
    process, reached = started(tmp_path / "first", *words, **where), 0
    while reached < 4 and process.poll() is None: reached = max([int(Path(k).name[6:14]) for k in keys(client, f"{kind.__name__}/") if "/epoch-" in k] + [0])
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and 4 <= reached < 12, f"it had ended, so nothing was shown: {(tmp_path / 'first.err').read_text()[-3000:]}"
    assert not list(tmp_path.glob("first/runs/*/epoch-*")), "no state is on the machine that may go"
    resumed = printed(started(tmp_path / "second", *words, "--resume", **where), tmp_path / "second")
    assert resumed["digest"] == undisturbed["digest"] and keys(client, f"{kind.__name__}/") == []
    with capsys.disabled(): print(f"\n{kind.__name__}: killed after {reached} of 12, the same digest {resumed['digest'][:12]} on another machine; {time.monotonic() - began:.0f} s, load {os.getloadavg()[0]:.0f}")


# --- rows of a journal -----------------------------------------------------------------------------------------------

def journal_of(home: Path, subjects: str) -> Path:
    "A journal whose segment has ended, a row a letter."
    journal = Journal[Entry](home / "journal" / "segments", sync_s=0)
    for number, subject in enumerate(subjects): journal.write(Entry(f"{home.name}-{number}", time.time_ns(), "wine", "1", "d" * 8, 200, 0.1, rows=1, subject=subject, columns={"a": [number]}, answers={"label": [1]}))
    journal.close()
    put_away(home / "journal")
    return home / "journal"


def rows_of(home: Path) -> set[tuple[str, str]]: return set(journaled(home / "journal").select("id", "subject").collect().rows())


def test_rows_that_were_put_away_are_in_the_bucket_and_an_erasure_reaches_them(s3, tmp_path):
    one, two, fresh = (Settings(home=tmp_path / n, archive="s3://kept/journal") for n in ("one", "two", "fresh"))
    journal_of(one.home, "ab")
    journal_of(two.home, "ac")
    assert (send_rows(one).sent, send_rows(two).sent, send_rows(one).sent) == (1, 1, 0)
    assert fetch_rows(fresh) == 2 and rows_of(fresh.home) == rows_of(one.home) | rows_of(two.home) and len(rows_of(fresh.home)) == 4
    assert erase(one.home / "journal", frozenset("a")) == 1 and (send_rows(one).sent, send_rows(fresh).sent) == (1, 0), "what was brought is never sent, or it would bring back what was erased"
    again = Settings(home=tmp_path / "again", archive="s3://kept/journal")
    assert fetch_rows(again) == 2 and rows_of(again.home) == {("one-1", "b"), ("two-0", "a"), ("two-1", "c")}
    assert purge(one.home / "journal", timedelta(days=-2), datetime.now(UTC)) == 1 and send_rows(one).taken == 1 and len(keys(s3[0], "journal/")) == 1
    assert {int(p.stat().st_mode & 0o777) for p in again.home.rglob("*.parquet")} == {0o600}


def test_a_sending_that_is_cut_off_is_done_by_the_next_one(s3, tmp_path, monkeypatch):
    settings = Settings(home=tmp_path / "cut", archive="s3://kept/cut")
    for _ in range(3): journal_of(settings.home, "ab")
    from mlray.governance.store import Bucket
    write, wrote = Bucket.write, []

    def once(self: Bucket, path: str, data: bytes) -> None:
        if wrote: raise OSError("the network is gone")
        write(self, path, data)
        wrote.append(path)
    with monkeypatch.context() as broken:
        broken.setattr(Bucket, "write", once)
        with pytest.raises(Unavailable, match="give the same command again"): send_rows(settings)
    assert len(keys(s3[0], "cut/")) == 1 and send_rows(settings).sent == 3 and len(keys(s3[0], "cut/")) == 3 and send_rows(settings).same == 3


def test_the_commands_send_and_bring(s3, tmp_path):
    from mlray.command_line.watching import tend
    settings, other = (Settings(home=tmp_path / n, archive="s3://kept/commands") for n in ("home", "other"))
    journal_of(settings.home, "ab")
    assert tend("compact", "", "", "", False, settings)[0]["sent"] == 1
    assert tend("fetch", "", "", "", False, other)[0] == {"files": 1}
    assert pl.DataFrame(tend("rows", "", "", "", False, other)[0])["subject"].to_list() == ["a", "b"]
    with pytest.raises(SettingsError, match="archive"): tend("fetch", "", "", "", False, Settings(home=tmp_path))


# --- answers of a batch ----------------------------------------------------------------------------------------------

QUIET = type("Quiet", (), {"start": lambda *a, **k: None, "add": lambda *a, **k: None, "finish": lambda *a, **k: None})()


def patients(times: int = 1) -> pl.DataFrame:
    "Of each 442, three break the contract."
    from mlray.samples import diabetes
    at = pl.int_range(pl.len())
    one = diabetes().with_columns(pl.when(at == 3).then(7000).otherwise("bmi").alias("bmi"), pl.when(at == 11).then(pl.lit("group 9")).otherwise("sex").alias("sex"), pl.when(at == 200).then(None).otherwise("glucose").alias("glucose"))
    return pl.concat([one] * times)


def here(folder: Path) -> dict[str, bytes]: return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("part-*.parquet")}
def there(client: Any, below: str) -> dict[str, bytes]: return {k.removeprefix(below): client.get_object(Bucket="kept", Key=k)["Body"].read() for k in keys(client, below) if "part-" in k}


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    "Of fifty rows."
    from mlray.serving import batch
    monkeypatch.setattr(batch, "_MOST", 50)


def answer(settings: Settings, source: Any, out: str, engine: Any = None, version: str = "diabetes/1") -> Any:
    from mlray.serving.batch_in_bucket import place_of
    from mlray.serving.batch_run import in_process, predict_file
    return predict_file(version, source, place_of(out, settings), settings, engine or in_process, progress=QUIET)


def test_a_bucket_gets_the_parts_that_a_folder_gets_and_a_batch_goes_on_there(s3, trained, pieces, tmp_path):
    from mlray.serving.batch_run import in_process
    settings, client = trained[0], s3[0]
    patients().write_parquet(tmp_path / "rows.parquet")
    local = answer(settings, tmp_path / "rows.parquet", str(tmp_path / "out"))

    def dying(work, pieces):
        for i, one in enumerate(in_process(work, pieces)):
            yield one
            if i == 3: raise Unavailable("the power is gone")
    with pytest.raises(Unavailable, match="power"): answer(settings, tmp_path / "rows.parquet", "s3://kept/answers/", dying)
    client.put_object(Bucket="kept", Key="answers/part-000001.parquet", Body=b"rot") # a part that is not what was kept,
    client.put_object(Bucket="kept", Key="answers/_batch/000002.log", Body=b"rot")   # and a note that cannot be read
    done = answer(settings, tmp_path / "rows.parquet", "s3://kept/answers")
    assert (done.resumed, done.parts, done.answered, done.refused, done.refused_at) == (2, 9, 439, 3, "s3://kept/answers/refused") and (local.answered, local.refused) == (439, 3)
    assert there(client, "answers/") == here(tmp_path / "out") and len(here(tmp_path / "out")) == 9 + 2
    assert answer(settings, tmp_path / "rows.parquet", "s3://kept/answers").resumed == 9 and not list((settings.home / "downloads").glob("*"))
    found = pl.concat([pl.read_parquet("s3://kept/answers/part-*.parquet").select("row"), pl.read_parquet("s3://kept/answers/refused/*.parquet").select("row")])["row"].to_list()
    assert sorted(found) == list(range(1, 443))


def test_a_place_that_is_another_batchs_is_a_letter(s3, trained, tmp_path, monkeypatch):
    from mlray.serving.batch_in_bucket import place_of
    from mlray.values.errors import DataError
    settings, client = trained[0], s3[0]
    patients().head(20).write_parquet(tmp_path / "rows.parquet")
    answer(settings, tmp_path / "rows.parquet", "s3://kept/taken")
    patients().head(30).write_parquet(tmp_path / "rows.parquet")
    with pytest.raises(DataError, match=r"s3://kept/taken was begun with other rows: rows.parquet has changed"): answer(settings, tmp_path / "rows.parquet", "s3://kept/taken")
    client.put_object(Bucket="kept", Key="thesis/thesis.txt", Body=b"!")
    with pytest.raises(DataError, match="something else than a batch"): answer(settings, tmp_path / "rows.parquet", "s3://kept/thesis")
    client.put_object(Bucket="kept", Key="there.csv", Body=b"!")
    for out, letter in (("s3://kept/there.csv", "there already"), ("s3://kept/thesis/thesis.txt", "is a file")):
        with pytest.raises(DataError, match=letter): answer(settings, tmp_path / "rows.parquet", out)
    for source in ("s3://kept/none.parquet", "s3://kept/none-*.csv"):
        with pytest.raises(DataError, match="There is nothing at"): answer(settings, source, "s3://kept/nothing")
    with pytest.raises(Unavailable, match="s3://nowhere/out could not be used"): answer(settings, tmp_path / "rows.parquet", "s3://nowhere/out")
    # two that begin at once: whatever the order of their steps, at most one goes on, and what stays is one claim or none
    claims = [{"digest": d, "names": ["rows"], "reasons": 0} for d in ("a", "b")]
    one, two = (place_of("s3://kept/race", settings.model_copy(update={"home": tmp_path / n})) for n in ("one", "two"))
    one.begin(claims[0])
    with pytest.raises(DataError, match="being claimed"): two.begin(claims[1])
    assert two.about() == claims[0] and one.begin(claims[0]) is None # the same batch once more is no other
    from mlray.governance.store import Bucket
    write = Bucket.write
    def both(self, path, data): # the other one writes between this one's writing and its look
        write(self, path, data)
        monkeypatch.setattr(Bucket, "write", write)
        with pytest.raises(DataError, match="being claimed"): two.begin(claims[1])
    monkeypatch.setattr(Bucket, "write", both)
    one.begin(claims[0])
    assert two.about() == claims[0]


def test_rows_and_answers_in_buckets_as_files(s3, trained, pieces, tmp_path):
    "Text, Parquet, several of them, and a Delta table that grows while its batch is cut off; one file comes out."
    from mlray.serving.batch_run import in_process
    deltalake = pytest.importorskip("deltalake", reason="pip install 'mlray[delta]'")
    from mlray.values.errors import DataError
    settings, client = trained[0], s3[0]
    def whole(frame: pl.DataFrame, name: str) -> list[bytes]: # the two files that a batch here makes of such rows
        frame.write_parquet(tmp_path / "rows.parquet")
        answer(settings, tmp_path / "rows.parquet", str(tmp_path / f"{name}.csv"))
        return [(tmp_path / f"{name}{e}.csv").read_bytes() for e in ("", ".refused")]
    client.put_object(Bucket="kept", Key="in/rows.csv", Body=patients().write_csv().encode())
    for name, part in (("a", patients()[:200]), ("b", patients()[200:])):
        part.write_parquet(tmp_path / "part.parquet")
        client.put_object(Bucket="kept", Key=f"in/rows-{name}.parquet", Body=(tmp_path / "part.parquet").read_bytes())
        deltalake.write_deltalake("s3://kept/in/events", part.to_arrow(), mode="append", storage_options=dict(os.environ))
    in_order, newest_first = whole(patients(), "in_order"), whole(pl.concat([patients()[200:], patients()[:200]]), "newest_first") # as a Delta table has its files
    for number, (source, expected) in enumerate((("s3://kept/in/rows.csv", in_order), ("s3://kept/in/rows-*.parquet", in_order), ("s3://kept/in/events", newest_first))):
        done = answer(settings, source, f"s3://kept/out/{number}.csv")
        assert (done.answered, done.refused, done.out, done.refused_at) == (439, 3, f"s3://kept/out/{number}.csv", f"s3://kept/out/{number}.refused.csv")
        assert [client.get_object(Bucket="kept", Key=f"out/{number}{e}")["Body"].read() for e in (".csv", ".refused.csv")] == expected, source
    assert keys(client, "out/") == sorted(f"out/{n}{e}" for n in range(3) for e in (".csv", ".refused.csv")), "nothing else stays"
    with pytest.raises(DataError, match="there already"): answer(settings, "s3://kept/in/rows.csv", "s3://kept/out/0.csv")

    def dying(work, pieces):
        yield next(iter(in_process(work, pieces)))
        deltalake.write_deltalake("s3://kept/in/events", patients().to_arrow(), mode="append", storage_options=dict(os.environ))
        raise Unavailable("the power is gone")
    with pytest.raises(Unavailable, match="power"): answer(settings, "s3://kept/in/events", "s3://kept/out/later.parquet", dying)
    done = answer(settings, "s3://kept/in/events", "s3://kept/out/later.parquet")
    assert (done.rows, done.resumed) == (442, 1), "it goes on with the version that it was begun with"
    assert answer(settings, "s3://kept/in/events", "s3://kept/out/newest").rows == 884


GO = """
import sys
from pathlib import Path
from mlray.serving import batch
from mlray.command_line.batch_cli import predict_batch
from mlray.values.settings import Settings
batch._MOST = 500
home = Path(sys.argv[1])
predict_batch("diabetes/1", sys.argv[2], sys.argv[3], *sys.argv[4:], settings=Settings(root=home, home=home / "home", tracking="disabled", object_store_mb=100))
"""


@pytest.mark.chaos
def test_twenty_kills_leave_no_trace_in_a_bucket(s3, trained, tmp_path, capsys):
    import random
    client, settings, draw, kills, began = s3[0], trained[0], random.Random(5), 0, time.monotonic()
    patients(300).write_parquet(tmp_path / "rows.parquet")
    client.upload_file(str(tmp_path / "rows.parquet"), "kept", "kills/rows.parquet")
    go = lambda out: [sys.executable, "-c", GO, str(settings.root), "s3://kept/kills/rows.parquet", out]
    subprocess.run(go(str(tmp_path / "whole")), check=True, capture_output=True)
    noted = lambda: sum(k.endswith(".log") for k in keys(client, "kills/out/_batch/"))
    while kills < 20:
        before = noted()
        process = subprocess.Popen(go("s3://kept/kills/out"), stderr=subprocess.DEVNULL)
        wanted = before + draw.randrange(0, 12) # parts; or none: while it starts
        while process.poll() is None and noted() < wanted: time.sleep(.002)
        time.sleep(draw.random() * (.05 if wanted > before else 2))
        assert process.poll() is None, "it was done before it was killed 20 times"
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
    left = noted()
    subprocess.run(go("s3://kept/kills/out"), check=True, capture_output=True)
    parts = there(client, "kills/out/")
    assert parts == here(tmp_path / "whole")
    rows = pl.concat([pl.read_parquet(data).select("row") for data in parts.values()])["row"].to_list()
    assert sorted(rows) == list(range(1, 300 * 442 + 1))
    with capsys.disabled(): print(f"\n{kills} kills, {left} of {len(here(tmp_path / 'whole'))} files noted before the last try; {len(rows):,} rows out of {300 * 442:,} rows in, the bytes of a folder; {time.monotonic() - began:.0f} s, load {os.getloadavg()[0]:.0f}")


@pytest.mark.chaos
@pytest.mark.ray
@pytest.mark.xdist_group("ray")
def test_workers_of_ray_write_into_a_bucket_and_may_be_killed(s3, trained, tmp_path, capsys):
    "A cluster of its own, in a process of its own: its workers have to know where the bucket is."
    import psutil
    client, killed, noted = s3[0], list[int](), lambda: sum(k.endswith(".log") for k in keys(s3[0], "ray/out/_batch/"))
    patients(300).write_parquet(tmp_path / "rows.parquet")
    client.upload_file(str(tmp_path / "rows.parquet"), "kept", "ray/rows.parquet")
    go = lambda out, on: [sys.executable, "-c", GO, str(trained[0].root), "s3://kept/ray/rows.parquet", out, on]
    with (tmp_path / "err").open("w") as err: process = subprocess.Popen(go("s3://kept/ray/out", "ray"), stdout=subprocess.DEVNULL, stderr=err)
    wanted = 3
    while process.poll() is None:
        if noted() >= wanted:
            for p in [p for p, name in running_below(psutil.Process(process.pid)).items() if name.startswith("ray::MapBatch")][:1]:
                p.kill()
                killed.append(p.pid)
                wanted += 40
        time.sleep(.02)
    assert process.returncode == 0 and len(killed) >= 3, (killed, (tmp_path / "err").read_text()[-3000:])
    subprocess.run(go(str(tmp_path / "here"), "local"), check=True, capture_output=True)
    assert there(client, "ray/out/") == here(tmp_path / "here")
    with capsys.disabled(): print(f"\n{len(killed)} workers killed, {noted()} parts in the bucket: the bytes of one process; load {os.getloadavg()[0]:.0f}")
