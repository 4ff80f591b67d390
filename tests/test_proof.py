"""A version can be checked by somebody who trusts nobody here: digests, signatures, statements, and the tools of others."""
import base64
import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from mlray.governance.anchoring import FilePlace, GitPlace, anchor, verify as verify_audit
from mlray.governance.database import SIGNATURES
from mlray.governance.ledger import audit
from mlray.governance.proof import sign, verify, write_proof
from mlray.governance.registry import Policy, Registry, Version, add_evidence, doubts, evidence, open_registry, promote, register, rollback, version
from mlray.governance.signature import create_signer, envelope, opened, retire_signer, revoke_signer, signer_of, signers, signing_keys
from mlray.governance.statement import TEST_RESULT, Conditions, canonical
from mlray.judgement.gate import judge
from mlray.values.errors import RegistryError, SignatureError
from mlray.values.settings import read_settings
from mlray.values.spec import Rule
from tests.test_door import letter, mlray, project  # noqa: F401 (fixtures)
from tests.test_registry import alone, tiny

NOW = "2026-01-01T00:00:00+00:00"
PASSED = judge({"roc_auc": 0.9}, [Rule(metric="roc_auc", at_least=0.8)])
openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the command openssl")


def registry_at(home: Path, required: bool = True) -> Registry:
    return Registry(f"sqlite:///{home}/registry.db", home / "store", actor="ada", policy=Policy(gates=("quality",), signature=required))


@pytest.fixture
def registry(tmp_path) -> Registry: return registry_at(tmp_path / "home")


def proved(registry: Registry, folder: Path, seed: int = 1) -> Version:
    "A version with passed evidence."
    found = register(registry, tiny(folder, seed), {})
    add_evidence(registry, found, "quality", PASSED, b"{}", Conditions("ef" * 32, {"version": str(found)}))
    return found


def wrong(registry: Registry, found: Version, **how) -> set[str]: return {c.what for c in verify(registry, found, **how).checks if c.holds is False}


# Keys

@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077, 0o777])
def test_a_private_key_is_readable_by_its_owner_alone(tmp_path, umask):
    before = os.umask(umask)
    try:
        (tmp_path / "signers").mkdir(mode=0o700)
        (tmp_path / "signers").chmod(0o700)
        made = create_signer(tmp_path / "signers", "ada", NOW)
    finally: os.umask(before)
    assert {p.suffix: stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "signers").iterdir()} == {".key": 0o600, ".pem": 0o644, ".json": 0o644}
    assert [k.id for k in signing_keys(tmp_path / "signers", {})] == [made.id]


def test_a_key_that_others_can_read_does_not_sign(registry, tmp_path):
    made = create_signer(registry.attestor.folder, "ada", NOW)
    key = registry.attestor.folder / f"{made.id}.key"
    key.chmod(0o640)
    with pytest.raises(SignatureError, match="read by others"): register(registry, tiny(tmp_path, 1), {})
    key.chmod(0o600)
    key.write_bytes((create_signer(tmp_path / "other", "eve", NOW) and next((tmp_path / "other").glob("*.key"))).read_bytes())
    with pytest.raises(SignatureError, match="is not the private key of ada"): register(registry, tiny(tmp_path, 2), {})


def test_no_private_key_is_ever_shown(tmp_path):
    create_signer(tmp_path, "ada", NOW)
    secret, = (p.read_text() for p in tmp_path.glob("*.key"))
    shown = repr(signing_keys(tmp_path, {})) + repr(signers(tmp_path)) + "".join(p.read_text() for p in tmp_path.glob("*.json"))
    assert secret.splitlines()[1] not in shown and base64.b64decode(secret.splitlines()[1]).hex() not in shown


