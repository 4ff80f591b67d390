"""Features of every type, and networks of one's own: learned without the target and without the order of rows, the same for one row as for many, and refused with a letter."""
import json
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from textwrap import dedent

import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings as hypothesis_settings, strategies as st

from mlray.governance.access import new_key
from mlray.governance.registry import bundle_of, open_registry
from mlray.learning.contract import Contract, schema
from mlray.learning.features import Features, apply, learn
from mlray.running.reproduce import reproduce
from mlray.running.run import LocalBackend, train
from mlray.serving.served import Served
from mlray.serving.service import Service
from mlray.shipping.bundle import predict
from mlray.values.errors import BundleError, ContractError, SpecError, TrainingError
from mlray.values.feature import Setting
from mlray.values.settings import read_settings
from mlray.values.spec import parse_spec, read_spec

CONFIGS = Path(__file__).parents[1] / "configs"

SPEC = """
name: letters
data: {train: {file: rows.parquet}, split: {test: 0.3, valid: 0.3}}
contract:
  age: {type: integer, nullable: true}
  paid: {type: number, nullable: true}
  owed: {type: number}
  kind: {type: category, nullable: true}
  known: {type: boolean, nullable: true}
  note: {type: text, nullable: true}
  born: {type: date, nullable: true}
  seen: {type: datetime, time_zone: Europe/Berlin, nullable: true}
  local: {type: datetime}
  took: {type: duration, nullable: true}
  face: {type: array, length: 5, nullable: true}
  late: {type: boolean, role: target}
features:
  share: paid / owed
  much: {sql: share > 0.5}
  shout: {sql: UPPER(kind)}
  first: {sql: "SUBSTRING(note, 1, 8)", type: text, words: 0, characters: 3, buckets: 64}
  lived: seen::date - born
  day: local::date
  paid: {encode: quantile}
  age: {encode: standard}
  owed: {alone: false}
  note: {words: 2, buckets: 256, longest: 24}
  seen: {parts: [trend, season, clock, month, monthday, weekday, hour]}
train: {epochs: 2}
"""
spec = parse_spec(SPEC)
contract = Contract(spec.contract)
moments = st.datetimes(datetime(1950, 1, 1), datetime(2080, 1, 1))
ROW = st.fixed_dictionaries({
    "age": st.none() | st.integers(-9, 120), "paid": st.none() | st.floats(-1e6, 1e6), "owed": st.floats(-10, 10) | st.just(0.0), "kind": st.none() | st.sampled_from("abc"), "known": st.none() | st.booleans(),
    "note": st.none() | st.text("ab Zé-", max_size=40), "born": st.none() | st.dates(date(1900, 1, 1), date(2080, 1, 1)), "seen": st.none() | moments.map(lambda t: t.replace(tzinfo=UTC)), "local": moments,
    "took": st.none() | st.timedeltas(timedelta(-9), timedelta(9)), "face": st.none() | st.lists(st.floats(-5, 5), min_size=5, max_size=5), "late": st.booleans()})


def framed(rows: list[dict]) -> pl.DataFrame: return pl.DataFrame(rows, schema=schema(contract))
def bits(matrix) -> list[bytes]: return [t.tobytes() for t in matrix.tensors]


@hypothesis_settings(max_examples=30, deadline=None)
@given(rows=st.lists(ROW, min_size=1, max_size=12), new=ROW, rnd=st.randoms())
def test_order_target_and_company_do_not_matter(rows, new, rnd):
    frame, order = framed(rows), list(range(len(rows)))
    rnd.shuffle(order)
    learned = learn(contract, frame, 8, spec.features)
    assert learned == learn(contract, frame[order], 8, spec.features), "the order of rows shows"
    assert learned == learn(contract, frame.with_columns(~pl.col("late")), 8, spec.features), "the target shows"
    assert learned == Features.from_dict(json.loads(json.dumps(learned.as_dict())))
    several = framed([*rows, new]).drop("late")
    together = apply(learned, several, several.height)
    for i, row in enumerate([*rows, new]):
        alone = apply(learned, {n: [row[n]] for n in contract.features}, 1)
        assert bits(alone) == bits(together[i:i + 1]), "a row of a request differs from the same row in a frame"
    assert not np.isinf(together.numbers).any()


