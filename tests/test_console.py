"""The console: who sees and does what, that its pages ask nobody and run nothing of others, and that its acts are those of the registry."""
import re
import shutil
import time
from collections import Counter
from html import unescape

import httpx
import pytest
from starlette.testclient import TestClient

from mlray.governance.access import ROLES, Caller, new_key
from mlray.governance.ledger import audit
from mlray.governance.registry import add_evidence, add_key, open_registry, promote, revoke_key, version
from mlray.judgement.gate import judge
from mlray.monitoring.journal import Entry, Feedback, Journal
from mlray.monitoring.keeping import pseudonyms, read_keys
from mlray.pages.console_acts import console_of
from mlray.pages.console_alone import app_of
from mlray.pages.console_seal import seal_text
from mlray.running.run import train
from mlray.serving.routes import CONSOLE, PUBLIC
from mlray.values.errors import Refused, SettingsError
from mlray.values.settings import Settings, shipped
from mlray.values.spec import Rule, read_spec
from tests.conftest import free_port

PAGE = b'{"cells": [{"cell_type": "code", "id": "a", "execution_count": 1, "metadata": {}, "source": "1", "outputs": [{"output_type": "display_data", "metadata": {}, "data": {"text/html": "<script>top.stolen = 1</script><img src=http://evil/x.png>shown"}}]}], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}'
GOOD = judge({"roc_auc": 0.8}, [Rule(metric="roc_auc", at_least=0.7)])


class House:
    "A registry with one version, a key for each role, and a journal of one answer."

    def __init__(self, home, root):
        self.settings = Settings(root=root, home=home, tracking="disabled", journal=True)
        self.registry, self.keys, self.ids = open_registry(self.settings, "root"), {}, {}
        for role in ROLES: self.key(role, role)
        (self.person,) = pseudonyms(read_keys(self.settings), "subject", "Ann Smith")
        journal, said = Journal[Entry](home / "journal/segments"), Journal[Feedback](home / "journal/feedback/segments")
        journal.write(Entry("req-17", time.time_ns() - 90 * 10**9, "diabetes", "1", seconds=0.002, rows=1, subject=self.person, caller="abcd1234", columns={"bmi": [31.5]}, answers={"label": [">140.5"]}))
        said.write(Feedback("req-17", time.time_ns(), number=1.0, source="clinic"))
        journal.close()
        said.close()
        self.console = console_of(self.settings, Caller("ann"))
        self.app = app_of(self.console)

    def key(self, name, role, models=("*",)):
        key, self.keys[name] = new_key(role, name, models)
        self.ids[name] = key.id
        add_key(self.registry, key)

    def browser(self, who=None):
        client = TestClient(self.app, base_url="http://127.0.0.1", follow_redirects=False)
        if who: assert client.post("/console/login", data={"key": self.keys[who]}).status_code == 303
        return client

    def proved(self):
        for gate in self.registry.policy.gates: add_evidence(self.registry, version(self.registry, "diabetes/1"), gate, GOOD, PAGE)


@pytest.fixture
def house(trained, tmp_path):
    shutil.copytree(trained[0].home, tmp_path / "home")
    return House(tmp_path / "home", tmp_path)


def csrf(client, at="/console"): return re.search(r'name="csrf" value="([^"]+)"', client.get(at).text)[1]
def token(house, client): return house.console.door.read(client.cookies[house.console.jar.name], house.registry).csrf
def path(route): return route.path.replace("{model}", "diabetes").replace("{version}", "1").replace("{word}", {"gate": "quality", "paper": "card", "asset": "console.css"}.get(route.name, ""))


def test_every_route_for_every_role(house):
    house.proved()
    for role in [*ROLES, None]:
        client = house.browser(role)
        for route in CONSOLE:
            if route.name in ("leave", "signin", "login", "enter"): continue
            form = {"csrf": token(house, client), "alias": "canary", "share": "0", "note": "", "id": "req-17"} if role and route.method == "POST" else {}
            reply = client.request(route.method, path(route), **({"data": form} if route.method == "POST" else {}))
            allowed = route.action == PUBLIC or (role and route.action in ROLES[role])
            expected = (200, 303, 422) if allowed else (403,) if role else (401,) if route.method == "POST" or route.name == "live" else (303,)
            assert reply.status_code in expected, (role, route, reply.status_code, reply.text[-600:])
            if not role and reply.status_code == 303: assert reply.headers["location"].startswith("/console/login?next=")
    told = [(e.actor, e.details["asked"]) for e in audit(house.registry).entries if e.action == "refuse"]
    assert {("viewer", a) for a in ("model:promote", "model:rollback", "model:approve", "traffic:set")} <= set(told), "who is refused stands in the audit"


