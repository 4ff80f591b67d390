"""A PostgreSQL server of one's own: a fresh cluster in a temporary folder, on a free loopback port, with a password, run by nobody in particular. Gone with the tests."""
import os
import pwd
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import free_port


@dataclass(frozen=True)
class Postgres:
    "Where a server is, and how to get in."
    port: int
    password: str
    bin: Path

    def uri(self, database: str = "postgres", user: str = "mlray", password: str | None = None) -> str:
        return f"postgresql://{user}:{password or self.password}@127.0.0.1:{self.port}/{database}"

    def run(self, sql: str, database: str = "postgres") -> str:
        "What psql says."
        return subprocess.run([self.bin / "psql", "-qAtX", "-v", "ON_ERROR_STOP=1", "-d", self.uri(database), "-c", sql], check=True, capture_output=True, text=True).stdout.strip()


def binaries() -> Path | None:
    "The folder of initdb and pg_ctl; that of the newest version where there are several."
    if found := shutil.which("initdb"): return Path(found).resolve().parent
    return max((p.parent for p in Path("/usr/lib/postgresql").glob("*/bin/initdb")), key=lambda p: int(p.parent.name), default=None)


@contextmanager
def postgres() -> Iterator[Postgres]:
    "A server that lives as long as the block; skips where PostgreSQL is not installed."
    where = binaries()
    if where is None: pytest.skip("PostgreSQL is not installed (no initdb): apt-get install postgresql")
    root = os.geteuid() == 0 # PostgreSQL refuses to run as root
    as_user = {"user": "nobody" if "postgres" not in {u.pw_name for u in pwd.getpwall()} else "postgres"} if root else {}
    folder, server = Path(tempfile.mkdtemp(prefix="pg-")), Postgres(free_port(), secrets.token_hex(12), where)
    (folder / "password").write_text(server.password)
    if root: [shutil.chown(p, as_user["user"]) for p in (folder, folder / "password")]

    def call(*command: str | Path) -> None: subprocess.run(command, check=True, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, **as_user)
    call(where / "initdb", "-D", folder / "data", "-U", "mlray", "-A", "scram-sha-256", "--pwfile", folder / "password", "-E", "UTF8", "--locale=C", "--no-sync")
    try:
        call(where / "pg_ctl", "-D", folder / "data", "-w", "-l", folder / "log", "-o", f"-p {server.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder} -c fsync=off", "start")
        yield server
    finally:
        subprocess.run([where / "pg_ctl", "-D", folder / "data", "-m", "immediate", "stop"], cwd=folder, capture_output=True, **as_user)
        shutil.rmtree(folder, ignore_errors=True)
