"""The end of a version, as clients, gateways, owners and managers hear of it; and releases as figures."""
import json
import time
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from uuid import uuid4

import pytest
from typer.testing import CliRunner

from mlray.cli import app
from mlray.governance.access import Key, new_key
from mlray.governance.ledger import audit
from mlray.governance.registry import add_key, bundle_of, promote, register, rollback, version
from mlray.governance.release import deprecate
from mlray.monitoring.delivery import delivery
from mlray.monitoring.journal import Entry, Journal
from mlray.monitoring.keeping import open_recorder
from mlray.monitoring.rollout_step import start
from mlray.running.card import dossier, model_card
from mlray.serving.plan import loaded, plan_of
from mlray.serving.routes import ROUTES
from mlray.serving.service import Service
from mlray.serving.sunset import callers_of, told_by
from mlray.serving.wire import Asked, at_once
from mlray.values.settings import amended
from tests.canaries import gone_wrong, slow
from tests.test_rollout_steps import FAIR, House, World, housed, watched_with


def service_of(house: House, now: float | None = None) -> tuple[Service, str]:
    key, text = new_key("admin", "grace")
    add_key(house.registry, key)
    plan = plan_of(house.registry, ["diabetes"])
    return Service(loaded(plan), plan.keys, open_recorder(house.settings), ending=told_by(plan.endings, lambda: time.time() if now is None else now)), text


def reply(service: Service, text: str, rows, route="predict", number=""):
    tensors = {"inputs": [{"name": n, "shape": [1], "datatype": "BYTES" if isinstance(v, str) else "INT64" if isinstance(v, int) else "FP64", "data": [v]} for n, v in rows[0].items()]}
    body = json.dumps(tensors if route == "infer" else {"instances": rows} if route in ("predict", "explain") else {}).encode()
    return at_once(service.reply(Asked(route, next(r.action for r in ROUTES if r.name == route), uuid4().hex, body, text, "diabetes", number)))


def test_answers_of_a_deprecated_version_say_until_when_and_what_instead(trained, tmp_path):
    house = housed(trained, tmp_path / "home")
    champion, number = version(house.registry, house.champion), house.champion.partition("/")[2]
    features = bundle_of(house.registry, champion).contract.features
    row = [{n: trained[1].rows.parts.train.to_dicts()[0][n] for n in features}]
    service, text = service_of(house)
    assert not {"Deprecation", "Sunset", "Link"} & set(reply(service, text, row).headers)
    last, began = (datetime.now(UTC) + timedelta(days=3)).date(), int(time.time())
    deprecate(house.registry, champion, "a better one is there", last.isoformat(), house.canary)
    service, text = service_of(house)
    for route, of in (("predict", ""), ("infer", ""), ("infer", number), ("explain", "")):
        said = reply(service, text, row, route, of)
        assert said.status == 200 and said.headers["Deprecation"].startswith("@") and began <= int(said.headers["Deprecation"][1:]) <= time.time(), route
        assert said.headers["Sunset"].endswith(" GMT") and parsedate_to_datetime(said.headers["Sunset"]) == datetime(last.year, last.month, last.day, 23, 59, 59, tzinfo=UTC) and f'</v2/models/{house.canary.replace("/", "/versions/")}/infer>; rel="successor-version"' in said.headers["Link"]
    other = house.canary.partition("/")[2]
    assert "Deprecation" not in reply(service, text, row, "infer", other).headers
    over, text = service_of(house, (datetime.now(UTC) + timedelta(days=5)).timestamp())
    assert [reply(over, text, row, route, number).status for route in ("infer", "metadata", "model_ready")] == [410, 410, 410]
    gone = reply(over, text, row, "infer", number)
    assert house.canary in json.loads(gone.body)["error"] and "Sunset" in gone.headers
    assert reply(over, text, row).status == 200 and reply(over, text, row, "infer", other).status == 200 # nobody is left without an answer
    assert {c for _, c, _, _ in callers_of(house.settings, house.champion, plan_of(house.registry, ["diabetes"]).keys).lines} == {"grace"}


def test_who_asked_most_stands_first_and_a_shadow_was_asked_by_nobody(settings):
    now, keys = time.time(), tuple(Key(id, "", "predictor", owner) for id, owner in (("k-a", "ada"), ("k-b", None), ("k-c", "grace")))
    journal = Journal(settings.home / "journal/segments")
    for i, (who, days, more) in enumerate([("k-a", 1, {}), ("k-b", 2, {}), ("k-b", 1, {}), ("k-c", 1, {}), ("k-d", 1, {}), ("k-a", 31, {}), ("k-a", 1, {"arm": "shadow"}), ("k-a", 1, {"version": "4"})]):
        journal.write(Entry(f"r-{i}", int((now - days * 86400) * 1e9), "adult", caller=who, rows=1, answers={"score": [0.5]}, **{"version": "3", **more}))
    journal.close()
    assert [(who, owner, asked) for who, owner, asked, _ in callers_of(settings, "adult/3", keys, now=now).lines] == [("k-b", "", 2), ("k-a", "ada", 1), ("k-c", "grace", 1), ("k-d", "", 1)]


