"""`cluster/terraform`: what it opens, hides and allows, read from the files; and that it says what aws.yaml and aws-policy.json say."""
import json
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from mlray.values.settings import Settings, shipped

hcl2 = pytest.importorskip("hcl2", reason="pip install 'mlray[dev]'")
FOLDER = shipped("cluster") / "terraform"


def plain(value: Any) -> Any:
    "Without the quotation marks and marks of blocks that the reader leaves."
    if isinstance(value, dict): return {k.strip('"'): plain(v) for k, v in value.items() if not k.startswith("__")}
    if isinstance(value, list): return [plain(v) for v in value]
    return value.strip('"') if isinstance(value, str) else value


WHOLE = [plain(hcl2.loads(f.read_text())) for f in sorted(FOLDER.glob("*.tf"))]
def of(block: str, kind: str) -> dict[str, dict]: return {n: body for d in WHOLE for each in d.get(block, []) for k, named in each.items() if k == kind for n, body in named.items()}
def variables() -> dict[str, Any]: return {n: body.get("default") for d in WHOLE for each in d.get("variable", []) for n, body in each.items()}


def words(value: Any) -> Iterator[str]:
    if isinstance(value, dict): yield from (w for k, v in value.items() for w in (k, *words(v)))
    elif isinstance(value, list): yield from (w for v in value for w in words(v))
    elif isinstance(value, str): yield value


def test_nobody_from_outside_comes_in():
    rules = of("resource", "aws_vpc_security_group_ingress_rule")
    assert {n: (r.get("from_port"), r.get("to_port"), "cidr_ipv4" in r) for n, r in rules.items()} == {"nodes": (None, None, False), "operators": (22, 22, True), "database": (5432, 5432, False)}
    assert rules["operators"]["cidr_ipv4"] == "${each.value}" and rules["operators"]["for_each"] == "${toset(var.operators)}" and variables()["operators"] == []
    groups = {**of("resource", "aws_security_group"), **of("resource", "aws_default_security_group")}
    assert set(groups) == {"nodes", "database", "closed"} and not any("ingress" in g for g in groups.values()) and not of("resource", "aws_security_group_rule")
    assert not any(s.get("map_public_ip_on_launch") for s in of("resource", "aws_subnet").values())
    assert {r: "nat_gateway_id" in b for r, b in of("resource", "aws_route").items()} == {"public": False, "private": True}
    assert of("resource", "aws_db_subnet_group")["this"]["subnet_ids"] == ["${[for subnet in aws_subnet.private : subnet.id]}"] or "aws_subnet.private" in str(of("resource", "aws_db_subnet_group")["this"]["subnet_ids"])


def test_the_database_is_hidden_encrypted_and_not_lost():
    database = of("resource", "aws_db_instance")["registry"]
    assert {k: database[k] for k in ("publicly_accessible", "storage_encrypted", "deletion_protection", "skip_final_snapshot", "manage_master_user_password", "multi_az")} == {
        "publicly_accessible": False, "storage_encrypted": True, "deletion_protection": True, "skip_final_snapshot": False, "manage_master_user_password": True, "multi_az": True}
    assert "password" not in database and database["vpc_security_group_ids"] == ["${aws_security_group.database.id}"]
    assert {"name": "rds.force_ssl", "value": "1"} in of("resource", "aws_db_parameter_group")["this"]["parameter"]


def test_no_bucket_is_public_and_each_is_encrypted_and_versioned():
    for kind in ("aws_s3_bucket_public_access_block", "aws_s3_bucket_versioning", "aws_s3_bucket_server_side_encryption_configuration", "aws_s3_bucket_lifecycle_configuration", "aws_s3_bucket_policy", "aws_s3_bucket"):
        (found,) = of("resource", kind).values()
        assert found["for_each"] == "${local.buckets}", kind
    block = of("resource", "aws_s3_bucket_public_access_block")["this"]
    assert all(block[k] is True for k in ("block_public_acls", "block_public_policy", "ignore_public_acls", "restrict_public_buckets"))
    assert not any("force_destroy" in b for b in of("resource", "aws_s3_bucket").values()) and not of("resource", "aws_s3_bucket_acl")


def test_roles_may_what_they_must():
    documents = of("data", "aws_iam_policy_document")
    for name, document in documents.items():
        for statement in document["statement"]:
            assert not any("*" in a for a in statement["actions"]), name
            if "*" in statement.get("resources", []): assert statement["actions"] == ["ecr:GetAuthorizationToken"]
    assert documents["pass"]["statement"][0]["resources"] == ['${aws_iam_role.machine["node"].arn}']
    actions = {a for s in documents["work"]["statement"] for a in s["actions"]}
    assert not any(a.startswith(("iam:", "ec2:", "s3:DeleteBucket", "s3:Put")) and a != "s3:PutObject" for a in actions)
    launch = of("resource", "aws_iam_role_policy")["launch"]["policy"]
    tag = '"ec2:ResourceTag/ray-cluster-name": "mlray"'
    assert (FOLDER.parent / "aws-policy.json").read_text().count(tag) == 1 and tag.replace('"', '\\"') in launch, "the file has what Terraform puts the cluster's name into"
    assert json.loads((FOLDER.parent / "aws-policy.json").read_text().replace(tag, tag.replace("mlray", "other")))


def test_its_variables_are_those_of_the_launcher():
    launcher, ours = yaml.safe_load((FOLDER.parent / "aws.yaml").read_text()), variables()
    assert (ours["region"], ",".join(ours["availability_zones"]), ours["cluster_name"]) == (launcher["provider"]["region"], launcher["provider"]["availability_zone"], launcher["cluster_name"])
    assert launcher["available_node_types"]["head"]["node_config"]["IamInstanceProfile"]["Name"] == f"{ours['cluster_name']}-head" and list(of("resource", "aws_iam_role")["machine"]["for_each"]) != []
    used = {w for d in WHOLE for w in words(d)}
    for name in ours: assert any(f"var.{name}" in w for w in used), f"nobody asks for {name}"


def test_what_it_prints_for_settings_are_settings():
    printed = next(body["value"] for d in WHOLE for each in d.get("output", []) for n, body in each.items() if n == "settings_ini")
    assert set(printed) <= set(Settings.model_fields) and {"registry", "store", "checkpoints", "archive"} == set(printed)


@pytest.mark.skipif(shutil.which("terraform") is None, reason="terraform is not installed")
def test_it_is_written_as_terraform_writes_it(): assert subprocess.run(["terraform", "fmt", "-check", "-no-color", str(FOLDER)], capture_output=True, text=True).stdout == ""


@pytest.mark.chaos
@pytest.mark.skipif(shutil.which("checkov") is None, reason="checkov is not installed: it wants an environment of its own")
def test_checkov_finds_nothing():
    done = subprocess.run(["checkov", "-d", str(FOLDER), "--framework", "terraform", "--compact", "--quiet", "--skip-download", "-o", "json"], capture_output=True, text=True)
    summary = json.loads(done.stdout)["summary"]
    assert summary["failed"] == 0 and summary["parsing_errors"] == 0 and summary["passed"] > 150, done.stdout[-3000:]
