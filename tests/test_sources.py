"""Sources that answer over a network, run for real on a loopback port: a Kafka broker, an S3 server, PostgreSQL, HTTP. And what is new in them: each row once, whoever dies in between."""
import json
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import polars as pl
import pytest
from hypothesis import given, settings as hypothesis_settings, strategies as st

from mlray.learning.contract import UNREAD, Contract, check
from mlray.learning.table import fingerprint
from mlray.sources.accepted import Mark, accepted_rows, read_mark
from mlray.sources.rows import check_sources, quarantine, read_rows
from mlray.sources.source import query_sql, read_source
from mlray.sources.survey import survey
from mlray.sources.topic import open_topic, read_message, scan_topic
from mlray.sources.watermark import accept, admission, next_batch
from mlray.values.data import Csv, Kafka, Source, Sql
from mlray.values.errors import DataError, Unavailable
from mlray.values.spec import parse_spec
from tests import buckets
from tests.brokers import broker
from tests.conftest import slower
from tests.postgres import Postgres, postgres

ROWS = pl.DataFrame({"row": range(40), "x": [i / 8 for i in range(40)], "y": [i % 2 == 0 for i in range(40)]})
SPEC = """
name: visits
data: {train: {kafka: {topic: visits, brokers_env: BROKERS}, growing: true}}
contract:
  row: {type: integer, role: time}
  x: {type: number, min: 0}
  y: {type: boolean, role: target}
"""


def mlray(folder, *words: str, **environ: str) -> subprocess.CompletedProcess:
    "The command, in a process and an environment of its own."
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "AZURE_", "GOOGLE_", "MLRAY_"))}
    return subprocess.run([sys.executable, "-c", "from mlray.cli import main; main()", *words], cwd=folder, env=kept | environ, capture_output=True, text=True, timeout=600)


# A Kafka topic.

@pytest.fixture
def brokers(monkeypatch):
    pytest.importorskip("confluent_kafka", reason="pip install 'mlray[kafka]'")
    with broker() as address:
        monkeypatch.setenv("BROKERS", address)
        yield address


def send(address: str, *contents: bytes | str | None, topic: str = "visits", partition: int = 0) -> None:
    from confluent_kafka import Producer
    producer = Producer({"bootstrap.servers": address, "log_level": 0})
    for content in contents: producer.produce(topic, content, partition=partition)
    assert producer.flush(20) == 0


def visit(row: int) -> str: return json.dumps({"row": row, "x": row / 8, "y": row % 2 == 0})


def test_a_topic_has_the_rows_and_the_fingerprint_of_a_file(brokers, settings):
    ROWS.write_parquet(settings.root / "rows.parquet")
    for row in range(40): send(brokers, visit(row), partition=row % 3)
    contract = Contract(parse_spec(SPEC).contract)
    named = [fingerprint(check(contract, read_source(Source(**s), Csv(), list(contract.columns), settings)[0]).good) for s in ({"file": "rows.parquet"}, {"kafka": {"topic": "visits", "brokers_env": "BROKERS"}})]
    assert named[0].digest == named[1].digest and named[0].rows == 40


def test_each_message_comes_once_and_late_ones_are_counted(brokers, settings):
    spec, seen = parse_spec(SPEC), []
    for looks, (partition, rows) in enumerate([(0, [1, 5]), (1, [3, 9]), (2, [2]), (0, [10])]):
        send(brokers, *map(visit, rows), partition=partition)
        batch = next_batch(spec, settings)
        assert sorted(batch.good["row"]) == sorted(rows) == sorted(next_batch(spec, settings).good["row"]), "not accepted, so it comes again"
        assert batch.late == [0, 1, 1, 0][looks]
        accept(spec, settings, batch)
        seen += rows
        assert next_batch(spec, settings) is None
    assert sorted(accepted_rows("visits", settings)[0].collect()["row"]) == sorted(seen)
    mark = read_mark("visits", settings)
    assert (mark.rows, mark.late, mark.batches) == (6, 2, 4) and read_mark("visits", settings).source_version.startswith("kafka:0=3,1=2,2=1")
    send(brokers, *map(visit, range(11, 80)), partition=3)
    accept(spec, settings, next_batch(spec, settings))
    mark = read_mark("visits", settings)
    assert read_rows(parse_spec(SPEC, ["data.split={test: 0.3, valid: 0.3, seed: 3}"]), settings).sources["train"].source_version == mark.source_version


