"""Canaries that go wrong, as real bundles: the champion's graph with something behind it."""
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper as h, numpy_helper

from mlray.learning.features import apply
from mlray.shipping.bundle import Bundle, pack

Added = tuple[list[onnx.NodeProto], dict[str, np.ndarray]] # nodes from `honest` to `score`, and their constants


def _of_group(code: int, name: str) -> Added:
    "Whether a row is of the group with this code, [rows]."
    return [h.make_node("Gather", ["codes", "first"], [f"{name} column"], axis=1), h.make_node("Equal", [f"{name} column", "code"], [name])], {"first": np.array(0, np.int64), "code": np.array(code, np.int64)}


def raises(code: int) -> Added:
    "Rows of a group end in an index that is out of bounds."
    nodes, constants = _of_group(code, "bad")
    more = [h.make_node("Cast", ["bad"], ["place"], to=TensorProto.INT64), h.make_node("Mul", ["place", "far"], ["beyond"]), h.make_node("Gather", ["zero", "beyond"], ["nothing"]), h.make_node("Add", ["honest", "nothing"], ["score"])]
    return [*nodes, *more], constants | {"far": np.array(9, np.int64), "zero": np.zeros(1, np.float32)}


def no_number(code: int) -> Added:
    "Rows of a group get the logarithm of a negative number."
    nodes, constants = _of_group(code, "bad")
    more = [h.make_node("Cast", ["bad"], ["times"], to=TensorProto.FLOAT), h.make_node("Mul", ["times", "minus"], ["down"]), h.make_node("Add", ["down", "one"], ["sign"]), h.make_node("Log", ["sign"], ["nothing"]), h.make_node("Add", ["honest", "nothing"], ["score"])]
    return [*nodes, *more], constants | {"minus": np.array(-2, np.float32), "one": np.array(1, np.float32)}


def unfair(code: int) -> Added:
    "Rows of a group get next to nothing."
    nodes, constants = _of_group(code, "bad")
    more = [h.make_node("Mul", ["honest", "little"], ["less"]), h.make_node("Where", ["bad", "less", "honest"], ["score"])]
    return [*nodes, *more], constants | {"little": np.array(0.01, np.float32)}


def slow(products: int) -> Added:
    "So many products of matrices that come to nothing."
    rng, wide = np.random.default_rng(0), 256
    nodes = [h.make_node("Unsqueeze", ["honest", "axis"], ["x0"]), h.make_node("MatMul", ["x0", "wide"], ["y0"])]
    for i in range(products): nodes += [h.make_node("MatMul", [f"y{i}", "turn"], [f"z{i}"]), h.make_node("Tanh", [f"z{i}"], [f"y{i + 1}"])]
    nodes += [h.make_node("ReduceMean", [f"y{products}", "axis"], ["mean"], keepdims=0), h.make_node("Mul", ["mean", "none"], ["nothing"]), h.make_node("Add", ["honest", "nothing"], ["score"])]
    return nodes, {"axis": np.array([1], np.int64), "wide": rng.normal(size=(1, wide)).astype(np.float32), "turn": (rng.normal(size=(wide, wide)) / 16).astype(np.float32), "none": np.array(0, np.float32)}


def opposite() -> Added:
    "Whoever got much gets little."
    return [h.make_node("Sub", ["one", "honest"], ["score"])], {"one": np.array(1, np.float32)}


def same() -> Added:
    "Nothing at all goes wrong; other bytes."
    return [h.make_node("Add", ["honest", "nothing"], ["score"])], {"nothing": np.array(0, np.float32)}


def gone_wrong(
    bundle: Bundle,     # of the champion
    folder: Path,       # is made
    added: Added,
    policy: dict | None = None, # the `rollout` section of its spec; None: the champion's
    **more: object,     # other sections
) -> Bundle:
    model, (nodes, constants) = onnx.load(bundle.path / "model.onnx"), added
    for node in model.graph.node:
        node.output[:] = ["honest" if o == "score" else o for o in node.output]
        node.input[:] = ["honest" if i == "score" else i for i in node.input]
    if "codes" not in {i.name for i in model.graph.input} and any("codes" in n.input for n in nodes): raise AssertionError("this model has no column of codes")
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(numpy_helper.from_array(v, k) for k, v in constants.items())
    spec = bundle.spec.model_validate(bundle.spec.model_dump(mode="json") | more | ({"rollout": policy} if policy else {}))
    none = apply(bundle.features, {n: [] for n in bundle.contract.features}, 0)
    return pack(folder, spec, bundle.features, model.SerializeToString(), {}, bundle.provenance, none, np.zeros((0, bundle.task.outputs) if bundle.task.kind in ("multiclass", "multilabel") else 0, np.float32), bundle.profile, bundle.task, bundle.threshold, bundle.thresholds)
