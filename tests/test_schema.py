"""The JSON Schema that editors use says of a spec what reading it says."""
import json
from pathlib import Path

import jsonschema
import pytest
import yaml

from mlray.values.errors import SpecError
from mlray.values.schema import spec_schema
from mlray.values.spec import parse_spec, read_spec

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
VALID = jsonschema.Draft202012Validator(spec_schema())


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_spec_is_valid_and_names_the_schema(path):
    text = path.read_text()
    assert not list(VALID.iter_errors(json.loads(json.dumps(yaml.safe_load(text))))) and text.startswith("# yaml-language-server: $schema=schema.json\n")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_a_spec_shows_itself_as_it_is_written(path):
    "A notebook's cell shows YAML, which is the same spec."
    shown = read_spec(path)._repr_markdown_()
    assert parse_spec(shown.removeprefix("```yaml\n").removesuffix("```")) == read_spec(path) and len(shown) < 1.5 * path.stat().st_size


@pytest.mark.parametrize("change", ["train.epocs=3", "train.epochs=many", "model.dropout=7", "contract.bmi.tipe=number"])
def test_what_reading_refuses_the_schema_refuses(change):
    tree = yaml.safe_load((ROOT / "configs/diabetes.yaml").read_text())
    (*path, last), value = change.split("=")[0].split("."), yaml.safe_load(change.split("=")[1])
    at = tree
    for key in path: at = at.setdefault(key, {})
    at[last] = value
    assert list(VALID.iter_errors(tree))
    with pytest.raises(SpecError): parse_spec(yaml.safe_dump(tree))


def test_most_keys_say_what_they_mean():
    parts = [p for part in (spec_schema(), *spec_schema()["$defs"].values()) for p in part.get("properties", {}).values()]
    assert sum("description" in p for p in parts) > 0.6 * len(parts), f"{sum('description' in p for p in parts)} of {len(parts)}"
