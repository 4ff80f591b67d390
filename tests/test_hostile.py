"""Bundles made to do harm, and names made to leave the store: none loads, nothing of theirs runs, no file lands outside."""
import hashlib
import io
import json
import os
import pickle
import random
import shutil
import socket
import struct
import sys
import unicodedata
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto as T, helper as h, load_model_from_string

import mlray.shipping.bundle as module
from mlray.engines.gate_on_papermill import gate_path
from mlray.governance.access import new_key
from mlray.governance.registry import Registry, Version, add_evidence, bundle_of, promote, register, rollback, version, versions
from mlray.governance.signature import create_signer
from mlray.governance.store import Store
from mlray.judgement.gate import judge
from mlray.shipping.bundle import load_bundle, predict
from mlray.values.errors import BundleError, MlrayError
from mlray.values.settings import Settings
from mlray.values.spec import Rule, parse_spec
from tests.test_registry import tiny

NAMES = ("model.onnx", "weights.safetensors", "bundle.json", "profile.json")


def manifest(folder: Path, **changes) -> bytes:
    "A manifest that is right about what lies in a folder, then changed."
    files = {n: {"sha256": hashlib.sha256((folder / n).read_bytes()).hexdigest(), "size": (folder / n).stat().st_size} for n in NAMES}
    return json.dumps({"format": module.FORMAT, "files": files} | changes).encode()


def repack(folder: Path, name: str, data: bytes) -> None:
    "Put other bytes into a bundle, and digests that are right about them: somebody meant to."
    (folder / name).write_bytes(data)
    (folder / "manifest.json").write_bytes(manifest(folder))


class Marker:
    "Unpickled, it would write a file."
    def __init__(self, path: Path): self.path = path
    def __reduce__(self): return (os.system, (f"touch {self.path}",))


def graph(nodes=None, initializers=None, inputs=None, outputs=None, opsets=(("", 20),), **more) -> bytes:
    "An ONNX graph: the age divided by a hundred, unless something else is asked for."
    made = h.make_model(h.make_graph(
        nodes or [h.make_node("Div", ["numbers", "hundred"], ["wide"]), h.make_node("Squeeze", ["wide", "one"], ["score"])], "g",
        [h.make_tensor_value_info(n, T.FLOAT, ["rows", 1]) for n in inputs or ["numbers"]], [h.make_tensor_value_info(n, T.FLOAT, ["rows"]) for n in outputs or ["score"]],
        initializers or [h.make_tensor("hundred", T.FLOAT, [1], [100.0]), h.make_tensor("one", T.INT64, [1], [1])]), opset_imports=[h.make_opsetid(*o) for o in opsets], ir_version=10, **more)
    return made.SerializeToString()


def outside(where: str) -> bytes:
    "Weights that lie in another file."
    model = load_model_from_string(graph())
    tensor = model.graph.initializer[0]
    tensor.ClearField("float_data")
    tensor.data_location = T.EXTERNAL
    tensor.external_data.add(key="location", value=where)
    return model.SerializeToString()


def outside_in_a_branch() -> bytes:
    constant = h.make_tensor("c", T.FLOAT, [1], [1.0])
    constant.ClearField("float_data")
    constant.data_location = T.EXTERNAL
    constant.external_data.add(key="location", value="/etc/passwd")
    branch = h.make_graph([h.make_node("Constant", [], ["b"], value=constant)], "b", [], [h.make_tensor_value_info("b", T.FLOAT, [1])])
    return graph([h.make_node("If", ["yes"], ["score"], then_branch=branch, else_branch=branch)], [h.make_tensor("yes", T.BOOL, [], [True])])


def lying(dims: list[int], size: int = 4) -> bytes:
    model = load_model_from_string(graph())
    tensor = model.graph.initializer[0]
    tensor.ClearField("float_data")
    del tensor.dims[:]
    tensor.dims.extend(dims)
    tensor.raw_data = b"\0" * size
    return model.SerializeToString()


