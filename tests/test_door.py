"""Bad input at the command line: exit code 2, one helpful sentence, nothing half-written; and a run that is killed."""
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from mlray.values.errors import SpecError
from mlray.values.settings import shipped
from mlray.values.spec import parse_spec

SPEC = yaml.safe_load((shipped("configs") / "diabetes.yaml").read_text())


@pytest.fixture
def project(tmp_path, monkeypatch):
    "A folder with settings of its own, as the current one."
    (tmp_path / "settings.ini").write_text("[DEFAULT]\ntracking = disabled\nobject_store_mb = 100\n[local]\n[production]\n")
    monkeypatch.chdir(tmp_path)
    for name in [n for n in os.environ if n.startswith("MLRAY_")]: monkeypatch.delenv(name)
    return tmp_path


@pytest.fixture
def mlray(project, monkeypatch, capsys):
    "Run a command here; exit code, stdout, stderr."
    from mlray.cli import main
    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mlray", *words])
        try: main(); status = 0
        except SystemExit as end: status = int(end.code or 0)
        said = capsys.readouterr()
        return status, said.out, said.err
    return run


def write(path: Path, **changes) -> str:
    path.write_text(yaml.safe_dump({**SPEC, **changes}, sort_keys=False))
    return str(path)


def rows_file(path: Path, rows: int = 60, drop: str = "") -> Path:
    from mlray.samples import diabetes
    frame = diabetes().head(rows)
    (frame.drop(drop) if drop else frame).write_csv(path)
    return path


def letter(status: int, err: str, *words: str) -> None:
    "Exit code 2, and the last thing on stderr is one letter, with no traceback."
    assert status == 2, err
    assert err.splitlines()[-1].startswith("mlray: ") and "Traceback" not in err
    for word in words: assert word in err, err


def empty(project: Path) -> bool:
    "Nothing was left behind but an empty registry."
    home = project / ".mlray"
    return not home.exists() or not any(p.is_file() and p.name not in ("registry.db",) for p in home.rglob("*"))


def test_an_unknown_key(mlray, project):
    status, _, err = mlray("train", write(project / "s.yaml", train={"epoch": 5}))
    letter(status, err, "train.epoch", "Did you mean 'epochs'?")
    assert empty(project)


def test_an_unknown_key_in_an_override(mlray, project):
    letter(*mlray("train", write(project / "s.yaml"), "train.epoch=5")[::2], "Did you mean 'epochs'?")


def test_a_missing_spec(mlray, project):
    write(project / "adult.yaml")
    letter(*mlray("train", "adlut.yaml")[::2], "no spec 'adlut.yaml'", "Did you mean 'adult.yaml'?")


def test_a_missing_file(mlray, project):
    letter(*mlray("train", write(project / "s.yaml", data={"train": {"file": "nowhere.csv"}}))[::2], "no file 'nowhere.csv'", "MLRAY_DATA")
    assert empty(project)


def test_a_wrong_sha256(mlray, project):
    rows_file(project / "rows.csv")
    letter(*mlray("train", write(project / "s.yaml", data={"train": {"file": "rows.csv", "sha256": "0" * 64}}))[::2], "sha256", "rows.csv")
    assert empty(project)


def test_a_missing_column(mlray, project):
    rows_file(project / "rows.csv", drop="bmi")
    letter(*mlray("train", write(project / "s.yaml", data={"train": {"file": "rows.csv"}}))[::2], "no column 'bmi'")
    assert empty(project)


def test_an_empty_table(mlray, project):
    rows_file(project / "rows.csv", rows=0)
    letter(*mlray("train", write(project / "s.yaml", data={"train": {"file": "rows.csv"}}))[::2], "no rows")
    (project / "rows.csv").write_text("")
    letter(*mlray("train", write(project / "s.yaml", data={"train": {"file": "rows.csv"}}))[::2], "no rows")
    assert empty(project)


def test_one_class_only(mlray, project):
    contract = {**SPEC["contract"], "progression": {**SPEC["contract"]["progression"], "positive_above": 499}}
    letter(*mlray("train", write(project / "s.yaml", contract=contract))[::2], "one class", "progression")
    assert empty(project)


