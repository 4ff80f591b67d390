"""`cluster/` and `mlray cluster plan`: what ships is closed, valid and complete; each planted fault is found, alone."""
import copy
import importlib.util
import json
import os
import re
import tomllib
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from mlray.command_line.cluster_cli import application
from mlray.operations.cluster_file import plan
from mlray.operations.cluster_plan import Demand, Group, place, read_prices
from mlray.operations.launcher import faults, groups_of, pinned
from mlray.operations.manifest import clusters, faults as faults_of_manifests
from mlray.values.errors import SettingsError
from mlray.values.imported import imported
from mlray.values.settings import Settings, shipped
from mlray.values.spec import read_spec
from tests.conftest import ROOT

CLUSTER = shipped("cluster")
LAUNCHERS = ("local", "aws", "gcp", "azure")
CRDS = Path(os.environ.get("MLRAY_DATA", "nowhere")) / "kuberay-v1.7.0"


def launcher(name: str) -> dict: return yaml.safe_load((CLUSTER / f"{name}.yaml").read_text())
def manifests() -> list[dict]: return [d for f in sorted((CLUSTER / "kuberay").glob("*.yaml")) for d in yaml.safe_load_all(f.read_text())]


@pytest.mark.parametrize("name", [*(f"{n}.yaml" for n in LAUNCHERS), "kuberay"])
def test_nothing_to_complain_of_in_what_ships(name): assert plan(CLUSTER / name, Settings(), [read_spec(shipped("configs") / "wine.yaml")]).complaints == ()


@pytest.mark.parametrize("name", LAUNCHERS)
def test_ray_itself_takes_our_launchers(name):
    from ray.autoscaler._private.util import prepare_config, validate_config
    prepared = prepare_config(launcher(name))
    validate_config(prepared)
    assert prepared["head_node_type"] in prepared["available_node_types"]


@pytest.mark.parametrize("name", LAUNCHERS)
def test_every_start_has_the_token_the_keepalives_and_no_open_dashboard(name):
    starts = [c for who in ("head", "worker") for c in launcher(name)[f"{who}_start_ray_commands"] if "ray start" in c]
    assert len(starts) == 2
    for command in starts:
        assert command.index("RAY_AUTH_MODE=token") < command.index("ray start") and "0.0.0.0" not in command
        assert all(f"{name}=" in command and name in (CLUSTER / "Dockerfile").read_text() for name in ("RAY_ROTATION_MAX_BYTES", "RAY_ROTATION_BACKUP_COUNT"))
        assert "RAY_grpc_client_keepalive_time_ms=10000" in command and "RAY_grpc_client_keepalive_timeout_ms=10000" in command
    assert "--dashboard-host=127.0.0.1" in starts[0]


def test_strangers_reach_ssh_on_aws_and_nothing_else():
    group, source = launcher("aws")["provider"]["security_group"], Path(importlib.util.find_spec("ray").submodule_search_locations[0]) / "autoscaler/_private/aws/config.py"
    assert set(group) == {"GroupName"}, "rules of ours are added to Ray's own"
    own = re.search(r"def _create_default_ssh_inbound_rules\(\):\n(.*?)\n\n", source.read_text(), re.S)[1]
    assert re.findall(r'"(?:From|To)Port": (-?\d+)', own) == ["22", "22"] and source.read_text().count("0.0.0.0/0") == 1
    policy = json.loads((CLUSTER / "aws-policy.json").read_text())["Statement"]
    asked = {a for s in policy for a in s["Action"]}
    assert not any("*" in a or a.startswith(("iam:", "s3:")) for a in asked)
    assert next(s for s in policy if "ec2:TerminateInstances" in s["Action"])["Condition"]["StringEquals"] == {"ec2:ResourceTag/ray-cluster-name": launcher("aws")["cluster_name"]}


def at(*path, value=None, drop=False):
    def change(config):
        for key in path[:-1]: config = config[key]
        if drop: config.pop(path[-1])
        else: config[path[-1]] = value
    return change