def huge(operator: str) -> bytes:
    source = [h.make_tensor("one", T.FLOAT, [1], [1.0])] if operator == "Expand" else []
    return graph([h.make_node(operator, ["one", "shape"] if operator == "Expand" else ["shape"], ["score"])], [*source, h.make_tensor("shape", T.INT64, [4], [2**15] * 4)])


def tensors(header: bytes | dict, body: bytes = b"", length: int | None = None) -> bytes:
    "A file of safetensors, right or not."
    told = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(told) if length is None else length) + told + body


def about(change: Callable[[dict], object]) -> Callable[[Path, Path], None]:
    def do(folder, marker):
        read = json.loads((folder / "bundle.json").read_bytes())
        change(read)
        repack(folder, "bundle.json", json.dumps(read).encode())
    return do


def onnx(make: Callable[[], bytes]) -> Callable[[Path, Path], None]: return lambda folder, marker: repack(folder, "model.onnx", make())
def weights(make: Callable[[], bytes]) -> Callable[[Path, Path], None]: return lambda folder, marker: repack(folder, "weights.safetensors", make())
def told(data: bytes) -> Callable[[Path, Path], None]: return lambda folder, marker: (folder / "manifest.json").write_bytes(data)


def told_otherwise(**changes) -> Callable[[Path, Path], None]: return lambda folder, marker: (folder / "manifest.json").write_bytes(manifest(folder, **changes))


def instead(name: str, make: Callable[[Path, Path], object]) -> Callable[[Path, Path], None]:
    "Something else where a file was."
    def do(folder, marker):
        (folder / name).rename(folder.parent / "moved")
        make(folder / name, folder.parent / "moved")
    return do


def pickled(name: str) -> Callable[[Path, Path], None]: return lambda folder, marker: repack(folder, name, pickle.dumps(Marker(marker)))


def zipped(folder: Path, marker: Path) -> None:
    "What torch.save and torch.export.save write: an archive with a pickle in it, and 100 MB of nothing."
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Marker(marker)))
        archive.writestr("bomb", b"\0" * 10**8)
    repack(folder, "weights.safetensors", held.getvalue())


def objects(folder: Path, marker: Path) -> None:
    held = io.BytesIO()
    np.save(held, np.array([Marker(marker)], object), allow_pickle=True)
    repack(folder, "weights.safetensors", held.getvalue())


def unix_socket(path: Path, moved: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent) # the name of a socket may not be long
    with socket.socket(socket.AF_UNIX) as s: s.bind(path.name)
    os.chdir(here)


# What a digest finds before anything is parsed

CHANGED: dict[str, Callable[[Path, Path], object]] = {
    "a byte of the graph": lambda f, m: (f / "model.onnx").write_bytes((f / "model.onnx").read_bytes()[:-1] + b"?"),
    "a byte of the weights": lambda f, m: (f / "weights.safetensors").write_bytes((f / "weights.safetensors").read_bytes()[:-1] + b"?"),
    "a byte of the manifest": lambda f, m: (f / "manifest.json").write_bytes((f / "manifest.json").read_bytes().replace(b"1", b"2", 1)),
    "a longer file": lambda f, m: (f / "model.onnx").write_bytes((f / "model.onnx").read_bytes() + b"\0"),
    "a shorter file": lambda f, m: (f / "bundle.json").write_bytes((f / "bundle.json").read_bytes()[:-1]),
    "a file that is gone": lambda f, m: (f / "profile.json").unlink(),
    "a pickle for weights": lambda f, m: (f / "weights.safetensors").write_bytes(pickle.dumps(Marker(m))),
    "a file more": lambda f, m: (f / "setup.py").write_text("raise SystemExit"),
    "a hidden folder": lambda f, m: (f / ".git").mkdir(),
    "a hidden file": lambda f, m: (f / ".gitattributes").write_text("* filter=evil"),
    "a module of its own": lambda f, m: (f / "__init__.py").write_text("raise SystemExit"),
    "ten thousand files": lambda f, m: [(f / f"{n}").touch() for n in range(10_000)],
    "a link to the same bytes": instead("model.onnx", lambda p, moved: p.symlink_to(moved)),
    "a link upwards": instead("bundle.json", lambda p, moved: p.symlink_to("../moved")),
    "a link to a device": instead("weights.safetensors", lambda p, moved: p.symlink_to("/dev/zero")),
    "a hard link to something else": instead("model.onnx", lambda p, moved: os.link(__file__, p)),
    "a pipe": instead("model.onnx", lambda p, moved: os.mkfifo(p)),
    "a folder": instead("profile.json", lambda p, moved: p.mkdir()),
    "a socket": instead("model.onnx", unix_socket),
    "a file of a terabyte": instead("model.onnx", lambda p, moved: os.truncate(p, 2**40) if not p.touch() else None),
    "a manifest of a gigabyte": instead("manifest.json", lambda p, moved: os.truncate(p, 2**30) if not p.touch() else None),
}