LOANS = "age;income;sex;opened;repaid\n" + "".join(f"{20 + i};{900 + 37 * i % 1100}.{i % 10},{i % 100:02d};{'fm'[i % 2]};{1 + i % 28:02d}.05.2024;{'yes' if i % 3 else 'no'}\n".replace(f".{i % 10},", ",") for i in range(60))
LOAN = {"name": "loans", "data": {"train": {"file": "loans.csv"}}, "contract": {"age": {"type": "integer"}, "income": {"type": "number"}, "sex": {"type": "category", "values": ["f", "m"]}, "opened": {"type": "date"}, "repaid": {"type": "category", "values": ["no", "yes"], "role": "target", "positive": "no"}}}


def loans(project: Path, data: str | bytes = LOANS, **csv) -> str:
    (project / "loans.csv").write_bytes(data if isinstance(data, bytes) else data.encode())
    (project / "loans.yaml").write_text(yaml.safe_dump({**LOAN, "data": LOAN["data"] | {"csv": csv}}, sort_keys=False))
    return "loans.yaml"


@pytest.mark.parametrize(("data", "csv", "words"), [
    (LOANS, {}, ("loans.csv cannot be read", "first line has one", "separator: ';'")), (LOANS.replace(",", "."), {}, ("no column 'age'", "one column only", "separator: ';'")),
    (LOANS.replace("f;", "\xe9;").encode("latin-1"), {"separator": ";"}, ("line 2 is not UTF-8", "0xe9", "iconv -f WINDOWS-1252")), (LOANS.encode("utf-16"), {"separator": ";"}, ("UTF-16", "iconv -f UTF-16")),
    (LOANS.replace("\n22;", "\n22;;;"), {"separator": ";"}, ("row 4 has 7 values, and the first has 5", "double quotes")), (LOANS.splitlines()[0], {"separator": ";"}, ("no rows", "Bring rows")),
    (LOANS, {"separator": ";", "decimal_comma": ["incme"]}, ("no column 'incme', which data.csv names", "Did you mean 'income'?"))], ids=["separator", "one column", "windows", "utf-16", "ragged", "header alone", "no such column"])
def test_a_file_that_is_written_otherwise(mlray, project, data, csv, words):
    letter(*mlray("check", loans(project, data, **csv))[::2], *words)
    letter(*mlray("train", "loans.yaml")[::2], *words)
    assert empty(project)


def test_commas_and_dates_of_another_country(mlray, project):
    status, out, _ = mlray("check", loans(project, separator=";"))
    assert status == 1 and "decimal_comma: [income]" in out and 'dates: {opened: "%d.%m.%Y"}' in out
    letter(*mlray("train", "loans.yaml")[::2], "None of the 60 train rows", "decimal_comma: [income]")
    loans(project, separator=";", decimal_comma=["income"], dates={"opened": "%d.%m.%Y"})
    said = json.loads(mlray("check", "loans.yaml", "--json")[1])
    assert said["train"]["good"] == 60 and said["train"]["bad"] == 0
    loans(project, b"\xef\xbb\xbf" + LOANS.encode(), separator=";", decimal_comma=["income"], dates={"opened": "%d.%m.%Y"}) # as Excel begins its files
    assert json.loads(mlray("check", "loans.yaml", "--json")[1])["train"]["digest" if "digest" in said["train"] else "fingerprint"] == said["train"]["fingerprint"], "the same rows"


@pytest.mark.parametrize(("text", "words"), [
    ("", ("is empty", "mlray new")), ("- a\n", ("is not a mapping", "a list")), ("name: x\ncontrat: {}\n", ("contrat: unknown key", "Did you mean 'contract'?")),
    (yaml.safe_dump(LOAN | {"contract": LOAN["contract"] | {"age": {"type": "interger"}}}), ("contract.age.type", "Did you mean 'integer'?")),
    (yaml.safe_dump(LOAN | {"contract": LOAN["contract"] | {"age": {"type": "integer", "min": 120, "max": 0}}}), ("min is 120", "Exchange them")),
    (yaml.safe_dump(LOAN | {"contract": LOAN["contract"] | {"repaid": {"type": "category", "values": [False, True], "role": "target"}}}), ("found False", "in quotes")),
    (yaml.safe_dump(LOAN | {"contract": LOAN["contract"] | {"repaid": {"type": "text", "role": "target"}}}), ("cannot be of type 'text'", "type: category"))], ids=["empty", "list", "key", "type", "bounds", "yes and no", "words"])
