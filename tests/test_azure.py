"""`cluster/azure.yaml` as Ray's own code takes it to Azure: what its templates ask for, which doors they open and to whom, and the packages that Ray's code needs on the head."""
import importlib.metadata
import json
import re
from pathlib import Path

import pytest
import ray
import yaml

from mlray.values.settings import shipped

FILE = shipped("cluster") / "azure.yaml"
OF_RAY = Path(ray.__file__).parent / "autoscaler/_private/_azure"
TYPES = {"string": str, "securestring": str, "int": int, "bool": bool, "object": dict, "array": list}
GIVEN = {"vmName", "adminUsername", "publicKey", "vmTags", "vmCount", "msi", "nsg", "subnet", "provisionPublicIp", "zones"} # by Ray, from the rest of the file


def resources(name: str) -> list[dict]: return json.loads((OF_RAY / name).read_text())["resources"]


@pytest.mark.parametrize("name", ["head", "cpu", "gpu"])
def test_what_the_template_of_a_machine_asks_for_is_given(name):
    asked = json.loads((OF_RAY / "azure-vm-template.json").read_text())["parameters"]
    given = yaml.safe_load(FILE.read_text())["available_node_types"][name]["node_config"]["azure_arm_parameters"]
    assert {n: type(v).__name__ for n, v in given.items() if not isinstance(v, TYPES[asked[n]["type"]])} == {}
    assert {n for n, p in asked.items() if "defaultValue" not in p} <= GIVEN | set(given)
    assert given["osDiskSize"] >= 140 and not {"imagePublisher", "imageOffer", "imageSku", "imageVersion"} - set(given)
    assert (given.get("priority") == "Spot") == (name == "gpu") and asked["evictionPolicy"]["defaultValue"] == "Delete", "a spot machine that is taken away leaves no disk behind that is paid for"


def test_which_doors_are_opened_and_to_whom():
    "As the comment at the head of the file says; where another version of Ray opens more, it is seen here."
    found = {r["type"]: r for r in resources("azure-config-template.json")}
    rules = found["Microsoft.Network/networkSecurityGroups"]["properties"]["securityRules"]
    assert [(r["properties"]["destinationPortRange"], r["properties"]["access"], r["properties"]["direction"]) for r in rules] == [("22", "Allow", "Inbound")]
    text, comment = (OF_RAY / "azure-config-template.json").read_text(), FILE.read_text().partition("cluster_name")[0]
    assert re.findall(r"roleDefinitions', '([0-9a-f-]+)'", text) == ["b24988ac-6180-42a0-ab88-20f7382dd24c"] and '"scope": "[resourceGroup().id]"' in text and "Contributor of the resource group" in comment
    assert all("identity" in r for r in resources("azure-vm-template.json") if r["type"] == "Microsoft.Compute/virtualMachines") and "workers too" in comment


def test_with_the_packages_of_the_file_the_code_of_ray_runs():
    "They are those that the head installs, to the version; with the newest of each Ray's code cannot even be imported."
    pytest.importorskip("azure.mgmt.resource", reason="pip install the packages that cluster/azure.yaml names")
    pins = dict(re.findall(r"((?:azure|msrest)[\w-]*)==(\S+)", FILE.read_text()))
    assert len(pins) == 6 and {n: v for n, v in pins.items() if importlib.metadata.version(n) != v} == {}
    from azure.core.credentials import AccessToken
    from azure.mgmt.compute import ComputeManagementClient
    from azure.mgmt.network import NetworkManagementClient
    from azure.mgmt.resource import ResourceManagementClient
    from ray.autoscaler._private._azure import config, node_provider

    class Nobody:
        def get_token(self, *scopes: str, **more: object) -> AccessToken: return AccessToken("t", 2**31)
    clients = {n: c(Nobody(), "subscription") for n, c in {"compute": ComputeManagementClient, "network": NetworkManagementClient, "resource": ResourceManagementClient}.items()}
    code = Path(node_provider.__file__).read_text() + Path(config.__file__).read_text()
    called = {*re.findall(r"(compute|network|resource)_client\.(\w+)\.(\w+)\(", code)}
    named = {(c, group, name) for c, group, name in re.findall(r"client=(?:self\.)?(compute|network|resource)_client\.(\w+),?\s*function_name=\"(\w+)\"", code)}
    assert len(called) > 5 and len(named) > 5
    for client, group, name in called: assert hasattr(getattr(clients[client], group), name), (client, group, name)
    for client, group, name in named: assert config.get_azure_sdk_function(getattr(clients[client], group), name)
