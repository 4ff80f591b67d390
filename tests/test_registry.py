"""The registry keeps what it said: on SQLite and on PostgreSQL, through migrations, against whoever changes it past the registry, and under writers who race."""
import dataclasses
import random
import sqlite3
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from onnx import TensorProto as T, helper as h

from mlray.governance.access import new_key
from mlray.governance.audit import Anchor, Entry, seal, verify
from mlray.governance.ledger import audit
from mlray.governance.registry import Policy, Registry, add_evidence, add_key, events, evidence, generation, keys, promote, register, retire, rollback, version, versions
from mlray.judgement.gate import judge
from mlray.learning.contract import Contract
from mlray.learning.features import apply, learn
from mlray.shipping.bundle import Bundle, pack
from mlray.values.errors import Conflict, RegistryError
from mlray.values.spec import Rule, parse_spec
from tests.postgres import postgres

PASSED, FAILED = (judge({"roc_auc": value}, [Rule(metric="roc_auc", at_least=0.8)]) for value in (0.9, 0.7))
POLICY = Policy(gates=("quality",))
GOLDEN = Path(__file__).parent / "golden"


def tiny(folder: Path, seed: int) -> Bundle:
    "A bundle made by hand: the age divided by a hundred."
    spec = parse_spec("{name: tiny, data: {train: {file: a.csv}}, contract: {age: {type: number}, ill: {type: boolean, role: target}}}")
    graph = h.make_model(h.make_graph(
        [h.make_node("Div", ["numbers", "hundred"], ["wide"]), h.make_node("Squeeze", ["wide", "one"], ["score"])], "g",
        [h.make_tensor_value_info("numbers", T.FLOAT, ["rows", 1])], [h.make_tensor_value_info("score", T.FLOAT, ["rows"])],
        [h.make_tensor("hundred", T.FLOAT, [1], [100.0]), h.make_tensor("one", T.INT64, [1], [1])]), opset_imports=[h.make_opsetid("", 20)], ir_version=10)
    features = learn(Contract(spec.contract), pl.DataFrame({"age": [20.0, 40.0]}))
    return pack(folder / f"bundle{seed}", spec, features, graph.SerializeToString(), {}, {"seed": seed}, apply(features, {"age": [50.0]}, 1), np.array([0.5], np.float32))


@pytest.fixture(scope="module")
def server() -> Iterator:
    with postgres() as running: yield running


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request, tmp_path) -> str:
    "An empty database of each kind."
    if request.param == "sqlite": return f"sqlite:///{tmp_path}/home/registry.db"
    pytest.importorskip("psycopg", reason="pip install 'mlray[postgres]'")
    running, name = request.getfixturevalue("server"), f"r{abs(hash(str(tmp_path))):x}"
    running.run(f"create database {name}")
    return running.uri(name)


@pytest.fixture
def registry(url, tmp_path) -> Registry:
    return Registry(url, tmp_path / "home/store", actor="ada", policy=POLICY)


@pytest.fixture
def three(registry, tmp_path) -> tuple:
    "Three versions with passed evidence."
    found = tuple(register(registry, tiny(tmp_path, seed), {}) for seed in (1, 2, 3))
    for v in found: add_evidence(registry, v, "quality", PASSED, b"{}")
    return found


def test_every_change_is_in_the_chain(registry, three):
    promote(registry, three[0])
    add_key(registry, new_key("viewer")[0])
    with pytest.raises(RegistryError, match="no verdict of the gate fairness"): promote(registry, three[1], gates=["fairness"])
    assert [r[1] for r in events(registry).rows] == ["register"] * 3 + ["gate"] * 3 + ["promote", "key", "refuse"]
    found = audit(registry)
    assert not found.faults and found.anchored == len(found.entries) == 9
    assert [str(v) for v in versions(registry)] == ["tiny/3", "tiny/2", "tiny/1"] and version(registry, "tiny@production") == versions(registry)[2] and len(keys(registry)) == 1
    assert register(registry, tiny(registry.store.root.parent / "again", 1), {}).number == 1 and len(audit(registry).entries) == 9, "the same bytes are the same version, and no change"


@pytest.mark.parametrize("reference", ["", "/1", "@production"])
def test_no_name_is_no_model(registry, three, reference):
    promote(registry, three[0])
    with pytest.raises(RegistryError, match="There is no model ''"): version(registry, reference)


def test_a_change_that_fails_leaves_no_entry(registry, three):
    before = audit(registry)
    with pytest.raises(Conflict): promote(registry, three[0], expect=7)
    with pytest.raises(ZeroDivisionError), registry.database.change() as c:
        registry._log(c, "promote", "tiny/1", alias="production", generation=1)
        1 / 0
    assert audit(registry) == before and generation(registry, "tiny") == 0