def test_a_spec_that_is_written_otherwise(mlray, project, text, words):
    (project / "s.yaml").write_text(text)
    letter(*mlray("check", "s.yaml")[::2], *words)
    assert empty(project)


def test_a_spec_in_another_encoding(mlray, project):
    (project / "s.yaml").write_bytes(yaml.safe_dump(LOAN, allow_unicode=True).replace("name: ", "description: café\nname: ", 1).encode("latin-1"))
    letter(*mlray("check", "s.yaml")[::2], "not text in UTF-8")


@pytest.mark.parametrize(("override", "words"), [("train.epochs=[1", ("'train.epochs=[1'", "not YAML")), ("train.seed=-1", ("train.seed", "greater than or equal to 0")), ("data.split.seed=-1", ("data.split.seed", "greater than or equal to 0"))])
def test_an_override_that_cannot_be(mlray, project, override, words):
    (project / "s.yaml").write_text(yaml.safe_dump(LOAN))
    letter(*mlray("train", "s.yaml", override)[::2], *words)


def test_what_yaml_can_do_a_spec_can(mlray, project):
    text = yaml.safe_dump(LOAN)
    assert parse_spec(text + "train:\n", ["train.epochs=3"]).train.epochs == 3, "a section that is begun and empty"
    merged = parse_spec(text + "monitor: {alerts: [&one {metric: roc_auc, at_least: 0.6}, {<<: *one, at_least: 0.7, looks: 2}]}\n").monitor.alerts
    assert [(a.at_least, a.looks) for a in merged] == [(0.6, 1), (0.7, 2)], "what a merge key brings may be given again"
    with pytest.raises(SpecError, match="given twice"): parse_spec(text + "name: again\n")


def test_rows_where_a_spec_was_expected(mlray, project):
    loans(project)
    letter(*mlray("train", "loans.csv")[::2], "holds rows", "mlray new NAME --from loans.csv --target COLUMN")


@pytest.mark.parametrize(("data", "words"), [
    (LOANS.splitlines()[0] + "\n", ("no rows",)), ("", ("is empty",)), ("\n".join(LOANS.splitlines()[:2]), ("1 row", "20 at least")), (LOANS.replace("sex;", "age;"), ("'age' 2 times",)),
    (LOANS.replace("\n22;", "\n22;;;"), ("row 4 has 7 values",)), (LOANS.replace(";f;", ";\x81;").encode("latin-1"), ("is not UTF-8", "0x81"))], ids=["header alone", "empty", "one row", "name twice", "ragged", "no code page"])
def test_a_project_of_rows_that_are_none(mlray, project, data, words):
    loans(project, data)
    letter(*mlray("new", "mine", "--from", "loans.csv", "--target", "repaid")[::2], *words)
    assert not (project / "mine").exists() and not list(project.glob("mine-part-*"))


def test_a_project_of_no_file_no_column(mlray, project, monkeypatch):
    loans(project)
    letter(*mlray("new", "mine", "--from", "loan.csv", "--target", "repaid")[::2], "no file loan.csv", "Did you mean 'loans.csv'?")
    letter(*mlray("new", "mine", "--from", ".", "--target", "repaid")[::2], "is a folder", "loans.csv")
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    letter(*mlray("new", "mine", "--from", "loans.csv")[::2], "--target", "age, income, sex, opened, repaid")