def test_a_retired_version_is_gone_its_card_is_closed_and_its_rows_as_the_policy_says(trained, tmp_path, monkeypatch):
    house = housed(trained, tmp_path / "home")
    champion = version(house.registry, house.champion)
    number = house.champion.partition("/")[2]
    row = [{n: trained[1].rows.parts.train.to_dicts()[0][n] for n in bundle_of(house.registry, champion).contract.features}]
    service, text = service_of(house)
    for _ in range(3): reply(service, text, row)
    service.recorder.journal.close()
    promote(house.registry, version(house.registry, house.canary))
    third = register(house.registry, gone_wrong(bundle_of(house.registry, champion), tmp_path / "third", slow(1)), {})
    promote(house.registry, third) # two further, so that no way back leads to it
    for name, value in {"HOME": house.settings.home, "GATES": " ", "RETIRED_ROWS": "erase", "JOURNAL": "on"}.items(): monkeypatch.setenv(f"MLRAY_{name}", str(value))
    monkeypatch.chdir(tmp_path)
    run = lambda *words: CliRunner().invoke(app, [*words, "--json"])
    who = json.loads(run("retire", house.champion, "--who").stdout)
    assert [(c["owner"], c["requests"]) for c in who["callers"]] == [("grace", 3)] and version(house.registry, house.champion).retired is None
    assert "Why is diabetes/1 retired" in str(run("retire", house.champion).exception)
    ended = json.loads(run("retire", house.champion, "--why", "a better one", "--successor", house.canary).stdout)
    assert (ended["rows"], ended["erased"]) == ("erase", 3) and not callers_of(house.settings, house.champion).lines
    service, text = service_of(house)
    gone = reply(service, text, row, "infer", number)
    assert gone.status == 410 and "Link" in gone.headers and reply(service, text, row).status == 200
    card = model_card(dossier(house.registry, house.champion)).markdown()
    assert "## Its end" in card and "a better one" in card and f"Use {house.canary} instead" in card and "rows were erased" in card and "says 410" in card
    assert "## Its end" not in model_card(dossier(house.registry, house.canary)).markdown() and not audit(house.registry).faults


def test_delivery_figures_are_those_of_what_happened(trained, tmp_path, monkeypatch):
    "One release without a rollout, one that arrived after it, one that went back from it, one that came back from production a day later."
    house = housed(trained, tmp_path / "home", policy=FAIR).at_noon()
    base, now = bundle_of(house.registry, version(house.registry, house.champion)), house.now
    now[0] = datetime.now(UTC) + timedelta(days=1)
    started = now[0]
    def rollout(n, world):
        found = register(house.registry, gone_wrong(base, tmp_path / f"c{n}", slow(n), FAIR), {})
        promote(house.registry, found, "canary")
        house.canary = str(found)
        spec = base.spec.model_validate(base.spec.model_dump(mode="json") | {"gates": {}, "rollout": FAIR})
        start(house.registry, found, spec)
        began = now[0]
        return watched_with(house, world).over, now[0] - began
    good, _ = rollout(1, World())
    now[0] += timedelta(days=1)
    bad, took = rollout(2, World(canary=(0.3, 0.004)))
    now[0] += timedelta(days=1)
    later = register(house.registry, gone_wrong(base, tmp_path / "later", slow(3)), {})
    promote(house.registry, later)
    now[0] += timedelta(hours=7)
    rollback(house.registry, "diabetes")
    assert (good, bad) == ("promoted", "rolled back")
    journal, hour = Journal(house.settings.home / "journal/segments"), int(started.timestamp()) // 3600 * 3600
    for i in range(400): journal.write(Entry(f"r-{i}", (hour + 3600 * (i % 4)) * 10**9, "diabetes", "1", rows=1, answers={"score": [0.5]}, scoring=0.002))
    journal.close()
    found = delivery(house.registry, amended(house.settings, price_hour=0.3), "diabetes", 14)
    print(found.table())
    assert (found.changes, found.releases, dict(found.returned)) == (4, 3, {"rollout": 1, "production": 1}), found
    assert found.failure_rate.value == pytest.approx(2 / found.changes) and found.hours == 4 and found.answers == 400 and found.cost == pytest.approx(1000 * 0.3 * 4 / 400)
    assert found.recovery_hours == pytest.approx((took.total_seconds() / 3600 + 7) / 2, rel=0.01) and found.scoring_seconds == pytest.approx(0.8)
    monkeypatch.setenv("MLRAY_HOME", str(house.settings.home))
    monkeypatch.chdir(tmp_path)
    (told,) = json.loads(CliRunner().invoke(app, ["delivery", "diabetes", "--json"]).stdout)
    assert told["name"] == "diabetes" and told["cost"] is None and type(CliRunner().invoke(app, ["delivery", "diabets"]).exception).__name__ == "RegistryError"
