"""`cluster/aws.yaml` against an EC2 and IAM that answer: what `ray up`, the autoscaler on the head and `ray down` make of it, and what they leave."""
import contextlib
import json
import logging
import os
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import botocore.client
import psutil
import pytest
import yaml

from mlray.engines.cluster_on_ray import free_port
from mlray.values.settings import Settings, shipped
from mlray.values.spec import read_spec

pytest.importorskip("moto", reason="pip install 'mlray[dev]'")
FILE = shipped("cluster") / "aws.yaml"
TRUST = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Principal": {"Service": "ec2.amazonaws.com"}, "Action": "sts:AssumeRole"}]}


class _AtTheDoor(threading.Thread):
    "Where SSH would begin, which nobody answers here: what a node was to be told is kept."
    told: ClassVar[dict[str, dict[str, Any]]] = {}
    exitcode = 0

    def __init__(self, node_id: str, **more: Any):
        super().__init__()
        self.told[node_id] = more | {"bootstrap": Path(more["file_mounts"]["~/ray_bootstrap_config.yaml"]).read_text()} # the file is temporary


@pytest.fixture
def aws(tmp_path, monkeypatch) -> Iterator[Any]:
    "A client of each service of an account in which the comment at the head of aws.yaml was followed; `asked` hears each call."
    import boto3
    from moto.server import ThreadedMotoServer
    from ray.autoscaler._private.aws import config, utils
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    url = "http://{}:{}".format(*server.get_host_and_port())
    for name, value in {"AWS_ENDPOINT_URL": url, "AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-west-2", "AWS_EC2_METADATA_DISABLED": "true", "HOME": str(tmp_path)}.items(): monkeypatch.setenv(name, value)
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ssh").mkdir()
    (tmp_path / ".ray/auth_token").write_text("t" * 64)
    client, asked = {s: boto3.client(s) for s in ("ec2", "iam")}, list[str]()
    client["iam"].create_role(RoleName="mlray-head", AssumeRolePolicyDocument=json.dumps(TRUST))
    client["iam"].put_role_policy(RoleName="mlray-head", PolicyName="mlray", PolicyDocument=(FILE.parent / "aws-policy.json").read_text())
    client["iam"].create_instance_profile(InstanceProfileName="mlray-head")
    client["iam"].add_role_to_instance_profile(InstanceProfileName="mlray-head", RoleName="mlray-head")
    call = botocore.client.BaseClient._make_api_call

    def heard(self: Any, operation: str, given: dict) -> Any:
        asked.append(f"{self.meta.service_model.service_name}:{operation}")
        return call(self, operation, given)
    monkeypatch.setattr(botocore.client.BaseClient, "_make_api_call", heard)
    for cached in (utils.resource_cache, utils.client_cache): cached.cache_clear()
    monkeypatch.setattr("ray.autoscaler._private.commands.NodeUpdaterThread", _AtTheDoor)
    monkeypatch.setattr(_AtTheDoor, "told", {})
    monkeypatch.chdir(FILE.parents[1])
    try: yield client | {"asked": asked}
    finally:
        config.reload_log_state({})
        for cached in (utils.resource_cache, utils.client_cache): cached.cache_clear()
        server.stop()


def instances(aws: Any) -> list[dict]: return [i for r in aws["ec2"].get_paginator("describe_instances").paginate() for s in r["Reservations"] for i in s["Instances"]]
def running(aws: Any) -> list[dict]: return [i for i in instances(aws) if i["State"]["Name"] in ("pending", "running")]
def tag(instance: dict, name: str) -> str: return next(t["Value"] for t in instance["Tags"] if t["Key"] == name)


def up() -> None:
    "As `ray up -y` does, to where SSH begins."
    from ray.autoscaler._private.commands import create_or_update_cluster
    create_or_update_cluster(str(FILE), None, None, False, False, yes=True, no_config_cache=True, redirect_command_output=True, use_login_shells=False)


def open_to_strangers(group: dict) -> list[tuple[Any, Any]]:
    "The ports of a security group that any address reaches."
    return [(r.get("FromPort"), r.get("ToPort")) for r in group["IpPermissions"] if r["IpRanges"] or r["Ipv6Ranges"] or r["PrefixListIds"] or any(p["GroupId"] != group["GroupId"] for p in r["UserIdGroupPairs"])]


