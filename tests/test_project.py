"""`mlray new`: a project of the user's own, from rows that ship with mlray or from a file alone, whose own tests pass."""
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest

from mlray.learning.contract import Contract, check
from mlray.operations import project_folder
from mlray.operations.first_look import file_format, first_spec
from mlray.operations.project import project_from, sample_project
from mlray.operations.project_folder import write_project
from mlray.values.errors import DataError, SpecError
from mlray.values.spec import parse_spec
from tests.conftest import free_port

MLRAY = str(Path(sys.executable).with_name("mlray"))
ADULT = "age,workclass,fnlwgt,education,education_num,marital_status,occupation,relationship,race,sex,capital_gain,capital_loss,hours,country,income"


def loans(folder: Path, rows: int = 400) -> Path:
    "A file as people have them: a header with blanks, question marks, a semicolon."
    path = folder / "loans.csv"
    lines = [f"{900 + 37 * i % 1100}; {'fm'[i % 2]};{20 + i % 50}; {'?' if i % 40 == 0 else 'rent' if i % 3 else 'own'}; {'yes' if (i * 7919) % 11 < 4 + 3 * (i % 3 == 0) else 'no'}" for i in range(rows)]
    path.write_text("income; sex; age ;home; repaid\n" + "\n".join(lines) + "\n")
    return path


def run(folder: Path, *command: str, timeout: float = 600) -> subprocess.CompletedProcess:
    clean = {k: v for k, v in os.environ.items() if k not in ("MLRAY_HOME", "MLRAY_ENV")}
    return subprocess.run(command, cwd=folder, env=clean | {"MLRAY_TRACKING": "disabled"}, capture_output=True, text=True, timeout=timeout)


