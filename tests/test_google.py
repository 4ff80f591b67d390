"""`cluster/gcp.yaml` as Ray's own code takes it to Google: every request is one that Google describes, and what they leave is what the file promises. Needs google-api-python-client, which brings Google's descriptions along."""
import json
import re
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from mlray.values.settings import shipped
from tests.test_clouds import _AtTheDoor

discovery = pytest.importorskip("googleapiclient.discovery", reason="pip install google-api-python-client google-auth-httplib2")
pytest.importorskip("google_auth_httplib2", reason="pip install google-auth-httplib2")
FILE = shipped("cluster") / "gcp.yaml"
DOCUMENTS = Path(discovery.__file__).parent / "discovery_cache/documents"
TYPES = {"string": str, "boolean": bool, "integer": int, "number": (int, float), "object": dict, "array": list}


def methods(resource: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield from resource.get("methods", {}).values()
    for inner in resource.get("resources", {}).values(): yield from methods(inner)


def faults(schemas: dict[str, Any], schema: dict[str, Any], value: Any, path: str = "") -> Iterator[str]:
    "Where a value is not as Google describes it: a name that means nothing, another type, a word that is none of those known."
    schema = schemas[schema["$ref"]] if "$ref" in schema else schema
    number = schema.get("format") in ("int64", "uint64") and isinstance(value, int)
    if not isinstance(value, TYPES.get(schema.get("type", "any"), object)) and not number:
        yield f"{path}: {value!r} is no {schema['type']}"
        return
    if "enum" in schema and value not in schema["enum"]: yield f"{path}: {value!r} is none of {schema['enum'][:6]}"
    if schema.get("type") == "array":
        for i, item in enumerate(value): yield from faults(schemas, schema["items"], item, f"{path}[{i}]")
    if schema.get("type") == "object":
        for key, item in value.items():
            inner = schema.get("properties", {}).get(key, schema.get("additionalProperties"))
            if inner is None: yield f"{path}.{key} is unknown"
            else: yield from faults(schemas, inner, item, f"{path}.{key}")


class Google:
    "An account that keeps what it is told, and takes no request that Google does not describe."

    def __init__(self) -> None:
        self.asked, self.wrong = list[str](), list[str]()
        self.instances, self.accounts = dict[str, dict](), dict[str, dict]()
        self.policy, self.metadata = {"bindings": []}, {"fingerprint": "f", "items": []}
        self.described = []
        for name in ("compute.v1", "iam.v1", "cloudresourcemanager.v1"):
            document = json.loads((DOCUMENTS / f"{name}.json").read_text())
            base = document["rootUrl"] + document["servicePath"]
            for method in methods(document):
                pattern = re.sub(r"\\\{\+?[\w]+\\\}", "([^/:]+)", re.escape(base + method.get("flatPath", method["path"])))
                self.described.append((method, re.compile(pattern), document["schemas"]))

    def request(self, http: Any, uri: str, method: str = "GET", body: Any = None, headers: Any = None, **more: Any) -> tuple[Any, bytes]:
        "In the place of `httplib2.Http.request`."
        import httplib2
        said, code = self.answer(uri, method, body)
        return httplib2.Response({"status": str(code), "content-type": "application/json"}), json.dumps(said).encode()

    def answer(self, uri: str, verb: str, body: Any) -> tuple[Any, int]:
        if "/token" in uri: return {"access_token": "t", "expires_in": 3600, "token_type": "Bearer"}, 200
        path, _, query = uri.partition("?")
        if path.endswith("/allowedLocations"): return {}, 404 # asked by the library that signs, not by Ray
        found = next(((m, hit, s) for m, p, s in self.described if m["httpMethod"] == verb and (hit := p.fullmatch(path))), None)
        if found is None:
            self.wrong.append(f"{verb} {path}: Google describes no such request")
            return {}, 404
        described, hit, schemas = found
        self.asked.append(described["id"])
        given = json.loads(body) if body else {}
        if given: self.wrong += [f"{described['id']}{f}" for f in faults(schemas, described["request"], given)]
        name, last = described["id"], hit.groups()[-1]
        done = {"name": "operation", "status": "DONE"}
        if name == "cloudresourcemanager.projects.get": return {"projectId": last, "lifecycleState": "ACTIVE"}, 200
        if name == "cloudresourcemanager.projects.getIamPolicy": return self.policy, 200
        if name == "cloudresourcemanager.projects.setIamPolicy":
            self.policy = given["policy"]
            return self.policy, 200
        if name == "iam.projects.serviceAccounts.get": return (self.accounts[last], 200) if last in self.accounts else ({}, 404)
        if name == "iam.projects.serviceAccounts.create":
            email = f"{given['accountId']}@{last}.iam.gserviceaccount.com"
            self.accounts[urllib.parse.quote(email, safe="@")] = made = {"email": email, "projectId": last}
            return made, 200
        if name == "compute.projects.get": return {"name": last, "commonInstanceMetadata": self.metadata}, 200
        if name == "compute.projects.setCommonInstanceMetadata":
            self.metadata = given
            return done, 200
        if name in ("compute.globalOperations.get", "compute.zoneOperations.get"): return done, 200
        if name == "compute.subnetworks.list": return {"items": [{"selfLink": "https://www.googleapis.com/compute/v1/projects/your-project/regions/us-central1/subnetworks/default"}]}, 200
        if name == "compute.instances.insert":
            self.instances[given["name"]] = given | {"status": "RUNNING", "labelFingerprint": "f", "networkInterfaces": [i | {"networkIP": "10.0.0.2", "accessConfigs": [{"natIP": "198.51.100.2"}]} for i in given["networkInterfaces"]]}
            return done, 200
        if name == "compute.instances.list":
            wanted = dict(re.findall(r"\(?labels\.([\w-]+) = ([\w-]+)\)?", urllib.parse.unquote_plus(query)))
            return {"items": [i for i in self.instances.values() if all(i["labels"].get(k) == v for k, v in wanted.items())]}, 200
        if name == "compute.instances.get": return self.instances[last], 200
        if name == "compute.instances.setLabels":
            self.instances[hit.groups()[-1]]["labels"] = given["labels"]
            return done, 200
        if name == "compute.instances.delete":
            self.instances.pop(last)
            return done, 200
        raise AssertionError(f"{name} was not expected")


@pytest.fixture
def google(tmp_path, monkeypatch) -> Google:
    from ray.autoscaler._private.util import generate_rsa_key_pair
    made = Google()
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray/auth_token").write_text("t" * 64)
    (tmp_path / "account.json").write_text(json.dumps({"type": "service_account", "project_id": "your-project", "private_key_id": "k", "private_key": generate_rsa_key_pair()[1], "client_email": "ada@your-project.iam.gserviceaccount.com", "client_id": "1", "token_uri": "https://oauth2.googleapis.com/token"}))
    for name, value in {"HOME": str(tmp_path), "GOOGLE_APPLICATION_CREDENTIALS": str(tmp_path / "account.json")}.items(): monkeypatch.setenv(name, value)
    monkeypatch.setattr("httplib2.Http.request", lambda http, *given, **more: made.request(http, *given, **more))
    monkeypatch.setattr("ray.autoscaler._private.commands.NodeUpdaterThread", _AtTheDoor)
    monkeypatch.setattr(_AtTheDoor, "told", {})
    monkeypatch.chdir(FILE.parents[1])
    return made


def test_a_cluster_comes_and_goes(google, tmp_path, capsys):
    from ray.autoscaler._private.commands import create_or_update_cluster, teardown_cluster
    from ray.autoscaler._private.gcp.node_provider import GCPNodeProvider
    from ray.autoscaler.v2.instance_manager.config import FileConfigReader
    from ray.autoscaler.v2.instance_manager.node_provider import NodeProviderAdapter
    types = yaml.safe_load(FILE.read_text())["available_node_types"]
    create_or_update_cluster(str(FILE), None, None, False, False, yes=True, no_config_cache=True, redirect_command_output=True, use_login_shells=False)
    head, = google.instances.values()
    told, = _AtTheDoor.told.values()
    assert head["labels"]["ray-user-node-type"] == "head" and head["machineType"].endswith(types["head"]["node_config"]["machineType"])
    assert sum("ray start" in c and "RAY_AUTH_MODE=token" in c for c in told["ray_start_commands"]) == 1 and "~/.ray/auth_token" in told["file_mounts"]
    (tmp_path / "bootstrap.yaml").write_text(told["bootstrap"]) # from here on it is the head that asks, by the configuration that it was given
    (tmp_path / "ray_bootstrap_key.pem").write_bytes(Path(told["file_mounts"]["~/ray_bootstrap_key.pem"]).read_bytes())
    reader = FileConfigReader(str(tmp_path / "bootstrap.yaml"))
    of_head = reader.get_cached_autoscaling_config()
    provider = NodeProviderAdapter(GCPNodeProvider(of_head.get_config("provider"), of_head.get_config("cluster_name")), reader)
    for type in ("cpu", "gpu"): provider._launch_nodes_by_type(type, 1, "a request")
    assert provider.poll_errors() == [] and sorted(n.node_type for n in provider.get_non_terminated().values()) == ["cpu", "gpu", "head"]
    workers = {i["labels"]["ray-user-node-type"]: i for i in google.instances.values() if i is not head}
    assert sorted(workers) == ["cpu", "gpu"] and all("serviceAccounts" not in w for w in workers.values()), "a worker has no account at all"
    assert workers["gpu"]["scheduling"]["provisioningModel"] == "SPOT" and "scheduling" not in workers["cpu"] | head
    assert all(d["initializeParams"]["diskSizeGb"] == 140 and d["autoDelete"] for i in google.instances.values() for d in i["disks"])
    roles = sorted(b["role"] for b in google.policy["bindings"])
    assert not any("firewall" in a for a in google.asked), "no port is opened beyond those of the network"
    teardown_cluster(str(FILE), yes=True, workers_only=False, override_cluster_name=None, keep_min_workers=False)
    assert google.wrong == [] and google.instances == {}
    with capsys.disabled(): print(f"\n{len(google.asked)} requests, all of them as Google describes them; the head's account has {roles}")


@pytest.mark.parametrize(("path", "value", "says"), [(("machineTyp",), "n2-standard-8", "machineTyp is unknown"), (("scheduling", "provisioningModel"), "CHEAP", "'CHEAP' is none of"), (("disks", 0, "boot"), "yes", "'yes' is no boolean")])
def test_what_google_does_not_describe_is_found(google, path, value, says):
    document = json.loads((DOCUMENTS / "compute.v1.json").read_text())
    node = yaml.safe_load(FILE.read_text())["available_node_types"]["gpu"]["node_config"]
    assert list(faults(document["schemas"], {"$ref": "Instance"}, node)) == []
    at = node
    for step in path[:-1]: at = at[step]
    at[path[-1]] = value
    found = list(faults(document["schemas"], {"$ref": "Instance"}, node))
    assert len(found) == 1 and says in found[0]
