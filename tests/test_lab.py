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

from mlray.settings import shipped
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
    (project / "settings.ini").write_text(f"[local]\n[lab]\njobs = http://localhost:8265\nhome = {share}/home\nhost = 0.0.0.0\nworkers = 3\nreplicas = 3\ntracking = disabled\ngates = quality fairness\n")


@contextmanager
def raised(folder: Path) -> Iterator[Lab]:
    "Hosts, `ray up`, and the job server's port on the laptop."
    share = folder / "share"
    write_project(share)
    prefix, bare = Path(sys.prefix).resolve(), Path(sys.base_prefix).resolve()
    shared = [p for p in (prefix, bare, ROOT, DATA, share) if p]
    variables = {"PATH": f"{prefix}/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "PYTHONPATH": str(ROOT), "LC_ALL": "C.UTF-8", "OMP_NUM_THREADS": "1", "WANDB_SILENT": "true"}
    with Hosts(folder / "hosts", shared, variables) as hosts:
        hosts.start(*NODES)
        for n in NODES: hosts.run(n, "ln", "-s", str(prefix), "/root/.mlray-env")
        hosts.run("laptop", "mv", str(share / "project"), "/root/project")
        (share / "local.yaml").write_text(launcher(hosts))
        hosts.run("laptop", "bash", "-c", "umask 077; ray get-auth-token --generate")
        made, began = Lab(hosts, share), time.monotonic()
        up = hosts.run("laptop", "bash", "-c", f"cd {ROOT} && ray up -y {share}/local.yaml", timeout=300, **OPERATOR)
        assert up.returncode == 0, up.stdout + up.stderr
        made.seconds["ray up"] = time.monotonic() - began
        wait_for(lambda: made.alive() == 3)
        made.seconds["three nodes"] = time.monotonic() - began
        tunnel = hosts.popen("laptop", "ssh", "-N", "-o", "StrictHostKeyChecking=no", "-o", "ServerAliveInterval=5", "-L", "8265:localhost:8265", hosts.ip("n1"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try: yield made
        finally:
            tunnel.kill()
            tunnel.wait()
            print("\n" + "  ".join(f"{what} {s:.1f} s" for what, s in made.seconds.items()))


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
    assert released["train"]["version"] == "patients/1" and released["train"]["verdict"]["passed"]
    assert released["gate"]["passed"] and set(released["gate"]["gates"]) == {"quality", "fairness"}
    print(json.dumps(released)[:1500])
