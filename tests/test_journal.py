"""What was answered is on the disk: through kills, full disks, cut files and many hands; and nothing is there that should not be."""
import asyncio
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import polars as pl
import pytest
from hypothesis import given, settings as given_settings, strategies as st

from mlray.governance.access import new_key
from mlray.governance.registry import bundle_of, open_registry
from mlray.learning.contract import Contract
from mlray.learning.profile import Profile
from mlray.monitoring.archive import cloud_events, entry_rows, erase, journaled, purge, put_away
from mlray.monitoring.feedback import feedback_of, newest, truth
from mlray.monitoring.journal import Entry, Feedback, Journal, JournalFull, ended, line_of, read, records, segments, whole
from mlray.monitoring.keeping import Keys, kept, open_recorder, plan, pseudonym, read_keys
from mlray.serving.served import Served
from mlray.serving.service import Service
from mlray.shipping.bundle import predict
from mlray.values.column import Column
from mlray.values.errors import ServingError, SettingsError

DAY = 86400 * 10**9


def entry(i, time_ns=None, rows=1, **more):
    return Entry(f"r-{i}", time.time_ns() if time_ns is None else time_ns, "adult", "1", "d", rows=rows, columns={"hours": list(range(rows))}, answers={"label": ["yes"] * rows, "score": [0.5] * rows}, **more)


# ---- lines ----------------------------------------------------------------------------------------------------------

texts = st.text(max_size=20)
entries = st.builds(Entry, texts, st.integers(0, 2**62), texts, texts, columns=st.dictionaries(texts, st.lists(st.one_of(st.none(), texts, st.floats(allow_nan=False, allow_infinity=False)), max_size=3), max_size=3))


@given(st.lists(entries, max_size=5), st.data())
@given_settings(max_examples=60, deadline=None)
def test_a_cut_takes_the_last_record_and_no_other(many, data):
    lines = [line_of(e) for e in many]
    written = b"".join(lines)
    cut = data.draw(st.integers(0, len(written)))
    kept_, torn = whole(written[:cut])
    complete = next((i for i in range(len(lines), -1, -1) if len(b"".join(lines[:i])) <= cut + 1), 0) # a record whose last newline alone is missing is whole
    assert len(kept_) in (complete, complete - 1) and torn <= 1
    assert [line_of(e)[9:-1] for e in many[:len(kept_)]] == kept_


@given(st.lists(entries, min_size=1, max_size=4), st.integers(0, 10**6), st.integers(1, 255))
@given_settings(max_examples=60, deadline=None)
def test_a_flipped_byte_is_never_believed(many, at, mask):
    lines = [line_of(e) for e in many]
    written = bytearray(b"".join(lines))
    written[at % len(written)] ^= mask
    assert set(whole(bytes(written))[0]) <= {line[9:-1] for line in lines}


# ---- kills ----------------------------------------------------------------------------------------------------------

WRITER = """
import sys, time
from pathlib import Path
from mlray.monitoring.journal import Entry, Journal
journal, name = Journal(Path(sys.argv[1]), most_bytes=20_000), sys.argv[2]
for i in range(10**9):
    journal.write(Entry(f"{name}-{i}", time.time_ns(), "adult", "1", "d", rows=1, columns={"hours": [i]}, answers={"label": ["yes"]}))
    sys.stdout.write(f"{name}-{i}\\n")
    sys.stdout.flush()
"""


def killed_writer(folder: Path, name: str, after: int) -> set[str]:
    "Ids that a process said it had written, before it was killed in the middle of it."
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(folder), name], stdout=subprocess.PIPE, text=True)
    said = [process.stdout.readline() for _ in range(after)]
    process.send_signal(signal.SIGKILL)
    said += process.stdout.readlines()
    assert process.wait() == -signal.SIGKILL and all(said[:after]), "it was to be killed while it wrote"
    return {line.strip() for line in said if line.endswith("\n")}


