"""One W&B run a training, offline, read back from the file that the real client wrote."""
import json
import struct
from pathlib import Path

from mlray.run import train
from mlray.tracking import MemoryTracker, NullTracker, Trackers

BLOCK = 32768


def records(path: Path):
    "The records of a .wandb file: a LevelDB log behind a seven-byte header."
    from wandb.proto.wandb_internal_pb2 import Record
    data, at, part = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if BLOCK - at % BLOCK < 7: at += BLOCK - at % BLOCK; continue
        _, size, kind = struct.unpack("<IHB", data[at:at + 7])
        part, at = (part if kind in (3, 4) else b"") + data[at + 7:at + 7 + size], at + 7 + size
        if kind in (1, 4): yield Record.FromString(part)


def plain(item):
    for kind in ("boolean", "integer", "number", "text"):
        try:
            if item.HasField(kind): return getattr(item, kind)
        except ValueError: pass
    return json.loads(item.value_json) if item.value_json else None


def test_a_training_is_one_run_with_losses_spec_and_scorecard(settings, diabetes):
    from mlray.track_on_wandb import WandbTracker
    memory = MemoryTracker()
    run = train(diabetes, settings, tracker=Trackers((memory, WandbTracker(settings.home / "runs"))))
    files = list((settings.home / "runs").glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 1
    found = list(records(files[0]))
    history = [{(i.key or "/".join(i.nested_key)): plain(i) for i in r.history.item} for r in found if r.WhichOneof("record_type") == "history"]
    losses = [h["valid_loss"] for h in history if "valid_loss" in h]
    assert losses == [e["valid_loss"] for e in memory.logged] and len(losses) > 5
    config = {i.key: json.loads(i.value_json) for r in found if r.WhichOneof("record_type") == "run" for i in r.run.config.update if i.value_json}
    assert config["data"]["split"]["seed"] == 8 and config["spec_id"] == diabetes.id
    summary = {(i.key or "/".join(i.nested_key)): plain(i) for r in found if r.WhichOneof("record_type") == "summary" for i in r.summary.update}
    assert summary["roc_auc"] == run.evaluation.scorecard.overall["roc_auc"].value and summary["version"] == "diabetes/1"
    assert list((settings.home / "runs").glob("wandb/offline-run-*/files/media/table/scorecard*"))


def test_a_run_that_fails_says_so(settings, diabetes):
    import pytest

    from mlray.errors import DataError
    memory = MemoryTracker()
    broken = diabetes.model_copy(update={"contract": diabetes.contract | {"progression": diabetes.contract["progression"].model_copy(update={"positive_above": 499.0})}})
    with pytest.raises(DataError): train(broken, settings, tracker=Trackers((memory, NullTracker())))
    assert "one class" in memory.summary["error"] and not memory.logged