def rewritten(key, old, new):
    def change(config): config[key] = [c.replace(old, new) for c in config[key]]
    return change


TYPES, OPEN = "available_node_types", {"FromPort": 8265, "ToPort": 8265, "IpProtocol": "tcp", "IpRanges": [{"CidrIp": "0.0.0.0/0"}]}
BAD = { # file, complaint, what is done to it
    "unknown key": ("aws", "schema", at("idle_timeout", value=5)),
    "wrong type": ("aws", "schema", at("max_workers", value="10")),
    "commands that are no list": ("gcp", "schema", at("setup_commands", value="pip install ray")),
    "unknown provider key": ("aws", "provider", at("provider", "regionn", value="x")),
    "unknown provider": ("aws", "provider", at("provider", "type", value="awz")),
    "no region": ("aws", "place", at("provider", "region", drop=True)),
    "no resource group": ("azure", "place", at("provider", "resource_group", drop=True)),
    "no project": ("gcp", "place", at("provider", "project_id", value=None)),
    "no auth": ("aws", "auth", at("auth", drop=True)),
    "no key": ("local", "auth", at("auth", "ssh_private_key", drop=True)),
    "typo in node_config": ("aws", "node_config", at(TYPES, "cpu", "node_config", "InstanceTyp", value="x")),
    "typo in arm parameters": ("azure", "node_config", at(TYPES, "cpu", "node_config", "azure_arm_parameters", "vmSiz", value="x")),
    "head of no type": ("aws", "head", at("head_node_type", value="nope")),
    "least above most": ("aws", "bounds", at(TYPES, "cpu", "min_workers", value=9)),
    "more than there are hosts": ("local", "bounds", at("min_workers", value=3)),
    "a host twice": ("local", "hosts", at("provider", "worker_ips", value=["192.0.2.12", "192.0.2.12"])),
    "larger than the machine": ("aws", "size", at(TYPES, "cpu", "resources", "CPU", value=16)),
    "a machine nobody knows": ("aws", "machine", at(TYPES, "cpu", "node_config", "InstanceType", value="m5.hugest")),
    "no token": ("gcp", "token", rewritten("worker_start_ray_commands", "RAY_AUTH_MODE=token", "")),
    "no token file": ("aws", "token_file", at("file_mounts", "~/.ray/auth_token", drop=True)),
    "token for all to read": ("azure", "token_file", rewritten("setup_commands", "chmod 600", "chmod 644")),
    "logs without end": ("azure", "logs", rewritten("worker_start_ray_commands", "RAY_ROTATION_MAX_BYTES=100000000 ", "")),
    "no keepalive": ("local", "keepalive", rewritten("head_start_ray_commands", "RAY_grpc_client_keepalive_timeout_ms=10000", "")),
    "a proxy that nobody misses": ("local", "proxy_health", rewritten("head_start_ray_commands", "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S=1", "")),
    "workers that do not find the head": ("local", "address", rewritten("worker_start_ray_commands", "RAY_HEAD_IP", "RAY__IP")),
    "open dashboard": ("aws", "dashboard", rewritten("head_start_ray_commands", "127.0.0.1", "0.0.0.0")),
    "open port": ("aws", "port", at("provider", "security_group", "IpPermissions", value=[OPEN])),
    "a role that may do all": ("aws", "role", at(TYPES, "head", "node_config", "IamInstanceProfile", drop=True)),
    "newest image": ("azure", "image", at(TYPES, "gpu", "node_config", "azure_arm_parameters", "imageVersion", value="latest")),
    "container of no version": ("aws", "image", at("docker", value={"image": "rayproject/ray:latest", "container_name": "ray"})),
    "packages of any version": ("aws", "packages", lambda c: c["setup_commands"].append("pip install -U ray boto3")),
    "idle for ever": ("gcp", "idle", at("idle_timeout_minutes", value=10_000)),
    "the operator's credentials go along": ("aws", "credentials", at("file_mounts", "~/.aws", value="~/.aws")),
    "the registry goes along": ("gcp", "carried", at("rsync_exclude", value=["**/.git"])),
    "a disk for nothing": ("aws", "disk", at(TYPES, "cpu", "node_config", "BlockDeviceMappings", 0, "Ebs", "VolumeSize", value=8)),
    "a small disk": ("gcp", "disk", at(TYPES, "cpu", "node_config", "disks", 0, "initializeParams", "diskSizeGb", value=10)),
    "workers that knock at another port": ("local", "address", rewritten("head_start_ray_commands", "--port=6379", "--port=6380")),
    "a GPU that nobody may ask for": ("aws", "gpu", at(TYPES, "gpu", "resources", value={"CPU": 8})),
    "spot head": ("aws", "spot", at(TYPES, "head", "node_config", "InstanceMarketOptions", value={"MarketType": "spot"})),
}