def alone(registry: Registry, *statements: str) -> None:
    "Write past the registry, as somebody who may do anything to its database."
    sqlite = registry.database._engine.dialect.name == "sqlite"
    with registry.database.change() as c:
        for drop in ["DROP TRIGGER events_kept_UPDATE", "DROP TRIGGER events_kept_DELETE"] if sqlite else ["DROP TRIGGER events_kept ON events"]: c.exec_driver_sql(drop)
        for statement in statements: c.exec_driver_sql(statement)


@pytest.mark.parametrize(("statements", "row"), [
    (["UPDATE events SET actor='eve' WHERE seq=4"], 4), (["DELETE FROM events WHERE seq=3"], 3), (["DELETE FROM events WHERE seq=7"], 7),
    (["UPDATE events SET seq=99 WHERE seq=2", "UPDATE events SET seq=2 WHERE seq=3", "UPDATE events SET seq=3 WHERE seq=99"], 2),
    (["UPDATE evidence SET passed=(1=0) WHERE id=1"], 4), (["UPDATE aliases SET number=2"], 7), (["DELETE FROM events"], 1)],
    ids=["edit", "delete", "truncate", "swap", "a verdict", "an alias", "all"])
def test_tampering_names_the_row(registry, three, statements, row):
    promote(registry, three[0])
    if "passed" in statements[0] and registry.database._engine.dialect.name == "sqlite": statements = ["UPDATE evidence SET passed=0 WHERE id=1"]
    assert not audit(registry).faults
    alone(registry, *statements)
    assert row in {f.seq for f in audit(registry).faults}


def test_the_database_refuses_what_is_not_added(registry, three):
    for statement in ("UPDATE events SET actor='eve'", "DELETE FROM events"):
        with pytest.raises(RegistryError, match="only ever added"), registry.database.change() as c: c.exec_driver_sql(statement)


def test_another_key_neither_seals_nor_verifies(registry, three, url, monkeypatch, tmp_path):
    monkeypatch.setenv("MLRAY_AUDIT_KEY", "x" * 32)
    with pytest.raises(RegistryError, match="another key sealed it"): promote(registry, three[0])
    assert len(audit(registry).faults) >= 6 and generation(registry, "tiny") == 0
    monkeypatch.setenv("MLRAY_AUDIT_KEY", "short")
    with pytest.raises(RegistryError, match="at least 32"): promote(registry, three[0])
    monkeypatch.delenv("MLRAY_AUDIT_KEY")
    key = registry.database.folder / "audit.key"
    key.chmod(0o644)
    with pytest.raises(RegistryError, match="read by others"): promote(registry, three[0])
    key.unlink()
    with pytest.raises(RegistryError, match="its key is not here"): promote(registry, three[0])
    assert not key.exists(), "a chain that has begun gets no second key"


# Tampering with chains, at random

KEY = b"k" * 64


def chain(rng: random.Random, key: bytes = KEY) -> list[Entry]:
    "A chain of 2 to 30 entries."
    made: list[Entry] = []
    for number in range(rng.randint(2, 30)):
        details = {"alias": rng.choice(["production", "canary"]), "generation": number, "x": rng.choice([None, True, 0.1, "é\n"])}
        made.append(seal(key, made[-1] if made else None, f"2026-01-01T00:00:{number:02}+00:00", rng.choice(["ada", "grace"]), rng.choice(["promote", "gate"]), f"tiny/{number}", details))
    return made


def anew(entries: list[Entry], key: bytes) -> list[Entry]:
    "The same story, sealed by somebody else."
    made: list[Entry] = []
    for e in entries: made.append(seal(key, made[-1] if made else None, e.created, e.actor, e.action, e.object, e.details))
    return made


def edit(rng, entries):
    at = rng.randrange(len(entries))
    e = entries[at]
    change = rng.choice([{"actor": e.actor + "a"}, {"object": "tiny/99"}, {"details": e.details | {"generation": -1}}, {"created": "2016" + e.created[4:]}, {"action": "refuse"}, {"mac": None},
                         {"mac": f"{int(str(e.mac), 16) ^ 1 << rng.randrange(256):064x}"}])
    return [*entries[:at], dataclasses.replace(e, **change), *entries[at + 1:]], e.seq


def delete(rng, entries):
    at = rng.randrange(len(entries) - 1)
    return entries[:at] + entries[at + 1:], entries[at].seq


def swap(rng, entries):
    a, b = sorted(rng.sample(range(len(entries)), 2))
    changed = list(entries)
    changed[a], changed[b] = dataclasses.replace(entries[b], seq=entries[a].seq), dataclasses.replace(entries[a], seq=entries[b].seq)
    return changed, entries[a].seq


