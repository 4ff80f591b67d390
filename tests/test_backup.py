"""A copy of a running registry, and the way back: whole or refused. `-m chaos` adds PostgreSQL, four writers at once, and kill -9."""
import json
import os
import random
import shutil
import signal
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from typer.testing import CliRunner

import mlray.governance.backup
from mlray.cli import app
from mlray.governance.access import new_key
from mlray.governance.backup import backup, backups, check_backup, restore
from mlray.governance.database import EVIDENCE, VERSIONS
from mlray.governance.ledger import audit
from mlray.governance.proof import verify
from mlray.governance.registry import Registry, add_evidence, add_key, bundle_of, evidence, generation, history, open_registry, promote, register, version, versions
from mlray.governance.signature import create_signer
from mlray.values.errors import MlrayError, Refused, RegistryError, Unavailable
from mlray.values.settings import Settings
from tests.postgres import Postgres, postgres
from tests.test_registry import PASSED, tiny

CHILDREN = get_context("forkserver")
CHILDREN.set_forkserver_preload(["tests.test_backup"])


def settings_for(home: Path, url: str = "") -> Settings: return Settings(home=home, registry=url, gates=("quality",), tracking="disabled")


def with_the_key(settings: Settings, of: Settings) -> Settings:
    "What an administrator does before a restore."
    settings.home.mkdir(parents=True)
    (settings.home / "audit.key").touch(0o600)
    (settings.home / "audit.key").write_bytes((of.home / "audit.key").read_bytes())
    return settings


def grown(settings: Settings, made: Path, seeds: range) -> Registry:
    "Versions with evidence, the last one in production."
    registry = open_registry(settings, "ada")
    for seed in seeds:
        found = register(registry, tiny(made, seed), {"seed": seed, "score": 0.1 + seed / 7}, {"rows": f"ä€ {seed}"} if seed % 2 else None)
        add_evidence(registry, found, "quality", PASSED, f"page {seed}".encode())
        promote(registry, found)
    return registry


def holds(settings: Settings, source: Registry) -> Registry:
    "The same versions, evidence, aliases and past; and it goes on from there."
    registry = open_registry(settings, "eve")
    assert not audit(registry).faults
    assert versions(registry) == versions(source)
    assert [evidence(registry, v) for v in versions(registry)] == [evidence(source, v) for v in versions(source)]
    assert [bundle_of(registry, v).digest for v in versions(registry)] == [v.digest for v in versions(source)]
    assert history(registry)[:-1] == history(source)[:len(history(registry)) - 1]
    assert history(registry)[-1].action == "restore"
    return registry


@pytest.fixture
def laptop(tmp_path) -> Settings: return settings_for(tmp_path / "laptop")


def test_back_again(laptop, tmp_path):
    source = grown(laptop, tmp_path / "made", range(3))
    made = backup(source, tmp_path / "kept")
    assert (made.versions, made.rows, made.keys) == (3, len(history(source)), False) and made.blobs == 3 * 3
    assert not list((tmp_path / "kept").rglob("*.key"))
    team = with_the_key(settings_for(tmp_path / "team"), laptop)
    restore(tmp_path / "kept", team)
    registry = holds(team, source)
    assert set(source.database.anchors()) <= set(registry.database.anchors())
    new = register(registry, tiny(tmp_path / "made", 9), {})
    add_evidence(registry, new, "quality", PASSED, b"a page")
    assert promote(registry, new) == 4 and not audit(registry).faults


def test_only_what_is_new_is_copied(laptop, tmp_path):
    source = grown(laptop, tmp_path / "made", range(2))
    first = backup(source, tmp_path / "kept")
    again = backup(source, tmp_path / "kept")
    assert first.copied > 0 and again.copied == 0
    grown(laptop, tmp_path / "made", range(2, 3))
    assert 0 < backup(source, tmp_path / "kept").copied < first.copied
    assert [b.versions for b in backups(tmp_path / "kept")] == [2, 2, 3]
    team = with_the_key(settings_for(tmp_path / "team"), laptop)
    assert restore(tmp_path / "kept", team, first.name[:20]).versions == 2 == len(versions(open_registry(team)))