def test_a_machine_without_files_signs_with_the_key_of_its_environment(registry, tmp_path, monkeypatch):
    made = create_signer(tmp_path / "elsewhere", "ci", NOW)
    monkeypatch.setenv("MLRAY_SIGNING_KEY", (tmp_path / "elsewhere" / f"{made.id}.key").read_text())
    found = proved(registry, tmp_path)
    assert wrong(registry, found) == {"signature", "signature of quality"}, "nobody has said yet that ci is trusted"
    assert not wrong(registry, found, trusted=[made])
    registry.attestor.folder.mkdir()
    shutil.copy(tmp_path / "elsewhere" / f"{made.id}.json", registry.attestor.folder)
    assert not wrong(registry, found) and promote(registry, found) == 1


def test_a_signer_rotates_and_is_revoked(registry, tmp_path):
    folder = registry.attestor.folder
    first = create_signer(folder, "ada", NOW)
    old = proved(registry, tmp_path, 1)
    retire_signer(folder, "ada", NOW)
    second = create_signer(folder, "ada", "2026-02-01T00:00:00+00:00")
    new = proved(registry, tmp_path, 2)
    assert not (folder / f"{first.id}.key").exists() and promote(registry, old) == 1 and promote(registry, new) == 2, "what a retired signer has signed holds"
    revoke_signer(folder, first.id[:12], "lost", NOW)
    with pytest.raises(RegistryError, match="was revoked on 2026-01-01: lost"): promote(registry, old)
    assert wrong(registry, old) == {"signature", "signature of quality"} and not wrong(registry, new)
    assert sign(registry, old) == ["bundle", "evidence of quality"] and promote(registry, old) == 3
    assert {row.signer for row in rows(registry)} == {first.id, second.id}


def rows(registry: Registry) -> list:
    with registry.database.change() as c: return list(c.execute(SIGNATURES.select()))


# The policy

def test_without_a_signature_nothing_goes_out_where_one_is_required(registry, tmp_path):
    found = proved(registry, tmp_path)
    for alias in ("production", "canary"):
        with pytest.raises(RegistryError, match="its bundle has no signature that counts: nobody has signed it"): promote(registry, found, alias)
    assert [e.details["alias"] for e in audit(registry).entries if e.action == "refuse"] == ["production", "canary"]
    assert promote(registry_at(tmp_path / "home", required=False), found, "canary") == 1
    create_signer(registry.attestor.folder, "ada", NOW)
    sign(registry, found)
    assert promote(registry, found) == 1 and not audit(registry).faults


def test_a_signature_of_another_version_is_none_of_this_one(registry, tmp_path):
    create_signer(registry.attestor.folder, "ada", NOW)
    one, other = proved(registry, tmp_path, 1), proved(registry, tmp_path, 2)
    theirs = {r.about: r.envelope for r in rows(registry)}
    mine, its = evidence(registry, one)["quality"].statement, evidence(registry, other)["quality"].statement
    for about, instead, what in ((one.digest, other.digest, "signature"), (mine, its, "signature of quality")):
        with registry.database.change() as c: c.execute(SIGNATURES.update().where(SIGNATURES.c.about == about).values(envelope=theirs[instead]))
        assert {"audit", what} <= wrong(registry, one)
        with pytest.raises(RegistryError, match=r"it speaks of the bundle|another statement"): promote(registry, one)
        with registry.database.change() as c: c.execute(SIGNATURES.update().where(SIGNATURES.c.about == about).values(envelope=theirs[about]))
    assert not wrong(registry, one) and promote(registry, one) == 1


@pytest.mark.parametrize(("statement", "found"), [
    ("UPDATE evidence SET verdict='{\"passed\": true, \"findings\": []}'", {"evidence of quality", "signature of quality"}), ("DELETE FROM signatures", {"audit", "signature", "signature of quality"}),
    ("UPDATE evidence SET page='" + "ab" * 32 + "'", {"audit", "evidence of quality"}), ("UPDATE versions SET digest='" + "ab" * 32 + "'", {"bundle", "audit"})], ids=["a verdict", "signatures", "a page", "a digest"])
def test_who_writes_past_the_registry_is_found_out(registry, tmp_path, statement, found):
    create_signer(registry.attestor.folder, "ada", NOW)
    proved(registry, tmp_path)
    alone(registry, statement)
    now = version(registry, "tiny/1")
    assert found <= wrong(registry, now)
    with pytest.raises(RegistryError, match=r"no signature that counts|no verdict"): promote(registry, now)


