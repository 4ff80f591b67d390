"""What is answered later, and what is answered beside: jobs whose workers are killed, shadows that are stuck. Plain processes, no Ray; `-m chaos` runs it in full."""
import json
import os
import re
import signal
import threading
import time
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pytest

from mlray.governance.access import new_key
from mlray.governance.registry import bundle_of, open_registry
from mlray.monitoring.archive import journaled
from mlray.monitoring.beside import beside, pairs
from mlray.monitoring.keeping import open_recorder
from mlray.running.run import train
from mlray.serving.arrow import ARROW, stream_of_answer
from mlray.serving.job_desk import Desk, Tally, Worker, said_of, shelf_of
from mlray.serving.jobs import PART, Job, Shelf, claimed, end, forget_jobs, job_id, keep, put, sweep
from mlray.serving.meters import Meters
from mlray.serving.open_inference import parts_of_answer
from mlray.serving.openapi import example_row
from mlray.serving.plan import Model, Plan, loaded
from mlray.serving.service import Service
from mlray.serving.shadow import Shadow
from mlray.serving.traffic import Traffic
from mlray.serving.wire import Asked, Refused, Reply, at_once, encode
from mlray.shipping.answer import predictions
from mlray.shipping.bundle import predict
from mlray.values.settings import Settings, shipped
from mlray.values.spec import read_spec
from mlray.values.task import Task


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    "Two versions of one model, and rows that keep their contract."
    root = tmp_path_factory.mktemp("jobs")
    settings = Settings(root=root, home=root / "home", tracking="disabled", journal=True, jobs_queued=4)
    registry = open_registry(settings)
    made = [train(read_spec(shipped("configs") / "diabetes.yaml", ["train.epochs=1", f"train.seed={seed}"]), settings).version for seed in (1, 2)]
    models = tuple(Model("diabetes", str(v.number), str(registry.store.path(v.digest)), v.digest) for v in made)
    bundle = bundle_of(registry, made[0])
    draw, row = np.random.default_rng(3), example_row(bundle.contract)
    rows = pl.DataFrame([row]).select(pl.all().repeat_by(40_000).explode()).with_columns(age=pl.Series(draw.integers(18, 100, 40_000)), bmi=pl.Series(draw.uniform(15, 50, 40_000)))
    return settings, models, [bundle_of(registry, v) for v in made], rows


KEYS = [new_key("tester", owner) for owner in ("ada", "bob")]


def served(settings: Settings, models: tuple[Model, ...], traffic: Traffic) -> Service:
    desk = Desk(shelf_of(settings))
    desk.models = {m.digest: m for m in models}
    return Service(loaded(Plan((traffic,), models, ())), tuple(key for key, _ in KEYS), desk=desk)


def ask(service: Service, route: str, body: bytes = b"", who: int = 0, **more) -> Reply:
    return at_once(service.reply(Asked(route, "predict", more.pop("request_id", os.urandom(8).hex()), body, KEYS[who][1], "diabetes" if route in ("submit", "predict") else "", **more)))


def stream(rows: pl.DataFrame) -> bytes: return rows.write_ipc_stream(None).getvalue()


def fresh(two, tmp_path: Path):
    "The same models, another home."
    settings, models, bundles, rows = two
    return settings.model_copy(update={"home": tmp_path}), models, bundles, rows


def work(home: str, settings: Settings) -> None: Worker(settings.model_copy(update={"home": Path(home)})).run()


def killed(settings: Settings, job: str, parts: int) -> None:
    "A worker that is killed with -9 once so many parts of the job are there."
    process = get_context("spawn").Process(target=work, args=(str(settings.home), settings))
    process.start()
    shelf = shelf_of(settings)
    while not shelf.part(job, parts - 1).exists() and process.is_alive(): time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.join()