@pytest.mark.parametrize("what", BAD)
def test_each_planted_fault_is_found_alone(what, tmp_path):
    name, complaint, change = BAD[what]
    config = launcher(name)
    change(config)
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump(config))
    found, = plan(tmp_path / "bad.yaml", Settings()).complaints
    assert found.what == complaint and found.mend


GROUP = ("spec", "headGroupSpec")
POD = (*GROUP, "template", "spec")
BAD_MANIFESTS = {
    "no token": ("token", at("spec", "authOptions", drop=True)), "service open to the world": ("port", at(*GROUP, "serviceType", value="LoadBalancer")),
    "newest image": ("image", at(*POD, "containers", 0, "image", value="rayproject/ray:latest")), "no limits": ("limits", at(*POD, "containers", 0, "resources", drop=True)),
    "root": ("root", at(*POD, "securityContext", drop=True)), "another version of Ray": ("version", at("spec", "rayVersion", value="2.9.0")),
    "a name of capitals": ("schema", at("metadata", "name", value="MlRay")), "least above most": ("bounds", at("spec", "workerGroupSpecs", 0, "minReplicas", value=99)),
}


@pytest.mark.parametrize("what", BAD_MANIFESTS)
def test_each_fault_of_a_manifest_is_found_alone(what, tmp_path):
    complaint, change = BAD_MANIFESTS[what]
    things = manifests()
    change(next(t for t in things if t["kind"] == "RayCluster"))
    (tmp_path / "all.yaml").write_text(yaml.safe_dump_all(things))
    assert {c.what for c in plan(tmp_path / "all.yaml", Settings()).complaints} == {complaint}


def test_a_cluster_without_a_network_policy(): assert [c.what for c in faults_of_manifests([t for t in manifests() if t["kind"] != "NetworkPolicy"])] == ["network"]


@pytest.mark.skipif(not CRDS.is_dir(), reason="KubeRay's CRD files are not in MLRAY_DATA/kuberay-v1.7.0")
def test_manifests_hold_against_kuberays_own_schema():
    assert faults_of_manifests(manifests(), CRDS) == ()
    for change in (at("spec", "workerGroupSpecs", 0, "maxReplica", value=3), at("spec", "workerGroupSpecs", 0, "maxReplicas", value="3"), at("spec", "headGroupSpec", "template", drop=True)):
        things = copy.deepcopy(manifests())
        change(next(t for t in things if t["kind"] == "RayCluster"))
        assert [c.what for c in faults_of_manifests(things, CRDS)] == ["schema"]


def test_kuberays_autoscaler_reads_our_clusters_as_we_do():
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr as read

    from mlray.operations.manifest import groups_in
    for thing in manifests():
        if thing.get("kind") != "RayCluster": continue
        types = read(copy.deepcopy(thing) | {"metadata": {"name": "mlray", "namespace": "default"}})["available_node_types"]
        ours = {g.name: (g.least, g.most, int(g.resources["CPU"]), int(g.resources["GPU"])) for g in groups_in(thing["spec"]) if not g.head}
        assert ours == {n: (t["min_workers"], t["max_workers"], t["resources"]["CPU"], t["resources"].get("GPU", 0)) for n, t in types.items() if not n.startswith("head")}


