"""Seasons by the dozen: the world of `nbs/tutorials/season.ipynb`, drawn anew, watched by the same code without a service around it."""
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import yaml
from nbdev.process import NBProcessor

from mlray.governance.registry import bundle_of, open_registry
from mlray.monitoring.alert import State, advance
from mlray.monitoring.archive import _FEEDBACK
from mlray.monitoring.keeping import Keys, answer_columns, kept, plan
from mlray.monitoring.monitor import watched
from mlray.monitoring.windows import Window, count_window
from mlray.running.run import train
from mlray.shipping.answer import predictions
from mlray.shipping.bundle import Bundle, decide, predict
from mlray.values.settings import Settings, shipped
from mlray.values.spec import parse_spec
from tests.conftest import DATA, ROOT

DAY, WEEK = 86400, 7 * 86400


@cache
def lesson() -> SimpleNamespace:
    "What the lesson defines of its model and its world, without running the rest of it."
    known: dict[str, Any] = {"pl": pl, "np": np, "yaml": yaml, "shipped": shipped, "data": DATA}
    for cell in NBProcessor(ROOT / "nbs/tutorials/season.ipynb", rm_directives=False, process=False).nb.cells:
        if cell.cell_type == "code" and any(f"def {name}(" in cell.source for name in ("drawn", "world")): exec(cell.source, known)
    return SimpleNamespace(**known)


def model_of(draw: int, home: Path) -> tuple[Bundle, pl.DataFrame]: # and who comes later
    "A model of another draw of the rows."
    past, stream = lesson().drawn(draw)
    past.write_parquet(home / "past.parquet")
    settings = Settings(root=home, home=home / ".mlray", data=DATA, tracking="disabled")
    return bundle_of(open_registry(settings), train(parse_spec(yaml.safe_dump(lesson().SPEC)), settings).version), stream


def a_week(bundle: Bundle, week: int, rows: pl.DataFrame) -> Window:
    "A week, looked at as it ends: what was true is known of those who asked two days before."
    truth, asked, first = rows["income"].to_list(), rows.drop("income"), lesson().START + (week - 1) * WEEK
    scores = predict(bundle, asked, asked.height)
    both = {"column": kept(plan(bundle.contract, bundle.profile, Keys({"1": b"key"})), asked.to_dict(as_series=False)), "answer": answer_columns(predictions(bundle.task, scores, decide(bundle, scores, asked)))}
    seconds = [first + i * WEEK // asked.height for i in range(asked.height)]
    answered = pl.DataFrame({"id": [f"w{week}-{i}" for i in range(asked.height)], "time": [s * 10**9 for s in seconds], **{f"{part}:{n}": v for part, columns in both.items() for n, v in columns.items()}})
    answered = answered.with_columns(arm=pl.lit("production"), row=0, status=200, seconds=0.002, rows=1, lost=0)
    known = [i for i, s in enumerate(seconds) if s + 2 * DAY <= first + WEEK]
    said = pl.DataFrame({"id": [f"w{week}-{i}" for i in known], "text": [truth[i] for i in known]}).with_columns(row=0, time=0, kind=pl.lit("label"), number=None, source=pl.lit(""), key=pl.lit(""), caller=pl.lit(""))
    return count_window(bundle, answered, said.select(pl.col(n).cast(t) for n, t in _FEEDBACK.items()), Window(bundle.name, "1", "production", first, first + WEEK))


def season(bundle: Bundle, stream: pl.DataFrame, seed: int, planted: bool, weeks: int | None = None) -> list[tuple[int, str, str, bool]]: # week, measure, whom, whether it begins
    "What is told at the end of each week."
    states, told, history = dict[str, State](), list[tuple[int, str, str, bool]](), list[Window]()
    alerts = [a.model_copy(update={"false_alarms": a.false_alarms / 7}) for a in bundle.spec.monitor.alerts] # there are windows of a week here, and of a day in the lesson: a look has the same level
    for week in range(1, (weeks or lesson().WEEKS) + 1):
        history.append(a_week(bundle, week, lesson().world(stream, week, seed, planted)))
        states, now = advance(states, alerts, watched(bundle, "1", history[-1:], history))
        told += [(week, t.measure, t.whom, t.begins) for t in now]
    return told


def wrong(told: list[tuple[int, str, str, bool]]) -> list[str]: # empty: all as stated
    "What of a planted season was not found in its weeks, by its name, for the right people, once, and not before."
    begun, found = [(w, m, whom) for w, m, whom, begins in told if begins], list[str]()
    for measure, first in lesson().PLANTED.items():
        weeks = [w for w, m, _ in begun if m == measure]
        if len(weeks) != 1 or not first <= weeks[0] < first + lesson().WITHIN[measure]: found.append(f"{measure}: told in {weeks}, planted in {first}")
    if any(m.startswith("equal_opportunity") and whom != "sex=Female" for _, m, whom in begun): found.append("told for others than women")
    return found + [f"{m} was told in {w}" for w, m, _ in begun if m not in lesson().PLANTED]