def test_keys_go_along_only_when_asked(laptop, tmp_path, monkeypatch):
    monkeypatch.delenv("MLRAY_AUDIT_KEY", raising=False)
    create_signer(laptop.home / "signers", "ada", "2026-01-01T00:00:00+00:00")
    source = grown(laptop, tmp_path / "made", range(1))
    backup(source, tmp_path / "kept")
    with pytest.raises(RegistryError, match=r"The key of the audit is not in backup.*Set MLRAY_AUDIT_KEY"): restore(tmp_path / "kept", settings_for(tmp_path / "team"))
    assert not (tmp_path / "team").exists(), "something was written before it was known whether the backup is whole"
    backup(source, tmp_path / "kept", with_keys=True)
    team = settings_for(tmp_path / "team")
    restore(tmp_path / "kept", team)
    registry = holds(team, source)
    assert (team.home / "audit.key").stat().st_mode & 0o077 == 0
    assert [k.id for k in registry.attestor.keys] == [k.id for k in source.attestor.keys] != []
    assert verify(registry, version(registry, "tiny/1")).holds


def one_blob(kept: Path, what: str) -> Path:
    return next(p for p in sorted((kept / "store").rglob(what)))


def spoil_row(kept: Path) -> None:
    "Slip in a promotion past the registry, and mend the sums: only the audit can tell."
    (folder,) = kept.glob("snapshots/*")
    with sqlite3.connect(folder / "registry.db") as file: file.execute("UPDATE aliases SET number = 1")
    file.close()
    told = json.loads((folder / "backup.json").read_text())
    told["files"] = mlray.governance.backup._sums(folder)
    (folder / "backup.json").write_text(json.dumps(told))


def spoil_anchor(kept: Path) -> None:
    "Cut off the end of the chain together with what it tells of, and mend the sums: only an anchor can tell."
    (folder,) = kept.glob("snapshots/*")
    with sqlite3.connect(folder / "registry.db") as file:
        for (trigger,) in file.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall(): file.execute(f"DROP TRIGGER {trigger}")
        file.execute("DELETE FROM events WHERE seq = (SELECT max(seq) FROM events)")
    file.close()
    told = json.loads((folder / "backup.json").read_text())
    (folder / "backup.json").write_text(json.dumps(told | {"files": mlray.governance.backup._sums(folder)}))


@pytest.mark.parametrize(("spoil", "letter"), [
    (lambda k: one_blob(k, "model.onnx").write_bytes(b"another model"), r"lacks tiny/\d"),
    (lambda k: one_blob(k, "quality.ipynb").write_bytes(b"another page"), "lacks the page of gate quality on tiny/"),
    (lambda k: shutil.rmtree(one_blob(k, "statement.json").parent), "lacks the statement of gate quality.*it is not there"),
    (lambda k: next(k.glob("snapshots/*/registry.db")).write_bytes(b"x"), "registry.db is not as it was written"),
    (lambda k: next(k.glob("snapshots/*/anchors.jsonl")).unlink(), "anchors.jsonl is not as it was written"),
    (lambda k: next(k.glob("snapshots/*/backup.json")).write_text("{"), "cannot be read"),
    (spoil_row, "it tells of alias tiny production"), (spoil_anchor, "anchored and is not there"),
], ids=["a graph", "a page", "a statement", "the rows", "anchors", "the letter itself", "an alias", "the end"])
def test_what_was_touched_comes_back_nowhere(spoil, letter, laptop, tmp_path):
    backup(grown(laptop, tmp_path / "made", range(2)), tmp_path / "kept")
    assert check_backup(tmp_path / "kept", laptop.home).versions == 2
    spoil(tmp_path / "kept")
    team = with_the_key(settings_for(tmp_path / "team"), laptop)
    with pytest.raises(RegistryError, match=letter): check_backup(tmp_path / "kept", laptop.home)
    with pytest.raises(RegistryError, match=letter): restore(tmp_path / "kept", team)
    assert [p.name for p in team.home.iterdir()] == ["audit.key"], "something was written before all of it was looked at"