def test_what_manifests_start_is_there():
    from typer.main import get_command

    from mlray.cli import app
    things = manifests()
    job, service = (next(t for t in things if t["kind"] == kind) for kind in ("RayJob", "RayService"))
    words = job["spec"]["entrypoint"].split()
    options = {o for p in get_command(app).commands[words[1]].params for o in p.opts}
    assert words[0] == "mlray" and {w for w in words if w.startswith("--")} <= options
    serve = yaml.safe_load(service["spec"]["serveConfigV2"])
    from ray.serve.schema import ServeDeploySchema
    assert imported(ServeDeploySchema.model_validate(serve).applications[0].import_path, "import_path") is application
    with pytest.raises(SettingsError, match="versions"): application({"env": "local"})


def test_asks_go_to_the_cheapest_machine_that_holds_them():
    groups = (Group("head", 1, 1, {"CPU": 0}, head=True), Group("dear", 0, 9, {"CPU": 8}, price=2.0), Group("cheap", 0, 1, {"CPU": 2}, price=0.1), Group("gpu", 0, 1, {"CPU": 2, "GPU": 1}, price=3.0))
    count, homeless = place(groups, [Demand("a", {"CPU": 2})] * 2 + [Demand("b", {"GPU": 1, "CPU": 2})] * 2, 9)
    assert count == {"head": 1, "dear": 1, "cheap": 1, "gpu": 1} and [a.what for a in homeless] == ["b"]
    assert len(place(groups, [Demand("a", {"CPU": 8})] * 4, 2)[1]) == 2


def test_specs_that_find_no_room(tmp_path):
    found = plan(CLUSTER / "aws.yaml", Settings(workers=5, gpu=True), [read_spec(shipped("configs") / "wine.yaml")])
    assert [c.what for c in found.complaints] == ["demand"] and "1 of 5" in found.complaints[0].found and found.machines["gpu"] == 4


def test_costs_are_those_of_the_table():
    config, prices = launcher("aws"), read_prices(CLUSTER / "prices.yaml", "aws")
    found = plan(CLUSTER / "aws.yaml", Settings())
    per = {g.name: prices.machines[g.machine].price for g in groups_of(config, prices)[0]}
    assert found.costs == pytest.approx({"idle": per["head"], "specs": per["head"], "most": per["head"] + 8 * per["cpu"] + 4 * per["gpu"]}) and found.noted == prices.noted


@pytest.mark.parametrize(("image", "fixed"), [("ray", False), ("ray:latest", False), ("localhost:5000/ray", False), ("localhost:5000/ray:2.60.0", True), ("r/ray@sha256:ab", True), ("ray:nightly", False)])
def test_which_images_are_pinned(image, fixed): assert pinned(image) is fixed


def test_the_command_and_its_exit_codes(tmp_path, monkeypatch):
    from mlray.cli import app
    ran = CliRunner().invoke(app, ["cluster", "plan", str(CLUSTER / "aws.yaml"), "--json"])
    assert ran.exit_code == 0 and json.loads(ran.stdout)["well"] is True
    config = launcher("aws")
    config["provider"].pop("region")
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump(config))
    ran = CliRunner().invoke(app, ["cluster", "plan", str(tmp_path / "bad.yaml")])
    assert ran.exit_code == 1 and "region" in ran.stdout
    for text in ("", "- 1\n", "a: [", "kind: Pod\nmetadata: {name: a}\n"):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(SettingsError) as letter: plan(tmp_path / "bad.yaml", Settings())
        assert letter.value.exit_code == 2


@pytest.mark.parametrize("config", [{}, {"provider": None}, {"cluster_name": "a", "provider": {"type": "aws"}, "available_node_types": {"a": None}}, {"cluster_name": "a", "provider": {"type": "local"}}])
def test_nonsense_is_told_and_breaks_nothing(config): assert faults(config)