def test_a_batch_takes_no_more_than_it_is_told(brokers, settings):
    spec, seen = parse_spec(SPEC, ["data.train.kafka.batch=7"]), []
    for partition in (0, 1): send(brokers, *(visit(r) for r in range(partition, 20, 2)), partition=partition)
    while batch := next_batch(spec, settings):
        assert batch.good.height <= 7
        accept(spec, settings, batch)
        seen += batch.good["row"].to_list()
    assert sorted(seen) == list(range(20))


POISON = [b'{"row": ', b"\xff\xfe", b"[1]", b'{"row": {"a": 1}, "x": 1}', None, b'{"row": NaN}', b"[" * 100_000, b'{"row": "\\ud800"}', b""]


def test_poison_goes_to_quarantine_and_stops_nothing(brokers, settings):
    spec = parse_spec(SPEC)
    send(brokers, visit(1), *POISON, visit(2), '{"row": 3, "x": -1, "y": true}')
    batch = next_batch(spec, settings)
    assert batch.good["row"].to_list() == [1, 2]
    assert {p.rule: p.rows for p in batch.checked.problems} == {"message": len(POISON), "min": 1}
    kept = pl.read_csv(accept(spec, settings, batch)[0])
    assert kept.height == len(POISON) + 1 and kept[UNREAD].drop_nulls()[0].startswith("partition 0, offset 1: Expecting value")
    send(brokers, b"poison alone")
    accept(spec, settings, next_batch(spec, settings))
    assert next_batch(spec, settings) is None and read_mark("visits", settings).rows == 2


def test_a_topic_that_goes_on_is_read_to_the_end_it_had(brokers, settings):
    stop = threading.Event()

    def chatter() -> None:
        while not stop.is_set(): send(brokers, visit(7))
    send(brokers, *map(visit, range(100)))
    topic = open_topic(Kafka(topic="visits", brokers_env="BROKERS"))
    thread = threading.Thread(target=chatter)
    thread.start()
    try: assert scan_topic(topic, ["row"]).collect().height == 100 == topic.messages
    finally:
        stop.set()
        thread.join()
    assert scan_topic(topic, ["row"]).filter(pl.col("row") == "50").select("row").head(1).collect().rows() == [("50",)]


def test_a_topic_made_anew_is_not_the_topic(brokers, settings):
    send(brokers, visit(1))
    with pytest.raises(DataError, match="ends at offset 1, and was read up to 5"): open_topic(Kafka(topic="visits", brokers_env="BROKERS"), {0: 5})
    with pytest.raises(DataError, match="Partition 99"): open_topic(Kafka(topic="visits", brokers_env="BROKERS"), {99: 0})
    with pytest.raises(DataError, match="nowhere"): open_topic(Kafka(topic="nowhere", brokers_env="BROKERS"))


def test_brokers_that_are_away_or_refused_are_a_letter_without_secrets(settings, monkeypatch):
    monkeypatch.setattr("mlray.sources.topic.PATIENCE", 1.0)
    secret = {"bootstrap.servers": "127.0.0.1:9", "security.protocol": "SASL_PLAINTEXT", "sasl.mechanism": "PLAIN", "sasl.username": "me", "sasl.password": "secret-7391"}
    kafka, began = Kafka(topic="visits", brokers_env="BROKERS"), time.monotonic()
    for said in ("127.0.0.1:9", json.dumps(secret)):
        with pytest.raises(Unavailable, match="could not be read") as caught: open_topic(kafka, environ={"BROKERS": said})
        assert "7391" not in str(caught.value) and caught.value.exit_code == 3
    assert time.monotonic() - began < 20 * slower()
    with pytest.raises(DataError) as caught: open_topic(kafka, environ={"BROKERS": json.dumps(secret | {"security.protocol": "secret-7391"})})
    assert "7391" not in str(caught.value)
    for said in ("", '{"bootstrap'):
        with pytest.raises(DataError, match="BROKERS"): open_topic(kafka, environ={"BROKERS": said})