def test_what_is_refused(laptop, tmp_path):
    source = grown(laptop, tmp_path / "made", range(1))
    with pytest.raises(RegistryError, match="There is no backup in"): restore(tmp_path / "kept", laptop)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.tex").touch()
    with pytest.raises(RegistryError, match="has other things in it"): backup(source, tmp_path / "full")
    backup(source, tmp_path / "kept")
    before = history(source)
    with pytest.raises(RegistryError, match="is not empty: there are versions"): restore(tmp_path / "kept", laptop)
    assert history(source) == before
    with pytest.raises(RegistryError, match="There is no backup '1999'"): restore(tmp_path / "kept", laptop, "1999")
    with pytest.raises(RegistryError, match="backups of another registry"): backup(grown(settings_for(tmp_path / "other"), tmp_path / "made2", range(1)), tmp_path / "kept")
    add_key(source, new_key("admin")[0])
    with pytest.raises(Refused, match="db:change asks for a key of admin, and MLRAY_API_KEY is not set"): backup(open_registry(laptop.model_copy(update={"access": "keys"})), tmp_path / "kept")
    shutil.rmtree(source.store.folder(versions(source)[0].digest))
    with pytest.raises(RegistryError, match=r"tiny/1 .* cannot be copied"): backup(source, tmp_path / "fresh")
    assert not backups(tmp_path / "fresh")


def test_into_a_bucket_of_which_a_copy_is_here_already(laptop, tmp_path):
    "A restore that was killed has left bytes here that never got there."
    source = grown(laptop, tmp_path / "made", range(1))
    backup(source, tmp_path / "kept")
    team = with_the_key(settings_for(tmp_path / "team"), laptop).model_copy(update={"store": f"file://{tmp_path}/bucket"})
    shutil.copytree(laptop.home / "store", team.home / "store")
    restore(tmp_path / "kept", team)
    shutil.rmtree(team.home / "store")
    holds(team, source)


def test_a_disk_that_is_full(laptop, tmp_path, monkeypatch):
    source = grown(laptop, tmp_path / "made", range(1))
    first = backup(source, tmp_path / "kept")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(Unavailable, match="was not finished: No space left on device"): backup(source, tmp_path / "kept")
    monkeypatch.undo()
    assert backups(tmp_path / "kept") == (first,) and not list(tmp_path.glob("kept/snapshots/.*"))
    assert check_backup(tmp_path / "kept", laptop.home) == first


def test_while_others_write(laptop, tmp_path):
    "What was acknowledged before a backup began is in it; what came meanwhile, whole or not at all."
    bundles, stop = [tiny(tmp_path / "made", seed) for seed in range(24)], threading.Event()
    source, told = grown(laptop, tmp_path / "made", range(24, 25)), list[str]()

    def writer(mine) -> None:
        registry = open_registry(laptop, "bob")
        for bundle in mine:
            if stop.is_set(): return
            told.append(str(register(registry, bundle, {})))

    threads = [threading.Thread(target=writer, args=(bundles[i::2],)) for i in (0, 1)]
    for t in threads: t.start()
    taken = []
    for _ in range(3):
        known = list(told)
        taken.append((known, backup(source, tmp_path / "kept")))
    stop.set()
    for t in threads: t.join()
    for at, (known, made) in enumerate(taken):
        team = with_the_key(settings_for(tmp_path / f"team{at}"), laptop)
        restore(tmp_path / "kept", team, made.name)
        assert set(known) <= {str(v) for v in versions(open_registry(team))}


def test_by_the_door(laptop, tmp_path, monkeypatch):
    grown(laptop, tmp_path / "made", range(1))
    monkeypatch.chdir(tmp_path)
    run = lambda home, *words: CliRunner().invoke(app, ["registry", *words], env={"MLRAY_HOME": str(home), "MLRAY_GATES": "quality"})
    said = run(laptop.home, "backup", "kept")
    assert said.exit_code == 0 and "NOT in it" in said.output
    assert json.loads(run(laptop.home, "backup", "kept", "--list", "--json").stdout)[0]["versions"] == 1
    assert "is whole: 1 versions, 3 blobs" in run(laptop.home, "restore", "kept", "--check").output
    team = with_the_key(settings_for(tmp_path / "team"), laptop)
    done = run(team.home, "restore", "kept", "--json")
    assert done.exit_code == 0 and json.loads(done.stdout)["restored"] is True
    assert isinstance(run(team.home, "restore", "kept").exception, RegistryError) # a letter, and 2