def test_the_image_is_small_locked_and_not_root():
    stages = re.split(r"(?m)^FROM ", (CLUSTER / "Dockerfile").read_text())
    final = {s.split(" AS ")[1].split()[0]: s for s in stages[1:]}
    for target in ("cpu", "gpu"):
        lines = final[target].splitlines()
        assert final[target].startswith("base ") and [x for x in lines if x.startswith("USER")] == ["USER 1000"]
        installs = [x for x in lines if "pip install" in x]
        assert installs and all("-c /constraints.txt" in x and "--no-cache-dir" in x for x in installs)
    torch = next(x for x in (CLUSTER / "constraints.txt").read_text().splitlines() if x.startswith("torch=="))
    copied = {x.split()[1] for x in final["wheel"].splitlines() if x.startswith("COPY") and len(x.split()) == 3}
    packed = tomllib.loads((CLUSTER.parent / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]
    assert set(packed.values()) <= copied, "the wheel wants a folder that the image does not copy"
    assert torch in final["cpu"] and torch in final["gpu"] and pinned(stages[0].split("ARG BASE=")[1].strip()) and "latest" not in "".join(final.values())


def test_the_image_is_built_of_all_that_a_wheel_carries():
    wheel, packaged = (CLUSTER / "Dockerfile").read_text().split(" AS wheel")[1].split("FROM ")[0], tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]
    assert {"mlray", *packaged.values()} <= {line.split()[1] for line in wheel.splitlines() if line.startswith("COPY")}


def test_every_node_has_the_python_of_the_image():
    "To the last number: Ray counts two that differ in it as two."
    image = re.search(r"BASE=python:([\d.]+)-", (CLUSTER / "Dockerfile").read_text())[1]
    assert {re.search(r"uv venv --quiet --python (\S+)", " ".join(launcher(name)["setup_commands"]))[1] for name in LAUNCHERS} == {image}


def _names(text: str) -> set[str]: return set(re.findall(r"\b((?:ray|mlray)_[a-z_]+)\b", text))


def test_alerts_and_dashboard_ask_for_metrics_that_exist():
    from mlray.monitoring import monitor
    panels = Path(importlib.util.find_spec("ray").submodule_search_locations[0]) / "dashboard/modules/metrics/dashboards"
    known = {n for p in panels.glob("*.py") for n in _names(p.read_text())} | _names(Path(monitor.__file__).read_text())
    rules = [r for g in yaml.safe_load((CLUSTER / "prometheus" / "alerts.yaml").read_text())["groups"] for r in g["rules"]]
    board = json.loads((CLUSTER / "grafana" / "mlray.json").read_text())
    queries = [r["expr"] for r in rules] + [t["expr"] for p in board["panels"] for t in p.get("targets", ())]
    assert len(rules) >= 8 and len(board["panels"]) >= 8 and all(_names(q) for q in queries)
    assert {n for q in queries for n in _names(q)} - known == set()
    assert all(r["annotations"]["summary"] and r["annotations"]["description"] and r["labels"]["severity"] in ("page", "ticket") and r["for"] for r in rules)
    assert len({p["id"] for p in board["panels"]}) == len(board["panels"])


def test_the_schema_and_the_clusters_are_what_we_say():
    assert {k for k, _ in clusters(manifests())} == {"RayCluster mlray", "RayJob mlray-train", "RayService mlray-serve"}
    assert {t["kind"] for t in manifests()} >= {"NetworkPolicy", "PodDisruptionBudget", "PersistentVolumeClaim"}


