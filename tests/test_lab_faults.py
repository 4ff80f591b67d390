"""Hosts that are slow, full, or about to be taken away, while a cluster serves and trains (`tests/hosts.py`). `-m chaos` runs it."""
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.hosts import missing
from tests.test_lab import LOAD, NODES, Lab, raised, wait_for
from tests.test_lab_head import asked, loaded

pytestmark = [pytest.mark.chaos, pytest.mark.skipif(bool(missing()), reason=f"no hosts: {missing()}")]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with raised(tmp_path_factory.mktemp("faults")) as made: yield made


RELEASED = """
import sys
from pathlib import Path
from mlray.access import new_key
from mlray.gate import judge
from mlray.registry import add_evidence, add_key, open_registry, promote
from mlray.run import train
from mlray.settings import Settings
from mlray.spec import Rule, read_spec
settings = Settings(home=Path(sys.argv[1]) / "home", root=Path("project"), tracking="disabled")
registry, made = open_registry(settings), train(read_spec("project/patients.yaml", ["model={}"]), settings).version
for gate in registry.policy.gates: add_evidence(registry, made, gate, judge({"roc_auc": 0.8}, (Rule(metric="roc_auc", at_least=0.5),)), b"{}")
promote(registry, made)
key, text = new_key("predictor")
add_key(registry, key)
print(text)
"""


@pytest.fixture(scope="module")
def key(lab: Lab) -> str:
    "That of a service on three hosts; its model was made on the head."
    (lab.share / "released.py").write_text(RELEASED)
    lab.hosts.run("laptop", "cp", "-r", "/root/project", f"{lab.share}/project")
    made = lab.hosts.run("n1", "bash", "-c", f"ln -s {lab.share}/project project && python {lab.share}/released.py {lab.share}")
    assert made.returncode == 0, made.stderr
    key = made.stdout.split()[-1]
    lab.mlray("serve", "patients", "--on", "lab", "--detach")
    for n in NODES: wait_for(lambda n=n: asked(lab, n, key), 400)
    (lab.share / "load.py").write_text(LOAD)
    return key


@contextmanager
def slowed(lab: Lab, name: str, works: float) -> Iterator[None]:
    "A host whose processes work for a part of each second, and stand still for the rest."
    over = threading.Event()
    def hold() -> None:
        while not over.is_set():
            lab.hosts.signal(name, "STOP")
            over.wait(1 - works)
            lab.hosts.signal(name, "CONT")
            over.wait(works)
    thread = threading.Thread(target=hold)
    thread.start()
    try: yield
    finally:
        over.set()
        thread.join()
        lab.hosts.signal(name, "CONT")


def test_a_slow_host_costs_time_and_no_answer(lab, key):
    load = loaded(lab, "n1", key, 50)
    with slowed(lab, "n3", 0.2): told = json.loads(load.communicate(timeout=300)[0].splitlines()[-1])
    print("\na host with a fifth of its speed:", told)
    assert told["failures"] == 0 and told["scores"] == 1 and told["answered"] > 200
    wait_for(lambda: lab.alive() == 3)


def test_a_full_disk_of_one_host_stops_nothing(lab, key):
    "No byte more goes to the disk on which Ray keeps its logs and sockets; what serves goes on, and what is trained ends up the same."
    shrink = "mount -o remount,size=$(( $(df --output=used -k /tmp | tail -1) + 4 ))k /tmp; dd if=/dev/zero of=/tmp/filler bs=1k 2>/dev/null; df --output=avail -k /tmp | tail -1"
    left = lab.hosts.run("n3", "bash", "-c", shrink).stdout.split()
    assert left == ["0"], left
    try:
        load = loaded(lab, "n1", key, 50)
        trained = lab.mlray("train", "patients.yaml", "train.seed=5", "--on", "lab")
        told = json.loads(load.communicate(timeout=300)[0].splitlines()[-1])
        print("\na host without room:", told, "trained meanwhile:", trained["version"])
    finally: lab.hosts.run("n3", "bash", "-c", "mount -o remount,size=2g /tmp; rm -f /tmp/filler")
    assert told["failures"] == 0 and told["scores"] == 1 and told["answered"] > 200
    assert lab.mlray("train", "patients.yaml", "train.seed=5", "--on", "lab")["digest"] == trained["digest"]


def test_a_host_that_is_taken_away_with_notice_costs_no_answer(lab, key):
    "What a cloud says two minutes before it takes a spot node, said to Ray as its autoscaler says it; half a minute later the power goes."
    load = loaded(lab, "n1", key, 75)
    said = lab.hosts.run("n3", "bash", "-c", f"/root/.mlray-env/bin/ray drain-node --address {lab.hosts.ip('n1')}:6379 --reason DRAIN_NODE_REASON_PREEMPTION --reason-message 'taken away' --deadline-remaining-seconds 30", RAY_AUTH_MODE="token")
    assert said.returncode == 0, said.stdout + said.stderr
    time.sleep(30) # the notice
    lab.hosts.kill("n3")
    told = json.loads(load.communicate(timeout=300)[0].splitlines()[-1])
    print("\na spot node with notice:", told)
    assert told["failures"] == 0 and told["scores"] == 1 and told["answered"] > 200
    wait_for(lambda: lab.alive() == 2)