def test_a_copy_of_what_was_tampered_with_says_so(laptop, tmp_path, monkeypatch):
    "It is made, as evidence; and its exit code says that it is no way back."
    grown(laptop, tmp_path / "made", range(1))
    monkeypatch.chdir(tmp_path)
    run = lambda *words: CliRunner().invoke(app, ["registry", *words], env={"MLRAY_HOME": str(laptop.home), "MLRAY_GATES": "quality"})
    assert json.loads(run("backup", "kept", "--json").stdout)["broken"] == ""
    with sqlite3.connect(laptop.home / "registry.db") as database:
        for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'trigger' AND tbl_name = 'events'").fetchall(): database.execute(f"DROP TRIGGER {name}")
        database.execute("UPDATE events SET actor = 'nobody' WHERE seq = 1")
    said = run("backup", "kept")
    assert said.exit_code == 1 and "BROKEN" in said.output and "row 1: it is not as it was sealed" in said.output, said.output
    assert len(json.loads(run("backup", "kept", "--list", "--json").stdout)) == 2
    assert run("restore", "kept", "--check").exit_code != 0


# --- by hand: another database, four writers, kill -9 ------------------------------------------------------------------

@pytest.fixture(scope="module")
def server() -> Iterator[Postgres]:
    pytest.importorskip("psycopg", reason="pip install 'mlray[postgres]'")
    with postgres() as running: yield running


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request) -> Callable[[str], str]:
    "Makes the address of an empty database; empty for SQLite."
    if request.param == "sqlite": return lambda name: ""
    server = request.getfixturevalue("server")

    def made(name: str) -> str:
        name = f"{name}_{abs(hash(request.node.name)):x}"
        server.run(f"create database {name}")
        return server.uri(name)
    return made


@pytest.mark.chaos
def test_from_a_laptop_to_a_team_and_back(server, laptop, tmp_path):
    source = grown(laptop, tmp_path / "made", range(3))
    add_key(source, new_key("viewer")[0])
    backup(source, tmp_path / "kept")
    server.run("create database team")
    team = with_the_key(settings_for(tmp_path / "team", server.uri("team")), laptop)
    restore(tmp_path / "kept", team)
    registry = holds(team, source)
    add_evidence(registry, versions(registry)[0], "quality", PASSED, b"another page") # takes a number of its own
    backup(registry, tmp_path / "back")
    again = with_the_key(settings_for(tmp_path / "again"), laptop)
    restore(tmp_path / "back", again)
    holds(again, registry)

    def rows(r: Registry) -> list:
        with r.database.change() as c: return [[tuple(row) for row in c.execute(t.select().order_by(*t.c[:2]))] for t in (VERSIONS, EVIDENCE)]
    assert rows(open_registry(again)) == rows(registry)


def register_and_promote(settings: Settings, made: Path, seed: int, said: Connection) -> None:
    registry = open_registry(settings, f"p{seed}")
    said.send("ready")
    for turn in range(10_000):
        found = register(registry, tiny(made, 1000 * seed + turn), {})
        add_evidence(registry, found, "quality", PASSED, f"{seed} {turn}".encode())
        said.send((str(found), found.digest, promote(registry, found)))


def heard(pipe: Connection) -> list:
    found = []
    try:
        while pipe.poll(): found.append(pipe.recv())
    except EOFError: pass
    return found