def test_what_was_changed_in_the_store_is_found_out(registry, tmp_path):
    create_signer(registry.attestor.folder, "ada", NOW)
    found = proved(registry, tmp_path)
    proof = evidence(registry, found)["quality"]
    for digest, name, what in ((found.digest, "model.onnx", "bundle"), (proof.page, "quality.ipynb", "evidence of quality"), (proof.statement, "statement.json", "evidence of quality"), (rows(registry)[0].envelope, "envelope.json", "signature")):
        path = registry.store.path(digest) / name
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + b"?")
        assert any(w.startswith(what) for w in wrong(registry, found)), name
        path.unlink()
        assert any(w.startswith(what) for w in wrong(registry, found)), name
        path.write_bytes(whole)
    assert not wrong(registry, found)


def test_a_registry_that_nobody_signs_says_so_and_is_not_wrong(tmp_path):
    registry = registry_at(tmp_path / "home", required=False)
    found = proved(registry, tmp_path)
    said = {c.what: c.holds for c in verify(registry, found).checks}
    assert said == {"bundle": True, "audit": True, "signature": None, "evidence of quality": True, "signature of quality": None}
    with pytest.raises(SignatureError, match="Nobody can sign here"): sign(registry, found)
    pem = create_signer(tmp_path / "theirs", "eve", NOW).pem
    assert wrong(registry, found, trusted=[signer_of(pem, "eve")]) == {"signature", "signature of quality"}


# Statements

def test_a_gate_statement_is_what_in_toto_says_it_is(registry, tmp_path):
    found = proved(registry, tmp_path)
    data = registry.attestor.read(evidence(registry, found)["quality"].statement, "statement.json")
    read = json.loads(data)
    assert canonical(read) == data and set(read) == {"_type", "subject", "predicateType", "predicate"} and read["_type"] == "https://in-toto.io/Statement/v1"
    assert read["subject"] == [{"name": "tiny/1", "digest": {"sha256": found.digest}}] and read["predicateType"] == TEST_RESULT
    assert read["predicate"]["result"] == "PASSED" and len(read["predicate"]["passedTests"]) == 1 and read["predicate"]["configuration"] == [{"name": "quality.ipynb", "digest": {"sha256": "ef" * 32}}]
    assert {"gate", "verdict", "notebook", "parameters", "rows", "source", "lock", "software", "started", "finished", "runner"} <= set(read["predicate"]["mlray"])


@pytest.mark.parametrize("damaged", [
    b"", b"[]", b"null", b"{" * 100_000, b'{"payload": 1, "payloadType": "x", "signatures": []}', b'{"payload": "YQ==", "payloadType": "application/vnd.in-toto+json", "signatures": [{"keyid": [], "sig": "YQ=="}]}',
    b'{"payload": "YQ==", "payloadType": "text/plain", "signatures": []}', b'{"payload": "!", "payloadType": "application/vnd.in-toto+json", "signatures": []}', b"\xff\xfe"])
def test_what_is_no_envelope_is_refused_with_a_letter(tmp_path, damaged):
    create_signer(tmp_path, "ada", NOW)
    with pytest.raises(SignatureError): opened(damaged, signers(tmp_path))


def test_a_signature_is_of_its_type_and_length_too(tmp_path):
    create_signer(tmp_path, "ada", NOW)
    sealed = json.loads(envelope(signing_keys(tmp_path, {})[0], b"12345"))
    for other in ({"payload": base64.b64encode(b"123456").decode()}, {"payload": base64.b64encode(b"1234").decode()}, {"signatures": [s | {"sig": base64.b64encode(b"\0" * 64).decode()} for s in sealed["signatures"]]}):
        with pytest.raises(SignatureError, match="was changed"): opened(json.dumps(sealed | other).encode(), signers(tmp_path))


# The tools of others