@pytest.mark.parametrize("times", [3, pytest.param(200, marks=pytest.mark.chaos)])
def test_what_was_acknowledged_survives_kill_9(tmp_path, times):
    acknowledged, rng = set(), random.Random(7)
    for i in range(times): acknowledged |= killed_writer(tmp_path / "segments", f"w{i}", rng.randrange(1, 400))
    found = [e.id for e in records(tmp_path / "segments", Entry)]
    torn = sum(read(s, Entry)[1] for s in segments(tmp_path / "segments"))
    print(f"\n{times} kills: {len(acknowledged)} acknowledged, {len(acknowledged - set(found))} lost, {len(found) - len(set(found))} twice, {torn} torn")
    assert not acknowledged - set(found) and len(found) == len(set(found)) and torn <= times
    assert put_away(tmp_path).rows == len(found) and {*journaled(tmp_path).collect()["id"]} == set(found)


PUTTING = """
import os, signal, sys
from pathlib import Path
from mlray.monitoring.archive import put_away
if "halfway" in sys.argv: sys.addaudithook(lambda event, _: event == "os.rename" and os.kill(os.getpid(), signal.SIGSTOP))
print("start", flush=True)
put_away(Path(sys.argv[1]))
"""


@pytest.mark.parametrize("times", [3, pytest.param(100, marks=pytest.mark.chaos)])
def test_putting_away_may_be_killed_anywhere(tmp_path, times):
    journal, rng, written, unfinished = Journal(tmp_path / "segments", most_bytes=3_000), random.Random(3), 0, 0
    for turn in range(times):
        for _ in range(120):
            journal.write(entry(written))
            written += 1
        journal.rotate()
        process = subprocess.Popen([sys.executable, "-c", PUTTING, str(tmp_path), *["halfway"] * (turn == 0)], stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "start\n"
        if turn == 0: os.waitpid(process.pid, os.WUNTRACED) # one file is written, and has no name yet
        else: time.sleep(rng.random() * 0.2) # anywhere in its work; what follows must hold wherever
        process.kill()
        unfinished += process.wait() != 0
        ids = journaled(tmp_path).collect()["id"].to_list()
        assert len(ids) == len(set(ids)) == written
    put_away(tmp_path)
    found = journaled(tmp_path).collect()
    print(f"\n{unfinished} of {times} killed in the middle; {found['id'].n_unique()} of {written} there, {found.height - found['id'].n_unique()} twice")
    assert unfinished and found.height == found["id"].n_unique() == written and not segments(tmp_path / "segments")
    journal.close()


def test_a_segment_that_is_written_is_left_alone(tmp_path):
    journal = Journal(tmp_path / "segments")
    journal.write(entry(0))
    assert put_away(tmp_path).open == 1 and not ended(segments(tmp_path / "segments")[0])
    journal.write(entry(1))
    assert journaled(tmp_path).collect()["id"].to_list() == ["r-0", "r-1"]
    journal.close()
    assert put_away(tmp_path).rows == 2


# ---- a full disk ----------------------------------------------------------------------------------------------------

FULL = """
import resource, sys, time
from pathlib import Path
from mlray.monitoring.journal import Entry, Journal, JournalFull
resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, 1 << 40))
journal, refused, said = Journal(Path(sys.argv[1]), full=sys.argv[2], sync_s=0.05), 0, []
for i in range(300):
    if i == 200: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 40, 1 << 40)) # room again
    try:
        before = journal.dropped
        journal.write(Entry(f"r-{i}", time.time_ns(), "adult"))
        if journal.dropped == before: said.append(f"r-{i}")
    except JournalFull: refused += 1
journal.close()
print(refused, journal.dropped, *said)
"""


def test_whoever_could_record_nothing_says_so_until_there_is_room(tmp_path):
    "By what HAProxy asks a replica; what was tried meanwhile is no record."
    journal, record = Journal[Entry](tmp_path, sync_s=0), Entry("a", 1, "wine", "1", "d" * 8, 200, 0.1)
    journal.write(record)
    assert journal.able()
    file, full = os.dup(journal._segment.file), os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, journal._segment.file)
    with pytest.raises(JournalFull): journal.write(record)
    assert not journal.able() and not journal.able()
    os.dup2(file, journal._segment.file)
    assert journal.able()
    journal.write(record)
    assert journal.able()
    journal.close()
    found, torn = read(next(tmp_path.glob("*.log")), Entry)
    assert [e.id for e in found] == ["a", "a"] and found[1].lost == 1 and torn == 0
    os.close(file), os.close(full)


