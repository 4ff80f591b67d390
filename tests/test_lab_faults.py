"""Hosts that are slow, full, or about to be taken away, while a cluster serves and trains (`tests/hosts.py`). `-m chaos` runs it."""
import json
import re
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.conftest import ROOT
from tests.hosts import missing
from tests.test_lab import LOAD, NODES, OPERATOR, Lab, arrived, begun, raised, tunnel, wait_for
from tests.test_lab_head import asked, loaded, up

pytestmark = [pytest.mark.chaos, pytest.mark.skipif(bool(missing()), reason=f"no hosts: {missing()}")]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    "Hosts whose `home` is their own: what is shared has a place of its own each, and the journal of a host is on that host's disk."
    with raised(tmp_path_factory.mktemp("faults"), MLRAY_AUDIT_KEY="a" * 64) as made:
        places = f"home = /tmp/home\nregistry = sqlite:///{made.share}/registry.db\nstore = file://{made.share}/store\ncheckpoints = {made.share}/states\njournal = yes"
        made.hosts.run("laptop", "sed", "-i", f"s|^home = .*|{places.replace(chr(10), chr(92) + 'n')}|", "/root/project/settings.ini")
        yield made


RELEASED = """
from mlray.governance.access import new_key
from mlray.judgement.gate import judge
from mlray.governance.registry import add_evidence, add_key, open_registry, promote
from mlray.running.run import train
from mlray.values.settings import read_settings
from mlray.values.spec import Rule, read_spec
settings = read_settings("lab", "project").model_copy(update={"ray": "local"})
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
    made = lab.hosts.run("n1", "bash", "-c", f"ln -s {lab.share}/project project && python {lab.share}/released.py")
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


JOURNALED = "from pathlib import Path; from mlray.monitoring.archive import journaled, put_away; f = Path('/tmp/home/journal'); put_away(f); print(chr(10).join(journaled(f).select('id').collect()['id']) if f.is_dir() else '')"
FULL = "mount -o remount,size=$(( $(df --output=used -k /tmp | tail -1) + 4 ))k /tmp; dd if=/dev/zero of=/tmp/filler bs=1k 2>/dev/null; df --output=avail -k /tmp | tail -1"


WATCH = """
import time
from pathlib import Path
from mlray.engines.haproxy import servers_up
node = next(Path('/tmp/haproxy-serve').glob('*/admin.sock')).parent.name
def asks(): return sum('Gateway' in name for name in servers_up(node))
print(asks(), flush=True)
for fewer in (True, False):
    while (asks() in (1, 2)) != fewer: time.sleep(0.05)
    print(time.time(), flush=True)