@openssl
@pytest.mark.parametrize("algorithm", ["ed25519", "ecdsa-p256"])
def test_openssl_says_the_same(registry, tmp_path, algorithm):
    made = create_signer(registry.attestor.folder, "ada", NOW, algorithm)
    folder = write_proof(registry, proved(registry, tmp_path), tmp_path / "proof")
    der = subprocess.run(["openssl", "pkey", "-pubin", "-in", folder / f"{made.id[:16]}.pem", "-outform", "DER"], capture_output=True, check=True).stdout
    commands = [line.strip() for line in (folder / "README.md").read_text().splitlines() if line.startswith("    openssl")]
    run = lambda command: subprocess.run(command.split(), cwd=folder, capture_output=True).returncode
    assert hashlib.sha256(der).hexdigest() == made.id and len(commands) == 2 and [run(c) for c in commands] == [0, 0]
    assert hashlib.sha256((folder / "bundle/manifest.json").read_bytes()).hexdigest() in (folder / "README.md").read_text()
    for changed in folder.glob("*.pae"): changed.write_bytes(changed.read_bytes()[:-1] + b"?")
    assert all(run(c) for c in commands)


def test_model_signing_accepts_a_bundle_and_refuses_a_changed_one(registry, tmp_path):
    pytest.importorskip("model_signing", reason="pip install 'mlray[signing]'")
    made = create_signer(registry.attestor.folder, "ada", NOW, "ecdsa-p256")
    folder = write_proof(registry, proved(registry, tmp_path), tmp_path / "proof")
    run = lambda: subprocess.run([sys.executable, "-m", "model_signing", "verify", "key", "bundle", "--signature", "model.sig", "--public_key", f"{made.id[:16]}.pem"], cwd=folder, capture_output=True, text=True)
    assert (said := run()).returncode == 0, said.stderr + said.stdout
    (folder / "bundle" / "extra").write_text("x")
    assert run().returncode
    (folder / "bundle" / "extra").unlink()
    whole = (folder / "bundle/model.onnx").read_bytes()
    (folder / "bundle/model.onnx").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert run().returncode
    (folder / "bundle/model.onnx").write_bytes(whole)
    assert run().returncode == 0
    from model_signing.signing import Config
    Config().use_elliptic_key_signer(private_key=registry.attestor.folder / f"{made.id}.key").sign(folder / "bundle", folder / "theirs.sig")
    theirs, ours = (json.loads(base64.b64decode(json.loads((folder / f"{name}.sig").read_text())["dsseEnvelope"]["payload"])) for name in ("theirs", "model"))
    assert theirs["predicate"]["resources"] == ours["predicate"]["resources"] and theirs["subject"][0]["digest"] == ours["subject"][0]["digest"], "what they sign of a bundle is what we sign"


# Going back

def test_going_back_is_always_possible_and_says_what_is_not_signed(registry, tmp_path):
    "A signer that was revoked since takes no way back; what is doubtful is told, and stands in the audit."
    lost = create_signer(registry.attestor.folder, "ada", NOW)
    one, two = (proved(registry, tmp_path, seed) for seed in (1, 2))
    for v in (one, two): promote(registry, v)
    assert rollback(registry, "tiny")[0] == version(registry, "tiny/1") and not doubts(registry, one)
    promote(registry, two)
    revoke_signer(registry.attestor.folder, lost.id, "the laptop was stolen", NOW)
    with pytest.raises(RegistryError, match="no signature that counts"): promote(registry, one, "production")
    assert rollback(registry, "tiny")[0].number == 1 and [d.split(":")[0] for d in doubts(registry, one)] == ["its bundle has no signature that counts", "the evidence of the gate quality has no signature that counts"]
    with registry.database.change() as c: told = [e.details.get("unsigned") for e in registry.database.entries(c) if e.action == "rollback"]
    assert told[0] is None and len(told[1]) == 2 and "laptop was stolen" in told[1][0] and not audit(registry).faults


# Heads of the audit, elsewhere

