"""A service with a certificate of its own house: who asks it believes the authority that they name, and nobody else; over HTTP and over gRPC."""
import asyncio
import datetime
import ipaddress
import json
import os
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from mlray.client import AsyncClient, Client, Patience, believing
from mlray.values.errors import ServingError
from mlray.values.settings import Settings
from tests.conftest import free_port, slower


@dataclass(frozen=True)
class Authority:
    "Vouches for names, in files."
    folder: Path
    key: Any
    certificate: x509.Certificate

    @property
    def pem(self) -> Path: return self.folder / "authority.pem"

    def vouch(self, name: str, address: str = "127.0.0.1") -> tuple[Path, Path]: # certificate and key
        key = ec.generate_private_key(ec.SECP256R1())
        made = built(name, self.certificate.subject, key.public_key(), [x509.DNSName(name), x509.IPAddress(ipaddress.ip_address(address))], False).sign(self.key, hashes.SHA256())
        for path, data in ((self.folder / f"{name}.pem", made.public_bytes(serialization.Encoding.PEM)), (self.folder / f"{name}.key", private(key))): path.write_bytes(data)
        return self.folder / f"{name}.pem", self.folder / f"{name}.key"


def private(key: Any) -> bytes: return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


def built(name: str, issuer: x509.Name | None, key: Any, names: list[x509.GeneralName], authority: bool) -> x509.CertificateBuilder:
    subject, now = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]), datetime.datetime.now(datetime.UTC)
    made = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer or subject).public_key(key).serial_number(x509.random_serial_number())
    made = made.not_valid_before(now - datetime.timedelta(hours=1)).not_valid_after(now + datetime.timedelta(days=1)).add_extension(x509.BasicConstraints(authority, None), True)
    return made.add_extension(x509.SubjectAlternativeName(names), False) if names else made


def founded(folder: Path) -> Authority:
    folder.mkdir()
    key = ec.generate_private_key(ec.SECP256R1())
    made = Authority(folder, key, built("an authority of our own", None, key.public_key(), [], True).sign(key, hashes.SHA256()))
    made.pem.write_bytes(made.certificate.public_bytes(serialization.Encoding.PEM))
    return made


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority: return founded(tmp_path_factory.mktemp("tls") / "ours")


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Authority: return founded(tmp_path_factory.mktemp("tls") / "theirs")


# --- whoever asks ----------------------------------------------------------------------------------------------------

class Answers(BaseHTTPRequestHandler):
    "The one answer of a service."
    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        body = json.dumps({"predictions": [{"label": "a"}], "model": "m", "version": "1", "digest": "d", "request_id": self.headers["x-request-id"]}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *words: Any) -> None: pass


@pytest.fixture(scope="module")
def https(authority) -> Iterator[str]:
    "A server that has a certificate of ours, made out to localhost and to no other name."
    server, context = ThreadingHTTPServer(("0.0.0.0", 0), Answers), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*authority.vouch("localhost"))
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"https://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_a_client_believes_whom_it_is_told_to(https, authority, stranger):
    with Client(https, "mlr_1_x", verify=believing(authority.pem)) as client: assert client.predict("m", [{}]).version == "1"
    async def ask() -> str:
        async with AsyncClient(https, "mlr_1_x", verify=believing(str(authority.pem))) as client: return (await client.predict("m", [{}])).version
    assert asyncio.run(ask()) == "1"
    began = time.monotonic()
    for ca, url in ((None, https), (stranger.pem, https), (authority.pem, https.replace("127.0.0.1", "127.0.0.2"))): # nobody, somebody else, and another name
        with Client(url, "mlr_1_x", Patience(seconds=60, attempts=50), verify=believing(ca)) as client, pytest.raises(ServingError, match=r"is not believed: .*--ca"): client.predict("m", [{}])
    assert time.monotonic() - began < 30 * slower(), "it is said at once"
    for path in (authority.folder / "nobody.pem", authority.folder / "localhost.key"):
        with pytest.raises(ServingError, match="no certificates in PEM"): believing(path)