"""


def told(lab: Lab, n: str) -> list[dict[str, str]]:
    "What the doctor has against a host."
    said = lab.laptop("mlray", "doctor", "--on", "lab", "--json", timeout=400)
    assert said.returncode in (0, 1), said.stderr
    return [c for c in json.loads(said.stdout)["complaints"] if c["found"].startswith(lab.hosts.ip(n))]


def test_a_full_disk_of_one_host_stops_nothing(lab, key):
    "No byte more goes to the disk on which Ray keeps its logs and packages, and the host its journal; what serves and trains elsewhere goes on, the operator is told, and what was answered is journaled."
    assert told(lab, "n3") == []
    watch = lab.hosts.popen("n1", "/root/.mlray-env/bin/python", "-c", WATCH, stdout=subprocess.PIPE)
    assert watch.stdout.readline().strip() == "3", "the head's HAProxy asks three"
    left = lab.hosts.run("n3", "bash", "-c", FULL).stdout.split()
    assert left == ["0"], left
    full = time.time()
    try:
        load = loaded(lab, "n1", key, 50, f"{lab.share}/ids")
        trained = lab.mlray("train", "patients.yaml", "train.seed=5", "--workers", "1..3", "--on", "lab")
        seen = json.loads(load.communicate(timeout=300)[0].splitlines()[-1])
        print("\na host without room:", seen, "trained meanwhile:", trained["version"], f"{lab.seconds['train patients.yaml']:.0f} s")
        refused = lab.laptop("mlray", "train", "patients.yaml", "train.seed=6", "--workers", "3", "--on", "lab", timeout=400) # who wants three and no fewer
        assert refused.returncode == 3 and f"no room on the disk of {lab.hosts.ip('n3')}, and elsewhere there is none for 3 workers" in refused.stderr, refused.stderr
        complaints = told(lab, "n3")
        print("the doctor:", [c["found"] for c in complaints])
    finally: lab.hosts.run("n3", "bash", "-c", "mount -o remount,size=2g /tmp; rm -f /tmp/filler")
    room, (out, back) = time.time(), map(float, watch.communicate(timeout=120)[0].split())
    print(f"the head's HAProxy asked it no more {out - full:.1f} s after its disk was full, and again {back - room:.1f} s after there was room")
    assert seen["failures"] == 0 and seen["scores"] == 1 and seen["answered"] > 200
    assert {"node", "node_disk"} & {c["what"] for c in complaints}
    acknowledged, kept = set((lab.share / "ids").read_text().split()), set[str]()
    for n in NODES: kept |= set(lab.hosts.run(n, "/root/.mlray-env/bin/python", "-c", JOURNALED).stdout.split())
    print(f"{len(acknowledged)} answers acknowledged, {len(acknowledged - kept)} of them not journaled")
    assert len(acknowledged) == seen["answered"] and acknowledged <= kept
    assert told(lab, "n3") == []
    again = lab.mlray("train", "patients.yaml", "train.seed=5", "--workers", "2", "--on", "lab")
    assert again["measures"] == trained["measures"], "what two workers make anywhere"


def announced(lab: Lab, n: str, seconds: int) -> None:
    "What a cloud says before it takes a spot node, said to Ray as its autoscaler says it."
    said = lab.hosts.run(n, "bash", "-c", f"/root/.mlray-env/bin/ray drain-node --address {lab.hosts.ip('n1')}:6379 --reason DRAIN_NODE_REASON_PREEMPTION --reason-message 'taken away' --deadline-remaining-seconds {seconds}", RAY_AUTH_MODE="token")
    assert said.returncode == 0, said.stdout + said.stderr


def test_a_host_that_is_taken_away_with_notice_costs_no_answer_and_no_training(lab, key):
    "Half a minute after the notice the power goes; the one who trains is told of it, another replica begins for the one there, and the training ends on the hosts that stay."
    lab.hosts.run("laptop", "sed", "-i", "s|^workers = .*|workers = 1..3|", "/root/project/settings.ini") # fewer will do
    running = begun(lab, log := lab.share / "notice.err", 1200)
    victim = next(n for n in ("n3", "n2") if any("RayTrainWorker" in c for c in lab.hosts.processes(n)))
    load = loaded(lab, "n1", key, 75)
    announced(lab, victim, 30)
    told_at = time.monotonic()
    wait_for(lambda: f"{lab.hosts.ip(victim)} is taken away in" in log.read_text(), 30)
    assert [c["what"] for c in told(lab, victim)][-1:] == ["leaving"]
    time.sleep(max(told_at + 30 - time.monotonic(), 0)) # the rest of the notice
    replicas = lambda: {n: sum("ServeReplica" in c for c in lab.hosts.processes(n)) for n in NODES if n in lab.hosts.inits}
    before = replicas()
    lab.hosts.kill(victim)
    seen = json.loads(load.communicate(timeout=300)[0].splitlines()[-1])
    print(f"\na spot node with notice, {victim}: {seen}; replicas when the power went: {before}")
    wait_for(lambda: sum(replicas().values()) == 3)
    assert seen["failures"] == 0 and seen["scores"] == 1 and seen["answered"] > 200
    wait_for(lambda: lab.alive() == 2)
    version = running.communicate(timeout=900)[0].split()
    print("\n".join(line for line in log.read_text().splitlines() if "  epoch " not in line))
    assert running.returncode == 0 and version, log.read_text()[-3000:]
    assert "what was announced has gone; going on from the newest checkpoint" in log.read_text(), "it outlived the node"


EPOCHS = 400 # more than are done before the power goes


def test_a_head_that_is_taken_away_with_notice_says_so_and_its_training_is_taken_up(lab, key):
    "The run ends with it, as it was told; another head in its place goes on from the states that all see, with nothing of the first one's disk."
    running = begun(lab, log := lab.share / "head.err", EPOCHS)
    announced(lab, "n1", 10)
    told_at = time.monotonic()
    wait_for(lambda: f"{lab.hosts.ip('n1')} is taken away in" in log.read_text(), 30)
    time.sleep(max(told_at + 10 - time.monotonic(), 0)) # the rest of the notice
    lab.hosts.kill("n1")
    running.communicate(timeout=300)
    said = log.read_text()
    print("\na head with notice:", [line for line in said.splitlines() if "taken away" in line or line.startswith("mlray:")])
    assert running.returncode == 3 and "and with it this run, which it leads" in said and "--resume" in said
    for n in NODES:
        if n not in lab.hosts.inits: arrived(lab, n)
    down = lab.hosts.run("laptop", "bash", "-c", f"cd {ROOT} && ray down -y {lab.share}/local.yaml", **OPERATOR) # else `ray up` takes the new host for the old one, which has all its files
    assert down.returncode == 0, down.stdout + down.stderr
    up(lab)
    with tunnel(lab.hosts):
        wait_for(lambda: lab.alive() == 3, 300)
        last = max(int(e) for e in re.findall(r"  epoch (\d+) ", said))
        with open(log := lab.share / "resumed.err", "w") as heard: resumed = lab.hosts.popen("laptop", "bash", "-c", f"cd ~/project && exec mlray train patients.yaml train.epochs={EPOCHS} train.patience={EPOCHS} --resume --on lab", variables=OPERATOR, stdout=subprocess.PIPE, stderr=heard)
        version = resumed.communicate(timeout=600)[0].split()
        assert resumed.returncode == 0 and version, log.read_text()[-3000:]
        after = int(re.search(r"after epoch (\d+)", log.read_text())[1]) # with as many workers as before, or more, or fewer
        print(f"the last epoch that was told: {last}; taken up after epoch {after}, and ended as {version[-1]}")
        assert last <= after < EPOCHS, "of what was told, nothing was done again"
