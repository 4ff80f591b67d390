"""Whoever dies while the registry writes, nothing that was acknowledged is lost: kill -9 at named points and at random instants, a full disk, a clock that is off. `-m chaos` runs it in full."""
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from importlib import import_module
from multiprocessing import get_context
from multiprocessing.connection import Connection
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

import mlray.governance.garbage
from mlray.governance.audit import Entry
from mlray.governance.database import HEAD
from mlray.governance.garbage import collect_garbage
from mlray.governance.ledger import audit
from mlray.governance.registry import Policy, Registry, Version, add_evidence, bundle_of, evidence, generation, promote, register, remove, retire, rollback, versions
from mlray.governance.store import Store
from mlray.shipping.bundle import load_bundle
from mlray.values.errors import MlrayError, RegistryError, Unavailable
from tests import buckets
from tests.postgres import postgres
from tests.test_registry import FAILED, GOLDEN, PASSED, POLICY, tiny

CHILDREN = get_context("forkserver") # one clean process that has imported everything and used nothing; a child of it starts in milliseconds
CHILDREN.set_forkserver_preload(["tests.test_crashes"])


def opened(url: str, home: Path, actor: str = "ada") -> Registry: return Registry(url, home / "store", actor, policy=POLICY)


@pytest.fixture(scope="module")
def server() -> Iterator:
    with postgres() as running: yield running


@pytest.fixture(params=["sqlite", "postgresql"])
def fresh(request, tmp_path) -> Callable[[], tuple[str, Path]]:
    "Makes an empty database, and a folder for its bytes."
    made = Counter()

    def another() -> tuple[str, Path]:
        made["n"] += 1
        home = tmp_path / f"home{made['n']}"
        if request.param == "sqlite": return f"sqlite:///{home}/registry.db", home
        pytest.importorskip("psycopg", reason="pip install 'mlray[postgres]'")
        running, name = request.getfixturevalue("server"), f"r{abs(hash(str(home))):x}"
        running.run(f"create database {name}")
        return running.uri(name), home

    return another


# --- where to die --------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Point:
    "A place in the code, and whether what was being done there has happened once somebody dies in it."
    name: str
    does: str               # open, register, gate, promote, rollback, retire, gc
    at: str                 # module:function, `sql:` with the beginning of a statement, or `commit`
    side: str = "before"    # before, after, or half: when half of the bytes are written
    nth: int = 1
    kept: bool = False


def die() -> None: os.kill(os.getpid(), signal.SIGKILL)