def insert(rng, entries):
    at = rng.randrange(len(entries))
    return [*entries[:at], dataclasses.replace(entries[at], actor="eve"), *entries[at:]], entries[at].seq


def truncate(rng, entries):
    keep = rng.randrange(len(entries))
    return entries[:keep], entries[keep].seq


def rewrite(rng, entries):
    "All of it, by somebody without the key, or with it."
    at = rng.randrange(len(entries))
    told = [dataclasses.replace(e, actor="eve") if i == at else e for i, e in enumerate(entries)]
    return anew(told, rng.choice([KEY, b"e" * 32])), entries[at].seq


def tamper_and_look(times: int, seed: int) -> Counter:
    rng, found = random.Random(seed), Counter()
    for kind in (edit, delete, swap, insert, truncate, rewrite):
        for _ in range(times):
            entries = chain(rng)
            changed, row = kind(rng, entries)
            faults = verify(KEY, changed, [Anchor(e.seq, str(e.mac)) for e in entries])
            found[kind.__name__] += row in {f.seq for f in faults}
    for _ in range(times):
        entries = chain(rng)
        found["clean"] += not verify(KEY, entries, [Anchor(e.seq, str(e.mac)) for e in rng.sample(entries, rng.randint(0, len(entries)))])
    return found


@pytest.mark.parametrize("times", [30, pytest.param(1000, marks=pytest.mark.chaos)])
def test_random_tampering_is_found_and_nothing_else_is(times):
    found = tamper_and_look(times, seed=20260101)
    print(dict(found))
    assert found == dict.fromkeys(("edit", "delete", "swap", "insert", "truncate", "rewrite", "clean"), times)


# Schemas of the past

def test_a_registry_of_schema_0001_is_brought_along(tmp_path):
    (tmp_path / "home").mkdir()
    with sqlite3.connect(tmp_path / "home/registry.db") as db: db.executescript((GOLDEN / "registry_0001.sql").read_text())
    db.close()
    registry = Registry(f"sqlite:///{tmp_path}/home/registry.db", tmp_path / "home/store", actor="ada", policy=POLICY)
    found = audit(registry)
    assert not found.faults and found.anchored == len(found.entries) == 8
    assert version(registry, "tiny@production").number == 2 and generation(registry, "tiny") == 2
    promote(registry, versions(registry)[1], expect=2)
    assert not audit(registry).faults and len(events(registry).rows) == 9


# Going back

def test_a_roll_back_goes_down_five_versions_and_more(registry, tmp_path):
    found = [register(registry, tiny(tmp_path, seed), {}) for seed in range(7)]
    for v in found:
        add_evidence(registry, v, "quality", PASSED, b"{}")
        promote(registry, v)
    for v in found[:-1]: add_evidence(registry, v, "quality", FAILED, b"{}") # what was out may be out again, whatever is proved since
    assert [rollback(registry, "tiny")[0].number for _ in range(6)] == [6, 5, 4, 3, 2, 1] and generation(registry, "tiny") == 13
    with pytest.raises(RegistryError, match="nothing before it"): rollback(registry, "tiny")
    with pytest.raises(RegistryError, match="no tiny@canary"): rollback(registry, "tiny", "canary")
    promote(registry, found[6])
    assert rollback(registry, "tiny")[0].number == 1 and not audit(registry).faults


def test_a_roll_back_to_damaged_bytes_moves_nothing(registry, three):
    for v in three[:2]: promote(registry, v)
    damaged = next(p for p in registry.store.path(three[0].digest).iterdir() if p.suffix == ".onnx")
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    from mlray.values.errors import BundleError
    with pytest.raises(BundleError): rollback(registry, "tiny")
    assert generation(registry, "tiny") == 2 and version(registry, "tiny@production").number == 2 and not audit(registry).faults


def test_a_retired_version_does_not_come_back(registry, three):
    for v in three: promote(registry, v)
    with pytest.raises(RegistryError, match="in use: tiny@production"): retire(registry, three[2], "slow")
    done = retire(registry, three[1], "slow", "tiny/3")
    assert done.retired and retire(registry, three[1], "again") == done
    with pytest.raises(RegistryError, match="was retired on"): promote(registry, three[1], "staging")
    assert rollback(registry, "tiny")[0].number == 1 and evidence(registry, three[1])["quality"].verdict.passed
    assert [r[1] for r in events(registry).rows][-4:] == ["refuse", "retire", "refuse", "rollback"] and not audit(registry).faults