@hypothesis_settings(max_examples=100, deadline=None)
@given(content=st.binary(max_size=60) | st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["row", "x"]), inner)).map(lambda v: json.dumps(v).encode()))
def test_a_message_is_a_row_or_says_why_not(content):
    try: row = read_message(content, ["row", "x"])
    except ValueError as error: assert str(error)
    else:
        frame = pl.DataFrame([row], schema={"row": pl.String, "x": pl.String})
        said = json.loads(content)
        assert isinstance(said, dict) and [v is None for v in frame.row(0)] == [said.get(n) is None for n in ("row", "x")]


DIES = """
import os, signal, sys
from mlray.sources import accepted
from mlray.values.settings import Settings
from mlray.values.spec import read_spec
from mlray.sources.watermark import accept, next_batch
settle, left = accepted._settle, int(sys.argv[1])
def dying(part, path):
    global left
    if left == 0: os.kill(os.getpid(), signal.SIGKILL)
    left -= 1
    settle(part, path)
accepted._settle = dying
from pathlib import Path
spec, settings = read_spec("visits.yaml"), Settings(root=Path("."), home=Path("home"))
accept(spec, settings, next_batch(spec, settings))
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("at", [0, 1, 2])
def test_whoever_dies_in_between_no_row_is_lost_and_none_is_there_twice(at, brokers, settings):
    (settings.root / "visits.yaml").write_text(SPEC)
    spec = parse_spec(SPEC)
    send(brokers, *map(visit, range(5)), b"poison")
    died = subprocess.run([sys.executable, "-c", DIES, str(at)], cwd=settings.root, capture_output=True, text=True)
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert read_mark("visits", settings).batches == (at == 2)
    send(brokers, *map(visit, range(5, 8)))
    while batch := next_batch(spec, settings): accept(spec, settings, batch)
    assert sorted(accepted_rows("visits", settings)[0].collect()["row"]) == list(range(8))
    assert [pl.read_csv(p).height for p in (settings.home / "quarantine").glob("*.csv")] == [1]


def test_the_door_takes_a_batch_and_refuses_one_that_has_moved(brokers, settings, monkeypatch):
    from typer.testing import CliRunner

    from mlray.cli import app
    (settings.root / "visits.yaml").write_text(SPEC)
    monkeypatch.chdir(settings.root)
    monkeypatch.setenv("MLRAY_HOME", str(settings.home))
    def look(*words): return CliRunner().invoke(app, ["check", "visits.yaml", *words])
    assert "No batch" in str(look().exception)
    send(brokers, *map(visit, range(200)))
    first = look("--new", "--json")
    assert first.exit_code == 0 and (said := json.loads(first.stdout))["accepted"] and (said["good"], said["bad"], said["drift"]) == (200, 0, None), first.output
    assert json.loads(look("--new", "--json").stdout)["good"] == 0
    send(brokers, *(json.dumps({"row": r, "x": 1000 + r, "y": True}) for r in range(200)))
    moved = look("--new", "--json")
    assert moved.exit_code == 1 and not (said := json.loads(moved.stdout))["accepted"] and "x (" in said["reasons"][0] and said["late"] == 199
    assert "The mark was not moved" in look("--new").stdout
    taken = look("--new", "--accept", "--json")
    assert taken.exit_code == 0 and json.loads(taken.stdout)["accepted"]
    monkeypatch.setenv("BROKERS", "127.0.0.1:9")
    known = json.loads(look("--json").stdout)["train"]
    assert known["good"] == 400 and known["source_version"].startswith("kafka:0=400"), "what was accepted is read from where it is kept"


def test_lost_messages_need_somebody_to_look(settings):
    spec = parse_spec(SPEC)
    checked = check(Contract(spec.contract), ROWS)
    from mlray.sources.watermark import Batch
    assert "3 messages were deleted" in admission(spec, settings, Batch(checked, 0, Mark(batches=1), Mark(), lost=3)).reasons[0]


# An S3 server.

@pytest.fixture(scope="module")
def s3():
    "The environment that leads to a server with a bucket, and a client."
    with buckets.amazon() as (url, _):
        import boto3
        environ = {"AWS_ENDPOINT_URL": url, "AWS_ALLOW_HTTP": "true", "AWS_ACCESS_KEY_ID": "id-7391", "AWS_SECRET_ACCESS_KEY": "secret-7391", "AWS_REGION": "us-east-1"}
        client = boto3.client("s3", endpoint_url=url, aws_access_key_id="id", aws_secret_access_key="secret", region_name="us-east-1")
        client.create_bucket(Bucket="rows")
        yield environ, client


def check_at(folder, source: dict, **environ: str) -> subprocess.CompletedProcess:
    spec = SPEC.replace("{kafka: {topic: visits, brokers_env: BROKERS}, growing: true}", json.dumps(source))
    (folder / "far.yaml").write_text(spec)
    return mlray(folder, "check", "far.yaml", "--json", **environ)


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl", "arrow"])
def test_rows_in_a_bucket(kind, s3, settings):
    environ, client = s3
    for i in range(2):
        path, piece = settings.root / f"part-{i}.{kind}", ROWS[20 * i:20 * (i + 1)]
        {"parquet": piece.write_parquet, "csv": piece.write_csv, "jsonl": piece.write_ndjson, "arrow": piece.write_ipc}[kind](path)
        client.upload_file(str(path), "rows", path.name)
    every = check_at(settings.root, {"file": f"s3://rows/part-*.{kind}"}, **environ)
    assert every.returncode == 0, every.stderr
    assert json.loads(every.stdout)["train"]["good"] == 40 and json.loads(every.stdout)["train"]["fingerprint"] == fingerprint(ROWS).digest
    if kind == "parquet": assert json.loads(check_at(settings.root, {"file": "s3://rows/part-1.parquet"}, **environ).stdout)["train"]["good"] == 20


def test_a_delta_table_in_a_bucket(s3, settings):
    deltalake = pytest.importorskip("deltalake", reason="pip install 'mlray[delta]'")
    environ, _ = s3
    for part in (ROWS[:30], ROWS[30:]): deltalake.write_deltalake("s3://rows/events", part.to_arrow(), mode="append", storage_options=environ)
    newest, first = (json.loads(check_at(settings.root, source, **environ).stdout)["train"] for source in ({"delta": "s3://rows/events"}, {"delta": "s3://rows/events", "version": 0}))
    assert (newest["good"], newest["source_version"], newest["fingerprint"]) == (40, "delta:1", fingerprint(ROWS).digest) and (first["good"], first["source_version"]) == (30, "delta:0")


@pytest.mark.parametrize(("source", "change", "code", "said"), [
    ({"file": "s3://none/a.parquet"}, {}, 2, "cannot be read"), ({"file": "s3://none/a-*.csv"}, {}, 2, "NoSuchBucket|cannot be read"), ({"file": "s3://rows/none.csv"}, {}, 2, "not found"),
    ({"delta": "s3://rows/none"}, {}, 2, "none"), ({"file": "s3://rows/a.parquet"}, {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, 3, "Try again"),
    ({"delta": "s3://rows/events"}, {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, 3, "Try again"), ({"file": "s3://rows/a.parquet"}, {"AWS_ALLOW_HTTP": "false"}, 2, "")])
def test_a_bucket_that_does_not_answer_is_a_letter_without_secrets(source, change, code, said, s3, settings):
    import re
    began, found = time.monotonic(), check_at(settings.root, source, **s3[0] | change)
    assert found.returncode == code and found.stdout == "" and "7391" not in found.stderr and "Traceback" not in found.stderr, found.stderr
    assert re.search(said, found.stderr) and time.monotonic() - began < 60 * slower()


# Google Cloud Storage: files are read by its XML interface, which is that of S3, so that moto answers for it; what is asked, and in which words, is Google's client's own. Azure has an emulator of Microsoft's.

def written(folder, kind: str) -> list:
    "The rows in two files."
    paths = [folder / f"part-{i}.{kind}" for i in range(2)]
    for i, path in enumerate(paths): {"parquet": ROWS[20 * i:20 * (i + 1)].write_parquet, "csv": ROWS[20 * i:20 * (i + 1)].write_csv}[kind](path)
    return paths


def google(address: str) -> str: return json.dumps({"gcs_base_url": address, "disable_oauth": True, "client_email": "", "private_key": "key-7391", "private_key_id": ""})


def named(source: dict, settings) -> tuple[str, str | None]: # fingerprint; the source's own name for its rows
    frame, version = read_source(Source(**source), Csv(), ["row", "x", "y"], settings)
    return fingerprint(check(Contract(parse_spec(SPEC).contract), frame).good).digest, version


def test_rows_at_google(s3, settings, monkeypatch):
    environ, client = s3
    for kind in ("parquet", "csv"):
        for path in written(settings.root, kind): client.upload_file(str(path), "rows", f"google/{path.name}", ExtraArgs={"ACL": "public-read"})
        with monkeypatch.context() as key:
            key.setenv("GOOGLE_SERVICE_ACCOUNT_KEY", google(environ["AWS_ENDPOINT_URL"]))
            assert named({"file": f"gs://rows/google/part-*.{kind}"}, settings) == named({"file": f"part-*.{kind}"}, settings) == (fingerprint(ROWS).digest, None)
        with monkeypatch.context() as public:
            for name, value in {"GOOGLE_BASE_URL": environ["AWS_ENDPOINT_URL"], "GOOGLE_ALLOW_HTTP": "true", "GOOGLE_SKIP_SIGNATURE": "true"}.items(): public.setenv(name, value)
            assert named({"file": f"gs://rows/google/part-1.{kind}"}, settings) == (fingerprint(ROWS[20:]).digest, None)
            with pytest.raises(DataError, match="not found"): named({"file": f"gs://rows/google/none.{kind}"}, settings)
    checked = check_at(settings.root, {"file": "gs://rows/google/part-*.csv"}, GOOGLE_SERVICE_ACCOUNT_KEY=google(environ["AWS_ENDPOINT_URL"]))
    assert checked.returncode == 0 and json.loads(checked.stdout)["train"]["fingerprint"] == fingerprint(ROWS).digest, checked.stderr


def test_a_delta_table_at_google(s3, settings, tmp_path, monkeypatch):
    deltalake = pytest.importorskip("deltalake", reason="pip install 'mlray[delta]'")
    environ, client = s3
    for part in (ROWS[:30], ROWS[30:]): deltalake.write_deltalake(str(tmp_path / "events"), part.to_arrow(), mode="append")
    for path in (tmp_path / "events").rglob("*.*"): client.upload_file(str(path), "rows", f"google/{path.relative_to(tmp_path)}", ExtraArgs={"ACL": "public-read"})
    monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT_KEY", google(environ["AWS_ENDPOINT_URL"]))
    assert named({"delta": "gs://rows/google/events"}, settings) == (fingerprint(ROWS).digest, "delta:1")
    assert named({"delta": "gs://rows/google/events", "version": 0}, settings) == (fingerprint(ROWS[:30]).digest, "delta:0")


@pytest.mark.chaos # about half a minute: three commands, each a process of its own
def test_a_model_is_trained_from_rows_at_google_and_made_again(s3, settings):
    from safetensors.numpy import load_file

    from mlray.samples import diabetes
    from mlray.values.spec import read_spec
    environ, client = s3
    shipped, table = read_spec("configs/diabetes.yaml"), diabetes()
    for i, part in enumerate((table[:200], table[200:])):
        part.write_parquet(settings.root / f"diabetes-{i}.parquet")
        client.upload_file(str(settings.root / f"diabetes-{i}.parquet"), "rows", f"google/diabetes-{i}.parquet", ExtraArgs={"ACL": "public-read"})
    key, found = google(environ["AWS_ENDPOINT_URL"]), {}
    for where, file in {"google": "gs://rows/google/diabetes-*.parquet", "here": "diabetes-*.parquet"}.items():
        spec = shipped.model_copy(update={"name": f"diabetes-{where}", "data": shipped.data.model_copy(update={"train": Source(file=file)})})
        (settings.root / f"{where}.yaml").write_text(json.dumps(spec.model_dump(mode="json", exclude_none=True, by_alias=True)))
        told = mlray(settings.root, "train", f"{where}.yaml", "train.epochs=4", "--json", GOOGLE_SERVICE_ACCOUNT_KEY=key)
        assert told.returncode in (0, 1) and "key-7391" not in told.stdout + told.stderr, told.stderr
        found[where] = json.loads(told.stdout)
    weights = [load_file(next((settings.root / ".mlray/store").glob(f"*/{found[w]['digest']}/weights.safetensors"))) for w in found]
    assert weights[0].keys() == weights[1].keys() and all((weights[0][k] == weights[1][k]).all() for k in weights[0]) and found["google"]["measures"] == found["here"]["measures"]
    again = mlray(settings.root, "reproduce", found["google"]["version"], "--json", GOOGLE_SERVICE_ACCOUNT_KEY=key)
    assert again.returncode == 0 and json.loads(again.stdout)["identical"], again.stderr
    away = mlray(settings.root, "train", "google.yaml", "--json", GOOGLE_SERVICE_ACCOUNT_KEY=google("http://127.0.0.1:9"))
    assert away.returncode == 3 and "Try again" in away.stderr and "key-7391" not in away.stderr and "Traceback" not in away.stderr, away.stderr
    print(f"{found['google']['version']} from gs:// and {found['here']['version']} from files: {table.height} rows, {len(weights[0])} tensors equal to the bit; made again")


def test_a_bucket_at_google_that_does_not_answer_is_a_letter(settings, monkeypatch):
    monkeypatch.setenv("NO_GCE_CHECK", "true") # asks no metadata server whether this is a machine of Google's
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(settings.home))
    with pytest.raises(DataError, match=r"^gs://rows/a\.parquet cannot be read: .*Set GOOGLE_APPLICATION_CREDENTIALS"): named({"file": "gs://rows/a.parquet"}, settings)
    monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT_KEY", google("http://127.0.0.1:9"))
    with pytest.raises(Unavailable, match="Try again") as letter: named({"file": "gs://rows/a.parquet"}, settings)
    assert "7391" not in str(letter.value)


AZURITE = os.environ.get("MLRAY_AZURITE", "") # the program azurite-blob


@pytest.fixture
def azure(tmp_path):
    "The environment that leads to Microsoft's emulator, with a container."
    import base64
    import hmac
    from email.utils import formatdate

    import httpx

    from mlray.engines.cluster_on_ray import free_port
    account, key, port = "devstoreaccount1", "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw==", free_port() # the emulator's own, the same everywhere
    server = subprocess.Popen([AZURITE, "--silent", "--inMemoryPersistence", "--blobPort", str(port), "--skipApiVersionCheck", "--disableTelemetry"], cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    headers = {"x-ms-date": formatdate(usegmt=True), "x-ms-version": "2021-12-02"}
    signed = "\n".join(["PUT", *[""] * 11, *(f"{k}:{v}" for k, v in headers.items()), f"/{account}/{account}/rows", "restype:container"])
    signature = base64.b64encode(hmac.digest(base64.b64decode(key), signed.encode(), "sha256")).decode()
    transport = httpx.HTTPTransport(retries=8) # it takes seconds to come up
    with httpx.Client(transport=transport) as client:
        made = client.put(f"http://127.0.0.1:{port}/{account}/rows?restype=container", headers=headers | {"Authorization": f"SharedKey {account}:{signature}", "Content-Length": "0"})
    assert made.status_code == 201, made.text
    yield {"AZURE_STORAGE_ACCOUNT_NAME": account, "AZURE_STORAGE_ACCOUNT_KEY": key, "AZURE_STORAGE_USE_EMULATOR": "true", "AZURITE_BLOB_STORAGE_URL": f"http://127.0.0.1:{port}"}
    server.terminate()
    server.wait()


@pytest.mark.chaos
@pytest.mark.skipif(not AZURITE, reason="MLRAY_AZURITE names no emulator: npm install azurite, and node_modules/.bin/azurite-blob")
def test_rows_at_azure(azure, settings, monkeypatch):
    for name, value in azure.items(): monkeypatch.setenv(name, value)
    for i in range(2):
        ROWS[20 * i:20 * (i + 1)].write_parquet(f"az://rows/part-{i}.parquet")
        ROWS[20 * i:20 * (i + 1)].write_csv(f"az://rows/part-{i}.csv")
    for source in ("az://rows/part-*.parquet", "az://rows/part-*.csv", "az://rows/part-1.parquet"):
        found = check_at(settings.root, {"file": source}, **azure)
        assert found.returncode == 0, found.stderr
        assert json.loads(found.stdout)["train"]["fingerprint"] == fingerprint(ROWS if "*" in source else ROWS[20:]).digest
    nobody = check_at(settings.root, {"file": "az://rows/none.csv"}, **azure | {"AZURE_STORAGE_ACCOUNT_KEY": "c2VjcmV0LTczOTE="})
    assert nobody.returncode == 2 and "c2VjcmV0" not in nobody.stderr and "Traceback" not in nobody.stderr
    assert "Set AZURE_STORAGE_ACCOUNT_NAME" in check_at(settings.root, {"file": "az://rows/none.csv"}).stderr


class InParts(BaseHTTPRequestHandler):
    "What every object store and most web servers do: answer for a part of a file."
    protocol_version = "HTTP/1.1"

    def __init__(self, *args, folder): self.folder = folder; super().__init__(*args)

    def do_GET(self):
        path = self.folder / self.path.partition("?")[0].strip("/")
        content = path.read_bytes() if path.is_file() else b""
        first, last = (int(x) for x in self.headers["Range"].removeprefix("bytes=").split("-")) if self.headers.get("Range") else (0, len(content) - 1)
        self.send_response(404 if not path.is_file() else 206 if self.headers.get("Range") else 200)
        self.send_header("Content-Length", str(len(content[first:last + 1])))
        if self.headers.get("Range"): self.send_header("Content-Range", f"bytes {first}-{min(last, len(content) - 1)}/{len(content)}")
        self.send_header("Last-Modified", "Wed, 01 May 2024 12:00:00 GMT")
        self.end_headers()
        if self.command == "GET": self.wfile.write(content[first:last + 1])

    do_HEAD = do_GET
    def log_message(self, *args): pass


def test_rows_behind_https_and_a_signed_address(settings):
    ROWS.write_csv(settings.root / "rows.csv")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(InParts, folder=settings.root))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    at = f"http://127.0.0.1:{server.server_port}"
    try:
        found = check_at(settings.root, {"file": f"{at}/rows.csv?X-Amz-Signature=secret-7391"})
        assert found.returncode == 0 and json.loads(found.stdout)["train"]["fingerprint"] == fingerprint(ROWS).digest, found.stderr
        gone = check_at(settings.root, {"file": f"{at}/none.csv?X-Amz-Signature=secret-7391"})
        assert gone.returncode == 2 and "7391" not in gone.stderr
    finally:
        server.shutdown()
        server.server_close()
    away = check_at(settings.root, {"file": f"{at}/rows.csv?X-Amz-Signature=secret-7391"})
    assert away.returncode == 3 and "key-7391" not in away.stderr


def test_a_password_in_an_address_is_refused():
    with pytest.raises(ValueError, match="no password"): Source(file="https://me:secret@host/rows.csv")
    assert Source(file="abfss://container@account.dfs.core.windows.net/rows.csv").is_uri


# PostgreSQL.

@pytest.fixture(scope="module")
def database():
    pytest.importorskip("adbc_driver_postgresql", reason="pip install 'mlray[sql]'")
    with postgres() as server:
        server.run("create table visits as select i as row, (i / 8.0)::numeric(12, 3) as x, i % 2 = 0 as y, 'a' as c from generate_series(0, 39) i")
        server.run("""create table kinds (at timestamptz, moment timestamp, n numeric, j jsonb, b bytea, a float8[], d date, u uuid, small smallint, t text, span interval);
                      insert into kinds values ('2024-05-01 12:00+02', '2024-05-01 12:00', 12.345, '{"a": [1]}', '\\x00ff', '{0.5,1}', '2024-05-01', 'a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11', 3, 'ü', '1 day')""")
        yield server


def test_a_table_in_postgresql_is_the_same_rows(database: Postgres, settings, monkeypatch):
    monkeypatch.setenv("VISITS", database.uri())
    found = survey(parse_spec(SPEC, ["data.train={sql: {uri_env: VISITS, query: 'select * from visits'}}"]), "train", settings)
    assert found.fingerprint.digest == fingerprint(ROWS).digest and found.good == 40


def test_the_types_of_postgresql(database: Postgres):
    frame = query_sql(Sql(uri_env="U", query="select at, moment, n, j, b, a, d, u, small, t from kinds"), {"U": database.uri()})
    columns = parse_spec("""