@pytest.mark.chaos
def test_while_four_processes_register_and_promote(database, tmp_path):
    settings = settings_for(tmp_path / "home", database("source"))
    registry, told, children = grown(settings, tmp_path / "made", range(1)), [], []
    for seed in range(1, 5):
        ours, theirs = CHILDREN.Pipe()
        children.append((CHILDREN.Process(target=register_and_promote, args=(settings, tmp_path / f"made{seed}", seed, theirs)), ours))
        children[-1][0].start()
        theirs.close()
    try:
        for _, pipe in children: assert pipe.recv() == "ready"
        taken = []
        for _ in range(6):
            while len(now := [a for _, pipe in children for a in heard(pipe)]) == 0: time.sleep(0.02)
            told += now
            began = time.monotonic()
            taken.append((list(told), backup(registry, tmp_path / "kept"), time.monotonic() - began))
        while not any(pipe.poll() for _, pipe in children): time.sleep(0.02) # nobody waited for the backup for ever
    finally:
        for process, _ in children: process.kill()
        for process, _ in children: process.join()
    assert not audit(registry).faults
    for at, (known, made, seconds) in enumerate(taken):
        team = with_the_key(settings_for(tmp_path / f"team{at}", database(f"t{at}")), settings)
        restore(tmp_path / "kept", team, made.name)
        there = open_registry(team)
        found = {str(v): v.digest for v in versions(there)}
        assert all(found.get(name) == digest for name, digest, _ in known) and generation(there, "tiny") >= max(g for *_, g in known)
        print(f"acknowledged before {len(known):4}  in the backup {len(found):4}  generation {generation(there, 'tiny'):4}  copied {made.copied:9,} bytes in {seconds:.2f} s")


def back_up_and_say(settings: Settings, kept: Path, said: Connection) -> None:
    registry = open_registry(settings)
    said.send("ready")
    said.recv()
    said.send(backup(registry, kept).name)


@pytest.mark.chaos
def test_killed_at_any_instant(database, tmp_path):
    settings = settings_for(tmp_path / "home", database("source"))
    registry, rng, killed, finished = grown(settings, tmp_path / "made", range(12)), random.Random(1), 0, 0
    backup(registry, tmp_path / "kept")
    began = time.monotonic()
    backup(registry, tmp_path / "measured")
    longest = 1.2 * (time.monotonic() - began)
    for turn in range(40):
        fresh = tmp_path / "kept" if turn % 2 else tmp_path / f"fresh{turn}"
        ours, theirs = CHILDREN.Pipe()
        process = CHILDREN.Process(target=back_up_and_say, args=(settings, fresh, theirs))
        process.start()
        theirs.close()
        assert ours.recv() == "ready"
        ours.send("go")
        time.sleep(rng.uniform(0, longest))
        process.kill()
        process.join()
        acknowledged = [m for m in heard(ours) if isinstance(m, str)]
        killed, finished = killed + (process.exitcode == -signal.SIGKILL), finished + bool(acknowledged)
        there = backups(fresh)
        assert {b.name for b in there} >= set(acknowledged), "what was acknowledged is not there"
        for found in there: assert check_backup(fresh, settings.home, found.name).versions == 12, "half a backup was taken for a whole one"
        assert backup(registry, fresh).versions == 12 and check_backup(fresh, settings.home), "a killed backup stands in the way of the next"
    assert killed >= 10, "hardly anybody was killed, so little was shown"
    print(f"killed {killed} of 40, {finished} had finished; every backup that has a name is whole")


@pytest.mark.chaos
def test_a_restore_that_is_killed_starts_again(database, tmp_path):
    settings, rng, filled = settings_for(tmp_path / "home"), random.Random(2), 0
    source = grown(settings, tmp_path / "made", range(8))
    backup(source, tmp_path / "kept")
    for turn in range(12):
        team = with_the_key(settings_for(tmp_path / f"team{turn}", database(f"k{turn}")), settings)
        process = CHILDREN.Process(target=restore, args=(tmp_path / "kept", team))
        process.start()
        time.sleep(rng.uniform(0.02, 0.5))
        process.kill()
        process.join()
        try: restore(tmp_path / "kept", team)
        except MlrayError as error:
            assert "is not empty" in str(error)
            filled += 1
        holds(team, source)
    print(f"killed 12, of which {filled} had all rows; each is whole in the end")