def asked(url: str, *more: str, model: str = "m", row: str = "{}", **variables: str) -> subprocess.CompletedProcess[str]:
    "`mlray ask`, as somebody types it."
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MLRAY_")} | {"MLRAY_API_KEY": "mlr_1_x"} | variables
    return subprocess.run([sys.executable, "-c", "from mlray.cli import main; main()", "ask", model, row, "--url", url, "--json", *more], env=environment, capture_output=True, text=True, timeout=600)


def test_the_command_believes_whom_it_is_told_to(https, authority):
    assert json.loads(asked(https, "--ca", str(authority.pem)).stdout)["version"] == "1"
    assert json.loads(asked(https, MLRAY_TLS_CA=str(authority.pem)).stdout)["version"] == "1"
    told = asked(https)
    assert told.returncode == 2 and "is not believed" in told.stderr and "Traceback" not in told.stderr, told.stderr


# --- the service -----------------------------------------------------------------------------------------------------

def test_a_pair_that_does_not_belong_together_is_a_letter(authority, stranger, tmp_path):
    from mlray.engines.cluster_on_ray import cluster
    cert, key = authority.vouch("one")
    for pair in ((cert, stranger.vouch("two")[1]), (cert, tmp_path / "none.key"), (key, cert)):
        with pytest.raises(ServingError, match="no certificate and the key that belongs to it"), cluster(Settings(root=tmp_path, home=tmp_path, tls_cert=pair[0], tls_key=pair[1])): pass
    with pytest.raises(ServingError, match="both"), cluster(Settings(root=tmp_path, home=tmp_path, tls_cert=cert)): pass


@pytest.mark.parametrize("pem", ["", "/run/mlray.pem"])
def test_what_ray_serve_writes_is_closed_whatever_stands_between_its_lines(pem):
    "The template of the Ray that is installed, not a copy of what it once was."
    import re

    from ray.serve._private.haproxy_templates import HAPROXY_CONFIG_TEMPLATE

    from mlray.engines.haproxy import closed
    written = re.sub(r"\{\{ *config\.(\w+) *\}\}", lambda m: "9000" if m[1].endswith("port") else "127.0.0.1", HAPROXY_CONFIG_TEMPLATE)
    told = closed(written, pem=pem)
    section = lambda name: told.partition(f"frontend {name}_frontend\n")[2].partition("\nfrontend ")[0]
    binds = {name: re.findall(r"(?m)^ *bind .*$", section(name)) for name in ("http", "grpc")}
    assert [b.partition("9000")[2].strip() for n in ("http", "grpc") for b in binds[n][:1]] == ([f"ssl crt {pem} alpn http/1.1", f"ssl crt {pem} alpn h2"] if pem else ["", "proto h2"])
    assert "grpc-status 12" in section("grpc") and all(f"del-header {h}" in section("http") for h in ("x-request-timeout-seconds", "x-request-disconnect-disabled")) and "deny_status 404 if routes" in section("http")