name: kinds
data: {train: {file: a.csv}}
contract:
  at: {type: datetime, time_zone: Europe/Berlin, role: time}
  moment: {type: datetime, role: ignored}
  n: {type: number}
  j: {type: text, role: ignored}
  b: {type: text, role: ignored}
  a: {type: array, length: 2, role: ignored}
  d: {type: date, role: ignored}
  u: {type: text, role: id}
  small: {type: integer}
  t: {type: category, role: target, positive: ü}
""").contract
    checked = check(Contract(columns), frame)
    assert not checked.problems
    row = checked.good.row(0, named=True)
    assert (row["at"].hour, row["moment"].hour, row["n"], json.loads(row["j"]), row["b"], row["a"], row["small"]) == (12, 12, 12.345, {"a": [1]}, "00ff", [0.5, 1.0], 3)
    with pytest.raises(DataError, match="Cast it in the query"): query_sql(Sql(uri_env="U", query="select span from kinds"), {"U": database.uri()})


def test_a_database_that_refuses_is_a_letter_without_the_password(database: Postgres):
    cases = [(database.uri(password="secret-7391"), "select 1", DataError, "password authentication failed"), (database.uri("none"), "select 1", DataError, "does not exist"),
             (database.uri(), "select * from nothing", DataError, "nothing"), ("postgresql://me:secret-7391@127.0.0.1:9/none", "select 1", Unavailable, "refused")]
    for uri, query, error, said in cases:
        with pytest.raises(error, match=said) as caught: query_sql(Sql(uri_env="U", query=query), {"U": uri})
        assert "7391" not in str(caught.value) and database.password not in str(caught.value) and caught.value.__cause__ is None


# More than fits into memory.

@hypothesis_settings(max_examples=25, deadline=None)
@given(values=st.lists(st.tuples(st.integers(0, 12), st.sampled_from(["1", "2.5", "-1", "", "x"])), min_size=1, max_size=40), size=st.integers(1, 9))
def test_in_pieces_or_as_one_it_is_the_same(values, size, tmp_path_factory):
    from mlray.sources import survey as module
    from mlray.values.settings import Settings
    root = tmp_path_factory.mktemp("pieces")
    here, spec = Settings(root=root, home=root / "home"), parse_spec(SPEC.replace("role: time", "role: id, unique: true"), ["data.train={file: rows.csv}"])
    pl.DataFrame({"row": [str(r) for r, _ in values], "x": [x for _, x in values], "y": ["true"] * len(values)}).write_csv(root / "rows.csv")
    whole = check_sources(spec, here)["train"]
    kept, module.ROWS = module.ROWS, size
    try: found = survey(spec, "train", here)
    finally: module.ROWS = kept
    assert (found.good, found.bad) == (whole.good.height, whole.bad.height)
    assert {(p.column, p.rule): (p.rows, p.examples) for p in found.problems} == {(p.column, p.rule): (p.rows, p.examples) for p in whole.problems}
    assert found.fingerprint == (fingerprint(whole.good) if whole.good.height else None)
    alike = quarantine(spec, here, {"train": whole})
    assert (found.quarantine is None and not alike) or pl.read_csv(found.quarantine).equals(pl.read_csv(alike[0]))


def test_a_version_remembers_which_version_of_its_source_it_read(settings):
    from typer.testing import CliRunner

    from mlray.cli import app
    from mlray.running.run import train
    pytest.importorskip("deltalake", reason="pip install 'mlray[delta]'")
    for _ in range(2): pl.concat([ROWS] * 5).write_delta(str(settings.root / "events"), mode="append")
    run = train(parse_spec(SPEC.replace("min: 0}", "min: 0, sensitive: true, bands: [2]}"), ["data={train: {delta: events}, split: {key: [row]}}", "train.epochs=1"]), settings)
    found = CliRunner().invoke(app, ["show", str(run.version)], env={"MLRAY_HOME": str(settings.home), "COLUMNS": "200"})
    assert found.exit_code == 0 and "400 rows, delta:1" in found.stdout, found.stdout