def cut(registry: Registry, row: int) -> None:
    "Take the end away, with the anchors that lie beside the database."
    alone(registry, f"DELETE FROM events WHERE seq>={row}")
    registry.database._anchor.unlink()


def rewritten(registry: Registry) -> None:
    "The same story with another actor, sealed with the right key; and anchors that fit it."
    from mlray.governance.audit import seal
    from mlray.governance.database import EVENTS, audit_key
    alone(registry)
    with registry.database.change() as c:
        old, last = registry.database.entries(c), None
        for e in old:
            last = seal(audit_key(registry.database.folder, make=False), last, e.created, "eve" if e.seq == 2 else e.actor, e.action, e.object, e.details)
            c.execute(EVENTS.update().where(EVENTS.c.seq == e.seq).values(**vars(last)))
    registry.database._anchor.write_text(json.dumps({"seq": last.seq, "mac": last.mac}))


def repository(folder: Path) -> Path:
    for words in (["init", "-q"], ["-c", "user.name=ada", "-c", "user.email=ada@localhost", "commit", "-q", "--allow-empty", "-m", "first"]): subprocess.run(["git", "-C", str(folder), *words], check=True)
    return folder


@pytest.mark.parametrize("where", ["file", "git"])
@pytest.mark.parametrize(("tamper", "words"), [(lambda r: cut(r, 3), "is not there"), (rewritten, "written anew")], ids=["cut off", "written anew"])
def test_a_head_elsewhere_shows_what_nothing_here_does(registry, tmp_path, where, tamper, words):
    create_signer(registry.attestor.folder, "ada", NOW)
    (tmp_path / "project").mkdir()
    place = FilePlace(tmp_path / "worm/heads.jsonl") if where == "file" else GitPlace(repository(tmp_path / "project"))
    proved(registry, tmp_path)
    anchor(registry, "clinic", [place])
    for seed in (2, 3): proved(registry, tmp_path, seed)
    anchor(registry, "clinic", [place])
    anchor(registry, "another registry", [place])
    assert verify_audit(registry, "clinic", [place]).outside == {place.name: 6} and not verify_audit(registry, "clinic", [place]).faults
    tamper(registry)
    assert not {f.seq for f in audit(registry).faults} - {0}, "all rows that are here agree with each other, and with the anchors beside them"
    assert words in {f.seq: f.why for f in verify_audit(registry, "clinic", [place]).faults}[6]


def test_a_head_that_was_forged_is_told_and_does_not_count(registry, tmp_path):
    mine = create_signer(registry.attestor.folder, "ada", NOW)
    place = FilePlace(tmp_path / "heads.jsonl")
    proved(registry, tmp_path)
    head, done = anchor(registry, "clinic", [place, GitPlace(tmp_path)])
    assert done[place.name] == "" and "took no note" in done["git notes"]
    line, = place.lines()
    read = json.loads(line)
    forged = read | {"payload": base64.b64encode(base64.b64decode(read["payload"]).replace(head.mac.encode(), b"0" * 64)).decode()}
    create_signer(tmp_path / "theirs", "eve", NOW)
    by_eve = envelope(signing_keys(tmp_path / "theirs", {})[0], base64.b64decode(forged["payload"]))
    for more in (json.dumps(forged).encode(), by_eve, b"no JSON", b"{}", b'{"payload": "e30="}'): place.add(more)
    found = verify_audit(registry, "clinic", [place])
    assert [f.seq for f in found.faults] == [2, 2] and {"was changed" in f.why or "not known here" in f.why for f in found.faults} == {True} and found.outside == {place.name: 2}
    place.path.write_bytes(line)
    assert not verify_audit(registry, "clinic", [place]).faults and verify_audit(registry, "clinic", [place], trusted=signers(tmp_path / "theirs")).faults, "only those count who are trusted"
    revoke_signer(registry.attestor.folder, mine.id, "lost", NOW)
    found = verify_audit(registry, "clinic", [place])
    assert not found.faults and found.outside == {place.name: 0} and "not at all" in found.table().title