@pytest.mark.chaos
@pytest.mark.ray
@pytest.mark.xdist_group("serve")
def test_real_clients_over_tls(no_shared_cluster, diabetes, authority, stranger, tmp_path, capsys):
    "Through HAProxy: the same answers as `bundle.predict` over HTTPS and over gRPC with TLS, and nobody without it, or with another authority's word."
    import numpy as np
    import tritonclient.grpc as tritongrpc

    from mlray.command_line.commands import deploy_versions
    from mlray.engines.cluster_on_ray import cluster
    from mlray.engines.grpc_on_ray import CALLS
    from mlray.governance.access import new_key
    from mlray.governance.registry import add_key, bundle_of, open_registry
    from mlray.running.run import train
    from mlray.samples import diabetes as patients
    from mlray.serving.inference_messages import messages
    from mlray.shipping.bundle import predict
    from mlray.values.spec import changed
    from tests.test_serving import infer_message, triton_inputs
    cert, private_key = authority.vouch("localhost")
    settings = Settings(root=tmp_path, home=tmp_path / "home", port=free_port(), grpc_port=free_port(), object_store_mb=100, tracking="disabled", journal=True, tls_cert=cert, tls_key=private_key, tls_ca=authority.pem)
    version = train(changed(diabetes, {"train.epochs": 1}), settings).version
    registry = open_registry(settings)
    key, text = new_key("admin")
    add_key(registry, key)
    bundle, rows = bundle_of(registry, version), patients().select(bundle_of(registry, version).contract.features)
    expected, roots = predict(bundle, rows, rows.height), authority.pem.read_bytes()
    where, bearer = f"127.0.0.1:{settings.grpc_port}", (("authorization", f"Bearer {text}"),)
    with cluster(settings):
        began = time.monotonic()
        deploy_versions([str(version)], settings)
        seconds = time.monotonic() - began
        told = dict[str, Any]()
        with grpc.secure_channel(where, grpc.ssl_channel_credentials(roots)) as channel:
            for name in CALLS:
                body = infer_message(rows.head(1), bundle.name) if name == "ModelInfer" else messages()[f"{name}Request"](**({"name": bundle.name} if name.startswith("Model") else {})).SerializeToString()
                _, done = channel.unary_unary(f"/inference.GRPCInferenceService/{name}").with_call(body, metadata=bearer, timeout=30) # at once: whoever deploys has waited
                told[name] = done.code().name
        assert set(told.values()) == {"OK"} and len(told) == 6, told
        with tritongrpc.InferenceServerClient(where, ssl=True, root_certificates=str(authority.pem)) as client:
            headers = {"authorization": f"Bearer {text}"}
            assert client.is_server_live() and client.is_model_ready(bundle.name, headers=headers)
            scores = client.infer(bundle.name, triton_inputs(tritongrpc, rows), headers=headers).as_numpy("score")
            assert np.array_equal(scores, expected)
        for name, channel in (("no TLS", grpc.insecure_channel(where)), ("another's word", grpc.secure_channel(where, grpc.ssl_channel_credentials(stranger.pem.read_bytes()))), ("another name", grpc.secure_channel(where.replace("127.0.0.1", "localhost"), grpc.ssl_channel_credentials(roots), [("grpc.ssl_target_name_override", "elsewhere")]))):
            with channel, pytest.raises(grpc.RpcError) as no: channel.unary_unary("/inference.GRPCInferenceService/ServerLive")(b"", timeout=10)
            assert no.value.code().name in ("UNAVAILABLE", "DEADLINE_EXCEEDED"), name
        with Client(settings.url, text, verify=believing(authority.pem)) as client: assert [p["score"] for p in client.predict(bundle.name, rows.to_dicts()).predictions] == expected.tolist()
        assert settings.url.startswith("https://")
        said = asked(settings.url, "--ca", str(authority.pem), model=bundle.name, row=json.dumps(rows.row(0, named=True)), MLRAY_API_KEY=text)
        assert json.loads(said.stdout)["predictions"][0]["score"] == expected.tolist()[0], said.stderr
        assert asked(settings.url, model=bundle.name, MLRAY_API_KEY=text).returncode == 2
        with pytest.raises(httpx.HTTPError): httpx.get(f"http://127.0.0.1:{settings.port}/healthz", timeout=10)
        old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        old.load_verify_locations(authority.pem)
        with pytest.warns(DeprecationWarning): old.maximum_version = ssl.TLSVersion.TLSv1_1
        with pytest.raises(httpx.ConnectError): httpx.get(f"{settings.url}/healthz", verify=old, timeout=10)
    with capsys.disabled(): print(f"\n6 calls of gRPC with TLS {told}; tritonclient, mlray.client and mlray ask: {rows.height} rows, the bits of bundle.predict; refused: no TLS, another authority, another name, TLS 1.1; up in {seconds:.1f} s; load {os.getloadavg()[0]:.0f}")