def test_from_a_file_alone_to_tests_that_pass(tmp_path):
    loans(tmp_path)
    made = run(tmp_path, MLRAY, "new", "credit", "--from", "loans.csv", "--target", "repaid", "--positive", "yes", "--sensitive", "sex", "--sensitive", "age", "--json")
    assert made.returncode == 0, made.stderr
    assert json.loads(made.stdout)["spec"] == "configs/credit.yaml" and not list(tmp_path.glob("credit-part-*"))
    project = tmp_path / "credit"
    spec = parse_spec((project / "configs/credit.yaml").read_text())
    assert spec.contract["repaid"].positive == "yes" and spec.contract["home"].nullable and spec.contract["age"].bands and set(spec.gates) == {"quality", "fairness"}
    tested = run(project, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")
    assert tested.returncode == 0 and "4 passed" in tested.stdout, tested.stdout + tested.stderr
    trained = run(project, MLRAY, "train", "configs/credit.yaml", "train.epochs=2", "--json")
    assert json.loads(trained.stdout)["version"] == "credit/1", trained.stderr


@pytest.mark.parametrize("kind", ["tabular", "text", "image"])
def test_each_kind_is_a_spec_with_its_own_source(tmp_path, kind):
    files = write_project(sample_project("mine", kind), tmp_path / "mine")
    spec = parse_spec((tmp_path / "mine/configs/mine.yaml").read_text())
    assert spec.name == "mine" and spec.data.train.call == "mine.source:rows" and "mine/source.py" in files
    found = run(tmp_path / "mine", sys.executable, "-c", f"from mine.source import rows; from mine.network import Network; from mlray.values.imported import imported; imported({spec.model.network!r} if ':' in {spec.model.network!r} else 'mine.network:Network', ''); print(rows().height)")
    assert found.returncode == 0 and int(found.stdout) > 100, found.stderr


@pytest.mark.chaos
@pytest.mark.parametrize("kind", ["text", "image"])
def test_each_kind_keeps_its_promises_with_its_own_network(tmp_path, kind):
    write_project(sample_project("mine", kind), tmp_path / "mine")
    trained = run(tmp_path / "mine", MLRAY, "train", "configs/mine.yaml", "--json")
    assert trained.returncode == 0 and json.loads(trained.stdout)["verdict"]["passed"], trained.stderr


def test_what_is_there_is_left_alone(tmp_path):
    (tmp_path / "credit").mkdir()
    (tmp_path / "credit" / "thesis.txt").write_text("the only copy")
    refused = run(tmp_path, MLRAY, "new", "credit", "--kind", "tabular")
    assert refused.returncode == 2 and "not empty" in refused.stderr and [p.name for p in tmp_path.rglob("*")] == ["credit", "thesis.txt"]


@pytest.mark.parametrize(("flags", "says"), [
    (["--from", "nowhere.csv", "--target", "x"], "no file"), (["--from", "loans.csv"], "--target"), (["--from", "loans.csv", "--target", "repayed"], "repaid"), (["--kind", "tabula"], "tabular"),
    (["--from", "loans.csv", "--target", "repaid", "--positive", "maybe"], "maybe"), (["--from", "loans.csv", "--target", "repaid", "--sensitive", "repaid"], "at once"), (["--target", "x"], "--from")])
def test_letters(tmp_path, flags, says):
    loans(tmp_path)
    refused = run(tmp_path, MLRAY, "new", "credit", *flags)
    assert refused.returncode == 2 and says in refused.stderr and "Traceback" not in refused.stderr and not (tmp_path / "credit").exists()


def test_names_of_packages(tmp_path):
    for name in ("Credit", "9lives", "a-b", "", "../up", "random", "pandas", "mlray", "tests", "data"): # Python would take one for the other
        with pytest.raises(SpecError): write_project(sample_project(name, "tabular"), tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_targets_of_each_kind(tmp_path):
    frame = pl.DataFrame({"a": [str(i) for i in range(90)], "three": ["x", "y", "z"] * 30, "flag": ["true", "false", "false"] * 30, "number": [f"{i / 7:.3f}" for i in range(90)], "same": ["1"] * 90})
    assert "positive" not in first_spec(frame, "three").contract["three"] and first_spec(frame, "flag").contract["flag"]["positive"] == "true"
    assert first_spec(frame, "number").gates["quality"][0]["metric"] == "r2" and first_spec(frame, "number", "6").contract["number"]["positive_above"] == 6
    for target in ("three", "flag", "number"): parse_spec(first_spec(frame, target).yaml("mine", "a try: with a colon", "mine.source:rows"))
    text = first_spec(frame, "flag").yaml("mine", "a try", "mine.source:rows") # folds are proposed where rows are few, with the reason, and nowhere else
    assert parse_spec(text).train.folds is None and parse_spec(text.replace("# train: {folds: 5}", "train: {folds: 5}")).train.folds == 5 and f"{frame.height} rows are few" in text
    assert "folds" not in replace(first_spec(frame, "flag"), rows=3_000).yaml("mine", "a try", "mine.source:rows")
    with pytest.raises(DataError, match="one value"): first_spec(frame.with_columns(pl.lit("only").alias("same")), "same")


def seen(folder: Path, text: str, target: str, **more: object):
    "A file as it came, and what is made of it."
    (folder / "rows.csv").write_text(text)
    rows = file_format(folder / "rows.csv").scan(folder / "rows.csv").collect()
    made = first_spec(rows, target, **more)
    return rows, made, parse_spec(made.yaml("mine", "rows", "mine.source:rows")).contract


def test_rows_of_somebody_stay_together(tmp_path):
    "Whom several rows are about is no feature and divides the rows; of what is nested each field is a column; and whatever is left out is said."
    people = [f"u{i % 90}" for i in range(400)]
    for name, column in (("user", people), ("customer_id", [i % 90 for i in range(400)])):
        made = first_spec(pl.DataFrame({name: column, "x": [i / 7 for i in range(400)], "y": ["a", "b"] * 200}), "y")
        spec = parse_spec(made.yaml("mine", "rows", "mine.source:rows"))
        assert spec.data.split.key == (name,) and spec.contract[name].role == "ignored" and any(name in note and "together" in note for note in made.notes())
    plain = first_spec(pl.DataFrame({"user": [f"says {i}" for i in range(400)], "when": pl.date_range(pl.date(2020, 1, 1), pl.date(2021, 2, 3), eager=True).head(400), "y": ["a", "b"] * 200, "odd": [[1.0] * (i % 3) for i in range(400)]}), "y")
    text = plain.yaml("mine", "rows", "mine.source:rows")
    assert not parse_spec(text).data.split.key and parse_spec(re.sub(r"  split:.*\n  # split", "  split", text)).data.split.by == "when", "a text is a text, and the line to try is a line that can be tried"
    assert {"when", "odd"} <= {word for note in plain.notes() for word in re.findall(r"\w+", note)}


def test_nested_rows(tmp_path):
    lines = [json.dumps({"who": {"plan": "ab"[i % 2], "at": {"town": f"t{i % 3}"}} if i % 9 else None, "tags": ["bug", "login"][:i % 3], "y": bool(i % 2)}) for i in range(60)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    project = project_from("mine", tmp_path / "rows.jsonl", "y")
    contract = parse_spec(project.spec).contract
    assert list(contract) == ["who_plan", "who_at_town", "tags", "y"] and contract["tags"].values == ("bug", "bug login") and contract["who_plan"].nullable
    assert check(Contract(contract), file_format(tmp_path / "rows.jsonl").scan(tmp_path / "rows.jsonl").collect()).good.height == 60


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16"])
def test_a_file_that_windows_wrote(tmp_path, encoding):
    "It is read, its copy is UTF-8, and that is said."
    (tmp_path / "mieten.csv").write_bytes(("Straße;Fläche;gekündigt\n" + "".join(f"Köln;{i},5;{('ja', 'nein')[i % 2]}\n" for i in range(60))).encode(encoding))
    project = project_from("mine", tmp_path / "mieten.csv", "gekündigt")
    write_project(project, tmp_path / "mine")
    assert (tmp_path / "mine/data/mieten.csv").read_text(encoding="utf-8").startswith("Straße;Fläche;gekündigt\nKöln;0,5;ja\n")
    assert list(parse_spec(project.spec).contract) == ["Straße", "Fläche", "gekündigt"] and any("UTF-8" in note for note in project.notes)
    csv = parse_spec(project.spec).data.csv # as `mlray predict` reads other files of the kind
    assert (csv.separator, csv.decimal_comma) == (";", ("Fläche",))


def test_an_index_without_a_name_is_no_column(tmp_path):
    "As pandas writes it; and a separator at the end of each line."
    for text in (",x,y\n" + "".join(f"{i},{i % 7},{'ab'[i % 2]}\n" for i in range(40)), "x;y;\n" + "".join(f"{i % 7};{'ab'[i % 2]};\n" for i in range(40))):
        assert list(seen(tmp_path, text, "y")[2]) == ["x", "y"]


def test_answers_are_spelled_as_they_come(tmp_path):
    "Truth values of Python, another language's yes, capitals here and there; whoever keeps the contract is a row of the file."
    for yes, no in (("True", "False"), ("ja", "nein"), ("1.0", "0.0"), ("Y", "N")):
        rows, _, contract = seen(tmp_path, "größe;gekündigt?\n" + "".join(f"{i};{no if i % 3 == 0 else yes}\n" for i in range(60)), "gekündigt?")
        assert contract["gekündigt?"].positive == yes and check(Contract(contract), rows).good.height == 60
    rows, _, contract = seen(tmp_path, "a;b\n" + "".join(f"{i};{('yes', 'No', 'YES', 'no', 'no')[i % 5]}\n" for i in range(60)), "b")
    assert set(contract["b"].values) == {"no", "yes"} or set(contract["b"].values) == {"no", "YES"}
    assert check(Contract(contract), rows).good["b"].n_unique() == 2


def test_a_row_without_an_answer_is_left_out(tmp_path):
    text = "x,y\n" + "".join(f"{i % 9},{('NA', '0', '1')[i % 3]}\n" for i in range(90))
    _, made, contract = seen(tmp_path, text, "y")
    assert (made.unanswered, made.rows) == (30, 60) and not contract["y"].nullable and any("30 of 90" in n for n in made.notes())
    project = project_from("mine", tmp_path / "rows.csv", "y")
    assert "is_not_null" in project.source and "is_not_null" not in project_from("mine", tmp_path / "rows.csv", "x").source
    with pytest.raises(DataError, match="10 of 90 rows"): seen(tmp_path, "x,y\n" + "".join(f"{i % 9},{'NA' if i >= 10 else i}\n" for i in range(90)), "y")


@pytest.mark.parametrize(("separator", "values", "means"), [
    ("\t", ["$1,200", "$980", "$12,000,000"], [1200, 980, 12_000_000]), (";", ["1.200,50 €", "980,00 €", "7,25 €"], [1200.5, 980, 7.25]), (",", ["45%", "7 %", "100%"], [45, 7, 100]),
    (";", ["1'200.5", "980.25", "12'000"], [1200.5, 980.25, 12_000]), (",", ['"1,234"', "980", '"12,000"'], [1234, 980, 12_000])])
def test_numbers_as_people_write_them(tmp_path, separator, values, means):
    text = f"n{separator}y\n" + "".join(f"{values[i % 3]}{separator}{'ab'[i % 2]}\n" for i in range(60))
    rows, _, contract = seen(tmp_path, text, "y")
    assert contract["n"].type in ("integer", "number") and rows["n"].cast(pl.Float64).to_list()[:3] == means


def test_what_could_be_either_stays_as_it_is(tmp_path):
    "1,234 may be a thousand or a fraction, ABC123 is no money, and two currencies are no number."
    for value in ("1,234", "ABC123", "SKU 9"):
        assert seen(tmp_path, "n;x;y\n" + "".join(f"{value};{i};{'ab'[i % 2]}\n" for i in range(40)), "y")[0]["n"][0] == value
    rows, *_ = seen(tmp_path, "n;x;y\n" + "".join(f"{'$€'[i % 2]}{i};{i};{'ab'[i % 2]}\n" for i in range(40)), "y")
    assert rows["n"][0] == "$0"


def test_what_teaches_nothing_stands_aside(tmp_path):
    text = "user_id,store,same,none,y\n" + "".join(f"u{i % 70},{i % 7},x,,{'ab'[i % 2]}\n" for i in range(200))
    _, made, contract = seen(tmp_path, text, "y")
    assert {n: c.role for n, c in contract.items()} == {"user_id": "ignored", "store": "feature", "same": "ignored", "none": "ignored", "y": "target"}
    assert all(n in " ".join(made.notes()) for n in ("user_id", "same", "none"))
    with pytest.raises(DataError, match="nothing to learn 'y' from"): seen(tmp_path, "same,y\n" + "x,a\nx,b\n" * 20, "y")
    assert contract["user_id"].description and Contract(contract).features == ("store",)


def test_a_project_knows_where_its_mlray_comes_from(tmp_path, monkeypatch):
    "As pip has noted it (PEP 610); its tests make an environment from there."
    class Noted:
        def __init__(self, said): self.said = said
        def read_text(self, name): return self.said if name == "direct_url.json" else None
    for said, means in ((None, "mlray"), ('{"url": "file:///here/mlray", "dir_info": {"editable": true}}', "mlray @ file:///here/mlray"),
                        ('{"url": "https://host/mlray", "vcs_info": {"vcs": "git", "commit_id": "abc"}}', "mlray @ git+https://host/mlray@abc")):
        monkeypatch.setattr(project_folder, "distribution", lambda name, said=said: Noted(said))
        assert f"MLRAY ?= {means}\n" in project_folder.project_files(sample_project("mine", "tabular"))["Makefile"]


@pytest.mark.chaos
@pytest.mark.ray
def test_four_commands_from_adult_to_an_answer(tmp_path):
    data = os.environ.get("MLRAY_DATA")
    if not data: pytest.skip("MLRAY_DATA is not set")
    import time
    began = time.monotonic()
    made = run(tmp_path, MLRAY, "new", "census", "--from", f"{data}/adult/adult.data", "--columns", ADULT, "--target", "income", "--positive", ">50K", "--sensitive", "sex")
    assert made.returncode == 0, made.stderr
    told = run(tmp_path / "census", MLRAY, "demo", "configs/census.yaml", "--port", str(free_port()))
    print(told.stdout, told.stderr, f"{time.monotonic() - began:.0f} s")
    assert told.returncode == 0 and "from census/1" in told.stdout


def test_a_project_from_parquet_needs_no_format(tmp_path):
    pl.DataFrame({"x": range(100), "y": ["a", "b"] * 50}).write_parquet(tmp_path / "rows.parquet")
    assert file_format(tmp_path / "rows.parquet").kind == "parquet"
    files = write_project(project_from("mine", tmp_path / "rows.parquet", "y"), tmp_path / "mine")
    assert "data/rows.parquet" in files
