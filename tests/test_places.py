"""Where `--on` leads: to a job server behind TLS, to one of several regions, and to a letter where it leads nowhere."""
import asyncio
import json
import os
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from typer.testing import CliRunner

import mlray
from mlray.cli import app
from mlray.engines.cluster_on_ray import serve_environment
from mlray.governance.registry import open_registry, version
from mlray.samples import diabetes
from mlray.values.errors import SettingsError
from mlray.values.settings import read_settings, shipped
from tests.conftest import free_port
from tests.test_anywhere import begun

MLRAY, DIABETES = str(Path(sys.executable).with_name("mlray")), str(shipped("configs") / "diabetes.yaml")
REGIONS = """
[DEFAULT]
registry = postgresql://mlray@db/mlray
store = s3://mlray/store
[local]
[europe]
region = eu
jobs = http://eu:8265
[america]
region = us
jobs = http://us:8265
[staging-us]
region = us
jobs = http://us:8265
[office]
[alone]
region = asia
registry =
store =
jobs = http://asia:8265
"""


@pytest.mark.parametrize(("words", "says"), [
    (["train", DIABETES, "--on", "eu,us"], "names 2 places"), (["serve", "diabetes", "--on", "us"], "--on america, --on staging-us"), (["tune", DIABETES, "--on", "asia"], "names no `registry` and no `store`"),
    (["gate", "diabetes/1", "--on", "europe", "--env", "office"], "another production would be meant"), (["serve", "diabetes", "--on", "office"], "Those with one: europe,america"), (["promote", "diabetes/1", "--on", "asien"], "no environment [asien]"),
    (["predict", "diabetes", "rows.csv", "answers.csv", "--on", "eu"], "Name one that all nodes of eu and you see, from its root: /shared/answers.csv"), (["predict", "diabetes", "lines.csv", "/shared/answers.csv", "--on", "eu"], "There is no file 'lines.csv' here")])
def test_what_is_no_place_is_said_with_what_to_type(tmp_path, monkeypatch, words, says):
    (tmp_path / "settings.ini").write_text(REGIONS)
    (tmp_path / "rows.csv").write_text("age\n59\n")
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, words)
    assert done.exception is not None and says in str(done.exception) and done.exception.exit_code == 2
    assert not (tmp_path / ".mlray").exists()


def test_a_notebook_is_told_the_same(tmp_path, monkeypatch):
    (tmp_path / "settings.ini").write_text(REGIONS)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SettingsError, match="mlray release NAME/3 --regions eu,us"): mlray.train(DIABETES, on="eu,us")


# --- TLS ---------------------------------------------------------------------------------------------------------------

@dataclass
class Authority:
    "A certificate authority of one's own."
    folder: Path

    def __post_init__(self) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "an authority of this test")])
        made = self._signed(self.name, self.key, x509.BasicConstraints(ca=True, path_length=0), 10)
        self.file = self.folder / "authority.pem"
        self.file.write_bytes(made.public_bytes(serialization.Encoding.PEM))

    def _signed(self, subject: x509.Name, key: ec.EllipticCurvePrivateKey, extension: Any, days: float, critical: bool = True) -> x509.Certificate:
        now = datetime.now(UTC)
        built = x509.CertificateBuilder().subject_name(subject).issuer_name(self.name).public_key(key.public_key()).serial_number(x509.random_serial_number()).not_valid_before(now - timedelta(days=30)).not_valid_after(now + timedelta(days=days))
        return built.add_extension(extension, critical=critical).sign(self.key, hashes.SHA256())

    def certificate(self, name: str, days: float = 5) -> ssl.SSLContext:
        "What a server called so presents."
        key = ec.generate_private_key(ec.SECP256R1())
        who = x509.IPAddress(ip_address(name)) if name[0].isdigit() else x509.DNSName(name)
        made = self._signed(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "a job server")]), key, x509.SubjectAlternativeName([who]), days, critical=False)
        (file := self.folder / f"{name}{days}.pem").write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()) + made.public_bytes(serialization.Encoding.PEM))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(file)
        return context


@contextmanager
def in_front(context: ssl.SSLContext, port: int) -> Iterator[int]:
    "A proxy that speaks TLS, and passes on what it hears; its port."
    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, asyncio.IncompleteReadError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        with suppress(OSError): writer.close()

    async def met(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try: there = await asyncio.open_connection("127.0.0.1", port)
        except OSError: return writer.close()
        await asyncio.gather(pass_on(reader, there[1]), pass_on(there[0], writer))

    loop, mine = asyncio.new_event_loop(), free_port()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    server = asyncio.run_coroutine_threadsafe(asyncio.start_server(met, "127.0.0.1", mine, ssl=context), loop).result(30)
    try: yield mine
    finally:
        loop.call_soon_threadsafe(server.close)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(30)


@pytest.mark.parametrize(("name", "days", "trusted", "says"), [
    ("127.0.0.1", 5, False, "vouched for by nobody known here.*`jobs_ca`"), ("head.example.org", 5, True, "made out to another name"), ("127.0.0.1", -1, True, "has expired")])
def test_a_certificate_that_does_not_do(tmp_path, monkeypatch, name, days, trusted, says):
    authority = Authority(tmp_path)
    with in_front(authority.certificate(name, days), free_port()) as port:
        (tmp_path / "settings.ini").write_text(f"[local]\n[far]\njobs = https://127.0.0.1:{port}\n" + f"jobs_ca = {authority.file}\n" * trusted)
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SettingsError, match=says): mlray.train(DIABETES, on="far")