def test_what_is_missing_and_what_was_never_seen_have_codes_of_their_own():
    rows = [{**dict.fromkeys(contract.columns), "owed": 1.0, "local": datetime(2024, 5, 1), "late": i > 1, "kind": k} for i, k in enumerate(["a", "b", "a"])]
    learned = learn(contract, framed(rows), 8, spec.features)
    at = [c.name for c in learned.categories].index("kind")
    kinds = apply(learned, {**{n: [rows[0][n]] * 3 for n in contract.features}, "kind": ["b", None, "z"]}, 3).codes[:, at]
    assert kinds.tolist() == [3, 0, 1]
    assert apply(learned, framed(rows), 3).texts[0].tolist().count(1) == 2 # each missing text is one id


def test_encodings_of_a_number():
    one = Contract({n: c for n, c in spec.contract.items() if n in ("paid", "late")})
    values = pl.DataFrame({"paid": [0.0, *np.geomspace(1, 1e6, 199)], "late": [True, False] * 100})
    number = {encode: learn(one, values, 32, {"paid": Setting(encode=encode)}).numbers[0] for encode in ("standard", "quantile", "piecewise")}
    assert len(number["standard"].edges) == 2 and number["standard"].common == ()
    heights = np.array(number["quantile"].heights)
    assert (np.diff(heights) > 0).all() and abs(heights.mean()) < 0.15 and 2 < heights[-1] < 3.2 and -3.2 < heights[0] < -2 # a normal score, whatever the tail
    assert number["piecewise"].heights[-1] < 3 < number["standard"].heights[-1] # the logarithm tames the tail, a line does not


@pytest.mark.parametrize(("sql", "said"), [("paid - AVG(paid)", "one row by itself"), ("LAG(paid) OVER (ORDER BY owed)", "one row by itself"), ("RANK() OVER (ORDER BY owed)", "one row by itself"), ("1 + 1", "one row by itself"),
                                           ("late::int + 1", "role is target"), ("paidd / owed", "no expression"), ("paid /", "no expression"), ("seen", "Make it a number"), ("local < CURRENT_TIMESTAMP", "time of day")])
def test_a_derived_column_is_made_from_one_row_of_features(sql, said):
    with pytest.raises(ContractError, match=said): learn(contract, framed([]), 8, {"x": Setting(sql=sql)})


@pytest.mark.parametrize(("features", "said"), [
    ("{agee: {encode: quantile}}", "no feature 'agee'.*Did you mean 'age'"), ("{kind: {encode: quantile}}", "for type integer or number or duration, not for 'category'"), ("{born: {parts: [hour]}}", "a date has no hour"),
    ("{age: paid / owed}", "derived column needs another"), ("{late: {encode: standard}}", "no feature 'late'"), ("{born.trend: paid + owed}", "give the column another name"), ("{note: {words: 9}}", "less than or equal to 5")])
def test_settings_that_do_not_fit_are_refused_with_the_spec(features, said):
    with pytest.raises(SpecError, match=said): parse_spec(SPEC, [f"features={features}"])


# One bundle with features of every type.