@pytest.mark.chaos
def test_a_cluster_comes_and_goes(aws, tmp_path):
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
    from ray.autoscaler._private.commands import teardown_cluster
    from ray.autoscaler.v2.instance_manager.config import FileConfigReader
    from ray.autoscaler.v2.instance_manager.node_provider import NodeProviderAdapter
    types = yaml.safe_load(FILE.read_text())["available_node_types"]
    up()
    head, = running(aws)
    told = _AtTheDoor.told[head["InstanceId"]]
    assert tag(head, "ray-node-type") == "head" and head["InstanceType"] == types["head"]["node_config"]["InstanceType"]
    assert head["IamInstanceProfile"]["Arn"].endswith(":instance-profile/mlray-head") and [r["RoleName"] for r in aws["iam"].list_roles()["Roles"]] == ["mlray-head"], "Ray made no role of its own, which may do all of EC2 and S3"
    assert not any(a.startswith("iam:") for a in aws["asked"] if not a.startswith("iam:List"))
    assert sum("ray start" in c and "RAY_AUTH_MODE=token" in c for c in told["ray_start_commands"]) == 1 and "~/.ray/auth_token" in told["file_mounts"]
    up()
    assert [i["InstanceId"] for i in running(aws)] == [head["InstanceId"]], "a second `ray up` makes no second head"

    aws["asked"].clear() # from here on it is the head that asks, by the configuration that it was given
    (tmp_path / "ray_bootstrap_config.yaml").write_text(told["bootstrap"])
    (tmp_path / "ray_bootstrap_key.pem").write_bytes(Path(told["file_mounts"]["~/ray_bootstrap_key.pem"]).read_bytes())
    reader = FileConfigReader(str(tmp_path / "ray_bootstrap_config.yaml"))
    of_head = reader.get_cached_autoscaling_config()
    provider = NodeProviderAdapter(AWSNodeProvider(of_head.get_config("provider"), of_head.get_config("cluster_name")), reader)
    for type in ("cpu", "cpu", "gpu"): provider._launch_nodes_by_type(type, 1, "a request") # of "at least one, at most two" moto starts one
    assert provider.poll_errors() == [] and sorted(n.node_type for n in provider.get_non_terminated().values()) == ["cpu", "cpu", "gpu", "head"]
    workers = [i for i in running(aws) if tag(i, "ray-node-type") == "worker"]
    for worker in workers:
        wanted = types[tag(worker, "ray-user-node-type")]["node_config"]
        assert worker["InstanceType"] == wanted["InstanceType"] and "IamInstanceProfile" not in worker, "a worker has no role at all"
        assert worker.get("InstanceLifecycle") == ("spot" if "InstanceMarketOptions" in wanted else None)
    for each in running(aws): assert each["MetadataOptions"]["HttpTokens"] == "required" and each["KeyName"] == head["KeyName"]
    disks = aws["ec2"].describe_volumes()["Volumes"]
    assert len(disks) == 4 and all(d["Encrypted"] and d["Size"] == 140 for d in disks)
    groups = aws["ec2"].describe_security_groups(GroupIds=sorted({g["GroupId"] for i in running(aws) for g in i["SecurityGroups"]}))["SecurityGroups"]
    assert [open_to_strangers(g) for g in groups] == [[(22, 22)]], "one group for all of them, and strangers reach SSH alone"
    provider._do_terminate([w["InstanceId"] for w in workers[:2]], "another request")
    assert provider.poll_errors() == [] and len(running(aws)) == 2
    allowed = {a for s in json.loads((FILE.parent / "aws-policy.json").read_text())["Statement"] for a in s["Action"]}
    assert set(aws["asked"]) - {"ec2:DescribeVolumes"} <= allowed, "what the head asks for, its role may do"
    assert {"ec2:RunInstances", "ec2:TerminateInstances"} <= set(aws["asked"])

    teardown_cluster(str(FILE), yes=True, workers_only=False, override_cluster_name=None, keep_min_workers=False)
    assert running(aws) == []