def test_pages_ask_nobody_and_run_nothing_of_others(house):
    house.proved()
    promote(house.registry, version(house.registry, "diabetes/1"))
    client = house.browser("admin")
    for route in CONSOLE:
        if route.method != "GET" or route.name in ("enter", "asset"): continue
        reply = client.get(path(route))
        assert reply.status_code == 200, (route, reply.text[-500:])
        policy = reply.headers["content-security-policy"]
        assert "unsafe-eval" not in policy and "frame-ancestors 'none'" in policy and "script" not in policy, "scripts are held by default-src alone"
        assert reply.headers["x-content-type-options"] == "nosniff" and reply.headers["cache-control"] == "no-store" and house.keys["admin"] not in reply.text
        if route.name == "gate":
            assert "default-src 'none'" in policy and "; sandbox" in policy and "allow-scripts" not in policy and "shown" in reply.text
            continue
        assert policy.startswith("default-src 'self';") and "unsafe-inline" not in policy
        assert not re.search(r"<script(?![^>]*src=\"/console/)|<style|\sstyle=|\son\w+=", reply.text), route
        assert all(at.startswith(("/console", "#", "?")) for at in re.findall(r'(?:src|href|action)="([^"]*)"', reply.text)), route


def test_what_nobody_has_thought_of_is_a_letter_too(house, monkeypatch, caplog):
    def broken(visit): raise KeyError("a secret of the inside")
    monkeypatch.setitem(house.console.pages, "models", broken)
    reply = house.browser("viewer").get("/console")
    assert reply.status_code == 500 and "secret" not in reply.text
    word = re.search(r"under ([0-9a-f]{8})", reply.text)[1]
    assert word in caplog.text and "a secret of the inside" in caplog.text


def test_a_session_is_not_a_key(house):
    client = house.browser()
    reply = client.post("/console/login", data={"key": house.keys["viewer"], "next": "//evil.example/console"})
    kept = reply.headers["set-cookie"]
    assert reply.headers["location"] == "/console" and all(w in kept for w in ("HttpOnly", "SameSite=Strict", "Path=/console")) and house.keys["viewer"].split("_", 2)[2] not in kept
    assert client.get("/console").status_code == 200
    revoke_key(house.registry, house.ids["viewer"], "gone")
    assert client.get("/console").status_code == 303, "a revoked key ends its sessions at once"
    assert house.browser().post("/console/login", data={"key": house.keys["viewer"]}).status_code == 401
    assert house.browser().post("/console/login", data={"key": "mlr_x"}, headers={"origin": "http://evil.example"}).status_code == 403
    forged = house.browser()
    forged.cookies.set(house.console.jar.name, console_of(house.settings.model_copy(update={"home": house.settings.root})).door.note(house.console.door.come_in(house.keys["admin"], house.registry)), path="/console")
    assert forged.get("/console").status_code == 303, "a note of another console opens nothing"
    assert "Secure" in console_of(house.settings.model_copy(update={"tls_cert": house.settings.root})).jar.kept("", "x", 1)
    (house.settings.home / "console.key").chmod(0o644)
    with pytest.raises(SettingsError, match="read by others"): console_of(house.settings).door.seal


def test_the_link_of_the_terminal_opens_once(house):
    first, second = house.browser(), house.browser()
    at = f"/console/enter?link={house.console.door.link}"
    assert second.get("/console/enter?link=").status_code == 401
    assert first.get(at).headers["location"] == "/console" and "ann" in first.get("/console/audit").text
    assert second.get(at).status_code == 401 and second.get("/console").status_code == 303
    assert TestClient(house.app, base_url="http://evil.example").get("/console").status_code == 400, "a name that somebody points here is not ours"