def test_room_for_a_byte_is_none_for_a_record(tmp_path):
    "A full disk has the rest of a block left: whoever tries one byte there would call a journal able that refuses every answer."
    journal, record, before = Journal[Entry](tmp_path, sync_s=0), Entry("a", 1, "wine", "1", "d" * 8, 200, 0.1), resource.getrlimit(resource.RLIMIT_FSIZE)
    journal.write(record)
    (path,) = tmp_path.glob("*.log")
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 20, before[1]))
    try:
        with pytest.raises(JournalFull): journal.write(record)
        size = path.stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, before[1]))
        assert not journal.able() and path.stat().st_size == size
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert journal.able() and path.stat().st_size == size, "what was tried is taken back"
    journal.write(record)
    journal.close()
    found, torn = read(path, Entry)
    assert [(e.id, e.lost) for e in found] == [("a", 0), ("a", 1)] and torn == 1


@pytest.mark.parametrize("policy", ["refuse", "answer-without"])
def test_a_full_disk_is_told_of_exactly(tmp_path, policy):
    done = subprocess.run([sys.executable, "-c", FULL, str(tmp_path), policy], capture_output=True, text=True, check=True).stdout.split()
    refused, dropped, said = int(done[0]), int(done[1]), done[2:]
    found = list(records(tmp_path, Entry))
    assert dropped > 50 and len(said) + dropped == 300 and refused == (dropped if policy == "refuse" else 0)
    assert [e.id for e in found] == said and "r-299" in said and sum(e.lost for e in found) == dropped


# ---- what may be kept -----------------------------------------------------------------------------------------------

PERSON = Contract({"name": Column(type="text", personal=True), "account": Column(type="category", personal=True, journal="pseudonym"), "town": Column(type="category", personal=True),
                   "age": Column(type="integer", personal=True, bands=(30, 50), journal="bucket"), "hours": Column(type="number")})


def test_planted_personal_values_are_nowhere(tmp_path):
    keys = Keys({"1": b"secret of the first epoch", "2": b"secret of the second"})
    wanted, journal, asked = plan(PERSON, Profile(0, {}), keys), Journal(tmp_path / "segments", most_bytes=200_000), 2000
    for i in range(asked):
        row = {"name": [f"CANARY-name-{i}"], "account": [f"CANARY-account-{i % 50}"], "town": [f"CANARY-town-{i}"], "age": [31], "hours": [40.0]}
        journal.write(Entry(f"r-{i}", time.time_ns(), "loans", "1", "d", rows=1, columns=kept(wanted, row), answers={"label": ["yes"]}, subject=pseudonym(keys, "subject", f"CANARY-{i}")))
    journal.close()
    before = b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    put_away(tmp_path)
    rows = journaled(tmp_path).collect()
    after = b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()) + rows.write_csv().encode()
    assert len(before) > 100_000 and b"CANARY" not in before and b"CANARY" not in after and b"secret of" not in before + after
    assert rows["column:age"].unique().to_list() == ["30 to 50"] and rows["column:account"].n_unique() == 50
    mark = pseudonym(keys, "account", "CANARY-account-7")
    assert erase(tmp_path, frozenset({mark})) == asked // 50
    assert mark.encode() not in b"".join(p.read_bytes() for p in tmp_path.rglob("*.parquet")) and mark not in journaled(tmp_path).collect().write_csv()


def test_keys_that_others_can_read_are_refused(settings):
    read_keys(settings, {})
    path = settings.home / "journal" / "keys.json"
    assert path.stat().st_mode & 0o777 == 0o600
    path.chmod(0o644)
    with pytest.raises(SettingsError, match="can be read by others"): read_keys(settings, {})
    assert read_keys(settings, {"MLRAY_JOURNAL_KEYS": "7:00ff"}).current == "7"
    with pytest.raises(SettingsError, match="holds no keys"): read_keys(settings, {"MLRAY_JOURNAL_KEYS": "7:zz"})