def drawn(count: int) -> pl.DataFrame:
    rng = np.random.default_rng(3)
    late = rng.random(count) < 0.4
    pick = lambda values: None if rng.random() < 0.1 else values
    rows = [{"age": pick(int(rng.integers(18, 90))), "paid": pick(float(rng.exponential(50))), "owed": float(rng.integers(0, 90)), "kind": pick(str(rng.choice(list("abc")))), "known": pick(bool(rng.random() < 0.5)),
             "note": pick(" ".join(rng.choice(["please", "wait", "sorry"] if is_late else ["paid", "in", "full"], 5))), "born": pick(date(1950, 1, 1) + timedelta(int(rng.integers(20_000)))),
             "seen": pick(datetime(2024, 1, 1, tzinfo=UTC) + timedelta(minutes=int(rng.integers(500_000)))), "local": datetime(2024, 1, 1) + timedelta(minutes=int(rng.integers(500_000))),
             "took": pick(timedelta(seconds=float(rng.exponential(900)))), "face": pick((rng.normal(size=5) + is_late).tolist()), "late": bool(is_late)} for is_late in late]
    return framed(rows)


@pytest.fixture(scope="module")
def letters(tmp_path_factory):
    folder = tmp_path_factory.mktemp("letters")
    drawn(600).write_parquet(folder / "rows.parquet")
    asked = parse_spec(SPEC.replace("rows.parquet", str(folder / "rows.parquet")))
    settings = read_settings(environ={"MLRAY_HOME": str(folder / "home")})
    return settings, train(asked, settings)


def test_features_of_every_type_are_learned_from(letters):
    assert letters[1].evaluation.values["roc_auc"] > 0.9


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 600])
def test_a_row_alone_is_the_row_in_a_batch(letters, size):
    bundle, rows = bundle_of(open_registry(letters[0]), letters[1].version), drawn(600)
    whole = predict(bundle, rows, rows.height)
    pieces = np.concatenate([predict(bundle, rows[i:i + size], min(size, rows.height - i)) for i in range(0, rows.height, size)])
    assert whole.tobytes() == pieces.tobytes()


def test_a_request_is_answered_as_the_row_in_the_frame(letters):
    settings, run = letters
    bundle, rows = bundle_of(open_registry(settings), run.version), drawn(40)
    key, secret = new_key("admin")
    service = Service({"letters": Served("1", bundle)}, (key,))
    scores = predict(bundle, rows, 40)
    text = lambda v: v.isoformat() if hasattr(v, "isoformat") else f"PT{v / timedelta(microseconds=1) / 1e6:.6f}S" if isinstance(v, timedelta) else v
    for i, row in enumerate(rows.drop("late").to_dicts()):
        reply = service.answer("letters", json.dumps({"instances": [{n: text(v) for n, v in row.items()}]}).encode(), secret, "r")
        assert reply.status == 200, reply.body
        assert np.float32(json.loads(reply.body)["predictions"][0]["score"]).tobytes() == scores[i].tobytes()


def test_nothing_of_a_text_travels_but_its_hash(letters):
    bundle = bundle_of(open_registry(letters[0]), letters[1].version)
    assert not any(word in p.read_bytes() for p in bundle.path.iterdir() for word in (b"please", b"sorry"))


# Networks of one's own.

