"""Who may let what out: roles, approvals, freezes, requests that are answered once, tokens of an identity provider; on SQLite and on PostgreSQL, and every refusal in the audit."""
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from uuid import uuid4

import pytest
from hypothesis import given, settings as hypothesis_settings, strategies as st

from mlray.governance.access import ACTIONS, ROLES, Caller, new_key, recognise
from mlray.governance.anchoring import anchor
from mlray.governance.backup import backup
from mlray.governance.database import HEAD, OUTBOX, REQUESTS, Database
from mlray.governance.ledger import audit
from mlray.governance.opened import open_registry
from mlray.governance.outbox import Letter, deliver, send_again, waiting
from mlray.governance.policy import Policy, windows
from mlray.governance.proof import change_signer, sign
from mlray.governance.reading import Reading, note, readings
from mlray.governance.registry import Registry, add_evidence, add_key, bundle_of, events, generation, history, keys, promote, register, remove, retire, revoke_key, rollback, version, versions
from mlray.governance.release import approvals, approve, deprecate, environment_of, withdraw
from mlray.governance.triggers import resume
from mlray.monitoring.rollout_step import start, stop
from mlray.serving.plan import set_share
from mlray.serving.service import Service
from mlray.shipping.bundle import pack
from mlray.values.errors import Conflict, Refused, RegistryError, Unavailable
from mlray.values.settings import Settings, amended, read_settings
from tests.test_registry import GOLDEN, PASSED, server, tiny, url

__all__ = ["server", "url"] # fixtures
TUESDAY = datetime(2026, 7, 7, 9, tzinfo=UTC)
STRICT = Policy(gates=("quality",), evidence_hours=24, separate_promoter=True, approvals=2, freeze=windows("Fri 16:00..Mon 08:00"), freeze_zone="Europe/Berlin")


@pytest.fixture
def house(url, tmp_path):
    "`house(name, role)`: the registry as that person has it; `house.at` is what their clocks say."
    class House:
        at = TUESDAY
        def __call__(self, name: str, *roles: str, policy: Policy = STRICT, models: tuple[str, ...] = ("*",), mirrors: tuple[str, ...] = ()) -> Registry:
            return Registry(url, tmp_path / "home/store", now=lambda: self.at, policy=policy, caller=Caller(name, roles, models), mirrors=mirrors)
    return House()


@pytest.fixture
def proved(house, tmp_path) -> tuple:
    "Two versions of Ada's, with passed evidence."
    ada = house("ada", "trainer")
    found = tuple(register(ada, tiny(tmp_path, seed), {}) for seed in (1, 2))
    for v in found: add_evidence(ada, v, "quality", PASSED, b"{}")
    return found


def refused(registry: Registry) -> list[dict]:
    with registry.database.change() as c: return [{"by": e.actor, "object": e.object, **e.details} for e in registry.database.entries(c) if e.action == "refuse"]


# The two-person rule

def test_production_needs_two_people_who_did_not_train(house, proved):
    ada, grace, alan, eve = house("ada", "trainer", "promoter"), house("grace", "promoter"), house("alan", "admin"), house("eve", "viewer")
    one, two = proved
    says = lambda words: pytest.raises(Refused, match=words)
    with says("another person has to approve"): approve(ada, one)
    with says("model:approve is for others than viewer"): approve(eve, one)
    with says("0 of 2 approvals"): promote(grace, one)
    given = approve(grace, one, note="I have seen the pages")
    assert approve(grace, one).seq == given.seq and (given.role, given.note, given.created) == ("promoter", "I have seen the pages", TUESDAY.isoformat()), "a person's word counts once"
    with says("1 of 2 approvals"): promote(alan, one)
    approve(alan, one, "canary")
    with says("1 of 2 approvals"): promote(alan, one)
    approve(alan, one)
    withdraw(grace, one, note="wait")
    with says("1 of 2 approvals"): promote(alan, one)
    with pytest.raises(RegistryError, match="no approval of tiny/1 for production that still counts"): withdraw(grace, one)
    approve(grace, one)
    with says("ada registered it, and another person"): promote(ada, one)
    assert generation(alan, "tiny") == 0 and promote(alan, one) == 1
    with says("0 of 2 approvals"): promote(alan, one, expect=1) # replayed: those words are spent
    with says("0 of 2 approvals"): promote(alan, two)
    assert [(a.actor, a.alias, a.spent, bool(a.withdrawn)) for a in approvals(alan, one)] == [("grace", "production", None, True), ("alan", "canary", None, False), ("alan", "production", 1, False), ("grace", "production", 1, False)]
    assert Counter(r["by"] for r in refused(alan)) == {"ada": 2, "eve": 1, "grace": 1, "alan": 5} and not audit(alan).faults


def test_what_was_rolled_back_needs_new_words(house, proved):
    grace, alan, edsger = (house(n, "promoter") for n in ("grace", "alan", "edsger"))
    for v in proved:
        for who in (grace, alan): approve(who, v)
        promote(edsger, v)
    assert rollback(edsger, "tiny")[0].number == 1, "going back asks nobody"
    with pytest.raises(Refused, match="0 of 2 approvals"): promote(edsger, proved[1])
    assert not audit(edsger).faults


def test_nothing_goes_out_on_friday_evening(house, proved):
    grace, alan, root = house("grace", "promoter"), house("alan", "promoter"), house("root", "admin")
    for who in (grace, root): approve(who, proved[0])
    house.at = datetime(2026, 7, 3, 13, 59, tzinfo=UTC) # 15:59 in Berlin in summer
    for who in (grace, root): approve(who, proved[1])
    for v in proved: add_evidence(house("ada", "trainer"), v, "quality", PASSED, b"{}")
    assert promote(alan, proved[0]) == 1
    house.at = datetime(2026, 7, 3, 14, 0, tzinfo=UTC)
    with pytest.raises(Refused, match=r"nothing is let out in Fri 16:00..Mon 08:00 \(Europe/Berlin\)"): promote(alan, proved[1])
    with pytest.raises(Refused, match="alan is no admin, and may not let anything out in a freeze"): promote(alan, proved[1], override="I want to")
    assert promote(alan, proved[1], "canary") == 1 and generation(alan, "tiny") == 1
    assert promote(root, proved[1], override="the old one discriminates") == 2 and rollback(alan, "tiny")[1] == 3
    last = [r for r in events(root).rows if r[1] == "promote"][-1][3]
    assert "override=the old one discriminates" in last and "freeze=Fri 16:00..Mon 08:00" in last and not audit(root).faults