def test_a_form_of_another_page_does_nothing(house):
    house.proved()
    client, before = house.browser("admin"), len(audit(house.registry).entries)
    good = {"csrf": token(house, client), "alias": "canary"}
    for form, headers in (({"alias": "canary"}, {}), ({**good, "csrf": "x"}, {}), ({**good, "csrf": token(house, house.browser("promoter"))}, {}), (good, {"origin": "http://evil.example"}), (good, {"sec-fetch-site": "cross-site"})):
        assert client.post("/console/models/diabetes/1/promote", data=form, headers=headers).status_code == 403
    assert len(audit(house.registry).entries) == before
    assert client.post("/console/models/diabetes/1/promote", data=good, headers={"origin": "http://127.0.0.1", "sec-fetch-site": "same-origin"}).status_code == 303
    assert client.post("/console/models/diabetes/1/promote", data={"x": "y" * 2**17}).status_code == 413


def test_acts_are_the_registrys(house):
    found, paul = version(house.registry, "diabetes/1"), house.browser("promoter")
    form, at = {"csrf": token(house, paul), "alias": "production", "expect": "0"}, "/console/models/diabetes/1"
    refused = paul.post(f"{at}/promote", data=form)
    mine = house.console.door.registry(Caller("promoter", ("promoter",)))
    with pytest.raises(Refused) as letter: promote(mine, found)
    assert refused.status_code == 403 and str(letter.value).replace("`", "") in unescape(re.sub(r"<[^>]+>", "", refused.text)), "the same letter as the command's"
    assert "it has no verdict of the gates quality and fairness" in paul.get(at).text, "what stands against it is said before anybody tries"
    house.proved()
    done = [paul.post(f"{at}/promote", data={**form, "once": "press-1"}) for _ in range(2)]
    assert [d.status_code for d in done] == [303, 303] and len([e for e in audit(house.registry).entries if e.action == "promote"]) == 1, "a button that is pressed twice acts once"
    assert "diabetes@production is diabetes/1 (generation 1)" in paul.get(at).text and "generation 1" not in paul.get(at).text, "what was done is said once"
    assert [e.actor for e in audit(house.registry).entries if e.action == "promote"] == ["promoter"]
    assert paul.post(f"{at}/promote", data=form).status_code == 409, "whoever was overtaken is told"
    said = paul.post(f"{at}/approve", data={"csrf": form["csrf"], "note": "<script>alert(1)</script> & fine"})
    assert said.status_code == 303 and "&lt;script&gt;alert(1)" in paul.get(at).text and "<script>alert" not in paul.get(at).text
    assert paul.post(f"{at}/approve", data={"csrf": form["csrf"], "withdraw": "1"}).status_code == 303
    assert paul.post("/console/models/diabetes/rollback", data={"csrf": form["csrf"], "expect": "1"}).status_code == 422, "there is nothing before it"
    assert paul.post("/console/models/diabetes/share", data={"csrf": form["csrf"], "share": "much"}).status_code == 422
    assert not audit(house.registry).faults


def test_a_key_for_some_models_sees_those(house):
    house.key("other", "admin", ("adult-*",))
    client = house.browser("other")
    assert "diabetes" not in client.get("/console").text and client.get("/console/models/diabetes").status_code == 403 and client.get("/console/models/diabetes/1/watch").status_code == 403
    assert "diabetes/1" not in client.get("/console/audit").text and "No version was made of anything yet" in client.get("/console/data").text
    assert "req-17" not in client.post("/console/journal", data={"csrf": token(house, client), "id": "req-17"}).text.partition("</form>")[2].partition("<table>")[2]


def test_an_answer_is_found_by_its_id_and_names_nobody(house):
    client = house.browser("viewer")
    found = client.post("/console/journal", data={"csrf": token(house, client), "id": "req-17"}).text
    assert "31.5" in found and house.person in found and "Ann Smith" not in found and "clinic" in found
    assert "or a person" not in client.get("/console/journal").text and client.post("/console/journal", data={"csrf": token(house, client), "person": "Ann Smith"}).status_code == 422
    admin = house.browser("admin")
    by_person = admin.post("/console/journal", data={"csrf": token(house, admin), "person": "Ann Smith"})
    assert "req-17" in by_person.text and "Ann Smith" not in by_person.text
    assert "The journal keeps no such answer" in admin.post("/console/journal", data={"csrf": token(house, admin), "id": "req-18"}).text


def test_an_empty_registry_teaches_the_next_command(tmp_path):
    settings = Settings(root=tmp_path, home=tmp_path / "home", tracking="disabled")
    console = console_of(settings, Caller("ann"))
    client = TestClient(app_of(console), base_url="http://127.0.0.1")
    assert "mlray demo" in client.get(f"/console/enter?link={console.door.link}").text
    for page, command in (("/data", "mlray train"), ("/traffic", "mlray promote"), ("/alerts", "mlray monitor")): assert command in client.get(f"/console{page}").text
    assert client.get("/console/models/adult").status_code == 404