def _half(original: Callable, *args: Any) -> None:
    "Do it with the first half of the bytes, which are the last argument."
    original(*args[:-1], args[-1][:len(args[-1]) // 2])


def arm(point: Point) -> None:
    "From now on, dying at a point. Nothing of this is in the product: functions are replaced in the process that is to die."
    calls = Counter()

    def now(side: str) -> bool:
        calls[side] += 1
        return side == point.side and calls[side] == point.nth

    kind, _, what = point.at.partition(":")
    if kind == "commit":
        sa.event.listen(sa.Engine, "commit", lambda connection: die() if now("before") else None)
    elif kind == "sql":
        hit = lambda side, statement: what.lower() in " ".join(statement.lower().split()) and now(side)
        sa.event.listen(sa.Engine, "before_cursor_execute", lambda c, cursor, statement, *_: die() if hit("before", statement) else None)
        sa.event.listen(sa.Engine, "after_cursor_execute", lambda c, cursor, statement, *_: die() if hit("after", statement) else None)
    else:
        *owner, name = what.split(".")
        module = import_module(kind)
        place = attrgetter(".".join(owner))(module) if owner else module
        original = getattr(place, name)

        def replaced(*args: Any, **named: Any) -> Any:
            if now("half"): _half(original, *args)
            if calls["half"] and point.side == "half" and calls["half"] == point.nth: die()
            if now("before"): die()
            result = original(*args, **named)
            if now("after"): die()
            return result

        setattr(place, name, replaced)


ROW, SEAL, NOTE, ANCHOR = "sql:INSERT INTO events", "commit", "mlray.governance.database:_note", "os:write"


def written(does: str, *tables: str) -> list[Point]:
    "The points that every change has: at each of its statements, around its seal, its commit, its anchor and its answer."
    return [*(Point(f"{does}: {side} {t}", does, f"sql:{t}", side) for t in tables for side in ("before", "after")), Point(f"{does}: before its seal", does, ROW), Point(f"{does}: after its seal", does, ROW, "after"),
            Point(f"{does}: before the commit", does, SEAL), Point(f"{does}: after the commit", does, NOTE, kept=True), Point(f"{does}: half an anchor", does, ANCHOR, "half", kept=True),
            Point(f"{does}: before the answer", does, NOTE, "after", kept=True)]


FILE, NAME = "mlray.governance.store:write_durably", "pathlib:Path.rename"
POINTS = [
    Point("open: before the key has its name", "open", "os:link"), Point("open: after the key has its name", "open", "os:link", "after"),
    *(Point(f"open: {side} the table {t}", "open", f"sql:CREATE TABLE {t}", side) for t in ("versions", "aliases", "moves") for side in ("before", "after")),
    Point("open: before the schema's number", "open", "sql:alembic_version", "before", 3), Point("open: before the commit", "open", SEAL), Point("open: after the commit", "open", "mlray.governance.database:Database.log", kept=True),
    Point("register: before its bytes", "register", "mlray.governance.store:_put"), Point("register: half a file", "register", FILE, "half"), Point("register: half its third file", "register", FILE, "half", 3),
    Point("register: after one file", "register", FILE, "after"), Point("register: after its files", "register", FILE, "after", 5), Point("register: before its bytes have their name", "register", NAME),
    Point("register: after its bytes have their name", "register", NAME, "after"), Point("register: before the last sync", "register", "mlray.governance.store:sync_folder", "before", 3),
    Point("register: inside the lock", "register", "mlray.governance.registry:load_bundle"), *written("register", "INSERT INTO versions"),
    Point("gate: half its page", "gate", FILE, "half"), Point("gate: after its page", "gate", NAME, "after"), *written("gate", "INSERT INTO evidence"),
    *written("promote", "UPDATE aliases", "INSERT INTO moves"), Point("rollback: before it reads the bytes", "rollback", "mlray.governance.registry:load_bundle"), *written("rollback", "UPDATE aliases", "INSERT INTO moves"),
    *written("remove", "DELETE FROM aliases"), *written("retire", "UPDATE versions"), Point("gc: before a name is gone", "gc", "mlray.governance.store:Store.put_aside", kept=False), Point("gc: after one name is gone", "gc", "mlray.governance.store:Store.put_aside", "after"),
    *written("gc"), Point("gc: before the bytes are gone", "gc", "mlray.governance.store:Store.erase", kept=True), Point("gc: after some bytes are gone", "gc", "mlray.governance.store:Store.erase", "after", kept=True)]


# --- what is done --------------------------------------------------------------------------------------------------

def do(registry: Registry, what: str, **given: Any) -> tuple[str, str, Any]:
    "One change through the public functions; the action, object and detail that the audit must have for it."
    found = versions(registry, "tiny")
    if what == "register":
        v = register(registry, load_bundle(given["bundle"]), {})
        return "register", str(v), v.digest
    if what == "gate":
        v = given.get("version") or found[0]
        return "gate", str(v), add_evidence(registry, v, "quality", PASSED, given["page"]).page
    if what == "promote":
        v = given.get("version") or found[0]
        return "promote", str(v), promote(registry, v, given.get("alias", "production"))
    if what == "remove": return "remove", str(remove(registry, "tiny", "canary", "it was tried")), "it was tried"
    if what == "rollback":
        v, new = rollback(registry, "tiny")
        return "rollback", str(v), new
    if what == "retire":
        v = retire(registry, given.get("version") or found[0], "it is done with")
        return "retire", str(v), "it is done with"
    return "gc", "store", sorted(b.digest for b in collect_garbage(registry, hours=0).blobs)


def told(entry: Entry) -> tuple[str, str, Any]:
    "The same of a row of the audit."
    d = entry.details
    return entry.action, entry.object, {"register": lambda: d["digest"], "gate": lambda: d["page"], "promote": lambda: d["generation"], "rollback": lambda: d["generation"], "retire": lambda: d["why"], "remove": lambda: d["why"],
                                        "gc": lambda: sorted(d["digests"])}[entry.action]()


def whole(registry: Registry, url: str) -> tuple[Entry, ...]:
    "The audit; with it everything holds: the database is sound, the chain and the tables agree, and every version and every page has its bytes."
    if url.startswith("sqlite"):
        with sqlite3.connect(url.removeprefix("sqlite:///")) as db: assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        db.close()
    found = audit(registry)
    assert not found.faults, found.faults
    for v in versions(registry):
        bundle_of(registry, v)
        for proof in evidence(registry, v).values():
            for digest, name in ((proof.page, "quality.ipynb"), (proof.statement, "statement.json")): registry.attestor.read(digest, name)
    return found.entries


def prepared(registry: Registry, home: Path, what: str, seed: int) -> dict[str, Any]:
    "What a change needs to be there."
    def version(number: int) -> Version:
        v = register(registry, tiny(home / "made", number), {})
        add_evidence(registry, v, "quality", PASSED, b"{}")
        return v
    if what == "register": return {"bundle": tiny(home / "made", seed).path}
    if what == "gc":
        for part in (1, 2): registry.store.put(f"{seed:032x}{part:032x}", {"a": b"never registered"})
        return {}
    if what == "retire": return {"version": version(seed)}
    ready = [v for v in versions(registry, "tiny") if not v.retired and evidence(registry, v)] or [version(0)]
    if len(ready) == 1: ready.insert(0, version(1))
    if what == "gate": return {"page": f"page {seed}".encode(), "version": ready[0]}
    if what == "promote" and not generation(registry, "tiny"): promote(registry, ready[1])
    if what == "rollback":
        for v in (ready[1], ready[0]): promote(registry, v)
    if what == "remove": promote(registry, ready[0], "canary")
    return {"version": ready[0]}


def do_and_die(point: Point, url: str, home: Path, given: dict[str, Any]) -> None:
    "What a child does: one change, and dies on the way."
    registry = opened(url, home) if point.does != "open" else None
    arm(point)
    do(registry or opened(url, home), "register" if point.does == "open" else point.does, **given)


def killed(point: Point, url: str, home: Path, given: dict[str, Any]) -> None:
    process = CHILDREN.Process(target=do_and_die, args=(point, url, home, given))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL, f"{point.name}: nobody died there, so nothing was shown"


def die_at(point: Point, url: str, home: Path, seed: int) -> None:
    "Die at a point; then look, do it again, and look again."
    if point.does == "open":
        killed(point, url, home, {"bundle": tiny(home / "made", seed).path})
        registry = opened(url, home)
        assert not whole(registry, url)
    else:
        registry = opened(url, home)
        given = prepared(registry, home, point.does, seed)
        before = whole(registry, url)
        killed(point, url, home, given)
        after = whole(registry, url)
        assert after[:len(before)] == before and len(after) == len(before) + point.kept, point.name
        assert not point.kept or after[-1].action == point.does
        if not point.kept and point.does != "gc": do(registry, point.does, **given)
        assert point.kept or point.does == "gc" or told(whole(registry, url)[-1])[0] == point.does
    registry.database._engine.dispose()


HANDFUL = ["open: after the table moves", "register: half its third file", "register: before the commit", "register: after the commit", "gate: after its seal", "promote: half an anchor",
           "rollback: after INSERT INTO moves", "remove: after DELETE FROM aliases", "retire: before the answer", "gc: after one name is gone"]


@pytest.mark.parametrize("fresh", ["sqlite", "postgresql"], indirect=True)
def test_a_handful_of_points(fresh):
    by_name = {p.name: p for p in POINTS}
    assert len(by_name) == len(POINTS) >= 25
    url, home = fresh()
    for seed, name in enumerate(HANDFUL): die_at(by_name[name], *(fresh() if name.startswith("open") else (url, home)), seed + 10)


@pytest.mark.chaos
@pytest.mark.parametrize("point", POINTS, ids=lambda p: p.name)
def test_every_point_twenty_times(fresh, point):
    url, home = fresh()
    for seed in range(20): die_at(point, *(fresh() if point.does == "open" else (url, home)), seed + 10)


# --- at random -----------------------------------------------------------------------------------------------------

def write_on(url: str, home: Path, seed: int, said: Connection) -> None:
    "What a child does that is killed at random: one change after the other, each told once it was acknowledged."
    rng, registry = random.Random(seed), opened(url, home, f"p{seed}")
    said.send("ready")
    for turn in range(10_000):
        what = rng.choices(["register", "gate", "promote", "rollback", "remove", "retire", "gc"], [4, 3, 5, 2, 1, 1, 1])[0]
        mine = [v for v in versions(registry, "tiny") if not v.retired and evidence(registry, v)]
        if not mine and turn < 2: what = ("register", "gate")[turn] # so that there is something to do the other things with
        given: dict[str, Any] = {"version": rng.choice(mine)} if mine and what in ("promote", "retire") else {}
        if what == "promote" and rng.random() < 0.3: given["alias"] = "canary"
        if what == "register": given["bundle"] = tiny(home / f"made{seed}", turn + 1000 * seed).path
        if what == "gate": given["page"] = f"{seed} {turn}".encode()
        if what == "gc" and rng.random() < 0.5: registry.store.put(rng.randbytes(32).hex(), {"a": b"never registered"})
        try: said.send(("done", do(registry, what, **given)))
        except (MlrayError, IndexError): said.send(("refused", what)) # nothing to go back to, in use, nothing yet


def heard(pipe: Connection) -> list[Any]:
    "Everything that a child had said before it died."
    found = []
    try:
        while pipe.poll(): found.append(pipe.recv())
    except EOFError: pass
    return found


def kill_at_random(fresh: Callable, kills: int, each: int, seed: int) -> Counter:
    "Two writers at once, killed together after a while, again and again; what was acknowledged, what was on its way."
    rng, counted = random.Random(seed), Counter()
    for at in range(kills):
        if at % each == 0:
            url, home = fresh()
            registry, before = opened(url, home), ()
        pipes = [CHILDREN.Pipe(duplex=False) for _ in range(2)]
        writers = [CHILDREN.Process(target=write_on, args=(url, home, 2 * at + i, there)) for i, (_, there) in enumerate(pipes)]
        for w in writers: w.start()
        for here, there in pipes:
            there.close()
            assert here.recv() == "ready"
        early = [[pipe.recv() for _ in range(rng.randrange(3))] for pipe, _ in pipes] # some changes, and then any instant will do
        time.sleep(rng.uniform(0, 0.05))
        for w in writers: os.kill(w.pid, signal.SIGKILL)
        for w in writers:
            w.join()
            assert w.exitcode == -signal.SIGKILL
        acknowledged = Counter(repr(answer) for (here, _), told_early in zip(pipes, early, strict=True) for kind, answer in (*told_early, *heard(here)) if kind == "done" and answer != ("gc", "store", []))
        after = whole(registry, url)
        assert after[:len(before)] == before, "what was there has changed"
        new = Counter(repr(told(e)) for e in after[len(before):] if e.action != "refuse")
        counted += Counter(kills=1, acknowledged=acknowledged.total(), lost=(acknowledged - new - repeated(acknowledged, after)).total(), unanswered=(new - acknowledged).total(), rows=len(after) - len(before))
        before = after
        if at % each == each - 1: registry.database._engine.dispose()
    return counted


def repeated(acknowledged: Counter, entries: tuple[Entry, ...]) -> Counter:
    "What was acknowledged and is no change, as it was so already: a version that had been retired."
    before = Counter(repr(told(e)) for e in entries if e.action == "retire")
    return Counter({a: n for a, n in acknowledged.items() if a in before})


@pytest.mark.parametrize("kills", [6, pytest.param(1000, marks=pytest.mark.chaos)])
def test_random_instants(fresh, kills):
    counted = kill_at_random(fresh, kills, each=25, seed=20261121)
    print(dict(counted))
    assert counted["kills"] == kills and counted["acknowledged"] > 0 and counted["lost"] == 0 and counted["unanswered"] <= 2 * kills


# --- garbage -------------------------------------------------------------------------------------------------------

def test_garbage_is_what_nobody_names(fresh):
    url, home = fresh()
    registry = opened(url, home)
    v = register(registry, tiny(home / "made", 1), {})
    proof = add_evidence(registry, v, "quality", PASSED, b"{}")
    promote(registry, v)
    second = register(registry, tiny(home / "made", 2), {})
    retire(registry, second, "slow")
    orphan = registry.store.put("ab" * 32, {"a": b"1", "b": b"22"})
    half = registry.store.root / ".put-killed"
    half.mkdir()
    for old in (orphan, half, *(registry.store.path(d) for d in (v.digest, proof.page, proof.statement))): os.utime(old, (1e9, 1e9))
    young = registry.store.put("cd" * 32, {"a": b"1"})
    looked = collect_garbage(registry, dry_run=True)
    assert {b.path for b in looked.blobs} == {orphan, half} and looked.size == 3 and not looked.taken and orphan.is_dir()
    assert {b.path for b in collect_garbage(registry).blobs} == {orphan, half} and young.is_dir() and not orphan.exists() and not half.exists()
    assert not collect_garbage(registry).blobs and [told(e) for e in whole(registry, url)][-1] == ("gc", "store", ["ab" * 32])
    assert [b.digest for b in collect_garbage(registry, hours=0).blobs] == ["cd" * 32] and {p.name for p in registry.store.root.glob("??/*")} == {v.digest, second.digest, proof.page, proof.statement}
    (home / "other.anchor").write_text("")
    with pytest.raises(RegistryError, match="those of other, too"): collect_garbage(registry, hours=0)
    with pytest.raises(RegistryError, match="give 0 or more"): collect_garbage(registry, hours=-1)


def test_bytes_that_are_named_while_garbage_is_collected_stay(fresh, monkeypatch):
    url, home = fresh()
    mine, theirs = opened(url, home), opened(url, home, "grace")
    one, two, three = (tiny(home / "made", seed) for seed in (1, 2, 3))
    for b in (one, two): mine.store.put(b.digest, {p.name: p.read_bytes() for p in b.path.iterdir()})
    real, met = mlray.governance.garbage._take, []

    def late(*args: Any) -> Any: # what was found to be garbage is registered before it is taken
        met.append(register(theirs, one, {}))
        return real(*args)

    with monkeypatch.context() as patched:
        patched.setattr("mlray.governance.garbage._take", late)
        assert [b.digest for b in collect_garbage(mine, hours=0).blobs] == [two.digest] and met
    put, took = Store.put, []

    def early(store: Store, digest: str, files: Any) -> Path: # bytes that were put are taken before they are named
        path = put(store, digest, files)
        if not took: took.append(collect_garbage(mine, hours=0))
        return path

    monkeypatch.setattr(Store, "put", early)
    assert register(theirs, three, {}).number == 2 and [b.digest for b in took[0].blobs] == [three.digest]
    whole(mine, url)
    took.clear()
    page = add_evidence(theirs, versions(mine)[0], "quality", PASSED, b"page").page
    assert [b.digest for b in took[0].blobs] == [page] and whole(mine, url)


def collect_when_told(url: str, home: Path, said: Connection) -> None:
    registry, taken = opened(url, home, "sweeper"), 0
    said.send("ready")
    while said.recv() == "now":
        taken += sum(bool(b.digest) for b in collect_garbage(registry, hours=0).blobs)
        said.send(taken)


@pytest.mark.parametrize("rounds", [5, pytest.param(300, marks=pytest.mark.chaos)])
def test_registrations_race_with_collection(fresh, rounds):
    "Each registration begins together with a collection that leaves nothing alone for being young."
    url, home = fresh()
    registry, bundles = opened(url, home), [tiny(home / "made", seed) for seed in range(rounds)]
    here, there = CHILDREN.Pipe()
    sweeper = CHILDREN.Process(target=collect_when_told, args=(url, home, there))
    sweeper.start()
    assert here.recv() == "ready"
    for at, bundle in enumerate(bundles):
        for garbage in (f"{at + 1:064x}", bundle.digest): registry.store.put(garbage, {p.name: p.read_bytes() for p in bundle.path.iterdir()}) # somebody died before it was registered
        here.send("now")
        add_evidence(registry, register(registry, bundle, {}), "quality", PASSED, f"{at}".encode())
        taken = here.recv()
    here.send("stop")
    sweeper.join()
    print({"registered": rounds, "taken": taken})
    assert sweeper.exitcode == 0 and taken + len(collect_garbage(registry, hours=0).blobs) >= rounds and len(versions(registry)) == rounds and whole(registry, url)


# --- bytes behind a URL --------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def bucket() -> Iterator[tuple[str, Any]]:
    "The URL of a folder in a bucket, and a client to look at it."
    with buckets.bucket("blobs") as (client, _): yield "s3://blobs/models", client


def keys(client: Any) -> set[str]: return {o["Key"].removeprefix("models/") for o in client.list_objects_v2(Bucket="blobs").get("Contents", []) if not o["Key"].endswith("/")}


def test_bytes_in_a_bucket(bucket, tmp_path, monkeypatch):
    url, client = bucket
    database = f"sqlite:///{tmp_path}/shared/registry.db"
    at = lambda name: Registry(database, tmp_path / name / "store", name, policy=POLICY, bytes_url=url)
    monkeypatch.setenv("MLRAY_AUDIT_KEY", "k" * 32)
    ada, grace = at("ada"), at("grace")
    v = register(ada, tiny(tmp_path, 1), {})
    proof = add_evidence(ada, v, "quality", PASSED, b"page")
    page = proof.page
    assert not list(grace.store.root.iterdir()) and bundle_of(grace, v).digest == v.digest, "another machine fetches what it reads"
    assert (grace.store.path(page) / "quality.ipynb").read_bytes() == b"page" and promote(grace, v) == 1
    grace.store.put("cd" * 32, {"a": b"never registered"})
    client.put_object(Bucket="blobs", Key=f"models/ef/{'ef' * 32}/model.onnx", Body=b"half a blob")
    assert not collect_garbage(ada).blobs and [b.digest for b in collect_garbage(ada, hours=0).blobs] == ["cd" * 32]
    assert {k.split("/")[1] for k in keys(client) if k[0] != "."} == {v.digest, page, proof.statement, "ef" * 32}
    client.delete_object(Bucket="blobs", Key=f"models/{v.digest[:2]}/{v.digest}/model.onnx") # somebody took a file of it
    far = at("edsger")
    assert not far.store.path(v.digest).exists()
    assert register(ada, tiny(tmp_path / "again", 1), {}).number == 1 and bundle_of(far, v).digest == v.digest, "what is not whole is put again"
    other = Registry(f"sqlite:///{tmp_path}/other/registry.db", tmp_path / "other/store", policy=POLICY, bytes_url=url)
    register(other, tiny(tmp_path, 2), {})
    with pytest.raises(RegistryError, match="what only they name would be lost"): collect_garbage(ada, hours=0)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    before = len(versions(ada))
    with pytest.raises(Unavailable, match="could not be used"): register(at("barbara"), tiny(tmp_path, 3), {})
    assert len(versions(ada)) == before
    with pytest.raises(RegistryError, match="Give a folder, or a URL"): Registry(database, tmp_path / "x/store", bytes_url="ftpx://nowhere/x")


# --- migrations ----------------------------------------------------------------------------------------------------

def dumped(url: str) -> dict[str, Any]:
    "Everything in a database, its tables and their columns included."
    engine, tables = sa.create_engine(url.replace("postgresql://", "postgresql+psycopg://")), sa.MetaData()
    with engine.connect() as c:
        tables.reflect(c)
        found = {t.name: ([x.name for x in t.columns], sorted(map(repr, c.execute(t.select())))) for t in tables.sorted_tables}
    engine.dispose()
    return found


def of_the_first_schema(url: str, home: Path) -> None:
    "The golden database of schema 0001, in a database of either kind."
    home.mkdir(parents=True)
    with sqlite3.connect(home / "golden.db") as golden: golden.executescript((GOLDEN / "registry_0001.sql").read_text())
    golden.close()
    if url.startswith("sqlite"): return shutil.copy(home / "golden.db", url.removeprefix("sqlite:///")) and None
    source, target, tables = sa.create_engine(f"sqlite:///{home}/golden.db"), sa.create_engine(url.replace("postgresql://", "postgresql+psycopg://")), sa.MetaData()
    with source.connect() as a, target.begin() as b:
        tables.reflect(a)
        tables.create_all(b)
        for t in tables.sorted_tables:
            if rows := [r._asdict() for r in a.execute(t.select())]: b.execute(t.insert(), rows)
    for engine in (source, target): engine.dispose()


def open_and_die(url: str, home: Path, nth: int) -> None:
    arm(Point("", "open", "sql:", nth=nth))
    opened(url, home)


@pytest.mark.parametrize("step", [9, pytest.param(1, marks=pytest.mark.chaos)])
def test_a_migration_killed_half_way_has_not_been(fresh, step):
    url, home = fresh()
    of_the_first_schema(url, home)
    before, kills = dumped(url), 0
    for nth in range(2, 1000, step):
        process = CHILDREN.Process(target=open_and_die, args=(url, home, nth))
        process.start()
        process.join()
        if process.exitcode == 0: break
        assert process.exitcode == -signal.SIGKILL and dumped(url) == before, f"half migrated, at statement {nth}"
        kills += 1
    print({"kills": kills})
    registry = opened(url, home)
    assert kills >= 20 // step and dumped(url)["alembic_version"] == (["version_num"], [repr((HEAD,))]) and not audit(registry).faults and [v.number for v in versions(registry)] == [2, 1]


# --- no room, and no time ------------------------------------------------------------------------------------------

@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    if os.geteuid() != 0: pytest.skip("mounting a small disk needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(disk)], capture_output=True).returncode: pytest.skip("mount is not allowed here")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_disk_is_a_letter_and_changes_nothing(small_disk, tmp_path):
    url = f"sqlite:///{small_disk}/registry.db"
    registry = opened(url, small_disk)
    for seed in (1, 2): add_evidence(registry, register(registry, tiny(tmp_path, seed), {}), "quality", PASSED, b"{}")
    second, first = versions(registry)
    promote(registry, first)
    bundle, filler, letters = tiny(tmp_path, 3), small_disk / "filler", Counter()
    changes = [lambda: register(registry, bundle, {}), lambda: add_evidence(registry, first, "quality", FAILED, b"another page"), lambda: promote(registry, second), lambda: retire(registry, second, "w" * 9000)]
    before = whole(registry, url)
    for left in range(0, 5):
        for change in changes:
            filler.write_bytes(bytes(max(shutil.disk_usage(small_disk).free // 4096 - left, 0) * 4096))
            try: change()
            except Unavailable as error: letters[str(error).split(" ")[1]] += 1
            else: letters["done"] += 1
            filler.unlink()
            after = whole(registry, url)
            assert after[:len(before)] == before and len(after) - len(before) in (0, 1) and not list(registry.store.root.glob(".*"))
            if left == 0: assert after == before, "there was no room for it"
            before = after
    print(dict(letters))
    assert letters["store"] >= 2 and letters["registry"] >= 2
    assert register(registry, bundle, {}).number == 3 and whole(registry, url)


def test_order_is_that_of_the_audit_and_never_of_the_clock(fresh):
    url, home = fresh()
    rng, real, off = random.Random(1), datetime.now(UTC), [0.0]
    registry = Registry(url, home / "store", "ada", lambda: real + timedelta(days=off[0]), POLICY)
    found = [register(registry, tiny(home / "made", seed), {}) for seed in range(3)]
    for turn in range(20):
        off[0] = rng.choice([-3650.0, 0.0, 3650.0])
        v = found[turn % 3]
        add_evidence(registry, v, "quality", FAILED, b"{}")
        add_evidence(registry, v, "quality", PASSED, b"{}") # the newest counts, whenever it says it was
        assert promote(registry, v) == turn + 1 and versions(registry)[2 - turn % 3].aliases == ("production",)
    entries = whole(registry, url)
    assert [e.details["generation"] for e in entries if e.action == "promote"] == list(range(1, 21)) and [e.created for e in entries] != sorted(e.created for e in entries)
    young = registry.store.put("ab" * 32, {"a": b"1"})
    off[0] = 3650.0
    assert not collect_garbage(registry).blobs and young.is_dir(), "how old bytes are, their own disk says"
    strict = Registry(url, home / "store", "ada", lambda: real, Policy(("quality",), evidence_hours=24))
    add_evidence(registry, found[0], "quality", PASSED, b"{}")
    with pytest.raises(RegistryError, match="not of the last 24 hours"): promote(strict, found[0])
