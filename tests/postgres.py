"""A PostgreSQL server of one's own: a fresh cluster in a temporary folder, on a free loopback port, with a password, run by nobody in particular. Gone with the tests."""
import os
import pwd
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
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
    folder: Path                            # of its files
    user: Mapping[str, str]                 # who runs it, as `subprocess` takes it

    def call(self, *command: str | Path) -> None: subprocess.run([self.bin / command[0], *command[1:]], check=True, cwd=self.folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, **self.user)
    def start(self) -> None: self.call("pg_ctl", "-D", self.folder / "data", "-w", "-l", self.folder / "log", "-o", f"-p {self.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={self.folder} -c fsync=off", "start")
    def stop(self) -> None: self.call("pg_ctl", "-D", self.folder / "data", "-w", "-m", "immediate", "stop")

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
    folder = Path(tempfile.mkdtemp(prefix="pg-"))
    server = Postgres(free_port(), secrets.token_hex(12), where, folder, as_user)
    (folder / "password").write_text(server.password)
    if root: [shutil.chown(p, as_user["user"]) for p in (folder, folder / "password")]
    server.call("initdb", "-D", folder / "data", "-U", "mlray", "-A", "scram-sha-256", "--pwfile", folder / "password", "-E", "UTF8", "--locale=C", "--no-sync")
    try:
        server.start()
        yield server
    finally:
        with suppress(subprocess.CalledProcessError): server.stop()
        shutil.rmtree(folder, ignore_errors=True)