def after_kills(two, tmp_path: Path, kills: int) -> str:
    settings, models, (bundle, _), rows = fresh(two, tmp_path)
    service = served(settings, models, Traffic("diabetes", "1"))
    reply = ask(service, "submit", stream(rows), kind=ARROW)
    job = json.loads(reply.body)["id"]
    assert reply.status == 202 and reply.headers["Location"] == f"/v1/jobs/{job}"
    for i in range(kills): killed(settings, job, 1 + i * (rows.height // PART) // kills)
    told = json.loads(ask(service, "job", job=job).body)
    Worker(settings).run()
    said = pl.read_ipc_stream(ask(service, "result", job=job, accept=ARROW).body)
    assert said["score"].to_numpy().tobytes() == predict(bundle, rows, rows.height).tobytes()
    kept = journaled(settings.home / "journal", "diabetes").collect()
    assert kept.height == rows.height and kept.select("id", "row").n_unique() == rows.height and kept["caller"].unique().to_list() == [KEYS[0][0].id]
    return f"{kills} workers killed, the last at {told['done']} of {rows.height} rows: every row answered to the bit, and journaled once"


def test_a_person_is_forgotten_in_jobs_that_are_over(tmp_path):
    "Their rows are gone by then, and so a column finds nobody in them; whom a job was about is still known."
    shelf, rows = Shelf(tmp_path), pl.DataFrame({"age": [41, 42]})
    for key in ("waits", "over"): put(shelf, Job(job_id("ada", key), "ada", "c", 2, Traffic("diabetes", "1"), (), key, 0.0, subject="p-7"), rows)
    keep(shelf, job_id("ada", "over"), 0, b"answers")
    end(shelf, job_id("ada", "over"), "done")
    assert forget_jobs(shelf, "42", "age") == 1 and shelf.get(job_id("ada", "waits")) is None and forget_jobs(shelf, "p-7") == 1 and shelf.get(job_id("ada", "over")) is None


def test_one_caller_takes_no_more_than_a_share_and_goes_not_before_all_others(tmp_path):
    shelf = Shelf(tmp_path, most=5, each=3)
    def submit(owner: str, key: str) -> str: return put(shelf, Job(job_id(owner, key), owner, "c", 1, Traffic("diabetes", "1"), (), key, 0.0), pl.DataFrame({"age": [1]})).id
    mine = [submit("ada", k) for k in "abc"]
    with pytest.raises(Refused, match="3 jobs of yours") as full: submit("ada", "d")
    assert (full.value.status, full.value.error, full.value.headers) == (429, "too_many_jobs", {"Retry-After": "5"}) and submit("ada", "a") == mine[0], "what is there is told of again"
    theirs = [submit("bob", k) for k in "ab"]
    assert shelf.waiting() == [mine[0], theirs[0], mine[1], theirs[1], mine[2]]
    with pytest.raises(Refused, match="As many jobs as may wait"): submit("eve", "a")
    end(shelf, mine[0], "cancelled")
    assert shelf.waiting() == [mine[1], theirs[0], mine[2], theirs[1]] and submit("ada", "d") in shelf.waiting()


def test_a_job_that_goes_while_it_is_listed_stops_nobody(tmp_path, monkeypatch):
    "Another process deletes; the thread that sees to the work looks every two seconds, and would die of it."
    shelf = Shelf(tmp_path)
    job = put(shelf, Job(job_id("ada", "k"), "ada", "c", 1, Traffic("diabetes", "1"), (), "k", 0.0), pl.DataFrame({"age": [1]}))
    monkeypatch.setattr(Path, "glob", lambda self, pattern: iter([tmp_path / ("0" * 32) / "job.json", tmp_path / job.id / "job.json"]))
    assert shelf.waiting() == [job.id]


def test_meters_tell_of_jobs_and_their_rows(two, tmp_path):
    "Waiting, under way, done and cancelled, at each moment; what is swept is not told of any more."
    settings, models, _, rows = fresh(two, tmp_path)
    service = served(settings, models, Traffic("diabetes", "1"))
    shelf = service.desk.shelf
    service.meters.kept.register(Tally(shelf, "r"))
    def told() -> dict[tuple[str, str], float]:
        lines = [re.fullmatch(r'mlray_(job\w*)\{replica="r",state="(\w+)"\} (\S+)', line) for line in ask(service, "metrics").body.decode().splitlines()]
        return {(m[1], m[2]): float(m[3]) for m in lines if m and float(m[3])}
    assert told() == {}
    job, other = (json.loads(ask(service, "submit", stream(rows[:n]), kind=ARROW).body)["id"] for n in (2 * PART + 5, 7))
    assert told() == {("jobs", "queued"): 2, ("job_rows", "queued"): 2 * PART + 12}
    ask(service, "cancel", job=other)
    with claimed(shelf, job) as mine:
        assert mine
        keep(shelf, job, 0, b"answers")
        assert told() == {("jobs", "running"): 1, ("job_rows", "running"): 2 * PART + 5, ("job_answered_rows", "running"): PART, ("jobs", "cancelled"): 1, ("job_rows", "cancelled"): 7}
    shelf.part(job, 0).unlink()
    Worker(settings).run()
    assert told() == {("jobs", "done"): 1, ("job_rows", "done"): 2 * PART + 5, ("job_answered_rows", "done"): 2 * PART + 5, ("jobs", "cancelled"): 1, ("job_rows", "cancelled"): 7}
    sweep(replace(shelf, now=lambda: time.time() + 2 * settings.jobs_kept_s))
    assert told() == {}


def test_a_worker_that_dies_is_followed_by_another(two, tmp_path): after_kills(two, tmp_path, 1)


@pytest.mark.chaos
def test_workers_that_die_are_followed_by_others(two, tmp_path): print(after_kills(two, tmp_path, 8))


def test_a_job_is_its_owners_and_there_are_only_so_many(two, tmp_path):
    settings, models, _, rows = fresh(two, tmp_path)
    service, body = served(settings, models, Traffic("diabetes", "1")), stream(rows.head(10))
    job = json.loads(ask(service, "submit", body, kind=ARROW, once="a").body)["id"]
    assert json.loads(ask(service, "submit", body, kind=ARROW, once="a").body)["id"] == job and json.loads(ask(service, "submit", body, 1, kind=ARROW, once="a").body)["id"] != job
    assert ask(service, "submit", stream(rows.head(11)), kind=ARROW, once="a").status == 409
    assert [ask(service, route, who=1, job=job).status for route in ("job", "result", "cancel")] == [404] * 3
    assert ask(service, "result", job=job).status == 409 and json.loads(ask(service, "job", job=job).body)["state"] == "queued"
    for _ in range(2): assert ask(service, "submit", body, kind=ARROW).status == 202
    full = ask(service, "submit", body, kind=ARROW)
    assert full.status == 429 and full.headers["Retry-After"] == "5"
    assert json.loads(ask(service, "cancel", job=job).body)["state"] == "cancelled" and ask(service, "submit", body, kind=ARROW).status == 202
    assert ask(service, "submit", stream(rows.head(2).with_columns(pl.lit(200, pl.Int64).alias("age"))), kind=ARROW).status == 422
    assert not (settings.home / "jobs" / job / "rows.arrow").exists() # nobody will ask for these
    assert sweep(replace(service.desk.shelf, now=lambda: time.time() + settings.jobs_kept_s + 1)) == 1 and ask(service, "job", job=job).status == 404


def test_the_version_of_a_job_is_decided_when_it_is_handed_in(two, tmp_path):
    settings, models, bundles, rows = fresh(two, tmp_path)
    canary, some = served(settings, models, Traffic("diabetes", "1", "2", 1.0)), rows.head(5)
    by = {how: json.loads(ask(canary, "submit", stream(some), kind=ARROW, **more).body)["id"] for how, more in (("canary", {}), ("override", {"wanted": "1"}))}
    Worker(settings).run()
    for how, version in (("canary", 1), ("override", 0)):
        said = json.loads(ask(canary, "result", job=by[how]).body)
        assert (said["arm"], said["version"], said["fallback"]) == (how, str(version + 1), False) and [p["score"] for p in said["predictions"]] == predict(bundles[version], some, 5).tolist()


def test_a_job_that_cannot_be_answered_says_so(two, tmp_path):
    settings, models, _, rows = fresh(two, tmp_path)
    service = served(settings, models, Traffic("diabetes", "1"))
    job = json.loads(ask(service, "submit", stream(rows.head(3)), kind=ARROW).body)["id"]
    path = settings.home / "jobs" / job / "job.json"
    kept = json.loads(path.read_bytes())
    path.write_text(json.dumps(kept | {"models": [m | {"path": "/nowhere"} for m in kept["models"]]}))
    Worker(settings).run()
    told = json.loads(ask(service, "job", job=job).body)
    assert (told["state"], told["error"]) == ("failed", "no_model") and json.loads(ask(service, "result", job=job).body)["error"] == "no_model"


@pytest.mark.parametrize(("kind", "names", "shape"), [("binary", ("no", "yes"), ()), ("multiclass", ("a", "b", "c.d"), (3,)), ("multilabel", ("a", "b"), (2,)), ("regression", (), ()), ("quantile", ("0.1", "0.5", "0.9"), (3,))])
def test_a_result_in_json_says_what_a_request_would(kind, names, shape):
    task, scores = Task(kind, ("y",), names, quantiles=(0.1, 0.5, 0.9) if kind == "quantile" else ()), np.random.default_rng(1).random((50, *shape), np.float32)
    decisions = scores >= 0.5 if kind in ("binary", "multilabel") else scores.argmax(1) if kind == "multiclass" else scores if kind == "regression" else scores[:, 1]
    table = pa.ipc.open_stream(stream_of_answer(task, parts_of_answer(task, scores, decisions), {})).read_all()
    assert said_of(table) == json.loads(encode(predictions(task, scores, decisions)))


# A shadow's answers.

def listening(two, home: Path, score=None) -> tuple[Service, Shadow]:
    settings, models, _, _ = two
    settings = settings.model_copy(update={"home": home})
    recorder, meters = open_recorder(settings), Meters()
    shadow = Shadow(meters, recorder=recorder, **({"score": score} if score else {}))
    service = served(settings, models, Traffic("diabetes", "1", shadow="2"))
    return replace(service, recorder=recorder, listen=shadow, meters=meters), shadow


def test_a_shadows_answers_stand_beside_those_that_were_given(two, tmp_path):
    _, _, bundles, rows = two
    service, shadow = listening(two, tmp_path)
    for i in range(20): assert ask(service, "predict", encode({"instances": rows[i * 5:i * 5 + 5].to_dicts()}), request_id=f"r-{i:02}").status == 200
    shadow.end()
    service.recorder.journal.close()
    found = pairs(tmp_path / "journal", "diabetes", "2")
    asked = rows.head(100)
    assert found["answer:score"].to_list() == predict(bundles[0], asked, 100).tolist() and found["answer:score:shadow"].to_list() == predict(bundles[1], asked, 100).tolist()
    assert set(found["version:shadow"]) == {"2"} and beside(bundles[1], found).rows == 100
    one = journaled(tmp_path / "journal", "diabetes", "2").collect()
    assert one["arm"].unique().to_list() == ["shadow"] and one["caller"].unique().to_list() == [KEYS[0][0].id]


def test_a_shadow_that_fails_is_journaled_and_not_felt(two, tmp_path):
    service, shadow = listening(two, tmp_path, lambda *asked: 1 / 0)
    assert ask(service, "predict", encode({"instances": two[3].head(1).to_dicts()})).status == 200
    shadow.end()
    assert service.meters.of("failures", "diabetes", "2", "shadow")._value.get() == 1


@pytest.mark.chaos
def test_a_stuck_shadow_adds_less_than_a_millisecond(two, tmp_path):
    "The same requests, in turns, of a service without a shadow and of one whose shadow never comes back."
    stuck = threading.Event()
    service, _ = listening(two, tmp_path / "stuck", lambda *asked: stuck.wait())
    plain = replace(listening(two, tmp_path / "plain")[0], models=loaded(Plan((Traffic("diabetes", "1"),), two[1], ())))
    body, took = encode({"instances": two[3].head(1).to_dicts()}), {"plain": [], "stuck": []}
    for _ in range(100):
        for name, one in (("plain", plain), ("stuck", service)):
            for _ in range(100):
                start = time.perf_counter()
                assert ask(one, "predict", body).status == 200
                took[name].append(time.perf_counter() - start)
    p50, p99 = ({name: float(np.percentile(times, q)) * 1000 for name, times in took.items()} for q in (50, 99))
    dropped = service.meters.of("dropped", "diabetes")._value.get()
    print(f"p50 {p50['plain']:.3f} → {p50['stuck']:.3f} ms, p99 {p99['plain']:.3f} → {p99['stuck']:.3f} ms over 2 × {len(took['plain'])} requests; {dropped:.0f} dropped; load {os.getloadavg()[0]:.1f}")
    stuck.set()
    assert p99["stuck"] - p99["plain"] < 1 and dropped > 9000