def test_local_lets_a_researcher_move(tmp_path):
    registry = open_registry(Settings(home=tmp_path / "home", gates=("quality",)), actor="ada")
    found = register(registry, tiny(tmp_path, 1), {})
    add_evidence(registry, found, "quality", PASSED, b"{}")
    assert promote(registry, found) == 1


# Roles × actions

@pytest.mark.parametrize("role", ROLES)
def test_a_role_allows_what_the_matrix_says_and_a_dead_key_nothing(role):
    now = datetime(2026, 1, 1, tzinfo=UTC)
    key, text = new_key(role, "ada", ["adult*"], now + timedelta(days=1))
    presented = {"ok": (key, "adult-eu", now), "expired": (key, "adult", now + timedelta(days=1)), "revoked": (replace(key, revoked=now.isoformat()), "adult", now), "wrong model": (key, "diabetes", now)}
    for action in ACTIONS:
        got = {case: (bearer := recognise(text, [k], at)) and bearer.may(action, model) for case, (k, model, at) in presented.items()}
        assert got == {"ok": action in ROLES[role], "expired": None, "revoked": None, "wrong model": False}, action
    assert {recognise(t, [key], now) for t in ("", "mlr_", f"mlr_{key.id}_", text[:-1], text + "x", f"mlr_{key.id}_{key.sha256}")} == {None}


def rolled_out(r, v, tmp):
    "The first version against the one in production, begun and ended."
    start(r, v[0], bundle_of(r, v[0]).spec)
    stop(r, "tiny", "enough")


DEEDS = {
    "model:register": lambda r, v, tmp: register(r, tiny(tmp, 99), {}), "model:gate": lambda r, v, tmp: add_evidence(r, v[0], "quality", PASSED, b"{}"),
    "model:approve": lambda r, v, tmp: approve(r, v[0]), "model:promote": lambda r, v, tmp: promote(r, v[0], "canary"), "model:rollback": lambda r, v, tmp: rollback(r, "tiny", "shadow"),
    "model:deprecate": lambda r, v, tmp: deprecate(r, v[0], "old", "2099-01-01"), "model:retire": lambda r, v, tmp: retire(r, v[2], "old"), "key:create": lambda r, v, tmp: add_key(r, new_key("viewer")[0]),
    "model:sign": lambda r, v, tmp: sign(r, v[0]), "signer:change": lambda r, v, tmp: change_signer(r, "create", f"s{uuid4().hex[:6]}"),
    "key:revoke": lambda r, v, tmp: revoke_key(r, keys(r)[0].id, "lost"), "traffic:set": lambda r, v, tmp: set_share(r, "tiny", 0.0), "rollout:step": rolled_out, "mirror:deliver": lambda r, v, tmp: (deliver(r, {}), send_again(r, "mlflow")),
    "run:train": lambda r, v, tmp: resume(r, "tiny", "the rows are mended", datetime.now(UTC)),
    "db:change": lambda r, v, tmp: backup(r, tmp),
    "data:note": lambda r, v, tmp: note(r, [Reading("people.csv", "tiny", "train", "5f" * 16, 3, 0, None, {})]), "audit:read": lambda r, v, tmp: anchor(r, "tiny", []),
}
OF_A_MODEL = {a for a in DEEDS if a.startswith(("run:", "model:", "traffic:", "rollout:", "data:"))}


def test_every_change_goes_through_the_matrix(tmp_path):
    "Each function that changes the registry, as each role, as a role for other models, and as nobody; on SQLite, since the matrix knows no database."
    at = f"sqlite:///{tmp_path}/home/registry.db"
    root = Registry(at, tmp_path / "home/store", "root", policy=Policy(gates=()))
    v = [register(root, tiny(tmp_path, seed), {}) for seed in (1, 2, 3)]
    for each in v[:2]: promote(root, each, "shadow")
    for each, alias in ((v[1], "production"), (v[0], "canary")): promote(root, each, alias)
    add_key(root, new_key("viewer")[0])
    change_signer(root, "create", "ada")
    source = (Path(__file__).parents[1] / "mlray").rglob("*.py")
    assert {a for p in source if p.stem != "run" for a in __import__("re").findall(r'Ask\(\s*"([a-z:]+)"', p.read_text())} == set(DEEDS), "an action that no test knows"
    expected = 0
    for action, deed in DEEDS.items():
        for roles, models in [*(((r,), ("*",)) for r in ROLES if r != "admin"), (("admin",), ("other*",)), ((), ("*",)), (("root",), ("*",))]:
            who = Registry(at, tmp_path / "home/store", policy=Policy(gates=()), caller=Caller("eve", roles, models))
            may = roles and action in ROLES.get(roles[0], ()) and not (action in OF_A_MODEL and models != ("*",))
            if may: continue # done below, once
            before = len(audit(root).entries)
            with pytest.raises(Refused, match=action): deed(who, v, tmp_path / uuid4().hex)
            expected += 1
            told = audit(root).entries[before:]
            assert [(e.action, e.actor, e.details["asked"]) for e in told] == [("refuse", "eve", action)]
    for action, deed in DEEDS.items():
        role = next(r for r in ROLES if action in ROLES[r])
        deed(Registry(at, tmp_path / "home/store", policy=Policy(gates=()), caller=Caller("eve", (role,))), v, tmp_path / action)
    print({"refused": expected})
    assert expected == len(refused(root)) and not audit(root).faults


