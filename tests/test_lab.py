"""From `ray up` to an answer, on hosts of their own: a laptop, a head and two workers (`tests/hosts.py`). `-m chaos` runs it; Linux, root, openssh-server, rsync, iproute2."""
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from mlray.values.settings import shipped
from tests.conftest import DATA, ROOT
from tests.hosts import Hosts, missing

pytestmark = [pytest.mark.chaos, pytest.mark.skipif(bool(missing()), reason=f"no hosts: {missing()}")]
NODES, OPERATOR = ("n1", "n2", "n3"), {"RAY_AUTH_MODE": "token", "RAY_UP_enable_autoscaler_v2": "0"}
NETWORK = '''"""A network of the project's own, which only the laptop has."""
from torch import nn


def network(outputs: int, widths: dict) -> nn.Module: return Small(widths["encoded"], outputs)


class Small(nn.Module):
    def __init__(self, width: int, outputs: int):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width, 32), nn.ReLU(), nn.Linear(32, outputs))

    def forward(self, encoded): return self.layers(encoded)
'''

ROW = json.dumps({"age": 59, "sex": "group 2", "bmi": 32.1, "blood_pressure": 101, "total_cholesterol": 157, "ldl": 93.2, "hdl": 38, "cholesterol_ratio": 4, "triglycerides_log": 4.8598, "glucose": 87})
LOAD = '''
import json, sys, threading, time
from mlray.client import Client
url, key, row, seconds = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), float(sys.argv[4])
done, failed, slowest, end = [], [], [0.0], time.monotonic() + seconds
def ask():
    with Client(url, key) as client:
        while time.monotonic() < end:
            began = time.monotonic()
            try: done.append(client.predict("patients", [row]))
            except Exception as error: failed.append(repr(error)[:200])
            slowest[0] = max(slowest[0], time.monotonic() - began)
threads = [threading.Thread(target=ask) for _ in range(8)]
print("begun", flush=True)
for t in threads: t.start()
for t in threads: t.join()
if len(sys.argv) > 5: open(sys.argv[5], "w").write("\\n".join(reply.request_id for reply in done))
print(json.dumps({"answered": len(done), "scores": len({reply.predictions[0]["score"] for reply in done}), "failed": failed[:5], "failures": len(failed), "slowest_s": round(slowest[0], 2)}))
'''


@dataclass
class Lab:
    "A cluster that `ray up` started, and the laptop that asks it."
    hosts: Hosts
    share: Path                     # what all hosts see
    seconds: dict[str, float] = field(default_factory=dict)

    def laptop(self, *words: str, **named: Any) -> subprocess.CompletedProcess: return self.hosts.run("laptop", "bash", "-c", f"cd ~/project && {' '.join(words)}", **OPERATOR, **named)

    def mlray(self, *words: str, code: int = 0, timeout: float = 400, key: str = "") -> Any:
        "A command of the laptop's, that answers in JSON."
        began = time.monotonic()
        ran = self.laptop("mlray", *words, "--json", timeout=timeout, **({"MLRAY_API_KEY": key} if key else {}))
        self.seconds[" ".join(words[:2])] = time.monotonic() - began
        assert ran.returncode == code, f"{words}: {ran.returncode}\n{ran.stdout[-2000:]}\n{ran.stderr[-4000:]}"
        return json.loads(ran.stdout) if ran.stdout.strip() else None

    def alive(self) -> int:
        "Nodes that the head counts."
        said = self.hosts.run("n1", "/root/.mlray-env/bin/python", "-c", "import ray, logging; ray.init(address='auto', logging_level=logging.ERROR, log_to_driver=False); print('alive', sum(n['Alive'] for n in ray.nodes()))", RAY_AUTH_MODE="token")
        return int(found[1]) if (found := re.search(r"alive (\d+)", said.stdout)) else 0


def wait_for(what, seconds: float = 120, every: float = 0.5) -> Any:
    "The first thing that is true of what a call returns."
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := what(): return found
        time.sleep(every)
    raise AssertionError(f"not within {seconds:g} s")