def test_keys_and_marks_are_on_the_disk_before_they_count(settings, monkeypatch):
    "What is synced has its bytes by then; and whoever reads while somebody is erased finds the marks of before, or all."
    sizes, real = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (sizes.append(os.fstat(file).st_size), real(file))[1])
    read_keys(settings, {})
    folder = settings.home / "journal"
    journal = Journal(folder / "segments", sync_s=0)
    journal.write(entry(7)) # marks are needed while a segment from before is written
    for mark in ("r-1", "r-2"): erase(folder, frozenset({mark}))
    assert sizes and all(sizes), "an empty file was synced"
    seen, real_replace = [], Path.replace
    monkeypatch.setattr(Path, "replace", lambda self, to: (seen.append(len(json.loads((folder / "erased.json").read_text()))), real_replace(self, to))[1])
    erase(folder, frozenset({"r-3"}))
    assert set(seen) == {2} and len(json.loads((folder / "erased.json").read_text())) == 3
    journal.close()


def test_rows_are_kept_for_as_long_as_somebody_wants(tmp_path):
    now = datetime(2026, 5, 20, 12, tzinfo=UTC)
    journal = Journal(tmp_path / "segments")
    for age in (0, 1, 30, 89, 91, 400): journal.write(entry(age, int((now - timedelta(days=age)).timestamp() * 1e9)))
    journal.close()
    assert purge(tmp_path, timedelta(days=90), now) == 2
    assert sorted(journaled(tmp_path).collect()["id"]) == ["r-0", "r-1", "r-30", "r-89"]
    assert journaled(tmp_path, "adult", "1", now - timedelta(days=40), now - timedelta(days=1)).collect()["id"].to_list() == ["r-30"]


# ---- exactly --------------------------------------------------------------------------------------------------------

def test_asked_again_is_answered_once(tmp_path):
    one, other = Journal(tmp_path / "segments"), Journal(tmp_path / "segments")
    same = entry(1, rows=3)
    for journal in (one, other): journal.write(same)
    one.close()
    put_away(tmp_path)
    assert journaled(tmp_path).collect().select("id", "row").rows() == [("r-1", 0), ("r-1", 1), ("r-1", 2)]
    other.close()


@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from(["a", "b"])), max_size=6))
@given_settings(max_examples=30, deadline=None)
def test_rows_of_any_requests_are_as_many_as_were_asked(sizes):
    lines = [line_of(Entry(str(i), i, m, "1", m, 200 if n else 422, rows=n, columns={m: [None] * n}, answers={"label": ["x"] * n} if n else {}))[9:-1] for i, (n, m) in enumerate(sizes)]
    frame = entry_rows(lines)
    assert frame.height == sum(max(n, 1) for n, _ in sizes) and frame.filter(pl.col("row").is_null()).height == sum(n == 0 for n, _ in sizes)
    assert sorted(frame.filter(pl.col("row").is_not_null()).select("id", "row").rows()) == sorted((str(i), r) for i, (n, _) in enumerate(sizes) for r in range(n))


def test_events_come_in_pairs(tmp_path):
    events = list(cloud_events(entry_rows([line_of(entry(i, rows=2))[9:-1] for i in range(3)])))
    assert [e["type"].rpartition(".")[2] for e in events] == ["request", "response"] * 3 and all({"specversion", "id", "source", "type"} <= set(e) for e in events)
    assert events[0]["data"]["instances"] == [{"hours": 0}, {"hours": 1}] and json.dumps(events)


@pytest.mark.parametrize("requests", [600, pytest.param(100_000, marks=pytest.mark.chaos)])
def test_answered_is_journaled(trained, tmp_path, requests):
    settings = trained[0].model_copy(update={"home": tmp_path, "journal": True, "journal_sync_s": 1.0})
    bundle, (key, secret), (_, stranger), rng = bundle_of(open_registry(trained[0]), trained[1].version), new_key(), new_key(), random.Random(5)
    recorder = open_recorder(settings)
    service, rows = Service({"diabetes": Served("1", bundle)}, (key,), recorder), trained[1].rows.parts.test.select(bundle.contract.features).to_dicts()
    told = {}
    for i in range(requests):
        body = json.dumps({"instances": rng.choices(rows, k=rng.choice([1, 1, 1, 3]))}).encode()
        if i % 10 == 3: body = rng.choice([b"{", b"[]", body.replace(b"bmi", b"BMI"), b'{"instances": []}'])
        reply = service.answer("diabetes", body, secret if i % 50 else stranger, f"r-{i}")
        if reply.status != 401: told[f"r-{i}"] = (reply.status, [p["label"] for p in json.loads(reply.body).get("predictions", ())])
    recorder.journal.close()
    found = list(records(tmp_path / "journal/segments", Entry))
    print(f"\n{requests} requests: {len(told)} told by a known caller, {len(found)} journaled, {len({s for s, _ in told.values()})} kinds of status")
    assert {e.id: (e.status, list(e.answers.get("label", ()))) for e in found} == told and len(found) == len(told) and {s for s, _ in told.values()} == {200, 400, 422}


