"""`mlray demo` as a user sees it: one command from real rows to an answered request, over real HTTP, and gone afterwards."""
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest

from tests.conftest import free_port, gone, running_below

pytestmark = [pytest.mark.ray, pytest.mark.xdist_group("serve")]
MLRAY = str(Path(sys.executable).with_name("mlray"))
PATIENT = {"age": 59, "sex": "group 2", "bmi": 32.1, "blood_pressure": 101, "total_cholesterol": 157, "ldl": 93.2, "hdl": 38, "cholesterol_ratio": 4, "triglycerides_log": 4.86, "glucose": 87}


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    "The demo, kept up: its process, its output so far, its folder."
    folder = tmp_path_factory.mktemp("demo")
    (folder / "settings.ini").write_text("[DEFAULT]\nobject_store_mb = 100\n[local]\n")
    process = subprocess.Popen([MLRAY, "demo", "--keep", "--port", str(free_port())], cwd=folder, stdout=subprocess.PIPE, stderr=(folder / "stderr").open("w"), text=True)
    said = []
    for line in process.stdout:
        said.append(line)
        if line.startswith("Up until"): break
    else: pytest.fail((folder / "stderr").read_text())
    yield process, "".join(said), folder
    if process.poll() is None: process.kill()


@pytest.fixture(scope="module")
def url(demo) -> str: return re.search(r"http://127\.0\.0\.1:\d+", demo[1])[0]


@pytest.fixture(scope="module")
def key(demo) -> str: return re.search(r"mlr_[0-9a-f]{8}_[\w-]{43}", demo[1].replace("\n", ""))[0]


def ask(url: str, key: str | None, *rows, **more) -> httpx.Response:
    return httpx.post(f"{url}/v1/models/diabetes:predict", json={"instances": list(rows)}, headers={"authorization": f"Bearer {key}"} if key else {}, timeout=10, **more)


def test_it_answers(demo, url, key):
    assert "from diabetes/1" in demo[1] and "curl" in demo[1]
    said = ask(url, key, PATIENT).json()
    assert said["predictions"][0]["label"] in (">140.5", "<=140.5") and said["version"] == "1" and said["request_id"]


def test_the_printed_curl_line_works(demo, url, key):
    line = re.search(r"try\s+(curl.*?'\{.*?\}')", demo[1], re.S)[1]
    assert json.loads(subprocess.run(line, shell=True, capture_output=True, text=True, check=True).stdout)["predictions"]


def test_ask_and_models_see_it(demo, url, key):
    import os
    environ = {**os.environ, "MLRAY_API_KEY": key}
    said = subprocess.run([MLRAY, "ask", "diabetes", json.dumps(PATIENT), "--url", url, "--json"], cwd=demo[2], env=environ, capture_output=True, text=True)
    assert json.loads(said.stdout)["model"] == "diabetes" and said.returncode == 0
    bad = subprocess.run([MLRAY, "ask", "diabetes", json.dumps(PATIENT | {"age": 999}), "--url", url], cwd=demo[2], env=environ, capture_output=True, text=True)
    assert bad.returncode == 2 and "age: at most 120" in bad.stderr
    listed = subprocess.run([MLRAY, "models", "--json"], cwd=demo[2], capture_output=True, text=True)
    assert json.loads(listed.stdout)[0]["aliases"] == ["production"]


def test_nothing_answers_without_a_key(demo, url, key):
    assert [ask(url, k, PATIENT).status_code for k in (None, "mlr_00000000_x", key[:-1], key)] == [401, 401, 401, 200]
    for path in ("/docs", "/openapi.json"):
        assert httpx.get(url + path).status_code == 401 and httpx.get(url + path, headers={"authorization": f"Bearer {key}"}).status_code == 403
    assert httpx.get(url + "/-/routes").status_code == 404
    assert httpx.get(url + "/healthz").json() == httpx.get(url + "/readyz").json() == {"status": "ok"}


def test_bad_rows_get_a_reason_and_no_echo(url, key):
    reply = ask(url, key, PATIENT, PATIENT | {"age": 73917, "sex": "canary-7391"})
    assert reply.status_code == 422 and "7391" not in reply.text
    assert [(p["row"], p["column"]) for p in reply.json()["problems"]] == [(1, "age"), (1, "sex")]


@pytest.mark.parametrize("body", [b"", b"{", b"\xff\xfe{", b'{"instances": [NaN]}', b'{"instances": [{"age": 1e999}]}', b"[" * 50_000, b'{"instances": ["\\ud800"]}', b"x" * (2**20 + 1)])
def test_hostile_bytes_get_a_4xx(url, key, body):
    reply = httpx.post(f"{url}/v1/models/diabetes:predict", content=body, headers={"authorization": f"Bearer {key}"})
    assert 400 <= reply.status_code < 500


def test_only_loopback_is_bound_by_the_proxy(demo):
    listening = {c.laddr.ip for p, name in running_below(psutil.Process(demo[0].pid)).items() if name.startswith("haproxy ") for c in p.net_connections("tcp") if c.status == "LISTEN"}
    assert listening == {"127.0.0.1"}


def test_a_replica_that_is_open_to_others_asks_for_the_key(demo, key):
    "HAProxy talks to replicas over TCP; whoever reaches that port directly still needs a key."
    ports = {c.laddr.port for p, name in running_below(psutil.Process(demo[0].pid)).items() if "Gateway" in name for c in p.net_connections("tcp") if c.status == "LISTEN" and 30000 <= c.laddr.port < 31000}
    assert ports
    for port in ports: assert ask(f"http://127.0.0.1:{port}", None, PATIENT).status_code == 401


def test_a_killed_replica_loses_no_request(demo, url, key):
    "HAProxy asks again; Ray starts another replica; the answers are the same."
    from concurrent.futures import ThreadPoolExecutor
    def gateways(): return [p for p, name in running_below(psutil.Process(demo[0].pid)).items() if "Gateway" in name]
    victim = gateways()[0]
    victim.kill()
    victim.wait(10)
    end, answered = time.monotonic() + 60, None
    while time.monotonic() < end and answered is None:
        try: answered = ask(url, key, PATIENT).json().get("predictions")
        except httpx.HTTPError: pass
        except ValueError: pass
        time.sleep(0.1)
    with ThreadPoolExecutor(8) as pool: after = list(pool.map(lambda _: ask(url, key, PATIENT).json()["predictions"], range(50)))
    assert all(a == answered for a in after) and gateways()[0].pid != victim.pid


def test_what_was_left_behind(demo):
    home = demo[2] / ".mlray"
    assert {p.name for p in (home / "gates/diabetes/1").iterdir()} == {"quality.ipynb", "fairness.ipynb"}
    assert list((home / "runs").glob("wandb/offline-run-*/*.wandb")) and (home / "registry.db").is_file()
    for page in (home / "gates/diabetes/1").iterdir(): assert str(demo[2]) not in page.read_text()
    assert not re.search(r"mlr_[0-9a-f]{8}_[\w-]{43}", "".join(p.read_text(errors="ignore") for p in home.rglob("*") if p.is_file()))


def test_it_goes_when_it_is_told_to(demo, url):
    "The last test of this file: SIGTERM, and no process is left."
    family = psutil.Process(demo[0].pid).children(recursive=True)
    demo[0].send_signal(signal.SIGTERM)
    assert demo[0].wait(60) == 0
    _, alive = psutil.wait_procs(family, timeout=20)
    assert not [p for p in alive if not gone(p)]
    with pytest.raises(httpx.HTTPError): httpx.get(url + "/healthz", timeout=2)