@contextlib.contextmanager
def head_of(folder: Path, idle_s: float) -> Iterator[str]:
    "A head with Ray's autoscaler, whose machines are processes of this one and whose types are those of aws.yaml. The address."
    from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID
    from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
    from ray.util import get_node_ip_address
    ours, address = yaml.safe_load(FILE.read_text()), f"{get_node_ip_address()}:{free_port()}"
    types = {n: {k: t[k] for k in ("resources", "labels", "min_workers", "max_workers") if k in t} | {"node_config": {}} for n, t in ours["available_node_types"].items() if n != ours["head_node_type"]}
    for each in types.values(): each["resources"]["object_store_memory"] = 80 * 2**20
    config = {k: [] for k in ("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands", "head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files")} | {"auth": {}, "file_mounts": {}} | {"cluster_name": "mlray", "max_workers": ours["max_workers"], "idle_timeout_minutes": idle_s / 60, "head_node_type": "ray.head.default",
              "provider": {"type": "external", "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider", "gcs_address": address, "launch_multiple": True, "head_node_id": FAKE_HEAD_NODE_ID},
              "available_node_types": types | {"ray.head.default": {"resources": ours["available_node_types"]["head"]["resources"], "node_config": {}, "max_workers": 0}}}
    AutoscalingConfig(config) # or the monitor ends, and the head with it
    (folder / "config.json").write_text(json.dumps(config))
    environment = os.environ | {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_enable_autoscaler_v2": "1", "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
                                "RAY_prestart_worker_first_driver": "0", "RAY_memory_monitor_refresh_ms": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    with open(folder / "head.log", "w") as log:
        head = subprocess.Popen([str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", f"--port={address.rpartition(':')[2]}", "--num-cpus=0", "--include-dashboard=false", "--object-store-memory=100000000",
                                 f"--temp-dir=/tmp/mlray-{os.getpid()}", f"--autoscaling-config={folder / 'config.json'}"], stdout=log, stderr=log, env=environment)
    try:
        began = time.monotonic()
        while "Ray runtime started" not in (said := (folder / "head.log").read_text()):
            assert head.poll() is None and time.monotonic() - began < 300, said[-2000:]
            time.sleep(0.2)
        yield address
    finally:
        head.terminate() # it ends what it started
        with contextlib.suppress(subprocess.TimeoutExpired): head.wait(30)
        every = [p for p in psutil.process_iter(["cmdline"]) if any(f"/tmp/mlray-{os.getpid()}" in a for a in p.info["cmdline"] or ())]
        for process in every:
            with contextlib.suppress(psutil.NoSuchProcess): process.kill()
        head.kill()
        head.wait(30)


def machines(ever: bool = False) -> dict[str, int]:
    "How many of each type are there, or ever were."
    import ray
    pools = [n["Labels"].get("pool") for n in ray.nodes() if n["Alive"] or ever]
    return {p: pools.count(p) for p in ("cpu", "gpu") if p in pools}


def until(true: Callable[[], bool], patience_s: float = 240) -> float: # seconds
    "How long it took."
    began = time.monotonic()
    while not true():
        assert time.monotonic() - began < patience_s, machines()
        time.sleep(0.2)
    return time.monotonic() - began


@pytest.mark.chaos
@pytest.mark.ray
def test_our_node_types_come_when_specs_ask_for_them_and_go_when_nobody_does(tmp_path, capsys, monkeypatch):
    for name, value in {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}.items(): monkeypatch.setenv(name, value)
    import ray

    from mlray.engines.train_on_ray import RayBackend
    from mlray.running.run import train
    with head_of(tmp_path, idle_s=10) as address:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        took = dict[str, float]()
        try:
            assert machines() == {}, "at rest there is the head alone, which takes no work"
            began = time.monotonic()
            run = train(read_spec(shipped("configs") / "wine.yaml", ["train.epochs=3"]), Settings(home=tmp_path / "home", workers=2), RayBackend(workers=2))
            took["trained, with the machine's coming"] = time.monotonic() - began
            assert str(run.version) == "wine/1" and machines(ever=True) == {"cpu": 1}, "two workers of a CPU each find room on one machine, and it is the cheap one"
            took["cpu gone"] = until(lambda: machines() == {})

            @ray.remote(num_cpus=1, num_gpus=1)
            def where() -> str: return ray.get_runtime_context().get_node_id()
            asked, began = [where.remote()], time.monotonic()
            ray.get(asked, timeout=240)
            took["gpu there"] = time.monotonic() - began
            assert machines(ever=True) == {"cpu": 1, "gpu": 1}

            @ray.remote(num_gpus=1)
            def hold(until: Path) -> str:
                while not until.exists(): time.sleep(0.2)
                return ray.get_runtime_context().get_node_id()
            held, began = [hold.remote(tmp_path / "enough") for _ in range(6)], time.monotonic()
            took["six ask"] = until(lambda: machines() == {"gpu": 4})
            while time.monotonic() - began < took["six ask"] + 10: assert machines() == {"gpu": 4}, "no more than `max_workers`"
            (tmp_path / "enough").touch()
            assert len(set(ray.get(held))) == 4
            took["gpu gone"] = until(lambda: machines() == {})
            labelled = ray.remote(num_cpus=0, label_selector={"pool": "cpu"})(lambda: 1).remote()
            assert ray.get(labelled, timeout=240) == 1 and machines(ever=True)["cpu"] == 2, "a label brings its own"
        finally: ray.shutdown()
    with capsys.disabled(): print("\n", {k: round(v, 1) for k, v in took.items()}, "load", os.getloadavg()[0])