def test_commands_act_as_the_bearer_of_the_key(tmp_path, monkeypatch):
    settings = amended(Settings(), home=tmp_path / "home", access="keys", gates=(), approvals=1, separate_promoter=True)
    monkeypatch.delenv("MLRAY_API_KEY", raising=False)
    made = {name: new_key(role, name, [models], datetime.now(UTC) + timedelta(days=days)) for name, role, models, days in [("root", "admin", "*", 1), ("ada", "trainer", "*", 1), ("grace", "promoter", "*", 1), ("alan", "promoter", "other", 1), ("old", "admin", "*", -1)]}
    with pytest.raises(Refused): add_key(open_registry(settings), made["grace"][0])
    add_key(open_registry(settings), made["root"][0])
    with pytest.raises(Refused): add_key(open_registry(settings), new_key("admin")[0])
    for name in ("ada", "grace", "alan", "old"): add_key(open_registry(settings, presented=made["root"][1]), made[name][0])
    as_ = lambda name: open_registry(settings, presented=made[name][1])
    found = register(as_("ada"), tiny(tmp_path, 1), {})
    assert found.actor == "ada"
    with pytest.raises(Refused, match="of MLRAY_API_KEY ended on 20"): approve(as_("old"), found)
    with pytest.raises(Refused, match="for the models other, and tiny is none of them"): approve(as_("alan"), found)
    approve(as_("grace"), found)
    revoke_key(as_("root"), made["grace"][0].id, "left")
    with pytest.raises(Refused, match="of MLRAY_API_KEY was revoked on 20"): promote(as_("grace"), found)
    monkeypatch.setenv("MLRAY_API_KEY", made["root"][1])
    assert promote(open_registry(settings), found) == 1 and not audit(open_registry(settings)).faults
    assert made["root"][1].split("_", 2)[2] not in Path(tmp_path / "home/registry.db").read_bytes().decode("latin1"), "a secret was kept"


# Asked once

def test_a_request_is_answered_once_and_again(house, proved, tmp_path):
    root = house("root", "admin", policy=Policy(gates=()))
    ask = {"register": lambda k: str(register(root, tiny(tmp_path / uuid4().hex, 7), {}, once=k)), "promote": lambda k: promote(root, proved[0], expect=None, once=k), "second": lambda k: promote(root, proved[1], once=k),
           "approve": lambda k: approve(root, proved[1], once=k).seq, "withdraw": lambda k: withdraw(root, proved[1], once=k), "rollback": lambda k: (lambda v, g: (v.number, g))(*rollback(root, "tiny", once=k)),
           "deprecate": lambda k: deprecate(root, proved[1], "old", "2026-12-31", once=k).sunset, "retire": lambda k: str(retire(root, proved[1], "old", anyway=True, once=k).retired)}
    first = {name: do(f"key {name}") for name, do in ask.items()}
    before = len(audit(root).entries)
    assert {name: do(f"key {name}") for name, do in ask.items()} == first and len(audit(root).entries) == before and not audit(root).faults
    assert first["promote"] == 1 and first["second"] == 2 and first["rollback"] == (1, 3)
    with pytest.raises(RegistryError, match="was used for another request"): promote(root, proved[0], "canary", once="key promote")
    with pytest.raises(RegistryError, match="was used for another request"): promote(house("grace", "promoter", policy=Policy(gates=())), proved[0], once="key promote")
    for key in ("", "x" * 129):
        with pytest.raises(RegistryError, match="1 to 128"): promote(root, proved[0], once=key)
    with root.database.change() as c: assert len(c.execute(REQUESTS.select()).all()) == len(ask)


def test_a_refused_request_may_be_asked_again(house, proved):
    grace, alan, key = house("grace", "promoter"), house("alan", "promoter"), "4b1f"
    with pytest.raises(Refused): promote(alan, proved[0], once=key)
    for who in (grace, house("root", "admin")): approve(who, proved[0])
    with pytest.raises(Conflict): promote(alan, proved[0], expect=3, once=key)
    assert promote(alan, proved[0], once=key) == promote(alan, proved[0], expect=0, once=key) == 1