def test_no_record_no_answer(trained, tmp_path):
    settings = trained[0].model_copy(update={"home": tmp_path, "journal": True})
    bundle, (key, secret) = bundle_of(open_registry(trained[0]), trained[1].version), new_key()
    recorder = open_recorder(settings)
    service, row = Service({"diabetes": Served("1", bundle)}, (key,), recorder), trained[1].rows.parts.test.select(bundle.contract.features).to_dicts()[0]
    ask = lambda: service.answer("diabetes", json.dumps({"instances": [row]}).encode(), secret, "r-1")
    assert ask().status == 200
    good = os.dup(recorder.journal._segment.file)
    os.dup2(os.open("/dev/full", os.O_WRONLY), recorder.journal._segment.file)
    full = ask()
    os.dup2(good, recorder.journal._segment.file)
    assert full.status == 503 and b"not_recorded" in full.body and full.headers["Retry-After"] and ask().status == 200
    recorder.journal.close()


class Handle:
    "A predictor as a gateway holds one, but in this process."
    def __init__(self, predictor): self.predictor = predictor
    @property
    def score(self): return self
    def remote(self, *sent): return asyncio.ensure_future(self.predictor.score(*sent))


@pytest.mark.parametrize("placement", ["together", "apart"])
def test_asked_together_is_answered_as_alone(trained, tmp_path, placement):
    "Through the gateway, as a server of HTTP asks it: rows that are scored together have their answers to the bit, under their own ids; who goes away takes nobody along; all that was told is journaled."
    from mlray.engines.front_on_ray import Front
    from mlray.engines.serve_on_ray import Gateway, Predictor
    from mlray.governance.registry import add_key
    from mlray.serving.asgi import send_reply
    from mlray.serving.plan import plan_of
    registry, (key, secret), draw = open_registry(trained[0]), new_key(), random.Random(5)
    add_key(registry, key)
    settings = trained[0].model_copy(update={"home": tmp_path, "journal": True})
    async def behind(scope, receive, send): # where Serve stands: who waits for a predictor is counted there
        assert placement == "apart", "this could have been answered in front"
        await send_reply(*await gateway.answer(scope, receive), send)
    front = Front(behind)
    plan = plan_of(registry, ["diabetes/1"])
    gateway = front.gateway = Gateway(plan, (), settings, {"diabetes": Handle(Predictor(plan.models, settings))} if placement == "apart" else None)
    bundle, rows = bundle_of(registry, trained[1].version), trained[1].rows.parts.test.select(trained[1].rows.contract.features).to_dicts()
    sent = {f"r-{i}": draw.choices(rows, k=draw.choice([1, 1, 1, 3])) for i in range(400)}

    async def ask(name: str, body: bytes) -> tuple[int, dict]:
        told, pieces = [], [{"type": "http.request", "body": body[:9], "more_body": True}, {"type": "http.request", "body": body[9:]}]
        async def receive():
            await asyncio.sleep(0)
            return pieces.pop(0)
        async def send(message): told.append(message)
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body)), (b"x-api-key", secret.encode()), (b"x-request-id", name.encode())]
        await front({"type": "http", "method": "POST", "path": "/v1/models/diabetes:predict", "query_string": b"", "headers": headers}, receive, send)
        assert (b"x-request-id", name.encode()) in told[0]["headers"]
        return told[0]["status"], json.loads(told[1]["body"])

    async def all_of_them() -> dict[str, tuple[int, dict]]:
        asked = {name: asyncio.create_task(ask(name, json.dumps({"instances": [{**r, "bmi": -1} if i % 10 == 3 else r for r in rows]}).encode())) for i, (name, rows) in enumerate(sent.items())}
        for _ in range(4): await asyncio.sleep(0)
        gone = {name for name, task in list(asked.items())[::17] if task.cancel()}
        await asyncio.wait(asked.values())
        return {name: task.result() for name, task in asked.items() if name not in gone}

    told = asyncio.run(all_of_them())
    for name, (status, said) in told.items():
        assert status == (422 if int(name[2:]) % 10 == 3 else 200) and said["request_id"] == name
        if status == 200: assert [p["score"] for p in said["predictions"]] == [float(predict(bundle, {n: [r[n]] for n in r}, 1)[0]) for r in sent[name]]
    gateway.service.recorder.journal.close()
    found = {e.id: e for e in records(tmp_path / "journal/segments", Entry)}
    assert set(told) <= set(found) and all(list(found[n].answers.get("score", ())) == [p["score"] for p in said.get("predictions", ())] for n, (_, said) in told.items())
    batches, of = (next(float(line.rsplit(" ", 1)[1]) for line in gateway.meters.text().decode().splitlines() if line.startswith(f"mlray_batch_size_requests_{word}")) for word in ("count", "sum"))
    print(f"\n{len(told)} told, {len(sent) - len(told)} went away, {of:.0f} scored in {batches:.0f} batches")
    assert batches < of / 4