def test_interrupted(project):
    "Ctrl-C: one line that says how to go on, and 130."
    run = subprocess.Popen([sys.executable, "-c", "from mlray.cli import main; main()", "train", write(project / "s.yaml", train={"epochs": 100_000, "patience": 100_000})], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    for line in run.stderr:
        if "epoch 1 " in line: break
    run.send_signal(signal.SIGINT)
    out, err = run.communicate(timeout=600)
    assert run.returncode == 130 and not out and "Traceback" not in err
    assert err.splitlines()[-1] == "mlray: stopped. The same command with --resume goes on from the last epoch that was kept."


def test_a_version_that_does_not_exist(mlray, trained, project, monkeypatch):
    letter(*mlray("promote", "diabetes/7")[::2], "no model 'diabetes'")
    monkeypatch.setenv("MLRAY_HOME", str(trained[0].home))
    for words in (["gate", "diabetes/7"], ["show", "diabetes/7"], ["promote", "diabetes/7"], ["serve", "diabetes"]):
        letter(*mlray(*words)[::2], "no version", "diabetes/1")


def test_a_service_that_nobody_could_ask(mlray, trained, monkeypatch):
    "Said before a cluster is started or looked for: this one is not there."
    monkeypatch.setenv("MLRAY_HOME", str(trained[0].home))
    monkeypatch.setenv("MLRAY_RAY", "127.0.0.1:1")
    letter(*mlray("serve", "diabetes/1")[::2], "no API key yet", "mlray key create")


def test_a_gate_that_does_not_exist(mlray, trained, monkeypatch):
    monkeypatch.setenv("MLRAY_HOME", str(trained[0].home))
    letter(*mlray("gate", "diabetes/1", "--gate", "fairnes")[::2], "Did you mean 'fairness'?")


def test_a_port_in_use(mlray, project):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        letter(*mlray("demo", "--port", str(taken.getsockname()[1]))[::2], "cannot be used", "--port")
    assert empty(project)


def test_an_environment_that_does_not_exist(mlray):
    letter(*mlray("models", "--env", "produktion")[::2], "Did you mean 'production'?")


def test_a_command_that_there_is_not(mlray):
    letter(*mlray("trian")[::2], "Did you mean 'train'?")


def test_a_registry_that_is_none(mlray, project):
    (project / ".mlray").mkdir()
    (project / ".mlray/registry.db").write_text("this is a letter, not a database\n" * 100)
    letter(*mlray("models")[::2], "registry")


def test_a_newer_registry_is_left_alone(mlray, project):
    import sqlite3
    mlray("models")
    with sqlite3.connect(project / ".mlray/registry.db") as db: db.execute("update alembic_version set version_num='9999'")
    letter(*mlray("models")[::2], "9999", "newer")


def test_bad_rows_are_counted_shown_and_kept(mlray, project):
    path = rows_file(project / "rows.csv")
    path.write_text(path.read_text() + "thirty,group 1,25,90,180,100,50,4,4.5,80,150\n205,group 9,25,90,180,100,50,4,4.5,80,150\n")
    spec = write(project / "s.yaml", data={"train": {"file": "rows.csv"}})
    status, out, _ = mlray("check", spec, "--json")
    found = json.loads(out)
    assert status == 1 and found["train"]["good"] == 60 and found["train"]["bad"] == 2
    assert {(p["column"], p["rule"]) for p in found["train"]["problems"]} == {("age", "type"), ("age", "max"), ("sex", "values")}
    kept = Path(found["quarantine"][0]).read_text()
    assert "thirty" in kept and "205" in kept and kept.count("\n") == 3
    letter(*mlray("train", spec, "data.on_invalid=stop")[::2], "a whole number", "quarantine")


def test_json_is_all_there_is_on_stdout(mlray, trained, monkeypatch):
    monkeypatch.setenv("MLRAY_HOME", str(trained[0].home))
    assert json.loads(mlray("models", "--json")[1])[0]["version"] == "diabetes/1"
    shown = json.loads(mlray("show", "diabetes/1", "--json")[1])
    assert shown["digest"] == trained[1].version.digest and shown["provenance"]["workers"] == 1


def test_a_key_is_shown_once(mlray, project):
    text = json.loads(mlray("key", "create", "--json")[1])["key"]
    assert text.startswith("mlr_") and not any(text[-43:].encode() in p.read_bytes() for p in (project / ".mlray").rglob("*") if p.is_file())
    letter(*mlray("key", "create", "--role", "vewer")[::2], "Did you mean 'viewer'?")


def test_train_prints_version_measures_and_verdict(mlray, project):
    status, out, _ = mlray("train", write(project / "s.yaml"), "train.epochs=3", "--json")
    said = json.loads(out)
    assert said["version"] == "diabetes/1" and len(said["digest"]) == 64 and status == (0 if said["verdict"]["passed"] else 1)
    assert set(said["measures"]["roc_auc"]) == {"value", "low", "high"} and len(said["verdict"]["findings"]) == 6


def test_a_verdict_that_fails_ends_with_1_and_cannot_be_promoted(mlray, project):
    spec = write(project / "s.yaml", gates={"quality": [{"metric": "roc_auc", "at_least": 0.999}]})
    status, out, _ = mlray("train", spec, "train.epochs=2", "--json")
    assert status == 1 and json.loads(out)["verdict"]["passed"] is False
    letter(*mlray("promote", "diabetes/1")[::2], "no verdict of the gate", "mlray gate diabetes/1")
    assert mlray("gate", "diabetes/1", "--gate", "quality")[0] == 1
    letter(*mlray("promote", "diabetes/1")[::2], "no verdict of the gate fairness")


def test_a_release_from_promotion_to_the_audit(mlray, trained, tmp_path, monkeypatch):
    "Promote, take back, retire, look at the audit, and find what was changed past it."
    import shutil
    import sqlite3

    from mlray.governance.registry import add_evidence, open_registry, version
    from mlray.values.settings import read_settings
    shutil.copytree(trained[0].home, tmp_path / "copy")
    monkeypatch.setenv("MLRAY_HOME", str(tmp_path / "copy"))
    registry = open_registry(read_settings())
    letter(*mlray("rollback", "diabetes")[::2], "no diabetes@production")
    for gate in ("quality", "fairness"): add_evidence(registry, version(registry, "diabetes"), gate, trained[1].verdict, b"{}")
    assert json.loads(mlray("promote", "diabetes/1", "--json")[1])["generation"] == 1
    letter(*mlray("rollback", "diabetes")[::2], "nothing before it")
    letter(*mlray("retire", "diabetes/1", "--why", "slow")[::2], "in use: diabetes@production")
    told = json.loads(mlray("audit", "--json")[1])
    assert [t["action"] for t in told][-2:] == ["promote", "refuse"] and told[-1]["seq"] == len(told)
    status, out, _ = mlray("audit", "verify")
    assert status == 0 and "The audit is whole" in out
    with sqlite3.connect(tmp_path / "copy/registry.db") as db: db.execute("update aliases set generation=9")
    status, out, _ = mlray("audit", "verify", "--json")
    found = json.loads(out)
    assert status == 1 and found["whole"] is False and found["faults"][0]["seq"] == len(told) - 1
    monkeypatch.setenv("MLRAY_REGISTRY", "mysql://root:secret@nowhere/x")
    status, _, err = mlray("models")
    letter(status, err, "postgresql://")
    assert "secret" not in err


def test_a_release_by_three_people(mlray, trained, project, tmp_path, monkeypatch):
    "Keys, approvals, an end that is announced, and copies for MLflow, each with the exit code that a script would see."
    import shutil

    from mlray.governance.registry import add_evidence, open_registry, version
    from mlray.values.settings import read_settings
    shutil.copytree(trained[0].home, tmp_path / "copy")
    registry = open_registry(read_settings().model_copy(update={"home": tmp_path / "copy"}))
    for gate in ("quality", "fairness"): add_evidence(registry, version(registry, "diabetes"), gate, trained[1].verdict, b"{}")
    for name, value in {"HOME": str(tmp_path / "copy"), "ACCESS": "keys", "APPROVALS": "1", "SEPARATE_PROMOTER": "yes", "MIRRORS": "mlflow"}.items(): monkeypatch.setenv(f"MLRAY_{name}", value)
    made: dict[str, dict] = {}

    def as_(name: str, *words: str):
        monkeypatch.setenv("MLRAY_API_KEY", made[name]["key"]) if name else monkeypatch.delenv("MLRAY_API_KEY", raising=False)
        return mlray(*words)

    letter(*as_("", "promote", "diabetes/1")[::2], "model:promote asks for a key of promoter or admin, and MLRAY_API_KEY is not set")
    letter(*as_("", "key", "create", "--role", "promoter")[::2], "key:create asks for a key of admin, and MLRAY_API_KEY is not set")
    made["root"] = json.loads(as_("", "key", "create", "--role", "admin", "--owner", "root", "--json")[1])
    for name in ("grace", "alan"): made[name] = json.loads(as_("root", "key", "create", "--role", "promoter", "--owner", name, "--models", "diab*", "--expires", "30d", "--json")[1])
    letter(*as_("root", "key", "create", "--expires", "soon")[::2], "Write 30d")
    letter(*as_("alan", "promote", "diabetes/1")[::2], "0 of 1 approvals")
    given = json.loads(as_("grace", "approve", "diabetes/1", "--note", "seen", "--once", "a1", "--json")[1])
    assert given["by"] == "grace" and json.loads(as_("grace", "approve", "diabetes/1", "--once", "a1", "--json")[1])["row"] == given["row"]
    assert "does not stand for diabetes/1" in as_("grace", "approve", "diabetes/1", "--withdraw")[1]
    letter(*as_("alan", "promote", "diabetes/1")[::2], "0 of 1 approvals")
    as_("grace", "approve", "diabetes/1", "--note", "seen twice")
    assert json.loads(as_("alan", "promote", "diabetes/1", "--once", "p1", "--json")[1])["generation"] == json.loads(as_("alan", "promote", "diabetes/1", "--once", "p1", "--json")[1])["generation"] == 1
    letter(*as_("alan", "promote", "diabetes/1", "canary")[::2], "Take another version for a rollout")
    assert json.loads(as_("alan", "show", "diabetes/1", "--json")[1])["aliases"] == ["production"], "what could not begin has moved nothing"
    letter(*as_("alan", "deprecate", "diabetes/1", "--why", "old", "--sunset", "soon")[::2], "Write it as 2026-12-31")
    assert as_("alan", "deprecate", "diabetes/1", "--why", "old", "--sunset", "2099-01-01")[0] == 0
    shown = json.loads(as_("alan", "show", "diabetes/1", "--json")[1])
    assert [(a["actor"], bool(a["spent"])) for a in shown["approvals"]] == [("grace", False), ("grace", True)] and shown["sunset"] == "2099-01-01" and len(shown["lineage"]["environment"]) == 64 and shown["lineage"]["run"].startswith("diabetes-")
    status, out, _ = as_("alan", "show", "diabetes/1")
    assert status == 0 and "seen twice" in out and "came from" in out
    letter(*as_("alan", "key", "revoke", made["grace"]["id"], "--why", "no")[::2], "key:revoke is for others than promoter: for admin")
    assert as_("root", "key", "revoke", made["grace"]["id"], "--why", "left")[0] == 0
    assert [k["state"].split()[0] for k in json.loads(as_("root", "key", "list", "--json")[1]) if k["owner"] == "grace"] == ["revoked"]
    letter(*as_("grace", "approve", "diabetes/1")[::2], f"mlr_{made['grace']['id']}_… of MLRAY_API_KEY was revoked on 20")
    told, = json.loads(as_("alan", "registry", "mirror", "--json")[1])
    assert told["target"] == "mlflow" and len(told["delivered"]) == 2 and (tmp_path / "copy/mirrors/mlflow/diabetes/1/MLmodel").is_file()
    assert as_("alan", "registry", "export", "diabetes@production", str(tmp_path / "out"))[0] == 0 and (tmp_path / "out/MLmodel").read_bytes() == (tmp_path / "copy/mirrors/mlflow/diabetes/1/MLmodel").read_bytes()
    letter(*as_("alan", "registry", "export", "diabetes@production", str(tmp_path / "out"))[::2], "is there already")
    letter(*as_("alan", "registry", "mirror", "--again", "mflow")[::2], "Did you mean 'mlflow'?")
    assert mlray("audit", "verify")[0] == 0


@pytest.mark.parametrize("signs", [("registry.db",), ("runs/*/epoch-*",), ("store/.put-*", "store/*/*"), ("store/*/*/manifest.json",)], ids=["as it begins", "as it trains", "as it keeps its bytes", "as it registers them"])
def test_a_killed_run_leaves_a_registry_that_opens(project, signs):
    from mlray.governance.registry import bundle_of, open_registry, versions
    from mlray.values.settings import read_settings
    run = subprocess.Popen([str(Path(sys.executable).with_name("mlray")), "train", write(project / "s.yaml")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    seen = lambda: any(found for sign in signs for found in (project / ".mlray").glob(sign))
    while run.poll() is None and not seen(): time.sleep(0.001)
    run.kill()
    run.wait()
    assert seen(), "it did not come so far"
    registry = open_registry(read_settings(start=project, environ={}))
    for version in versions(registry): assert bundle_of(registry, version).digest == version.digest


def test_what_was_only_looked_at_is_in_the_catalogue(mlray, project):
    "With its fingerprint, contract, owner and bad rows; once a day; and a version made of it later joins it."
    rows_file(project / "rows.csv")
    spec = write(project / "s.yaml", data={"train": {"file": "rows.csv"}, "split": SPEC["data"]["split"]}, about={"data_owner": "the clinic"}, gates={}, contract=SPEC["contract"] | {"bmi": {"type": "number", "min": 10, "max": 35}}, train={"epochs": 1})
    looked = [json.loads(mlray("check", spec, "--json")[1]) for _ in range(2)]
    found, = json.loads(mlray("data", "rows.csv", "--json")[1])
    state, = found["states"]
    assert looked[0] == looked[1] and (state["digest"], state["rows"], state["bad"], state["versions"]) == (looked[0]["train"]["fingerprint"], looked[0]["train"]["good"], looked[0]["train"]["bad"], []) and state["bad"] > 0
    assert (found["owners"], found["personal"], found["columns"]["bmi"]["max"], found["models"], found["features"]) == (["the clinic"], ["age", "sex"], 35, ["diabetes"], [])
    assert [r["action"] for r in json.loads(mlray("audit", "--json")[1])] == ["read"] and mlray("audit", "verify")[0] == 0
    mlray("train", spec, "--json")
    found, = json.loads(mlray("data", state["digest"][:8], "--json")[1])
    assert [(s["digest"], s["versions"], s["bad"]) for s in found["states"]] == [(state["digest"], ["diabetes/1"], state["bad"])] and found["features"]


def test_a_check_does_not_hang_on_the_registry(mlray, project, monkeypatch):
    rows_file(project / "rows.csv")
    spec = write(project / "s.yaml", data={"train": {"file": "rows.csv"}})
    monkeypatch.setenv("MLRAY_ACCESS", "keys")
    status, said, err = mlray("check", spec, "--json")
    assert status == 0 and json.loads(said)["train"]["good"] == 60 and "not noted in the catalogue" in err and "data:note asks for a key of trainer or admin" in err


@pytest.mark.parametrize(("statement", "words"), [("UPDATE readings SET rows=1", "it tells of reading"), ("DELETE FROM readings", "it tells of reading"), ("INSERT INTO readings SELECT 9, source, model, part, digest, rows, bad, source_version, about, created, actor FROM readings", "no row tells of reading"),
                                                  ("UPDATE readings SET about='{}'", "it tells of reading")])
def test_the_audit_vouches_for_what_was_read(tmp_path, statement, words):
    from mlray.governance.ledger import audit
    from mlray.governance.opened import Registry
    from mlray.governance.reading import Reading, note
    registry = Registry(f"sqlite:///{tmp_path}/registry.db", tmp_path / "store", "ada")
    one = Reading("s3://lake/" + "x" * 300, "tiny", "train", "5f" * 16, 3, 0, None, {"age": {"type": "number"}}, newest={"at": "2026-01-01"})
    assert note(registry, [one]) == 1 and note(registry, [one]) == 0 and not audit(registry).faults
    with registry.database.change() as c: c.exec_driver_sql(statement)
    assert words in " ".join(f.why for f in audit(registry).faults)