@pytest.mark.parametrize("clients", [8, pytest.param(64, marks=pytest.mark.chaos)])
def test_clients_who_ask_together_with_one_key_get_one_change(house, proved, clients):
    root = house("root", "admin", policy=Policy(gates=()))
    keys_ = [uuid4().hex for _ in range(clients // 4)]
    with ThreadPoolExecutor(8) as pool: got = list(pool.map(lambda i: (i % len(keys_), promote(root, proved[i % len(keys_) % 2], once=keys_[i % len(keys_)])), range(clients)))
    assert len({g for _, g in got}) == len(keys_) == generation(root, "tiny") and len(set(got)) == len(keys_) and not audit(root).faults


# The end of a version

def test_an_end_is_announced_held_up_and_told(house, proved, tmp_path):
    root = house("root", "admin", policy=Policy(gates=("quality",)))
    child = register(root, tiny_child(tmp_path, proved[0].digest), {})
    assert child.parent == proved[0].digest
    promote(root, proved[0])
    with pytest.raises(RegistryError, match="is over"): deprecate(root, proved[0], "old", "2026-07-06")
    done = deprecate(root, proved[0], "old", "2026-07-10", "tiny/2")
    assert (done.sunset, done.successor, done.deprecated) == ("2026-07-10", "tiny/2", TUESDAY.isoformat())
    assert deprecate(root, proved[0], "old", "2026-07-08").sunset == "2026-07-08" and promote(root, proved[0], "canary") == 1
    promote(root, proved[1])
    promote(root, proved[1], "canary")
    with pytest.raises(Refused, match="was promised until 2026-07-08"): retire(root, proved[0], "old")
    house.at = TUESDAY + timedelta(days=2)
    with pytest.raises(Refused, match="its sunset was on 2026-07-08"): promote(root, proved[0], "staging")
    with pytest.raises(Refused, match="tiny/3 began with the weights of tiny/1"): retire(root, proved[0], "old")
    assert rollback(root, "tiny")[0].number == 1, "what is deprecated may still be gone back to"
    with pytest.raises(RegistryError, match="There is no tiny@canary"): rollback(root, "tiny", "canary") # it ended with production's way back
    for alias in ("production", "canary"): promote(root, proved[1], alias)
    done = retire(root, proved[0], "old", anyway=True)
    assert done.retired and done.successor == "tiny/2"
    with root.database.change() as c: end = next(e for e in root.database.entries(c) if e.action == "retire").details
    assert {(alias, bool(until)) for alias, _, until in end["served"]} == {("production", True), ("canary", True)} and len(end["served"]) == 3 and "tiny/3 began" in end["anyway"]
    assert not audit(root).faults


def tiny_child(folder: Path, parent: str):
    "A bundle that began with another's weights."
    made = tiny(folder, 50)
    import numpy as np

    from mlray.learning.features import apply
    return pack(folder / "child", made.spec, made.features, (made.path / "model.onnx").read_bytes(), {}, {"seed": 51, "parent": parent}, apply(made.features, {"age": [50.0]}, 1), np.array([0.5], np.float32))


def test_lineage_is_kept_and_its_packages_once(house, tmp_path):
    ada, came = house("ada", "trainer"), {"code": {"commit": "0" * 40, "changed": False}, "environment": "5f" * 32, "packages": "polars==2.1.0\n", "run": "tiny-1", "tracked": {"wandb": "ada/mlray/1"}}
    one, two = (register(ada, tiny(tmp_path, seed), {}, came) for seed in (1, 2))
    assert one.lineage == {k: v for k, v in came.items() if k != "packages"} == two.lineage and environment_of(ada, two) == "polars==2.1.0\n" and not audit(ada).faults


@pytest.mark.parametrize(("statement", "row"), [
    ("UPDATE approvals SET actor='alan'", 6), ("UPDATE approvals SET spent=NULL", 7), ("DELETE FROM approvals", 6), ("UPDATE keys SET models='*'", 5), ("UPDATE keys SET revoked=NULL", 8), ("UPDATE keys SET expires=NULL", 5),
    ("UPDATE versions SET sunset='2099-01-01'", 9), ("UPDATE versions SET lineage=NULL", 1), ("DELETE FROM requests", 7)])
def test_what_is_changed_past_the_registry_is_found(house, tmp_path, statement, row):
    root = house("root", "admin", policy=Policy(gates=("quality",), approvals=1))
    found = register(root, tiny(tmp_path, 1), {}, {"run": "tiny-1"})
    register(root, tiny(tmp_path, 2), {})
    add_evidence(root, found, "quality", PASSED, b"{}")
    add_evidence(root, found, "fairness", PASSED, b"{}")
    key = new_key("viewer", "eve", ["adult"], TUESDAY)[0]
    add_key(root, key)
    approve(house("grace", "promoter", policy=root.policy), found)
    promote(root, found, once="4b1f")
    revoke_key(root, key.id, "left")
    deprecate(root, found, "old", "2026-12-31")
    assert not audit(root).faults
    with root.database.change() as c: c.exec_driver_sql(statement)
    assert row in {f.seq for f in audit(root).faults}


# The outbox

class Deaf:
    "Hears, and goes away before it can say so, now and then."
    def __init__(self, rng: random.Random, often: float): self.rng, self.often, self.heard, self.state = rng, often, [], {}
    def take(self, letter, registry):
        self.heard.append(letter.seq)
        if letter.seq > self.state.get(letter.entry.details.get("alias"), (0, 0))[0]: self.state[letter.entry.details.get("alias")] = (letter.seq, letter.version.number if letter.entry.action != "remove" else None)
        if self.rng.random() < self.often: raise Unavailable("The line went dead.")


def test_what_is_kept_is_delivered_in_order_at_least_once_and_nothing_else(house, proved):
    root = house("root", "admin", policy=Policy(gates=("quality", "fairness")), mirrors=("a", "b"))
    easy = house("root", "admin", policy=Policy(gates=("quality",)), mirrors=("a", "b"))
    for turn in range(6): promote(easy, proved[turn % 2])
    with pytest.raises(Refused): promote(root, proved[0])
    with pytest.raises(Conflict): promote(easy, proved[0], expect=99)
    told = [e.seq for e in audit(root).entries if e.action == "promote"]
    mirrors = {"a": Deaf(random.Random(1), 0.4), "b": Deaf(random.Random(2), 0)}
    rounds = 0
    while any(waiting(easy, t) for t in mirrors):
        deliver(easy, mirrors)
        rounds += 1
    assert mirrors["b"].heard == told and sorted(set(mirrors["a"].heard)) == told and len(mirrors["a"].heard) > len(told) and rounds > 1
    assert mirrors["a"].state == mirrors["b"].state and mirrors["a"].heard == sorted(mirrors["a"].heard)
    with root.database.change() as c: assert {(r.target, r.attempts) for r in c.execute(OUTBOX.select()) if r.target == "b"} == {("b", 1)}
    promote(easy, proved[0], "canary")
    assert remove(easy, "tiny", "canary", "it was tried") == proved[0]
    while any(waiting(easy, t) for t in mirrors): deliver(easy, mirrors)
    assert mirrors["a"].state == mirrors["b"].state and mirrors["b"].state["canary"][1] is None and mirrors["b"].state["production"][1] == proved[1].number, "an alias that ended is told as one that moved"
    told = [e.seq for e in audit(root).entries if e.action in ("promote", "remove")]
    assert send_again(easy, "b") == len(told) + 2 and not audit(easy).faults # and the two that were registered before there was a mirror


def test_an_mlflow_folder_follows_the_aliases_and_an_old_letter_changes_nothing(house, proved, tmp_path):
    from mlray.engines.mirror_on_mlflow import MlflowMirror
    root, folder = house("root", "admin", policy=Policy(gates=()), mirrors=("mlflow",)), tmp_path / "mirror"
    for v in proved: promote(root, v)
    rollback(root, "tiny")
    for _ in range(2):
        send_again(root, "mlflow")
        assert not deliver(root, {"mlflow": MlflowMirror(folder)})[0].error
        said = json.loads((folder / "tiny/aliases/production.json").read_bytes())
        assert (said["version"], said["generation"]) == ("tiny/1", 3) and sorted(p.name for p in (folder / "tiny").iterdir()) == ["1", "2", "aliases"]
    promote(root, proved[0], "canary")
    deliver(root, {"mlflow": MlflowMirror(folder)})
    assert (folder / "tiny/aliases/canary.json").is_file()
    remove(root, "tiny", "canary", "it was tried")
    for _ in range(2):
        assert not deliver(root, {"mlflow": MlflowMirror(folder)})[0].error and sorted(p.name for p in (folder / "tiny/aliases").iterdir()) == ["production.json"]
        assert json.loads((folder / "tiny/ended/canary.json").read_bytes())["why"] == "it was tried"
        send_again(root, "mlflow")
    every = [Letter(e, version(root, e.object)) for e in history(root) if e.details.get("alias") == "canary"]
    for letter in (*every, *reversed(every), *every[:1]): MlflowMirror(folder).take(letter, root)
    assert not (folder / "tiny/aliases/canary.json").exists(), "a letter from before its end brings no alias back"
    promote(root, proved[1], "canary")
    deliver(root, {"mlflow": MlflowMirror(folder)})
    assert json.loads((folder / "tiny/aliases/canary.json").read_bytes())["version"] == "tiny/2", "and one that begins again is there"
    assert not [p for p in folder.rglob(".*")], "something was left half written"
    model = folder / "tiny/1" / proved[0].digest / "model.onnx"
    model.write_bytes(model.read_bytes()[:-1] + b"x")
    from mlray.engines.mirror_on_mlflow import _load_pyfunc
    from mlray.values.errors import BundleError
    with pytest.raises(BundleError, match="not the file that was packed"): _load_pyfunc(str(model.parent))


MLFLOW = os.environ.get("MLRAY_MLFLOW", "") # a Python that has mlflow and what mlray needs


@pytest.mark.chaos
@pytest.mark.skipif(not MLFLOW, reason="MLRAY_MLFLOW names no Python with mlflow: python -m venv --system-site-packages mf && mf/bin/pip install mlflow")
def test_mlflow_itself_serves_the_folder(house, proved, tmp_path):
    "`mlflow models serve` and `mlflow.pyfunc.load_model` take what the mirror has written, and answer as mlray does, to the bit."
    import httpx

    from mlray.engines.mirror_on_mlflow import export_model
    from mlray.governance.registry import bundle_of
    from mlray.shipping.bundle import predict
    from tests.conftest import free_port
    bundle, port, rows = bundle_of(house("root", "admin"), proved[0]), free_port(), [{"age": 50.0}, {"age": 1.5}, {"age": 99.25}]
    folder, mine = export_model(bundle, proved[0], tmp_path / "model"), predict(bundle, {"age": [r["age"] for r in rows]}, len(rows)).tolist()
    environment = os.environ | {"PATH": f"{Path(MLFLOW).parent}:{os.environ['PATH']}", "PYTHONPATH": str(Path(__file__).parents[1]), "MLFLOW_TRACKING_URI": f"file:{tmp_path}/runs"}
    loaded = f"import json, mlflow, pandas; print(json.dumps(mlflow.pyfunc.load_model({str(folder)!r}).predict(pandas.DataFrame({rows!r}))))"
    answers = json.loads(subprocess.run([MLFLOW, "-c", loaded], capture_output=True, text=True, check=True, env=environment).stdout.splitlines()[-1])
    log = tmp_path / "serve.log"
    with open(log, "wb") as said: server = subprocess.Popen([MLFLOW, "-m", "mlflow", "models", "serve", "-m", str(folder), "-h", "127.0.0.1", "-p", str(port), "--env-manager", "local"], env=environment, stdout=said, stderr=said, start_new_session=True)
    try:
        end = time.monotonic() + 240
        while True:
            assert server.poll() is None and time.monotonic() < end, log.read_text()[-2000:]
            try:
                if httpx.get(f"http://127.0.0.1:{port}/ping", timeout=5).status_code == 200: break
            except httpx.HTTPError: time.sleep(0.5)
        served = httpx.post(f"http://127.0.0.1:{port}/invocations", json={"dataframe_records": rows}, timeout=60).json()["predictions"]
        refused = httpx.post(f"http://127.0.0.1:{port}/invocations", json={"dataframe_records": [{"age": "old"}]}, timeout=60)
    finally:
        with suppress(ProcessLookupError): os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)
    print({"served": served, "refused": refused.status_code})
    assert served == answers and [a["score"] for a in served] == mine and 400 <= refused.status_code < 500


# Schemas of the past

def test_a_registry_of_schema_0002_is_brought_along(url, tmp_path, monkeypatch):
    "The rows of the golden database, in a database of either kind that Alembic made."
    laid("0002", url, tmp_path, monkeypatch)
    registry = Registry(url, tmp_path / "home/store", "ada", policy=Policy(gates=("quality",)))
    with registry.database.change() as c: assert c.exec_driver_sql("select version_num from alembic_version").scalar() == HEAD >= "0003"
    assert version(registry, "tiny@production").number == 2 and version(registry, "tiny/3").retired and keys(registry)[0].models == ("*",) and len(audit(registry).entries) == 14 and not audit(registry).faults
    assert promote(registry, versions(registry)[2], expect=4) == 5 and not audit(registry).faults
    assert [v.parent for v in versions(registry)] == [None] * 3 and not approvals(registry, versions(registry)[0])


def test_a_registry_of_schema_0004_is_brought_along(url, tmp_path, monkeypatch):
    "With approvals, signatures, lineage, a sunset, an outbox and a request that was answered once."
    laid("0004", url, tmp_path, monkeypatch)
    registry = Registry(url, tmp_path / "home/store", "alan", policy=Policy(gates=("quality",)))
    with registry.database.change() as c: assert c.exec_driver_sql("select version_num from alembic_version").scalar() == HEAD >= "0005"
    three, two, one = versions(registry)
    assert not audit(registry).faults and len(audit(registry).entries) == 20 and one.aliases == ("production",) and (three.sunset, three.successor, bool(three.retired)) == ("2026-01-31", "tiny/2", True)
    assert [(a.actor, a.note, a.spent) for a in approvals(registry, two)] == [("grace", "seen", 2)] and environment_of(registry, one) == "polars==2.1.0\n" and [k.revoked is None for k in keys(registry)] == [True, False]
    assert len(waiting(registry, "mlflow")) == 8 and not readings(registry) and note(registry, [Reading("people.csv", "tiny", "train", "5f" * 16, 3, 0, None, {})]) == 1
    assert promote(registry, two, expect=3) == 4 and not audit(registry).faults


def laid(schema: str, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "A registry of an old schema where the url says, with the golden rows and their key."
    monkeypatch.setenv("MLRAY_AUDIT_KEY", "golden-" * 5 + "golden")
    (tmp_path / "home").mkdir(exist_ok=True)
    if url.startswith("sqlite"):
        with sqlite3.connect(tmp_path / "home/registry.db") as db: db.executescript((GOLDEN / f"registry_{schema}.sql").read_text())
        db.close()
    else: as_of(schema, url)


def as_of(schema: str, url: str) -> None:
    "A PostgreSQL database of an old schema, with the golden rows."
    import sqlalchemy as sa
    from alembic import command
    from alembic.config import Config
    engine, golden = sa.create_engine(url.replace("postgresql://", "postgresql+psycopg://")), sqlite3.connect(":memory:")
    golden.executescript((GOLDEN / f"registry_{schema}.sql").read_text())
    with engine.begin() as connection:
        config = Config(attributes={"connection": connection, "adopt": lambda c: None})
        config.set_main_option("script_location", str(Path(__file__).parents[1] / "mlray/migrations"))
        command.upgrade(config, schema)
        meta = sa.MetaData()
        meta.reflect(connection)
        for table in [t for t in meta.sorted_tables if t.name != "alembic_version"]:
            cursor = golden.execute(f"select * from {table.name}")
            names = [d[0] for d in cursor.description]
            kinds = {c.name: c.type for c in table.columns}
            read = lambda name, value, kinds=kinds: json.loads(value) if value is not None and isinstance(kinds[name], sa.JSON) else bool(value) if isinstance(kinds[name], sa.Boolean) else value
            for row in cursor: connection.execute(table.insert().values({n: read(n, v) for n, v in zip(names, row, strict=True)}))
    engine.dispose()
    golden.close()


def test_one_step_back_and_forth_again(tmp_path):
    from alembic import command
    from alembic.config import Config
    database = Database(f"sqlite:///{tmp_path}/registry.db", tmp_path)
    schema = lambda c: sorted(r[0] for r in c.exec_driver_sql("select sql from sqlite_master where sql is not null"))
    with database.change() as c:
        config = Config(attributes={"connection": c, "adopt": lambda c: None})
        config.set_main_option("script_location", str(Path(__file__).parents[1] / "mlray/migrations"))
        before = schema(c)
        command.downgrade(config, "0002")
        assert "approvals" not in str(schema(c)) and "sunset" not in str(schema(c))
        command.upgrade(config, "head")
        assert schema(c) == before


# Tokens of an identity provider

jwt = pytest.importorskip("jwt", reason="pip install 'mlray[oidc]'")
from cryptography.hazmat.primitives import serialization  # noqa: E402
from cryptography.hazmat.primitives.asymmetric import ec, rsa  # noqa: E402

from mlray.governance.oidc import Issuer  # noqa: E402

RSA, EC, NEW = rsa.generate_private_key(public_exponent=65537, key_size=2048), ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
PEM = RSA.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def jwk(private, kid: str) -> dict:
    kind = jwt.algorithms.RSAAlgorithm if isinstance(private, rsa.RSAPrivateKey) else jwt.algorithms.ECAlgorithm
    return json.loads(kind.to_jwk(private.public_key())) | {"kid": kid, "use": "sig"}


@contextmanager
def provider(*published: dict):
    "A JWKS endpoint on loopback: its URL, what it publishes, and how often it was asked."
    said, asked = list(published), []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            body = json.dumps({"keys": said}).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
        def log_message(self, *_): pass
    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    try: yield f"http://127.0.0.1:{http.server_port}/jwks", said, asked
    finally:
        http.shutdown()
        http.server_close()


def claims(**changes) -> dict:
    made = {"iss": "https://login.example", "aud": "mlray", "sub": "grace", "roles": ["promoter"], "exp": datetime.now(UTC) + timedelta(hours=1)} | changes
    return {k: v for k, v in made.items() if v is not None}


def signed(said: dict, key=EC, algorithm: str = "ES256", kid: str = "ec", **head) -> str: return jwt.encode(said, key, algorithm=algorithm, headers={"kid": kid, **head})


def by_hand(head: dict, said: dict, secret: bytes) -> str:
    "A token that PyJWT would refuse to make."
    import base64
    import hashlib
    import hmac
    text = lambda b: base64.urlsafe_b64encode(b).rstrip(b"=").decode()
    body = f"{text(json.dumps(head).encode())}.{text(json.dumps(said | {'exp': int(said['exp'].timestamp())}).encode())}"
    return f"{body}.{text(hmac.new(secret, body.encode(), hashlib.sha256).digest()) if secret else ''}"


def test_a_token_is_believed_and_forgeries_are_not():
    with provider(jwk(RSA, "rsa"), jwk(EC, "ec")) as (at, _said, asked):
        issuer = Issuer("https://login.example", "mlray", at)
        assert issuer.caller(signed(claims())) == issuer.caller(signed(claims(roles="mlray:promoter"), RSA, "RS256", "rsa")) == Caller("grace", ("promoter",))
        forged = {
            "none": jwt.encode(claims(), None, algorithm="none", headers={"kid": "ec"}), "None": by_hand({"alg": "None", "kid": "rsa"}, claims(), b""), "no signature": by_hand({"alg": "RS256", "kid": "rsa"}, claims(), b""),
            "HS256 with the public key": by_hand({"alg": "HS256", "kid": "rsa", "typ": "JWT"}, claims(), PEM), "HS256 as RS256": by_hand({"alg": "RS256", "kid": "rsa"}, claims(), PEM),
            "HS256 with the JWK": by_hand({"alg": "HS256", "kid": "rsa"}, claims(), json.dumps(jwk(RSA, "rsa")).encode()),
            "RS384": signed(claims(), RSA, "RS384", "rsa"), "ES256 under the key of RSA": signed(claims(), kid="rsa"), "another key": signed(claims(), NEW), "an unknown kid": signed(claims(), kid="none such"),
            "a kid that is a path": signed(claims(), kid="../../dev/null"), "its own key": signed(claims(), NEW, jwk=jwk(NEW, "ec")), "its own JWKS": signed(claims(), NEW, jku="http://127.0.0.1:1/jwks"),
            "crit": signed(claims(), crit=["exp"]), "over": signed(claims(exp=datetime.now(UTC) - timedelta(minutes=5))), "not yet": signed(claims(nbf=datetime.now(UTC) + timedelta(minutes=5))),
            "no end": signed(claims(exp=None)), "another audience": signed(claims(aud="wiki")), "no audience": signed(claims(aud=None)), "another issuer": signed(claims(iss="https://login.example.evil")),
            "no issuer": signed(claims(iss=None)), "nobody": signed(claims(sub=None)), "empty": "", "dots": "..", "no token": "mlr_00000000_secret", "no JSON": "e30.e30.e30"}
        assert {name: issuer.caller(token) for name, token in forged.items()} == dict.fromkeys(forged)
        assert len(asked) <= 2, "tokens that name a key nobody has make a flood of questions"


@pytest.mark.parametrize("flips", [400, pytest.param(10_000, marks=pytest.mark.chaos)])
def test_no_token_with_a_bit_flipped_is_believed(flips):
    rng, token = random.Random(20260707), signed(claims(), RSA, "RS256", "rsa")
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    with provider(jwk(RSA, "rsa")) as (at, _, _):
        issuer, believed, done = Issuer("https://login.example", "mlray", at), 0, 0
        assert issuer.caller(token)
        while done < flips:
            i = rng.randrange(len(token))
            if token[i] == "." or i == len(token) - 1: continue # the last letter carries bits that mean nothing
            changed = alphabet[alphabet.index(token[i]) ^ 1 << rng.randrange(6)]
            believed += issuer.caller(token[:i] + changed + token[i + 1:]) is not None
            done += 1
    print({"flips": done, "believed": believed})
    assert not believed


def test_keys_are_rotated_and_a_provider_that_is_away_is_a_letter(monkeypatch):
    with provider(jwk(EC, "ec")) as (at, said, _asked):
        issuer = Issuer("https://login.example", "mlray", at)
        assert issuer.caller(signed(claims()))
        said[:] = [jwk(NEW, "new")]
        issuer._keys.cooldown_duration = 0
        assert issuer.caller(signed(claims(), NEW, kid="new")) and issuer.caller(signed(claims())) is None
    with pytest.raises(Unavailable, match="could not be read"): Issuer("https://login.example", "mlray", at).caller(signed(claims()))


roles = st.lists(st.sampled_from([*ROLES, "mlray:admin", "root", "*", "", "ADMIN"]) | st.integers() | st.none(), max_size=4) | st.text(max_size=9) | st.integers() | st.dictionaries(st.text(max_size=3), st.none(), max_size=2)


@hypothesis_settings(max_examples=200, deadline=None)
@given(roles=roles, models=st.none() | st.text(max_size=5) | st.lists(st.text(max_size=5) | st.integers(), max_size=3) | st.integers(), name=st.text(max_size=200) | st.integers() | st.none())
def test_claims_of_any_shape_give_known_roles_or_nothing(roles, models, name):
    issuer = Issuer("https://login.example", "mlray", "https://login.example/jwks")
    found = issuer._caller({"sub": name, "roles": roles, "mlray_models": models})
    assert found is None or (set(found.roles) <= set(ROLES) and 0 < len(found.name) <= 128 and all(isinstance(m, str) for m in found.models))


def test_a_token_opens_the_registry_and_the_routes(tmp_path):
    with provider(jwk(EC, "ec")) as (at, _, _):
        settings = amended(Settings(), home=tmp_path / "home", access="keys", gates=(), oidc_issuer="https://login.example", oidc_audience="mlray", oidc_jwks=at)
        add_key(open_registry(settings), new_key("admin")[0])
        found = register(open_registry(settings, presented=signed(claims(sub="ada", roles=["trainer"]))), tiny(tmp_path, 1), {})
        with pytest.raises(Refused, match="for others than trainer"): promote(open_registry(settings, presented=signed(claims(sub="ada", roles=["trainer"]))), found)
        with pytest.raises(Refused, match="token in MLRAY_API_KEY is nobody"): promote(open_registry(settings, presented=signed(claims(), NEW)), found)
        assert promote(open_registry(settings, presented=signed(claims())), found) == 1 and found.actor == "ada"
        service = Service({}, (), tokens=Issuer("https://login.example", "mlray", at).caller)
        status = lambda token, model="tiny": (lambda reply: reply.status if reply else 200)(service.refused(token, "predict", "r", model))
        assert [status(signed(claims(roles=["predictor"], mlray_models=["tiny"]))), status(signed(claims(roles=["predictor"], mlray_models=["tiny"])), "adult"), status(signed(claims())), status(signed(claims(), NEW)), status("x"), status(None)] == [200, 403, 403, 401, 401, 401]
    away = Service({}, (), tokens=Issuer("https://login.example", "mlray", at).caller)
    assert away.refused(signed(claims()), "predict", "r").status == 503


def test_what_is_shipped_asks_for_two_people_in_production():
    root = Path(__file__).parents[1]
    strict, easy = (read_settings(env, root, {}) for env in ("production", "local"))
    assert strict.access == "keys" and strict.separate_promoter and strict.separate_approver and strict.approvals >= 1 and strict.evidence_hours
    assert easy.access == "open" and easy.approvals == 0 and not easy.separate_promoter


def test_pyjwt_is_not_loaded_by_those_who_have_no_provider():
    done = subprocess.run([sys.executable, "-c", "import mlray.serving.service, mlray.governance.registry, sys; print('jwt' in sys.modules)"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# From a cluster

def desk_of(name: str):
    "The process of the registry's actor, among our own descendants."
    import psutil
    import ray
    found = {a["Name"]: a for a in ray._private.state.actors().values() if a["State"] == "ALIVE"}
    return psutil.Process(found[name]["Pid"]) if name in found else None


@pytest.mark.ray
@pytest.mark.xdist_group("ray")
@pytest.mark.parametrize("kills", [2, pytest.param(30, marks=pytest.mark.chaos)])
def test_from_a_cluster_what_is_asked_happens_once_though_the_actor_is_killed(ray_cluster, tmp_path, kills):
    import ray

    from mlray.engines.registry_on_ray import RegistryOnRay
    settings = Settings(home=tmp_path / "home", gates=())
    afar = RegistryOnRay(settings)

    @ray.remote(num_cpus=0.1)
    def elsewhere(settings, number: int, folder: str):
        afar = RegistryOnRay(settings)
        found = afar.register(tiny(Path(folder), number), {"values": {}}, {"run": f"tiny-{number}"})
        return str(found), afar.ask("promote", found, "canary"), afar.bundle_of(found, Path(folder) / "cache").digest == found.digest

    @ray.remote(num_cpus=0.1)
    def promotes(settings, found): return RegistryOnRay(settings).ask("promote", found)

    assert sorted(v for v, _, same in ray.get([elsewhere.remote(settings, n, str(tmp_path / f"node{n}")) for n in (1, 2)]) if same) == ["tiny/1", "tiny/2"]
    found, killed, answers = afar.ask("versions"), 0, []
    for turn in range(kills * 3):
        asking = promotes.remote(settings, found[turn % 2])
        if turn % 3 == 0 and (desk := desk_of(afar.name)):
            desk.kill()
            killed += 1
        answers.append(ray.get(asking))
    registry = open_registry(settings)
    told = [e.details["generation"] for e in audit(registry).entries if e.action == "promote" and e.details["alias"] == "production"]
    print({"asked": len(answers), "killed": killed, "kept": len(told)})
    assert killed >= kills - 1 and answers == told == list(range(1, kills * 3 + 1)) and not audit(registry).faults
    with pytest.raises(Refused, match="may not be promoted to production: it has no verdict of the gate quality"): RegistryOnRay(amended(settings, registry=f"sqlite:///{settings.home}/./registry.db", gates=("quality",))).ask("promote", found[0])
    with pytest.raises(RegistryError, match="not asked for"): afar.ask("alone")
    for name in [a["Name"] for a in ray._private.state.actors().values() if a["State"] == "ALIVE" and a["Name"].startswith("mlray.registry.")]: ray.kill(ray.get_actor(name, namespace="mlray"))


TWO_NODES = """
import json, sys
from pathlib import Path
import ray
from ray.cluster_utils import Cluster
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On
from mlray.governance.ledger import audit
from mlray.governance.opened import open_registry
from mlray.engines.registry_on_ray import RegistryOnRay
from mlray.values.settings import Settings
from tests.test_registry import tiny
folder = Path(sys.argv[1])
settings = Settings(home=folder / "home", gates=())
cluster = Cluster()
head = cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20, include_dashboard=False)
second = cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20)
ray.init(address=cluster.address, log_to_driver=False)

@ray.remote(num_cpus=0.5, max_retries=0)
def there(number):
    afar, at = RegistryOnRay(settings), ray.get_runtime_context().get_node_id()
    found = afar.register(tiny(folder / f"made{number}", number), {"values": {}}, {"run": f"tiny-{number}"})
    return at, str(found), afar.ask("promote", found), afar.bundle_of(found, folder / f"cache{number}").digest == found.digest

on = lambda node: On(node.node_id, soft=False)
said = [ray.get(there.options(scheduling_strategy=on(node)).remote(n)) for n, node in enumerate((second, head, second), 1)]
desk = next(a for a in ray._private.state.actors().values() if a["State"] == "ALIVE" and a["Name"].startswith("mlray.registry."))
at = {second.node_id: "second", head.node_id: "head"}
cluster.remove_node(second, allow_graceful=False)
third = cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20)
at[third.node_id] = "third"
said.append(ray.get(there.options(scheduling_strategy=on(third)).remote(4)))
found = audit(open_registry(settings))
print(json.dumps({"said": [(at[n], *rest) for n, *rest in said], "desk": at[desk["Address"]["NodeID"]], "rows": [(e.action, e.object) for e in found.entries], "faults": len(found.faults)}))
ray.shutdown()
cluster.shutdown()
"""


@pytest.mark.ray
@pytest.mark.chaos
def test_a_registry_in_a_file_is_asked_from_other_nodes_and_outlives_them(tmp_path):
    "Two raylets and a third after one was killed: the file stays with the head's actor, whoever asks. In a process of its own, for it has a cluster of its own."
    done = subprocess.run([sys.executable, "-c", TWO_NODES, str(tmp_path)], capture_output=True, text=True, cwd=Path(__file__).parents[1], env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS": "0"})
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    print(told)
    assert told["said"] == [["second", "tiny/1", 1, True], ["head", "tiny/2", 2, True], ["second", "tiny/3", 3, True], ["third", "tiny/4", 4, True]]
    assert told["desk"] == "head" and told["rows"] == [[a, f"tiny/{n}"] for n in (1, 2, 3, 4) for a in ("register", "promote")] and told["faults"] == 0


def test_with_postgresql_every_node_asks_for_itself(house, proved, url, tmp_path):
    "No actor and no Ray: the database is asked directly."
    from mlray.engines.registry_on_ray import RegistryOnRay
    if url.startswith("sqlite"): pytest.skip("an SQLite file is asked through the actor")
    afar = RegistryOnRay(Settings(home=tmp_path / "home", registry=url, gates=("quality",)))
    assert afar.ask("promote", proved[0], once="4b1f") == afar.ask("promote", proved[0], once="4b1f") == 1 and [v.aliases for v in afar.ask("versions")] == [(), ("production",)]