# ---- feedback -------------------------------------------------------------------------------------------------------

SAID = [Feedback("a", 1, text="no"), Feedback("a", 3, text="yes"), Feedback("a", 2, kind="correction", text="no"), Feedback("b", 1, text="yes", source="bank"), Feedback("b", 1, text="no", source="court"), Feedback("b", 9, kind="click", number=1.0)]


@given(st.permutations(SAID * 3))
@given_settings(max_examples=40, deadline=None)
def test_order_and_repetition_of_feedback_change_nothing(said):
    frame = lambda many: pl.DataFrame([{f: getattr(x, f) for f in x.__struct_fields__} for x in many], schema={"id": pl.String, "time": pl.Int64, "row": pl.Int64, "kind": pl.String, "text": pl.String, "number": pl.Float64, "source": pl.String, "key": pl.String})
    assert truth(frame(said)).equals(truth(frame(SAID))) and newest(frame(said)).equals(newest(frame(SAID)))
    assert truth(frame(said)).select("id", "text").rows() == [("a", "no"), ("b", "no")]


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff", b'{"feedback": []}', b'{"feedback": [{"request_id": "a"}]}', b'{"feedback": [{"request_id": "a", "value": null}]}', b'{"feedback": [{"request_id": "a", "value": 1e999}]}', b'{"feedback": [{"request_id": "a", "value": 1, "row": -1}]}',
                                  b'{"feedback": [{"request_id": "SECRET \\n", "value": 1}]}', b'{"feedback": [{"request_id": "a", "value": "' + b"x" * 2000 + b'"}]}', b"[" * 100_000])
def test_feedback_that_is_none(body):
    with pytest.raises(ServingError) as error: feedback_of(body)
    assert "SECRET" not in str(error.value) and "xxx" not in str(error.value)


@pytest.mark.ray
@pytest.mark.chaos
def test_through_http(trained):
    from mlray.engines.cluster_on_ray import cluster
    from mlray.engines.serve_on_ray import deploy
    from mlray.governance.registry import add_key
    from mlray.serving.plan import plan_of
    from tests.conftest import free_port
    settings, run = trained[0].model_copy(update={"journal": True, "port": free_port()}), trained[1]
    registry = open_registry(settings)
    both = [new_key(role) for role in ("predictor", "feedbacker")]
    for key, _ in both: add_key(registry, key)
    row = run.rows.parts.test.select(run.rows.contract.features).to_dicts()[0]
    with cluster(settings), httpx.Client(base_url=settings.url, timeout=30) as client:
        deploy(plan_of(registry, ["diabetes/1"]), ["diabetes/1"], settings)
        headers = [{"authorization": f"Bearer {text}"} for _, text in both]
        ids = [client.post("/v1/models/diabetes:predict", json={"instances": [row]}, headers=headers[0]).json()["request_id"] for _ in range(50)]
        said = [client.post("/v1/feedback", json={"feedback": [{"request_id": i, "value": 150}]}, headers=h).status_code for i in ids[:2] for h in headers]
    assert said == [403, 202, 403, 202]
    put_away(settings.home / "journal")
    assert set(ids) == {*journaled(settings.home / "journal").collect()["id"]} and sorted(journaled(settings.home / "journal/feedback").collect()["id"]) == sorted(ids[:2])