def test_a_rayservice_of_ones_own_is_what_ships_with_other_names():
    from ray.serve.schema import ServeDeploySchema

    from mlray.operations.serve_manifest import manifest_yaml, ray_service, serve_config
    made = ray_service(["adult", "wine@canary"], Settings(env="production", port=9000, replicas=6), "registry.example.org/mlray:7")
    again = yaml.safe_load(manifest_yaml(made))
    assert again == made and again["metadata"]["name"] == "mlray-adult-wine-canary"
    beside = [t for t in manifests() if t["kind"] == "NetworkPolicy"]
    assert faults_of_manifests([made, *beside], CRDS if CRDS.is_dir() else None) == ()
    serve = ServeDeploySchema.model_validate(yaml.safe_load(made["spec"]["serveConfigV2"]))
    assert serve.applications[0].args == {"env": "production", "versions": "adult wine@canary"} and serve.http_options.port == 9000
    assert {c["image"] for _, spec in clusters([made]) for g in (spec["headGroupSpec"], *spec["workerGroupSpecs"]) for c in g["template"]["spec"]["containers"]} == {"registry.example.org/mlray:7"}
    assert ServeDeploySchema.model_validate(serve_config(["adult"], Settings(registry="postgresql://u:secret@h/d"))) and "secret" not in json.dumps(serve_config(["adult"], Settings(registry="postgresql://u:secret@h/d")))


def test_what_is_scheduled_is_there():
    from typer.main import get_command

    from mlray.cli import app
    commands, jobs = get_command(app).commands, [t for t in manifests() if t["kind"] == "CronJob"]
    assert {j["metadata"]["name"] for j in jobs} == {"mlray-monitor", "mlray-batch"}
    for job in jobs:
        pod = job["spec"]["jobTemplate"]["spec"]["template"]["spec"]
        words, container = pod["containers"][0]["command"], pod["containers"][0]
        assert words[0] == "mlray" and {w for w in words if w.startswith("--")} <= {o for p in commands[words[1]].params for o in p.opts}
        assert pod["securityContext"]["runAsNonRoot"] and pinned(container["image"]) and {"cpu", "memory"} <= set(container["resources"]["limits"]) and job["spec"]["concurrencyPolicy"] == "Forbid"


HOLD = """
import os, sys
from mlray.engines.cluster_on_ray import serve_environment
os.environ.update(serve_environment() | {"RAY_USAGE_STATS_ENABLED": "0"})
import ray
ray.init(address="local", num_cpus=4, object_store_memory=100 * 2**20, include_dashboard=True, dashboard_port=int(sys.argv[1]), log_to_driver=False)
print("up", flush=True)
sys.stdin.read()
ray.shutdown()
"""


@pytest.mark.chaos
def test_serve_deploy_takes_our_file_and_it_answers(trained, tmp_path, monkeypatch, capsys):
    import subprocess
    import sys
    import time

    from mlray.cli import main
    from mlray.client import Client
    from mlray.command_line.commands import create_key
    from tests.conftest import free_port
    settings, dashboard = trained[0].model_copy(update={"port": free_port()}), free_port()
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": os.urandom(32).hex()} # whoever deploys has to have the cluster's
    for name, value in {"MLRAY_HOME": settings.home, "MLRAY_PORT": settings.port, **token}.items(): monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(sys, "argv", ["mlray", "serve", "diabetes/1", "--manifest", "serve"])
    with pytest.raises(SystemExit) as ended: main()
    assert not ended.value.code
    (tmp_path / "serve.yaml").write_text(capsys.readouterr().out)
    key, row = create_key("predictor", settings), trained[1].rows.parts.test.head(1).select(trained[1].rows.contract.features).to_dicts()[0]
    held = subprocess.Popen([sys.executable, "-c", HOLD, str(dashboard)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert held.stdout.readline() == "up\n"
        done = subprocess.run([str(Path(sys.executable).with_name("serve")), "deploy", str(tmp_path / "serve.yaml"), "-a", f"http://127.0.0.1:{dashboard}"], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        end, said = time.monotonic() + 240, None
        with Client(f"http://127.0.0.1:{settings.port}", key) as client:
            while said is None and time.monotonic() < end:
                try: said = client.predict("diabetes", [row]).as_dict()
                except Exception as error: last = error; time.sleep(1)
        assert said and said["version"] == "1" and said["digest"] == trained[1].version.digest, last
        print(f"\nserve deploy took the file of `mlray serve --manifest serve`; the answer: {said['predictions'][0]}")
    finally:
        held.stdin.close()
        held.wait(120)