def test_the_audit_is_anchored_by_a_command(mlray, project):  # noqa: F811
    (project / "settings.ini").write_text("[DEFAULT]\ntracking = disabled\nanchors = file:worm/heads.jsonl git\n[local]\n")
    letter(*mlray("audit", "anchor")[::2], "`mlray signer create NAME` makes one")
    mlray("signer", "create", "ada")
    status, said, _ = mlray("audit", "anchor", "--json")
    assert status == 3 and [p["noted"] for p in json.loads(said)["places"]] == [True, False], "this folder is no repository yet"
    repository(project)
    assert mlray("audit", "anchor")[0] == 0 and json.loads(mlray("audit", "verify", "--json")[1])["outside"] == {f"the file {(project / 'worm/heads.jsonl').resolve()}": 1, "git notes": 1}
    letter(*mlray("audit", "anchor", "--to", "gti")[::2], "Did you mean 'git'")
    assert mlray("audit", "verify", "--at", "wandb")[0] == 3
    registry = open_registry(read_settings())
    cut(registry, 1)
    registry.database._engine.dispose()
    status, said, _ = mlray("audit", "verify")
    assert status == 1 and "cut off" in said


# The commands

def test_an_environment_that_asks_for_signatures_gets_them(mlray, project):  # noqa: F811
    (project / "settings.ini").write_text("[DEFAULT]\ntracking = disabled\ngates = quality\n[local]\n[production]\nsignature = required\n")
    registry = open_registry(read_settings("production"))
    proved(registry, project)
    production = ("--env", "production")
    letter(*mlray("promote", "tiny/1", *production)[::2], "its bundle has no signature that counts: nobody has signed it. `mlray sign tiny/1` signs it")
    letter(*mlray("sign", "tiny/1")[::2], "`mlray signer create NAME` makes one")
    assert json.loads(mlray("verify", "tiny/1", "--json")[1])["holds"], "where nobody asks for a signature, none is missing"
    assert mlray("verify", "tiny/1", *production)[0] == 1
    made, = json.loads(mlray("signer", "create", "ada", "--algorithm", "ecdsa-p256", "--json")[1])
    assert made["state"] == "active" and stat.S_IMODE((project / ".mlray/signers" / f"{made['id']}.key").stat().st_mode) == 0o600
    assert json.loads(mlray("sign", "tiny/1", "--json")[1]) == {"version": "tiny/1", "signed": ["bundle", "evidence of quality"]}
    assert mlray("promote", "tiny/1", *production)[0] == 0
    status, said, _ = mlray("verify", "tiny/1", "--out", "proof", *production)
    assert status == 0 and "every byte of" in said and (project / "proof/model.sig").is_file() and "openssl dgst" in (project / "proof/README.md").read_text()
    key = str(project / "proof" / f"{made['id'][:16]}.pem")
    assert mlray("verify", "tiny/1", "--trust", key)[0] == 0
    create_signer(project / "theirs", "eve", NOW)
    assert mlray("verify", "tiny/1", "--trust", str(next((project / "theirs").glob("*.pem"))))[0] == 1
    letter(*mlray("verify", "tiny/1", "--trust", "nothing.pem")[::2], "--trust names a file in PEM")
    assert [s["state"] for s in json.loads(mlray("signer", "rotate", "ada", "--json")[1])] == ["retired", "active"]
    letter(*mlray("signer", "revoke", made["id"][:12])[::2], "--why")
    assert mlray("signer", "revoke", made["id"][:12], "--why", "the laptop was stolen")[0] == 0
    broken = json.loads(mlray("verify", "tiny/1", "--json")[1])
    assert not broken["holds"] and {c["what"] for c in broken["checks"] if c["holds"] is False} == {"signature", "signature of quality"}
    assert [r["action"] for r in json.loads(mlray("audit", "--json")[1])] == ["register", "gate", "refuse", "create signer", "sign", "promote", "rotate signer", "revoke signer"]
    assert mlray("audit", "verify")[0] == 0 and str(version(registry, "tiny@production")) == "tiny/1"