# What digests cannot find, because whoever packed it meant to

MEANT: dict[str, Callable[[Path, Path], object]] = {
    "a manifest that is none": told(b"[1, 2"), "a manifest of another shape": told(b'{"format": 2, "files": []}'), "a manifest of text": told('{"format": "2️"}'.encode()),
    "a manifest as UTF-16": lambda f, m: (f / "manifest.json").write_bytes(manifest(f).decode().encode("utf-16")),
    "a manifest with a key twice": lambda f, m: (f / "manifest.json").write_bytes(manifest(f).replace(b'{"format"', b'{"format": 1, "format"', 1)),
    "a manifest too deep": told(b"[" * 2000), "a manifest with more to say": told_otherwise(run="rm -rf"), "a manifest for an older reader": told_otherwise(format=1), "a format that is true": told_otherwise(format=True),
    "a manifest that lists a path upwards": lambda f, m: (f / "manifest.json").write_bytes(manifest(f).replace(b"model.onnx", b"../model.onnx")),
    "a manifest that lists an absolute path": lambda f, m: (f / "manifest.json").write_bytes(manifest(f).replace(b"model.onnx", b"/etc/passwd")),
    "a manifest with a size that is none": lambda f, m: (f / "manifest.json").write_bytes(manifest(f).replace(b'"size": ', b'"size": -', 1)),
    "a pickle for a graph": pickled("model.onnx"), "a pickle for weights, with its digest": pickled("weights.safetensors"), "a pickle for JSON": pickled("bundle.json"),
    "an archive of torch": zipped, "an array of objects": objects,
    "a graph with data outside": onnx(lambda: outside("/etc/passwd")), "a graph with data upwards": onnx(lambda: outside("../../secret")), "a graph with data in the bundle": onnx(lambda: outside("weights.safetensors")),
    "a graph with data outside, in a branch": onnx(outside_in_a_branch),
    "a graph with somebody's operator": onnx(lambda: graph([h.make_node("Run", ["numbers"], ["score"], domain="evil")], opsets=(("", 20), ("evil", 1)))),
    "a graph with an operator that is not asked for": onnx(lambda: graph([h.make_node("Run", ["numbers"], ["score"], domain="evil")])),
    "a graph with a vendor's operator": onnx(lambda: graph([h.make_node("Gelu", ["numbers"], ["score"], domain="com.microsoft")], opsets=(("", 20), ("com.microsoft", 1)))),
    "a graph in a vendor's integers": onnx(lambda: graph([h.make_node("DequantizeLinear", ["numbers", "hundred"], ["score"], domain="com.microsoft")], opsets=(("", 20), ("com.microsoft", 1)))),
    "a graph with integers of four bits": onnx(lambda: graph(initializers=[h.make_tensor("hundred", T.FLOAT, [1], [100.0]), h.make_tensor("one", T.INT64, [1], [1]), T(name="few", data_type=T.INT4, dims=[2], raw_data=b"\x12")])),
    "a graph with fewer integers than it says": onnx(lambda: graph(initializers=[h.make_tensor("hundred", T.FLOAT, [1], [100.0]), h.make_tensor("one", T.INT64, [1], [1]), T(name="few", data_type=T.INT8, dims=[2**20], raw_data=b"\x12")])),
    "a graph with functions": onnx(lambda: graph(functions=[h.make_function("evil", "Run", ["x"], ["y"], [h.make_node("Identity", ["x"], ["y"])], [h.make_opsetid("", 20)])])),
    "a graph with too large a tensor": onnx(lambda: lying([2**40])), "a graph with a tensor of nothing": onnx(lambda: lying([2**20, 2**20], 0)), "a graph with a negative tensor": onnx(lambda: lying([-1])),
    "a graph that makes a huge tensor": onnx(lambda: huge("ConstantOfShape")), "a graph that makes a tensor huge": onnx(lambda: huge("Expand")),
    "a graph that reads what is no input": onnx(lambda: graph(inputs=["numbers", "__class__"])), "a graph that answers something else": onnx(lambda: graph([h.make_node("Identity", ["numbers"], ["secret"])], outputs=["secret"])),
    "a graph that is text": onnx(lambda: b"#!/bin/sh\ntouch /tmp/x\n"), "a graph that is nothing": onnx(lambda: b""), "a graph cut short": onnx(lambda: graph()[:-7]),
    "weights with a header of 2^62 bytes": weights(lambda: tensors(b"{}", length=2**62)), "weights of 2^40 numbers": weights(lambda: tensors({"w": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}, b"\0" * 16)),
    "weights that overlap": weights(lambda: tensors({n: {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} for n in "ab"}, b"\0" * 16)),
    "weights with bytes behind": weights(lambda: tensors({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"\0" * 64)), "weights cut short": weights(lambda: tensors({"w": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}, b"\0" * 8)),
    "JSON with a key twice": lambda f, m: repack(f, "bundle.json", (f / "bundle.json").read_bytes().replace(b'{\n "spec"', b'{\n "task": {}, "spec"', 1)),
    "JSON too deep": lambda f, m: repack(f, "profile.json", b'{"rows": 0, "columns": ' + b"[" * 500 + b"]" * 500 + b"}"), "JSON far too deep": lambda f, m: repack(f, "bundle.json", b"[" * 10**6),
    "JSON with a number of 5 000 digits": lambda f, m: repack(f, "profile.json", b'{"rows": ' + b"9" * 5000 + b', "columns": {}}'), "JSON that is no object": lambda f, m: repack(f, "bundle.json", b"null"),
    "JSON that is not UTF-8": lambda f, m: repack(f, "profile.json", b'{"rows": 0, "columns": {"\xff": 1}}'),
    "a spec with a key of its own": about(lambda b: b["spec"].update(run="rm -rf")), "a name that leaves its folder": about(lambda b: b["spec"].update(name="../../etc/cron.d/x")), "a name of nothing": about(lambda b: b["spec"].update(name="")),
    "a path for a decision": about(lambda b: b["decision"].update(path="/etc")), "a threshold that is text": about(lambda b: b["decision"].update(threshold="0.5")), "a threshold that is no number": about(lambda b: b["decision"].update(threshold=float("nan"))),
    "features of no kind": about(lambda b: b["features"].update(numbers=[{"name": "age", "exec": "x"}])), "a task of no kind": about(lambda b: b.update(task={"kind": "shell"})), "provenance that is a list": about(lambda b: b.update(provenance=[1])),
}
LINKED = {"a link for a folder", "a digest of another bundle"}


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path: return tiny(tmp_path_factory.mktemp("good"), 1).path


@pytest.fixture
def opens(monkeypatch) -> list[str]:
    "What is parsed, in order."
    seen: list[str] = []
    for name, do in (("strict_json", module.strict_json), ("harmless", module.harmless), ("_whole_weights", module._whole_weights)):
        monkeypatch.setattr(module, name, lambda *a, name=name, do=do: (seen.append(name), do(*a))[1])
    return seen


def copied(good: Path, tmp_path: Path) -> Path: return Path(shutil.copytree(good, tmp_path / "bundle"))


def test_what_is_copied_loads(good, tmp_path, opens):
    folder = copied(good, tmp_path)
    repack(folder, "model.onnx", graph())
    loaded = load_bundle(folder)
    assert opens == ["strict_json"] * 3 + ["harmless", "_whole_weights"], "digests first"
    assert predict(loaded, {"age": [50.0]}, 1).tolist() == [0.5], "the corpus stands on a bundle that is good"


@pytest.mark.parametrize("kind", CHANGED)
def test_what_was_changed_is_refused_before_it_is_parsed(good, tmp_path, opens, kind):
    folder, marker, digest = copied(good, tmp_path), tmp_path / "marker", hashlib.sha256((good / "manifest.json").read_bytes()).hexdigest()
    CHANGED[kind](folder, marker)
    with pytest.raises(BundleError) as refused: load_bundle(folder, digest)
    assert len(str(refused.value)) < 1000 and set(opens) <= {"strict_json"} and len(opens) <= 1 and not marker.exists(), "only the manifest, and that only when its own digest is right"
    if kind == "a byte of the manifest": assert not opens


@pytest.mark.parametrize("kind", MEANT)
def test_what_was_meant_is_refused_with_right_digests(good, tmp_path, kind):
    folder, marker = copied(good, tmp_path), tmp_path / "marker"
    MEANT[kind](folder, marker)
    with pytest.raises(BundleError) as refused: load_bundle(folder, hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest())
    assert len(str(refused.value)) < 1000 and not marker.exists() and not isinstance(refused.value.__cause__, AssertionError)


def test_the_corpus_is_large_enough():
    assert len(CHANGED) + len(MEANT) + len(LINKED) >= 70


def test_a_link_for_a_folder_and_another_digest_are_refused(good, tmp_path):
    (tmp_path / "linked").symlink_to(good)
    with pytest.raises(BundleError, match="There is no bundle"): load_bundle(tmp_path / "linked")
    with pytest.raises(BundleError, match="has digest"): load_bundle(good, "ab" * 32)


def test_a_graph_that_is_exchanged_after_loading_does_not_answer(good, tmp_path):
    loaded = load_bundle(copied(good, tmp_path))
    (loaded.path / "model.onnx").write_bytes(graph([h.make_node("Squeeze", ["numbers", "one"], ["score"])]))
    with pytest.raises(BundleError, match="not the file that was packed"): predict(loaded, {"age": [50.0]}, 1)


def test_code_that_a_spec_names_is_not_run_by_loading(good, tmp_path, monkeypatch):
    (tmp_path / "evilnet.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'w')\nclass Net: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    folder = copied(good, tmp_path)
    for change in (lambda b: b["spec"]["model"].update(network="evilnet:Net"), lambda b: b["spec"]["train"].update(optimizer="evilnet:Net"), lambda b: b["spec"]["train"].update(loss="evilnet:Net")):
        about(change)(folder, tmp_path)
        with suppress(BundleError): predict(load_bundle(folder), {"age": [50.0]}, 1)
    assert "evilnet" not in sys.modules and not (tmp_path / "marker").exists()


# Names

BITS = ["..", "../", "..%2f", "%2e%2e/", "..\\", "/", "//", "/etc/passwd", "~", "~root", "$HOME", "`id`", "$(id)", "; rm -rf /", "| sh", "&&", "\0", "\n", "\r\n", "\t", " ", ".", ".git", ".ssh/authorized_keys", "CON", "NUL", "aux.onnx", "C:\\", "\\\\host\\share",
        "file:///etc/passwd", "' OR 1=1 --", "\"; DROP TABLE versions; --", "${jndi:ldap://x}", "{{7*7}}", "%00", "%n%s", "\u202e", "\u200b", "\ufeff", "\u2025", "\u2024\u2024/", "\uff0e\uff0e\uff0f", "\u2215", "\u29f8", "а", "ﬁ", "ß", "İ", "😀", "é", "e\u0301", "\ud800", "\U0001f468\u200d\U0001f469",
        "a" * 255, "b" * 10_000, "-rf", "--help", "*", "?", "[a-z]", "<script>", "\x1b[31m", "\x7f", "production", "adult", "tiny", "1", "0", "-1", "1e9", "@", "@production", "/1", "tiny/../1", "quality", "bundle.json"]


def names(number: int, seed: int) -> list[str]:
    "Names that are made of what has once broken something."
    rng, made = random.Random(seed), list(BITS)
    while len(made) < number: made.append(rng.choice(["", "", "/", ".", "-"]).join(rng.choice(BITS) for _ in range(rng.randint(1, 4))))
    return made + [unicodedata.normalize("NFKC", n) for n in made[:number // 10] if unicodedata.normalize("NFKC", n) != n]


def everything_in(folder: Path) -> set[str]:
    return {os.path.join(at, n) for at, folders, files in os.walk(folder, followlinks=False) for n in (*folders, *files)}


def test_no_name_leads_out_of_the_store(tmp_path):
    root, verdict = tmp_path / "a" / "b" / "c" / "home", judge({"x": 1.0}, [Rule(metric="x", at_least=0)])
    registry = Registry(f"sqlite:///{root}/registry.db", root / "store", actor="ada")
    found, store, settings = register(registry, tiny(tmp_path, 1), {}), Store(root / "store"), Settings(root=tmp_path / "a", home=root)
    text = "{{name: {}, data: {{train: {{file: a.csv}}}}, contract: {{age: {{type: number}}, ill: {{type: boolean, role: target}}}}}}"
    before = {p for p in everything_in(tmp_path) if not p.startswith(str(root))}
    fields: dict[str, Callable[[str], object]] = {
        "a digest": lambda n: store.put(n, {"a": b""}), "a file": lambda n: store.put("ab12", {n: b""}), "a file read": lambda n: store.path(n).read_bytes(), "a model": lambda n: parse_spec(text.format(json.dumps(n))),
        "a reference": lambda n: version(registry, n), "a listing": lambda n: versions(registry, n), "an alias": lambda n: promote(registry, found, n, gates=[]), "a model to go back": lambda n: rollback(registry, n),
        "a bundle": lambda n: bundle_of(registry, Version("tiny", 1, n, "", "", {}, "", "")), "evidence": lambda n: add_evidence(registry, found, n, verdict, b"{}"), "a gate": lambda n: gate_path(n, settings),
        "a role": lambda n: new_key(n), "a signer": lambda n: create_signer(root / "signers", n, "2026-01-01T00:00:00+00:00")}
    refused, every = dict.fromkeys(fields, 0), names(5000, 7)
    costly = {"an alias", "evidence", "a signer", "a model to go back", "a reference", "a model"} # a transaction, a key pair or a parser each
    for i, name in enumerate(every):
        for field, use in fields.items():
            if field in costly and i >= len(BITS) and i % 25: continue
            try: use(name)
            except MlrayError as error:
                refused[field] += 1
                assert str(error), field
            except (OSError, ValueError, UnicodeError) as error: pytest.fail(f"{field} {name[:60]!r} was not refused with a letter: {type(error).__name__}: {error}")
    assert len(every) >= 5000 and {p for p in everything_in(tmp_path) if not p.startswith(str(root))} == before
    inside = {Path(p).relative_to(root).parts for p in everything_in(root)}
    assert all(len(p) <= 4 and p[0] in {"store", "signers", "registry.db", "registry.db.anchor", "audit.key", "registry.db-journal"} for p in inside), inside
    assert refused["a digest"] >= 4990 and refused["a role"] == len(every) and all(refused.values())