def launcher(hosts: Hosts) -> str:
    "cluster/local.yaml with the addresses and the user of these hosts. What it installs is there already, as in an image; two cores a host, so that work spreads."
    config = yaml.safe_load((shipped("cluster") / "local.yaml").read_text())
    config["provider"] |= {"head_ip": hosts.ip("n1"), "worker_ips": [hosts.ip("n2"), hosts.ip("n3")]}
    config["auth"] = {"ssh_user": "root", "ssh_private_key": "~/.ssh/id_ed25519"}
    config["setup_commands"] = [c for c in config["setup_commands"] if "mlray-uv" not in c]
    for who in ("head", "worker"): config[f"{who}_start_ray_commands"] = [c.replace("ray start", "ray start --num-cpus=2 --object-store-memory=150000000") for c in config[f"{who}_start_ray_commands"]]
    return yaml.safe_dump(config)


def write_project(share: Path) -> None:
    "A spec with rows and a network that nobody else has."
    import polars as pl

    from mlray.samples import diabetes
    (project := share / "project").mkdir(parents=True)
    rows = diabetes()
    rows.collect().write_csv(project / "patients.csv") if isinstance(rows, pl.LazyFrame) else rows.write_csv(project / "patients.csv")
    spec = yaml.safe_load((shipped("configs") / "diabetes.yaml").read_text()) | {"name": "patients", "model": {"network": "own:network"}, "train": {"epochs": 8, "patience": 8}}
    spec["data"]["train"] = {"file": "patients.csv"}
    spec["search"] = {"trials": 4, "space": {"train.learning_rate": {"low": 1e-3, "high": 3e-2, "log": True}}}
    (project / "patients.yaml").write_text(yaml.safe_dump(spec, sort_keys=False))
    (project / "own.py").write_text(NETWORK)
    (project / "settings.ini").write_text(f"[local]\n[lab]\njobs = http://localhost:8265\nhome = {share}/home\nhost = 0.0.0.0\nworkers = 3\nreplicas = 3\ntracking = disabled\ncollective_timeout_s = 20\nhealth_timeout_s = 10\ngates = quality fairness\n")


def image(share: Path) -> tuple[list[Path], dict[str, str]]:
    "What every host has from the beginning: the interpreter and its packages, the code, and the folder that all of them see."
    prefix, bare = Path(sys.prefix).resolve(), Path(sys.base_prefix).resolve()
    shared = [p for p in (prefix, bare, ROOT, DATA, share) if p]
    return shared, {"PATH": f"{prefix}/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "PYTHONPATH": str(ROOT), "LC_ALL": "C.UTF-8", "OMP_NUM_THREADS": "1", "WANDB_SILENT": "true",
                    "RAY_worker_niceness": "0", # on a busy machine what works would stand behind all else
                    "RAY_memory_monitor_refresh_ms": "0"} # the memory it sees is all the machine's, and others use it, too


def arrived(lab: Lab, n: str) -> None:
    "Switch a host on, with nothing but its image."
    lab.hosts.start(n)
    lab.hosts.run(n, "ln", "-s", str(Path(sys.prefix).resolve()), "/root/.mlray-env")