def test_an_alias_is_a_word(registry, three):
    for alias in ("staging", "canary", "shadow", "eu-west_2"): assert promote(registry, three[0], alias) == 1
    for alias in ("", "Production", "a b", "../x", "production\n", "a" * 65):
        with pytest.raises(RegistryError, match="no name for an alias"): promote(registry, three[0], alias)


# Policy

def test_production_asks_for_its_policy_whatever_the_caller_says(registry, url, tmp_path, three):
    strict = lambda actor, hours=0.0: Registry(url, tmp_path / "home/store", actor, lambda: datetime.now(UTC) + timedelta(hours=hours), Policy(("quality", "fairness"), 24, True))
    with pytest.raises(RegistryError, match="no verdict of the gate fairness"): promote(strict("grace"), three[0], gates=[])
    add_evidence(registry, three[0], "fairness", FAILED, b"{}")
    with pytest.raises(RegistryError, match="failed the gate fairness"): promote(strict("grace"), three[0], gates=[])
    add_evidence(registry, three[0], "fairness", PASSED, b"{}")
    for hours in (25, -2):
        with pytest.raises(RegistryError, match="quality and fairness is not of the last 24 hours"): promote(strict("grace", hours), three[0])
    with pytest.raises(RegistryError, match="ada registered it, and another person"): promote(strict("ada"), three[0])
    assert generation(registry, "tiny") == 0 and promote(strict("ada"), three[0], "canary") == 1
    assert promote(strict("grace"), three[0]) == 1
    told = [r for r in events(registry).rows if r[1] == "refuse"]
    assert len(told) == 5 and "24 hours" in told[2][3] and told[4][4] == "ada" and not audit(registry).faults


def test_the_policy_of_an_environment_is_read(tmp_path):
    from mlray.governance.registry import open_registry
    from mlray.values.settings import read_settings
    (tmp_path / "settings.ini").write_text("[DEFAULT]\nevidence_hours =\n[local]\ngates = quality\n[production]\nevidence_hours = 24\nseparate_promoter = yes\n")
    assert open_registry(read_settings("local", tmp_path, {})).policy == POLICY
    assert open_registry(read_settings("production", tmp_path, {})).policy == Policy(("quality", "fairness"), 24, True)


# Races

def climb(url: str, store: Path, actor: str, rounds: int, barrier: Any) -> list[tuple[int, bool]]:
    "Look together with all others, then promote together with them to the generation that everybody saw; which one it was, and whether it was won."
    registry, done = Registry(url, store, actor, policy=POLICY), []
    found = versions(registry, "tiny")
    for turn in range(rounds):
        barrier.wait()
        seen = generation(registry, "tiny")
        barrier.wait()
        try: done.append((promote(registry, found[turn % len(found)], expect=seen), True))
        except Conflict: done.append((seen + 1, False))
    return done


@pytest.mark.parametrize("rounds", [5, pytest.param(125, marks=pytest.mark.chaos)])
def test_of_racing_promotions_one_wins_each_generation(registry, three, url, rounds):
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__]) # eight processes that have imported it already
    with context.Manager() as manager, context.Pool(8) as pool:
        barrier = manager.Barrier(8)
        each = pool.starmap(climb, [(url, registry.store.root, f"p{i}", rounds, barrier) for i in range(8)], chunksize=1)
    won, lost = Counter(g for done in each for g, first in done if first), Counter(g for done in each for g, first in done if not first)
    print({"won": won.total(), "conflicts": lost.total(), "winners": sum(any(first for _, first in done) for done in each)})
    assert won == dict.fromkeys(range(1, rounds + 1), 1) and lost == dict.fromkeys(range(1, rounds + 1), 7)
    found = audit(registry)
    assert not found.faults and [e.details["generation"] for e in found.entries if e.action == "promote"] == sorted(won)


def test_a_registry_that_is_lost_is_not_begun_anew_in_silence(tmp_path):
    at, path = (f"sqlite:///{tmp_path}/registry.db", tmp_path / "store"), tmp_path / "registry.db"
    add_key(Registry(*at), new_key("admin")[0])
    kept = path.read_bytes()
    path.unlink()
    for _ in range(2): # the first try leaves nothing behind that the second takes for a registry
        with pytest.raises(RegistryError, match=r"has been lost.*registry\.db\.anchor has noted 1 changes.*mlray registry restore"): Registry(*at)
        assert not path.exists()
    path.touch()
    with pytest.raises(RegistryError, match="has been lost"): Registry(*at)
    path.write_bytes(kept)
    assert len(keys(Registry(*at))) == 1
    path.unlink()
    (tmp_path / "registry.db.anchor").rename(tmp_path / "registry.db.anchor.lost")
    assert keys(Registry(*at)) == (), "on purpose"
