"""Whoever dies while the registry writes, nothing that was acknowledged is lost: kill -9 at named points and at random instants, a full disk, a clock that is off. `-m chaos` runs it in full."""
import os
import random
import signal
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from multiprocessing import get_context
from multiprocessing.connection import Connection
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from mlray.audit import Entry
from mlray.bundle import load_bundle
from mlray.errors import MlrayError
from mlray.garbage import collect_garbage
from mlray.ledger import audit
from mlray.registry import (
    Registry,
    Version,
    add_evidence,
    bundle_of,
    evidence,
    generation,
    promote,
    register,
    retire,
    rollback,
    versions,
)
from tests.postgres import postgres
from tests.test_registry import PASSED, POLICY, tiny

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


ROW, SEAL, NOTE, ANCHOR = "sql:INSERT INTO events", "commit", "mlray.database:Database._note", "os:write"


def written(does: str, *tables: str) -> list[Point]:
    "The points that every change has: at each of its statements, around its seal, its commit, its anchor and its answer."
    return [*(Point(f"{does}: {side} {t}", does, f"sql:{t}", side) for t in tables for side in ("before", "after")), Point(f"{does}: before its seal", does, ROW), Point(f"{does}: after its seal", does, ROW, "after"),
            Point(f"{does}: before the commit", does, SEAL), Point(f"{does}: after the commit", does, NOTE, kept=True), Point(f"{does}: half an anchor", does, ANCHOR, "half", kept=True),
            Point(f"{does}: before the answer", does, NOTE, "after", kept=True)]


FILE, NAME = "mlray.store:write_durably", "pathlib:Path.rename"
POINTS = [
    Point("open: before the key has its name", "open", "os:link"), Point("open: after the key has its name", "open", "os:link", "after"),
    *(Point(f"open: {side} the table {t}", "open", f"sql:CREATE TABLE {t}", side) for t in ("versions", "aliases", "moves") for side in ("before", "after")),
    Point("open: before the schema's number", "open", "sql:alembic_version", "before", 3), Point("open: before the commit", "open", SEAL), Point("open: after the commit", "open", "mlray.database:Database.log", kept=True),
    Point("register: before its bytes", "register", "mlray.store:Store._put"), Point("register: half a file", "register", FILE, "half"), Point("register: half its third file", "register", FILE, "half", 3),
    Point("register: after one file", "register", FILE, "after"), Point("register: after its files", "register", FILE, "after", 5), Point("register: before its bytes have their name", "register", NAME),
    Point("register: after its bytes have their name", "register", NAME, "after"), Point("register: before the last sync", "register", "mlray.store:sync_folder", "before", 3),
    Point("register: inside the lock", "register", "mlray.registry:load_bundle"), *written("register", "INSERT INTO versions"),
    Point("gate: half its page", "gate", FILE, "half"), Point("gate: after its page", "gate", NAME, "after"), *written("gate", "INSERT INTO evidence"),
    *written("promote", "UPDATE aliases", "INSERT INTO moves"), Point("rollback: before it reads the bytes", "rollback", "mlray.registry:load_bundle"), *written("rollback", "UPDATE aliases", "INSERT INTO moves"),
    *written("retire", "UPDATE versions"), Point("gc: before a name is gone", "gc", "mlray.garbage:put_aside", kept=False), Point("gc: after one name is gone", "gc", "mlray.garbage:put_aside", "after"),
    *written("gc"), Point("gc: before the bytes are gone", "gc", "mlray.garbage:erase", kept=True), Point("gc: after some bytes are gone", "gc", "mlray.garbage:erase", "after", kept=True)]


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
        return "promote", str(v), promote(registry, v)
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
    return entry.action, entry.object, {"register": lambda: d["digest"], "gate": lambda: d["page"], "promote": lambda: d["generation"], "rollback": lambda: d["generation"], "retire": lambda: d["why"],
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
        for proof in evidence(registry, v).values(): assert (registry.store.path(proof.page) / "quality.ipynb").stat().st_size
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
           "rollback: after INSERT INTO moves", "retire: before the answer", "gc: after one name is gone"]


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
        what = rng.choices(["register", "gate", "promote", "rollback", "retire", "gc"], [4, 3, 4, 2, 1, 1])[0]
        mine = [v for v in versions(registry, "tiny") if not v.retired and evidence(registry, v)]
        given: dict[str, Any] = {"version": rng.choice(mine)} if mine and what in ("promote", "retire") else {}
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
        time.sleep(rng.uniform(0, 0.15)) # any instant will do
        for w in writers: os.kill(w.pid, signal.SIGKILL)
        for w in writers:
            w.join()
            assert w.exitcode == -signal.SIGKILL
        acknowledged = Counter(repr(answer) for here, _ in pipes for kind, answer in heard(here) if kind == "done" and answer != ("gc", "store", []))
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


@pytest.mark.parametrize("kills", [8, pytest.param(1000, marks=pytest.mark.chaos)])
def test_random_instants(fresh, kills):
    counted = kill_at_random(fresh, kills, each=25, seed=20261121)
    print(dict(counted))
    assert counted["kills"] == kills and counted["acknowledged"] > 0 and counted["lost"] == 0 and counted["unanswered"] <= 2 * kills