@contextmanager
def tunnel(hosts: Hosts) -> Iterator[None]:
    "The head's job server, on the laptop's own port. To a host with another key than before, SSH opens no tunnel; another head has another."
    running = hosts.popen("laptop", "ssh", "-N", "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "ServerAliveInterval=5", "-L", "8265:localhost:8265", hosts.ip("n1"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try: yield
    finally:
        running.kill()
        running.wait()


@contextmanager
def raised(folder: Path, **variables: str) -> Iterator[Lab]:
    "Hosts with some variables of every login, `ray up`, and the job server's port on the laptop."
    share = folder / "share"
    write_project(share)
    shared, usual = image(share)
    with Hosts(folder / "hosts", shared, usual | variables) as hosts:
        made = Lab(hosts, share)
        for n in NODES: arrived(made, n)
        hosts.run("laptop", "mv", str(share / "project"), "/root/project")
        (share / "local.yaml").write_text(launcher(hosts))
        hosts.run("laptop", "bash", "-c", "umask 077; ray get-auth-token --generate")
        began = time.monotonic()
        up = hosts.run("laptop", "bash", "-c", f"cd {ROOT} && ray up -y {share}/local.yaml", timeout=300, **OPERATOR)
        assert up.returncode == 0, up.stdout + up.stderr
        made.seconds["ray up"] = time.monotonic() - began
        wait_for(lambda: made.alive() == 3)
        made.seconds["three nodes"] = time.monotonic() - began
        try:
            with tunnel(hosts): yield made
        finally: print("\n" + "  ".join(f"{what} {s:.1f} s" for what, s in made.seconds.items()))


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with raised(tmp_path_factory.mktemp("lab")) as made: yield made


@pytest.fixture(scope="module")
def released(lab: Lab) -> dict[str, Any]:
    "Train, tune, gate, promote: from the laptop."
    trained = lab.mlray("train", "patients.yaml", "--on", "lab")
    tuned = lab.mlray("tune", "patients.yaml", "--on", "lab")
    gated = lab.mlray("gate", trained["version"], "--on", "lab")
    promoted = lab.mlray("promote", trained["version"], "--on", "lab")
    return {"train": trained, "tune": tuned, "gate": gated, "promote": promoted}


def test_train_tune_gate_promote_from_a_laptop(lab, released):
    trained, tuned = released["train"], released["tune"]
    assert trained["version"] == "patients/1" and trained["verdict"]["passed"] and tuned["version"] == "patients/2"
    assert released["gate"]["passed"] and set(released["gate"]["gates"]) == {"quality", "fairness"}
    assert {v["version"]: v["aliases"] for v in lab.mlray("models", "--on", "lab")} == {"patients/1": ["production"], "patients/2": []}
    assert lab.hosts.run("laptop", "test", "-e", "/root/project/.mlray").returncode != 0, "nothing of it was done on the laptop"


def test_what_is_wrong_is_told_here_with_its_exit_code(lab, released):
    said = lab.laptop("mlray gate patients/99 --on lab")
    assert said.returncode == 2 and "mlray: " in said.stderr and "patients" in said.stderr and not said.stdout, said.stderr
    assert lab.laptop("mlray train patients.yaml --on lab", RAY_AUTH_TOKEN="f" * 64).returncode == 2
    assert lab.laptop("mlray train patients.yaml --on http://localhost:9").returncode == 3


def begun(lab: Lab, log: Path, epochs: int) -> subprocess.Popen:
    "A training, followed from the laptop; it has begun to learn when this returns."
    with open(log, "w") as said: running = lab.hosts.popen("laptop", "bash", "-c", f"cd ~/project && exec mlray train patients.yaml train.epochs={epochs} train.patience={epochs} --on lab", variables=OPERATOR, stdout=subprocess.PIPE, stderr=said)
    wait_for(lambda: running.poll() is not None or "  epoch 10 " in log.read_text(), 600)
    assert running.poll() is None, log.read_text()
    return running


def test_ctrl_c_stops_what_runs_there(lab, released):
    running = begun(lab, log := lab.share / "stopped.err", 2000)
    lab.hosts.run("laptop", "pkill", "-INT", "-f", "bin/mlray train")
    running.communicate(timeout=120)
    assert running.returncode == 130 and "is stopped; nothing of it runs on" in log.read_text(), log.read_text()
    wait_for(lambda: not any("RayTrainWorker" in c for n in NODES for c in lab.hosts.processes(n)))
    assert lab.mlray("job", "--on", "lab")[0]["status"] == "STOPPED"


def test_a_host_that_falls_silent_in_training_changes_nothing(lab, released):
    "The cable of a host with a worker is pulled; what comes of it is, to the bit, what comes of a training that nobody disturbs."
    running = begun(lab, log := lab.share / "cut.err", 60)
    victim = next(n for n in ("n2", "n3") if any("RayTrainWorker" in c for c in lab.hosts.processes(n)))
    lab.hosts.cable(victim, False)
    cut = time.monotonic()
    try:
        wait_for(lambda: running.poll() is not None or "a worker was lost" in log.read_text(), 240)
        lab.seconds["worker's silence noticed"] = time.monotonic() - cut
        version = running.communicate(timeout=400)[0].split()[-1]
    finally: lab.hosts.cable(victim, True)
    assert running.returncode == 0 and "a worker was lost" in log.read_text(), log.read_text()
    before = {v["version"]: v["digest"] for v in lab.mlray("models", "--on", "lab")}
    wait_for(lambda: lab.alive() == 3, 180)
    again = lab.mlray("train", "patients.yaml", "train.epochs=60", "train.patience=60", "--on", "lab")
    assert (again["version"], again["digest"]) == (version, before[version]), "the same bytes, so the same version"


def test_a_host_that_falls_silent_in_serving_costs_no_answer(lab, released):
    "Asked from the laptop, through the head, by clients that ask again."
    made = lab.hosts.run("laptop", "bash", "-c", f"ray exec {lab.share}/local.yaml 'MLRAY_HOME={lab.share}/home mlray key create --role predictor --json'", **OPERATOR)
    key = json.loads(re.search(r'\{"key".*?\}', made.stdout)[0])["key"]
    began = time.monotonic()
    job = lab.mlray("serve", "patients", "--on", "lab", "--detach")["job"]
    ask = lambda n: lab.hosts.run("laptop", "mlray", "ask", "patients", ROW, "--url", f"http://{lab.hosts.ip(n)}:8000", "--json", MLRAY_API_KEY=key)
    answers = [json.loads(wait_for(lambda n=n: (said := ask(n)).returncode == 0 and said.stdout, 180)) for n in NODES]
    lab.seconds["served from three hosts"] = time.monotonic() - began
    assert {a["version"] for a in answers} == {"1"} and len({a["predictions"][0]["score"] for a in answers}) == 1
    (lab.share / "load.py").write_text(LOAD)
    load = lab.hosts.popen("laptop", "python", str(lab.share / "load.py"), f"http://{lab.hosts.ip('n1')}:8000", key, ROW, "60", stdout=subprocess.PIPE)
    assert load.stdout.readline().strip() == "begun"
    threading.Timer(10, lab.hosts.cable, ("n3", False)).start()
    told = json.loads(load.communicate(timeout=200)[0].splitlines()[-1])
    lab.hosts.cable("n3", True)
    print("\n", told)
    assert told["failures"] == 0 and told["scores"] == 1 and told["answered"] > 500
    assert lab.mlray("job", job, "--on", "lab", "--stop")["status"] == "STOPPED"
    wait_for(lambda: ask("n1").returncode != 0)


def test_down_leaves_nothing(lab, released):
    "`ray down` stops the head; the workers are stopped as the launcher says."
    down = lab.hosts.run("laptop", "bash", "-c", f"cd {ROOT} && ray down -y {lab.share}/local.yaml", **OPERATOR)
    assert down.returncode == 0, down.stdout + down.stderr
    for n in ("n2", "n3"): lab.hosts.run("laptop", "ssh", "-o", "StrictHostKeyChecking=no", lab.hosts.ip(n), ".mlray-env/bin/ray stop")
    wait_for(lambda: not any(lab.hosts.processes(n) for n in NODES), 90)
    print("\nfiles that stay:", {n: lab.hosts.run(n, "bash", "-c", "ls -d /tmp/ray /tmp/haproxy-serve ~/.ray/* ~/ray_bootstrap_* ~/mlray ~/.mlray 2>/dev/null").stdout.split() for n in NODES})


def test_two_networks_do_not_touch(tmp_path):
    "The same host of two networks may listen at the same port, and neither hears the other's."
    serve = "import http.server, sys; http.server.HTTPServer(('0.0.0.0', 6379), http.server.SimpleHTTPRequestHandler).serve_forever()"
    with Hosts(tmp_path / "one") as one, Hosts(tmp_path / "two") as two:
        heard = list[str]()
        for hosts, name in ((one, "one"), (two, "two")):
            hosts.start("n1")
            hosts.run("n1", "bash", "-c", f"mkdir -p /tmp/here && echo {name} > /tmp/here/who")
            running = hosts.popen("n1", "bash", "-c", f"cd /tmp/here && exec /usr/bin/python3 -c \"{serve}\"", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            heard.append(wait_for(lambda hosts=hosts: hosts.run("laptop", "/usr/bin/python3", "-c", f"import urllib.request; print(urllib.request.urlopen('http://{hosts.ip('n1')}:6379/who', timeout=5).read().decode().strip())").stdout.strip(), 30))
            assert running.poll() is None
        assert heard == ["one", "two"]