# --- a cluster ----------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[tuple[Path, int]]:
    "A project with environments of two regions, and one that reaches the same cluster through TLS; and the port of its service."
    folder, home, port = tmp_path_factory.mktemp("places"), tmp_path_factory.mktemp("homes"), free_port()
    authority = Authority(folder)
    with begun(folder, **serve_environment(), MLRAY_AUDIT_KEY="a" * 64) as address, in_front(authority.certificate("127.0.0.1"), int(address.rpartition(":")[2])) as secure:
        (folder / "settings.ini").write_text("\n".join([
            f"[DEFAULT]\ntracking = disabled\nworkers = 1\naccess = open\ngates = data\nregistry = sqlite:///{folder}/registry.db\nstore = file://{folder}/store\nport = {port}\nconsole = no\n[local]",
            f"[europe]\nregion = eu\nhome = {home}/eu\njobs = https://127.0.0.1:{secure}\njobs_ca = {authority.file}", f"[america]\nregion = us\nhome = {home}/us\njobs = {address}\n"]))
        diabetes().write_csv(folder / "rows.csv")
        yield folder, port


def command(folder: Path, *words: str) -> subprocess.CompletedProcess: return subprocess.run([MLRAY, *words], cwd=folder, env={k: v for k, v in os.environ.items() if not k.startswith("MLRAY_")} | {"MLRAY_AUDIT_KEY": "a" * 64}, capture_output=True, text=True, timeout=900)


def ran(folder: Path, *words: str, code: int | None = 0) -> tuple[Any, str]: # what it printed, and said
    done = command(folder, *words, "--json")
    assert code is None or done.returncode == code, f"{words}: {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    assert done.stdout, f"{words}: {done.returncode}\n{done.stderr[-4000:]}"
    return json.loads(done.stdout), done.stderr


@pytest.mark.chaos
@pytest.mark.ray
def test_two_regions_by_the_commands_one_of_them_behind_tls(cluster):
    folder, port = cluster
    first = command(folder, "train", DIABETES, "train.epochs=3", "--on", "eu")
    assert "diabetes/1" in first.stdout and "https://127.0.0.1" in first.stderr and "epoch 1 " in first.stderr and "measuring on" in first.stderr, f"what it said came through TLS: {first.stderr[-4000:]}"
    second, _ = ran(folder, "train", DIABETES, "train.epochs=4", "--on", "us", code=None)
    assert second["version"] == "diabetes/2", "one registry for both"
    for name, on in (("diabetes/1", "eu"), ("diabetes/2", "us")):
        assert ran(folder, "gate", name, "--on", on)[0]["passed"]
        ran(folder, "promote", name, "--on", on)
    registry = open_registry(read_settings("local", folder))
    assert [version(registry, f"diabetes@production@{r}").number for r in ("eu", "us")] == [1, 2]
    told = {on: ran(folder, "predict", "diabetes@production", "rows.csv", f"{folder}/{on}.parquet", "--on", on)[0] for on in ("eu", "us")}
    assert [told[on]["version"] for on in told] == ["diabetes/1", "diabetes/2"], told
    here = {on: ran(folder, "predict", name, "rows.csv", f"{folder}/{on}-here.parquet")[0] for on, name in (("eu", "diabetes/1"), ("us", "diabetes/2"))}
    assert here and all(pl.read_parquet(folder / f"{on}.parquet").equals(pl.read_parquet(folder / f"{on}-here.parquet")) for on in told), "the same answers, there and here"
    key = ran(folder, "key", "create", "--role", "predictor")[0]["key"]
    job = ran(folder, "serve", "diabetes", "--on", "eu", "--detach")[0]["job"]
    row = json.dumps(diabetes().drop("progression", strict=False).row(0, named=True))
    assert asked(folder, port, row, key)["version"] == "1", "what is in production in eu"
    assert ran(folder, "job", job, "--on", "eu", "--stop")[0]["status"] == "STOPPED"
    found, _ = ran(folder, "doctor", "--on", "eu", code=None)
    assert not {"node", "node_disk", "nodes", "clock"} & {c["what"] for c in found["complaints"]}, found
    print(f"\neu (TLS): {told['eu']}\nus: {told['us']}\ndoctor --on eu: {[c['what'] for c in found['complaints']]}  load {os.getloadavg()[0]:.0f}")


def asked(folder: Path, port: int, row: str, key: str) -> dict[str, Any]:
    "An answer, as soon as there is one."
    end = time.monotonic() + 300
    while True:
        done = subprocess.run([MLRAY, "ask", "diabetes", row, "--url", f"http://127.0.0.1:{port}", "--json"], cwd=folder, env=os.environ | {"MLRAY_API_KEY": key}, capture_output=True, text=True, timeout=120)
        if done.returncode == 0: return json.loads(done.stdout)
        assert time.monotonic() < end, done.stderr
        time.sleep(1)