NETS = """
import torch
from torch import nn


class Line(nn.Module):
    def __init__(self, widths, outputs):
        super().__init__()
        self.line = nn.Linear(widths["numbers"] + widths["missing"], outputs)

    def forward(self, numbers, missing): return self.line(torch.cat([numbers, missing], 1))


class Narrow(Line):
    def forward(self, numbers, missing): return super().forward(numbers, missing).flatten()


class Failing(Line):
    def forward(self, numbers, missing): return self.line(numbers)


class Asserting(Line):
    def forward(self, numbers): assert numbers.shape[1] == 99


class Branching(Line):
    def forward(self, numbers, missing): return super().forward(numbers, missing) * (1 if numbers.sum() > 0 else 2)


class Mixing(Line):
    def forward(self, numbers, missing): return super().forward(numbers, missing) - super().forward(numbers, missing).mean(0)


class Everything(nn.Module):
    def __init__(self, widths, outputs):
        super().__init__()
        self.line = nn.Linear(widths["encoded"], 3 * outputs)

    def forward(self, encoded, *, scale=1.0): return self.line(encoded).unflatten(1, (3, -1)) * scale


def nothing(outputs): return None
def greedy(outputs, more): return nn.Linear(more, outputs)
def raising(outputs): raise RuntimeError("no weights today")
def nameless(features, outputs): return nn.Sequential(nn.Linear(len(features.numbers), outputs))
number = 3
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    "A folder with rows, and a module of networks."
    drawn(200).write_parquet(tmp_path / "rows.parquet")
    (tmp_path / "my_nets.py").write_text(dedent(NETS))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [p for p in __import__("sys").path if p])
    monkeypatch.delitem(__import__("sys").modules, "my_nets", raising=False)
    return read_settings(environ={"MLRAY_HOME": str(tmp_path / "home")})


def own(network: str, **more): return parse_spec(SPEC, [f"model.network={network}", *(f"{k}={v}" for k, v in more.items())])


@pytest.mark.parametrize(("network", "letter", "said"), [
    ("my_nets:Narrow", TrainingError, r"answered with shape \(2,\) where \(2, members\)"), ("my_nets:Failing", TrainingError, r"failed on two rows of numbers \(2, \d+\).*RuntimeError"),
    ("my_nets:Asserting", TrainingError, r"failed on two rows of numbers .*AssertionError"), ("my_nets:Branching", TrainingError, "cannot become an ONNX graph"), ("my_nets:nothing", SpecError, "returned NoneType; a torch.nn.Module"), ("my_nets:number", SpecError, "is int; a function or a class"),
    ("my_nets:greedy", SpecError, "asks for 'more'. It may ask for outputs, features, widths, model"), ("my_nets:raising", SpecError, "RuntimeError: no weights today"), ("my_nets:Lin", SpecError, "Did you mean 'Line'"),
    ("my_netz:Line", SpecError, "ModuleNotFoundError"), ("my_nets:nameless", SpecError, r"takes \(input\), and the rows have numbers, codes, arrays, texts"), ("my_nets:Mixing", BundleError, "has another answer in a request of 1")])
def test_a_network_that_will_not_do_is_refused_with_a_letter(project, network, letter, said):
    with pytest.raises(letter, match=said): train(own(network), project)
    assert not list((project.home / "store").glob("*")) if (project.home / "store").exists() else True


@pytest.mark.parametrize("error", [MemoryError(), MemoryError("Unable to allocate 9 GiB"), RuntimeError("CUDA out of memory.")])
def test_out_of_memory_is_a_letter_whatever_it_says(error):
    from mlray.learning.fitting import memory_letter
    from mlray.values.recipe import Train
    with pytest.raises(TrainingError, match="not enough memory for batches of 32 rows"), memory_letter(Train(batch_size=32)): raise error


@pytest.mark.parametrize("network", ["my_nets:Line", "my_nets:Everything"])
def test_a_network_of_ones_own_is_trained_shipped_and_reproduced(project, network):
    run = train(own(network), project)
    bundle = bundle_of(open_registry(project), run.version)
    rows = drawn(64)
    whole = predict(bundle, rows, 64)
    assert np.isfinite(whole).all() and whole.tobytes() == np.concatenate([predict(bundle, rows[i:i + 1], 1) for i in range(64)]).tobytes()
    assert reproduce(bundle, "letters/1", project, LocalBackend()).identical
    Path("my_nets.py").write_text(dedent(NETS) + "\n# a word more\n")
    again = reproduce(bundle, "letters/1", project, LocalBackend())
    assert [d.what for d in again.differences] == ["code of my_nets"] and "code of my_nets" in again.finding


@hypothesis_settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(ROW, min_size=1, max_size=6))
def test_an_own_network_sees_no_nan(letters, rows):
    import torch

    from mlray.learning.own_network import OwnNetwork
    from mlray.values.recipe import Model
    seen = {}

    class Watch(torch.nn.Module):
        def forward(self, numbers, codes, arrays, texts, missing, encoded):
            seen.update(numbers=numbers, arrays=arrays, missing=missing, encoded=encoded, codes=codes, texts=texts)
            return encoded[:, :1]

    import sys
    sys.modules[__name__].Watch = Watch
    features = bundle_of(open_registry(letters[0]), letters[1].version).features
    matrix = apply(features, framed(rows), len(rows))
    OwnNetwork(features, Model(network=f"{__name__}:Watch", embedding=2)).eval()(*map(torch.from_numpy, matrix.tensors))
    assert set(seen) == {"numbers", "codes", "arrays", "texts", "missing", "encoded"} and not any(t.isnan().any() for t in seen.values())
    assert seen["missing"].bool().numpy().tolist() == np.hstack([np.isnan(matrix.numbers), np.isnan(matrix.arrays[:, ::5])]).tolist()


# Pictures and text, with only a spec and ten lines.

@pytest.mark.parametrize(("name", "epochs", "least"), [("digits", 6, 0.9), ("docstrings", 12, 0.5)])
def test_pictures_and_text_go_through_the_same_commands(tmp_path, name, epochs, least):
    settings = read_settings(environ={"MLRAY_HOME": str(tmp_path)})
    run = train(read_spec(CONFIGS / f"{name}.yaml", [f"train.epochs={epochs}"]), settings)
    assert run.evaluation.values["accuracy"] > least
    bundle, rows = bundle_of(open_registry(settings), run.version), run.rows.parts.test.head(20)
    key, secret = new_key("admin")
    sent = rows.select(bundle.contract.features).to_dicts()
    reply = json.loads(Service({name: Served("1", bundle)}, (key,)).answer(name, json.dumps({"instances": sent}).encode(), secret, "r").body)
    assert [p["label"] for p in reply["predictions"]] == [bundle.task.classes[i] for i in predict(bundle, rows, 20).argmax(1)]


def test_a_single_number_alone_is_itself_among_others():
    "With one numeric feature and one row onnxruntime would sum the pieces of its curve in another order."
    import torch

    from mlray.learning.features import Features, Matrix, Number
    from mlray.learning.network import build, sensible, to_onnx
    from mlray.shipping.bundle import _open, _run
    from mlray.values.recipe import Model, Train
    from mlray.values.task import Task
    features = Features((Number("x", 0.0, tuple(map(float, range(16))), tuple(i / 4 - 2 for i in range(16)), ()),), ())
    network, task = build(features, sensible(Model(network="mlp", hidden=(8,)), Train(), 3000)[0], 0), Task("regression", ("y",), ("y",), center=20_000.0, spread=11_547.0)
    with torch.no_grad():
        for weight in network.parameters(): weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    rows = Matrix(np.random.default_rng(0).uniform(0, 15, (200, 1)).astype(np.float32), np.empty((200, 0), np.int64), np.empty((200, 0), np.float32), np.empty((200, 0), np.int64))
    session = _open(to_onnx(network.eval(), features, task))
    together = _run(session, rows)
    assert [i for i in range(200) if _run(session, rows[i:i + 1]).tobytes() != together[i:i + 1].tobytes()] == []


@given(st.data())
@hypothesis_settings(max_examples=25, deadline=None)
def test_what_a_layer_learns_is_what_the_layer_of_the_package_learns(data):
    "Whatever way is taken for so many rows: the same numbers and gradients, save for the order of their sums."
    import torch
    from tabm import LinearBatchEnsemble

    from mlray.learning.network import Layer
    rows, members, inputs, outputs = (data.draw(st.integers(1, most), label=label) for label, most in (("rows", 40), ("members", 4), ("inputs", 40), ("outputs", 24)))
    shared = data.draw(st.booleans(), label="shared")
    torch.manual_seed(data.draw(st.integers(0, 99), label="seed"))
    layer, theirs = (kind(inputs, outputs, k=members, scaling_init=("normal", "normal")).double() for kind in (Layer, LinearBatchEnsemble))
    theirs.load_state_dict(layer.state_dict())
    x = torch.randn(1 if shared else members, rows, inputs, dtype=torch.float64, requires_grad=True)
    ours, expected = layer(x), theirs(x.transpose(0, 1)).relu().transpose(0, 1)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)
    pull = torch.randn(members, rows, outputs, dtype=torch.float64)
    for mine, other in zip(torch.autograd.grad(ours, [x, *layer.parameters()], pull), torch.autograd.grad(expected, [x, *theirs.parameters()], pull), strict=True): torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-9)
    single = layer.float().eval(), theirs.float()
    given_rows = x.detach().transpose(0, 1).float()
    assert torch.equal(single[0](given_rows), single[1](given_rows)) # an answer is the package's, to the bit


@pytest.mark.parametrize("rows", [3, 64]) # two ways
def test_dropout_holds_back_both_ways(rows):
    "What is dropped neither answers nor learns, and what is kept counts for it."
    import torch

    from mlray.learning.network import Layer
    torch.manual_seed(0)
    layer = Layer(8, 32, k=400 // rows, scaling_init=("normal", "ones"))
    x, dropped = torch.randn(1, rows, 8), 64 / 256
    whole, kept = layer(x), layer(x, dropped)
    there = kept > 0
    torch.testing.assert_close(kept[there], whole[there] / (1 - dropped))
    assert not bool((there & (whole <= 0)).any()) and abs(float(there.sum() / (whole > 0).sum()) - (1 - dropped)) < 0.03
    biases, = torch.autograd.grad(kept.sum(), layer.bias)
    torch.testing.assert_close(biases, there.sum(1) / (1 - dropped))


@given(st.lists(st.one_of(st.none(), st.integers(-3, 8), st.floats(-5, 9, width=32)), min_size=1, max_size=9))
def test_common_values_are_found_alike_to_learn_and_to_answer(values):
    import torch

    from mlray.learning.features import Number
    from mlray.learning.network_inputs import Encoding
    features = Features((Number("x", 0.0, (0.0, 7.0), (-1.0, 1.0), (-2.0, 0.5, 3.0, 7.0)), Number("line", 0.0, (0.0, 1.0), (0.0, 1.0), ()), Number("y", 0.0, (0.0, 1.0), (0.0, 1.0), (1.0,))), ())
    encoding = Encoding(features, 2)
    numbers = torch.tensor([[np.nan if v is None else v] * 3 for v in values], dtype=torch.float32)
    assert torch.equal(encoding.train()._common_codes(numbers), encoding.eval()._common_codes(numbers))


def test_what_is_collected_in_the_middle_of_an_export_does_not_break_it():
    "Before Python 3.11.8 an `ast.parse` fails when another one ran in it, as it does when a traceback is shown in a `__del__`."
    import ast
    import gc

    from mlray.learning.features import Features, Number
    from mlray.learning.network import build, sensible, to_onnx
    from mlray.values.recipe import Model, Train
    features, collections = Features((Number("x", 0.0, (0.0, 1.0), (0.0, 1.0), ()),), ()), []
    network, often = build(features, sensible(Model(network="linear"), Train(), 3000)[0], 0).eval(), gc.get_threshold()

    def parsed(deeper: int) -> ast.AST: return parsed(deeper - 1) if deeper else ast.parse("collected = True")

    def collected(phase: str, _: dict) -> None:
        if phase == "start": collections.append(parsed(16))

    before = to_onnx(network, features)
    gc.callbacks.append(collected)
    gc.set_threshold(50)
    try: assert to_onnx(network, features) == before and collections and gc.isenabled()
    finally:
        gc.callbacks.remove(collected)
        gc.set_threshold(*often)