def test_who_answers_now_is_counted_from_the_journal(house):
    house.proved()
    promote(house.registry, version(house.registry, "diabetes/1"))
    text = house.browser("viewer").get("/console/traffic/live").text
    assert "<html" not in text and "100%" in text and "Requests a minute" in text and "diabetes/1 production" in text


def test_a_session_holds_at_every_replica(house, tmp_path):
    sealed = seal_text(house.settings)
    apart = [TestClient(app_of(console_of(house.settings.model_copy(update={"home": tmp_path / f"node{i}", "registry": f"sqlite:///{house.settings.home / 'registry.db'}"}), sealed=sealed)), base_url="http://127.0.0.1", follow_redirects=False) for i in range(2)]
    assert apart[0].post("/console/login", data={"key": house.keys["viewer"]}).status_code == 303
    apart[1].cookies = apart[0].cookies
    assert [client.get("/console").status_code for client in apart] == [200, 200] and not list(tmp_path.glob("node*/console.key"))


@pytest.mark.chaos
@pytest.mark.ray
def test_behind_the_gateway(tmp_path):
    "Ray Serve behind HAProxy, two replicas: who may sees, whoever may not is refused, a promotion is followed, what is answered appears."
    from mlray.command_line.commands import deploy_versions
    from mlray.engines.cluster_on_ray import cluster
    settings = Settings(root=tmp_path, home=tmp_path / "home", port=free_port(), object_store_mb=100, tracking="disabled", journal=True, replicas=2, gates=())
    registry, keys = open_registry(settings), {}
    runs = [train(read_spec(shipped("configs") / "diabetes.yaml", more), settings) for more in ([], ["description=the same again"])]
    promote(registry, runs[0].version, gates=())
    for role in ("viewer", "promoter", "predictor"):
        key, keys[role] = new_key(role)
        add_key(registry, key)
    row = {n: v for n, v in runs[0].rows.parts.train.head(1).to_dicts()[0].items() if n in runs[0].rows.contract.features}
    with cluster(settings):
        deploy_versions(["diabetes"], settings)
        with httpx.Client(base_url=settings.url, timeout=60) as viewer, httpx.Client(base_url=settings.url, timeout=60) as promoter:
            def ask() -> tuple[int, str]:
                reply = viewer.post("/v1/models/diabetes:predict", json={"instances": [row]}, headers={"Authorization": f"Bearer {keys['predictor']}"})
                return reply.status_code, reply.json().get("version", "")
            assert viewer.get("/console").headers["location"].startswith("/console/login") and viewer.post("/console/login", data={"key": keys["viewer"] + "x"}).status_code == 401
            for who, client in (("viewer", viewer), ("promoter", promoter)): assert client.post("/console/login", data={"key": keys[who]}).status_code == 303
            seen = Counter(client.get(at).status_code for client in (viewer, promoter) for at in ("/console", "/console/models/diabetes", "/console/models/diabetes/2", "/console/traffic", "/console/alerts") for _ in range(6))
            assert seen == {200: 60}, "a session holds at every replica"
            form = lambda client: {"csrf": re.search(r'name="csrf" value="([^"]+)"', client.get("/console").text)[1], "alias": "production", "expect": "1", "once": "press-1"}
            assert ask() == (200, "1") and viewer.post("/console/models/diabetes/2/promote", data=form(viewer)).status_code == 403, "a viewer looks"
            done = [promoter.post("/console/models/diabetes/2/promote", data=form(promoter)) for _ in range(3)]
            assert [d.status_code for d in done] == [303] * 3 and len([e for e in audit(registry).entries if e.action == "promote" and e.object == "diabetes/2"]) == 1, "pressed three times, it acts once, whichever replica is asked"
            assert "diabetes@production is diabetes/2 (generation 2)" in promoter.get(done[0].headers["location"]).text
            end = time.monotonic() + 60
            while not all(ask() == (200, "2") for _ in range(8)): assert time.monotonic() < end, "the replicas do not follow"
            while "diabetes/2 production" not in viewer.get("/console/traffic/live").text: assert time.monotonic() < end + 60, "what was answered does not appear"
            assert viewer.get("/console/traffic").headers["content-security-policy"].startswith("default-src 'self';")
