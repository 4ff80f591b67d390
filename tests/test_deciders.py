"""Pure decisions at their edges: where each of them turns, on the one side of it and on the other. No files, no clock, no network."""
import math
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta

import pytest

from mlray.governance.policy import Approval, Candidate, Policy, Proof, counted, frozen, reasons, windows
from mlray.judgement.drift import DriftReport
from mlray.judgement.gate import Finding, Verdict, judge, less_is_better
from mlray.judgement.retrain import Attempt, Cause, Due, Evidence, causes, due
from mlray.measures.score import Measure
from mlray.monitoring.alert import State, Told, advance
from mlray.monitoring.monitor import Known, Watched
from mlray.monitoring.windows import Window
from mlray.serving.traffic import Choice, Rates, Traffic, choose, place
from mlray.values.errors import SettingsError
from mlray.values.rollout_policy import Retrain
from mlray.values.spec import Alert, Rule, Waiver

MAY = datetime(2026, 5, 1, tzinfo=UTC)


# ---- the gate -------------------------------------------------------------------------------------------------------

GAP = "demographic_parity_difference[sex]"
PROMISE = Rule(metric="demographic_parity_difference", by=("sex",), at_most=0.1)


def waiver(owner: str = "ada", until: str = "2026-05-31", measure: str = GAP) -> Waiver: return Waiver(measure=measure, owner=owner, reason="few clients so far", until=date.fromisoformat(until))


def judged(value: float | None, *waivers: Waiver, today: str = "2026-05-01") -> tuple[bool, Finding]:
    verdict = judge({} if value is None else {GAP: value}, [PROMISE], waivers=waivers, today=date.fromisoformat(today))
    return verdict.passed, verdict.findings[0]


def test_a_waiver_holds_to_its_last_day_and_no_longer():
    assert [judged(0.2, waiver(), today=day)[0] for day in ("2026-05-30", "2026-05-31", "2026-06-01")] == [True, True, False]
    passed, over = judged(0.2, waiver(), today="2027-01-01")
    assert not passed and not over.waived and "the waiver of ada ended on 2026-05-31" in over.why


def test_of_several_waivers_the_last_to_end_counts():
    for two in ((waiver("ada", "2026-05-31"), waiver("grace", "2026-07-31")), (waiver("grace", "2026-07-31"), waiver("ada", "2026-05-31"))):
        passed, found = judged(0.2, *two, today="2026-06-15")
        assert passed and found.waived.startswith("grace until 2026-07-31: few")


def test_a_waiver_excuses_what_was_measured_and_broken_and_nothing_else():
    assert not judged(0.2)[0] and not judged(0.2, waiver(measure="roc_auc"))[0], "of something else"
    assert judged(0.05, waiver())[1] == judged(0.05)[1], "a promise that is kept needs none"
    for unmeasured in (None, math.nan): assert not judged(unmeasured, waiver())[0] and not judged(unmeasured, waiver())[1].waived


def test_verdicts_are_joined_and_each_must_pass():
    good, bad = judge({GAP: 0.05}, [PROMISE]), judge({GAP: 0.2}, [PROMISE])
    assert (good + bad).findings == (*good.findings, *bad.findings) and (good + good).passed and not (good + bad).passed and not (bad + good).passed and not Verdict(()).passed


def test_what_would_be_worst_is_named_where_certainty_is_asked_for():
    rule = Rule(metric="roc_auc", at_least=0.8)
    plain, sure, unknown = (judge({"roc_auc": m}, [r]).findings[0] for m, r in (
        (Measure(0.79, 0.7, 0.85), rule), (Measure(0.82, 0.7, 0.9), rule.model_copy(update={"certain": True})), (Measure(0.82), rule.model_copy(update={"certain": True}))))
    assert [f.why for f in (plain, sure, unknown)] == ["0.79 is below 0.8", "0.82, perhaps 0.7, is below 0.8", "0.82, without a known interval, is below 0.8"]
    assert not any(f.passed for f in (plain, sure, unknown)) and judge({"roc_auc": Measure(0.85, 0.8, 0.9)}, [rule.model_copy(update={"certain": True})]).passed, "at least is kept by the same number"


def test_a_difference_of_groups_says_nothing_of_a_whole():
    "Nor is a whole held against groups: production has no such measure then."
    rule, groups = Rule(metric="roc_auc", within=0.01), {"a": Measure(0.9), "b": Measure(0.7)}
    assert judge({"roc_auc": 0.8}, [rule], {"roc_auc": 0.805}, {"roc_auc": groups}).passed
    assert not judge({"roc_auc": 0.8}, [rule], {"roc_auc": 0.82}, {"roc_auc": groups}).passed and not judge({"roc_auc": 0.8}, [rule], {"roc_auc": groups}).passed
    assert not judge({"roc_auc": 0.8}, [rule], {}).passed and judge({"roc_auc": 0.8}, [rule], None).passed, "a production without the measure is no missing production"


def test_groups_that_nothing_can_be_said_of_are_counted():
    rule, found = Rule(metric="recall", by=("sex",), at_least=0.5), {"a": Measure(0.6), "b": Measure(0.7)}
    whys = [judge({rule.measure: groups}, [rule]).findings[0].why for groups in (found, {**found, "c": Measure(math.nan)})]
    assert "too few rows" not in whys[0] and whys[1] == f"{whys[0]}; 1 more with too few rows to be judged"


def test_which_way_a_measure_is_better():
    assert all(map(less_is_better, ("log_loss", "latency_p99", "cost", "membership_advantage", "selection_rate_difference[sex]", "false_positive_rate_group_max[sex]")))
    assert not any(map(less_is_better, ("roc_auc", "accuracy", "recall_group_min[sex]", "selection_rate_ratio[sex]", "coverage")))


# ---- training again -------------------------------------------------------------------------------------------------

POLICY = Retrain(every="30d", new_rows=1000, new_labels=10, alerts=("roc_auc",), pause="1d", runs=4, minutes=60, per="7d", failures=3)


def known(days: float = 0, **more) -> Evidence: return Evidence("adult", "3", MAY, MAY + timedelta(days=days), **more)


def attempt(id: str, ended: float | None, state: str = "passed", minutes: float = 10, kind: str = "rows") -> Attempt: # days after May 1st
    began = MAY + timedelta(days=ended or 0, minutes=-minutes)
    return Attempt(id, kind, "", "", state, began, began + timedelta(minutes=minutes), "host:1", ended=None if ended is None else MAY + timedelta(days=ended), seconds=minutes * 60)


@pytest.mark.parametrize(("before", "at"), [({"days": 29.999}, {"days": 30}), ({"rows": 999}, {"rows": 1000}), ({"labels": 9}, {"labels": 10}), ({"broken": {"accuracy": MAY.isoformat()}}, {"broken": {"roc_auc": MAY.isoformat()}})])
def test_a_cause_is_there_from_its_number_on(before, at):
    assert not causes(known(**before), POLICY) and len(causes(known(**at), POLICY)) == 1 and not causes(known(**at), Retrain())
    assert due(known(**before), POLICY, ()).said == "not yet" and due(known(**at), POLICY, ()).said == "due"


def test_an_alert_that_stands_is_another_cause_after_each_budget():
    at = lambda days: causes(known(days, broken={"roc_auc": MAY.isoformat()}), Retrain(alerts=("roc_auc",), per="7d"))[0]
    assert [at(d).window.rpartition(" ")[2] for d in (0, 6.9, 7, 14)] == ["+0", "+0", "+1", "+2"] and "times" not in at(6.9).why and "for 2 times 7d by now" in at(14).why


def test_of_those_who_ask_one_is_answered_with_all_that_was_noticed():
    found = due(known(30, rows=1000, asked={"a": "new column", "b": "other column"}), POLICY, ())
    assert isinstance(found, Due) and [c.kind for c in found.causes] == ["request", "rows", "schedule"] and found.causes[0].window == "a" and found.minutes == 60
    after = due(known(30, rows=1000, asked={"a": "new column", "b": "other column"}), POLICY, [attempt(c.id, 29, "passed" if i == 0 else "answered") for i, c in enumerate(found.causes)])
    assert [c.window for c in after.causes] == ["b"] and after.minutes == 50


def test_a_pause_lies_between_runs_that_nobody_asked_for():
    rows = {"rows": 1000}
    at = lambda days, history, **more: due(known(days, **rows, **more), POLICY, history).said
    assert [at(2 + d, [attempt("x", 2)]) for d in (0.5, 0.999, 1, 1.5)] == ["not yet", "not yet", "due", "due"]
    assert at(2.5, [attempt("x", 2)], asked={"k": "now"}) == "due", "who asks waits for none"
    for lets_go_on in (attempt("x", 2, "passed", kind="resume"), attempt("x", 2, "answered")): assert at(2.5, [lets_go_on]) == "due", "no run has ended there"


def test_a_budget_counts_what_ended_within_its_time():
    one = Retrain(new_rows=1000, pause="1m", runs=1, minutes=60, per="7d")
    at = lambda days, history, policy=one: due(known(days, rows=1000), policy, history)
    assert [at(d, [attempt("x", 2)]).said for d in (8.9, 9, 9.1)] == ["not yet", "due", "due"] and "1 of 1 runs in 7d are used up" in at(8.9, [attempt("x", 2)]).why[0]
    assert at(3, [attempt("x", 2, kind="resume")]).said == at(3, [attempt("x", 2, "answered")]).said == "due"
    many = one.model_copy(update={"runs": 9})
    assert at(3, [attempt("x", 2, minutes=29)], many).minutes == pytest.approx(31) and at(3, [attempt("x", 2, minutes=31)], many).said == "not yet", "less is left than the longest took"
    assert "29.0 of 60 minutes in 7d are left, and the longest run took 31.0" in at(3, [attempt("x", 2, minutes=31)], many).why[0] and at(3, [attempt("x", 2, minutes=30)], many).said == "not yet"


def test_who_was_not_heard_of_is_followed_by_another_within_the_budget():
    silent, policy = attempt("x", None, "running", minutes=10), Retrain(runs=1, minutes=60)
    assert [due(known(d), policy, [silent]).said for d in (-0.001, 0)] == ["not yet", "due"]
    found = due(known(1), policy, [silent])
    assert found.orphan == silent and found.minutes == pytest.approx(40) and found.causes == ()
    assert due(known(1), policy, [silent, attempt("y", 0.5)]).said == "not yet", "the one run of a week is used up by another"


def test_what_speaks_for_a_run_waits_for_the_canary_unless_somebody_asks():
    assert due(known(rows=1000, canary="adult/4"), POLICY, ()).said == "not yet" and due(known(rows=1000, canary="adult/4", asked={"k": "now"}), POLICY, ()).said == "due"
    assert due(known(), POLICY, ()).why == ("nothing speaks for it",) and "answered already: 1000 rows" in due(known(rows=1000), POLICY, [attempt(causes(known(rows=1000), POLICY)[0].id, -5)]).why[0]


def test_failures_are_counted_from_the_last_success():
    ended = lambda *states: [attempt(f"{i}", i / 100, s) for i, s in enumerate(states)]
    said = lambda *states: due(known(5, asked={"k": "now"}), Retrain(failures=2, runs=99), ended(*states)).said
    assert said("failed") == "due" and said("failed", "refused") == "stopped" and said("failed", "passed", "refused") == "due" and said("refused", "answered", "failed") == "stopped"
    assert Cause("adult", "request", "k", "one").id == Cause("adult", "request", "k", "other").id != Cause("adult", "request", "l", "one").id


# ---- what an environment asks ---------------------------------------------------------------------------------------

STRICT = Policy(gates=("quality",), evidence_hours=24, approvals=2, separate_promoter=True)
PROVED = Candidate("adult/3", "ada", {"quality": Proof(True, MAY.isoformat())}, [Approval(seq, "production", who, "promoter", "", "") for seq, who in ((7, "grace"), (8, "alan"))])


def refused(policy: Policy = STRICT, candidate: Candidate = PROVED, alias: str = "production", actor: str = "grace", hours: float = 1, **more) -> str:
    return "; ".join(reasons(policy, candidate, alias, actor, MAY + timedelta(hours=hours), **more))


def test_nothing_is_said_against_what_has_all_that_is_asked(): assert refused() == ""


@pytest.mark.parametrize(("approval", "counts"), [
    ({}, True), ({"role": "admin"}, True), ({"role": "trainer"}, False), ({"actor": "ada"}, False), ({"actor": "alan"}, False), ({"withdrawn": 9}, False), ({"spent": 1}, False)])
def test_which_approvals_count(approval, counts):
    "Another person's, of a role that may, neither taken back nor used up."
    there = replace(PROVED, approvals=[PROVED.approvals[1], replace(Approval(9, "production", "edsger", "promoter", "", ""), **approval)])
    assert len(counted(STRICT, there)) == 1 + counts and ("1 of 2 approvals are there" in refused(candidate=there)) == (not counts)
    assert ("that of ada, who registered it, counts for nothing" in refused(candidate=there)) == (approval == {"actor": "ada"})


def test_whose_own_approval_counts_where_the_policy_lets_it():
    own = replace(PROVED, approvals=[PROVED.approvals[0], Approval(9, "production", "ada", "promoter", "", "")])
    assert refused(replace(STRICT, separate_approver=False), own) == "" and "counts for nothing" not in refused(replace(STRICT, separate_approver=False, approvals=3), own)
    assert refused(actor="ada") == "ada registered it, and another person has to promote it" and refused(replace(STRICT, separate_promoter=False), actor="ada") == ""


def test_evidence_is_of_the_last_hours():
    assert [refused(hours=h)[:14] for h in (-1.01, -1, 0, 24, 24.01)] == ["the verdict of", "", "", "", "the verdict of"], "an hour ahead is a clock"
    assert refused(replace(STRICT, evidence_hours=None), hours=9999) == "" and "failed the gate quality" in refused(candidate=replace(PROVED, proofs={"quality": Proof(False, MAY.isoformat())}))
    assert "no verdict of the gates quality and fairness" in refused(replace(STRICT, gates=("quality", "fairness")), replace(PROVED, proofs={}))


def test_a_sunset_is_the_last_day_and_retired_is_retired():
    assert refused(candidate=replace(PROVED, sunset="2026-05-01")) == "" and refused(candidate=replace(PROVED, sunset="2026-04-30")) == "it is deprecated, and its sunset was on 2026-04-30"
    assert refused(candidate=replace(PROVED, retired="2026-04-30T10:00:00", sunset="2026-04-01")) == "it was retired on 2026-04-30"


def test_an_alias_that_is_not_guarded_is_asked_for_evidence_alone():
    bare = replace(PROVED, approvals=[])
    assert refused(candidate=bare, alias="staging", actor="ada") == "" and "0 of 2" in refused(candidate=bare, alias="production@eu") and STRICT.guards("production@eu") and not STRICT.guards("staging")
    assert "gate extra" in refused(alias="staging", gates=["extra"]) and "gate quality" not in refused(candidate=replace(bare, proofs={}), alias="staging", gates=[])


@pytest.mark.parametrize(("text", "inside", "outside"), [
    ("Fri 16:00..Mon 08:00", ("2026-05-01T16:00", "2026-05-03T00:00", "2026-05-04T07:59"), ("2026-05-01T15:59", "2026-05-04T08:00")),
    ("Tue 09:00..Tue 17:00", ("2026-05-05T09:00", "2026-05-05T16:59"), ("2026-05-05T08:59", "2026-05-05T17:00", "2026-05-06T10:00")),
    ("Tue 09:30..Tue 17:15", ("2026-05-05T09:30", "2026-05-05T17:14"), ("2026-05-05T09:29", "2026-05-05T17:15")),
    ("Mon 00:00..Tue 00:00", ("2026-05-04T00:00", "2026-05-04T23:59"), ("2026-05-03T23:59", "2026-05-05T00:00")),
    ("2026-12-20..2027-01-04", ("2026-12-20T00:00", "2027-01-04T23:59"), ("2026-12-19T23:59", "2027-01-05T00:00")), ("2026-12-24", ("2026-12-24T12:00",), ("2026-12-23T23:59", "2026-12-25T00:00"))])
def test_a_freeze_holds_from_its_first_minute_to_its_last(text, inside, outside):
    policy = Policy(freeze=windows(text))
    at = lambda moment: frozen(policy, datetime.fromisoformat(moment).replace(tzinfo=UTC))
    assert all(at(m) for m in inside) and not any(at(m) for m in outside)


def test_a_freeze_is_on_the_clock_of_its_zone_and_may_be_overridden():
    policy = replace(STRICT, freeze=windows("2026-12-24, Fri 16:00..Mon 08:00"), freeze_zone="Pacific/Auckland") # 12 hours ahead in May
    assert [bool(frozen(policy, MAY + timedelta(hours=h))) for h in (3.9, 4, 67.9, 68)] == [False, True, True, False]
    assert "nothing is let out in Fri 16:00..Mon 08:00 (Pacific/Auckland)" in refused(policy, hours=5) and refused(policy, hours=5, override=True) == "" and refused(policy, alias="staging", hours=5) == ""
    for wrong in ("2027-01-04..2026-12-20", "Fri..Mon", "Fry 16:00..Mon 08:00", "2026-13-01"):
        with pytest.raises(SettingsError, match="is not understood"): windows(wrong)


# ---- who answers ----------------------------------------------------------------------------------------------------

PEOPLE = [f"person {i}" for i in range(2000)]
BOTH = Traffic("adult", "3", "4", 0.2, shadow="5", previous="2")


def test_a_share_of_the_people_gets_the_canary_and_always_the_same_ones():
    canary = {share: {p for p in PEOPLE if choose(replace(BOTH, share=share), p).arm == "canary"} for share in (0, 0.05, 0.2, 0.5, 1)}
    assert [len(c) / len(PEOPLE) for c in canary.values()] == pytest.approx([0, 0.05, 0.2, 0.5, 1], abs=0.04) and not canary[0] and len(canary[1]) == len(PEOPLE)
    assert canary[0.05] < canary[0.2] < canary[0.5], "who has it keeps it as the share grows"
    other = {p for p in PEOPLE if choose(replace(BOTH, canary="6"), p).arm == "canary"}
    assert len(other & canary[0.2]) / len(PEOPLE) == pytest.approx(0.04, abs=0.02), "the next canary meets other people"
    assert not [p for p in PEOPLE if choose(replace(BOTH, canary=None), p).arm == "canary"] and all(0 <= place("adult/4", p) < 1 for p in PEOPLE)


def test_the_edge_of_a_share_is_outside_of_it():
    at = place("adult/4", "ada")
    assert [choose(replace(BOTH, share=share), "ada").version for share in (math.nextafter(at, 0), at, math.nextafter(at, 1))] == ["3", "3", "4"]
    for share in (-0.01, 1.01, math.nan):
        with pytest.raises(ValueError, match="a share is a number from 0 to 1"): replace(BOTH, share=share)


def test_who_answers_instead_and_who_listens_along():
    assert choose(replace(BOTH, share=0.0), "ada") == Choice("3", "production", ("2",), "5") and choose(replace(BOTH, share=1.0), "ada") == Choice("4", "canary", ("3", "2"), "5")
    assert choose(BOTH, "ada", "5") == Choice("5", "override"), "a tester wants to see it fail"
    assert choose(replace(BOTH, share=0.0, shadow="3", previous=None), "ada") == Choice("3", "production"), "a version does not listen to itself"
    assert choose(replace(BOTH, share=1.0, previous="3"), "ada").instead == ("3",) and BOTH.versions == ("3", "4", "5", "2") and replace(BOTH, shadow="3", previous=None).versions == ("3", "4")


def test_a_key_may_ask_as_often_as_its_rate_and_saves_up_a_second():
    rates = Rates(2)
    assert [rates.wait("a", now) for now in (0.0, 0.0, 0.0, 0.25, 0.5, 0.5)] == [0, 0, 0.5, 0.25, 0, 0.5] and rates.wait("b", 0.0) == 0, "another's requests are another's"
    assert [rates.wait("a", now) for now in (100, 100, 100)] == [0, 0, 0.5], "no more is saved up than the burst"
    slow, free = Rates(0.125), Rates(None)
    assert [slow.wait("a", now) for now in (0, 0, 7, 8)] == [0, 8, 1, 0] and not any(free.wait("a", 0) for _ in range(1000))


# ---- what is told ---------------------------------------------------------------------------------------------------

ERRORS = Alert(metric="error_rate", at_most=0.02, clear=0.015, minimum=100)


def looked(alert: Alert, *values: float | None, n: int = 1000, state: State | None = None) -> tuple[list[tuple[int, bool]], State, list[Told]]:
    "What is said at each look, an hour apart: which look, and whether it begins; a value has an interval of a thousandth to each side."
    states, said, told = {alert.measure: state} if state else {}, [], []
    for hour, value in enumerate(values):
        at, found = MAY + timedelta(hours=hour), {} if value is None else {alert.measure: Known(Measure(value, value - 0.001, value + 0.001), n)}
        report = Watched("adult/3", at, at + timedelta(hours=1), Window("adult", "3", "production", 0, 3600), found, DriftReport((1, 1), ()), None, None, None, None, Verdict(()))
        states, now = advance(states, [alert], report)
        said += [(hour, t.begins) for t in now]
        told += now
    return said, states[alert.measure], told


def test_an_alert_is_told_when_it_begins_and_when_it_is_over_and_never_between():
    said, state, told = looked(ERRORS, 0.01, 0.1, 0.1, 0.018, 0.1, 0.01, 0.01, 0.1)
    assert said == [(1, True), (5, False), (7, True)] and state.firing
    assert [t.since[:13] for t in told] == ["2026-05-01T01", "2026-05-01T01", "2026-05-01T07"], "since it was last kept"
    assert told[0].id == told[1].id != told[2].id and len(told[0].id) == 16 and "; it is over" in told[1].sentence and "since 2026-05-01T01:00" in told[0].sentence and told[0].may.endswith("`mlray rollback adult`")


def test_what_is_broken_from_the_beginning_is_broken_since_then():
    _, state, told = looked(ERRORS, 0.1, 0.1)
    assert [t.since for t in told] == [MAY.isoformat()] and state.began == MAY.isoformat() and state.looks == 2


def test_as_many_looks_in_a_row_as_are_asked_for():
    twice = ERRORS.model_copy(update={"looks": 2})
    assert looked(twice, 0.1, 0.01, 0.1, 0.018, 0.1)[0] == [], "what lies between is none of them"
    said, state, told = looked(twice, 0.01, 0.1, 0.1, 0.018, 0.018)
    assert said == [(2, True)] and state.firing and told[0].since[:13] == "2026-05-01T01" and state.began == told[0].since, "and does not end it, nor its beginning"
    assert looked(twice, 0.1, 0.018, 0.1, 0.1)[0] == [(3, True)] and looked(twice, 0.1, 0.018, 0.1, 0.1)[2][0].since[:13] == "2026-05-01T02"


def test_too_little_and_unmeasured_change_nothing():
    assert looked(ERRORS.model_copy(update={"looks": 2}), 0.1, None, 0.1)[0] == [(2, True)]
    said, state, _ = looked(ERRORS, 0.1, None, 0.1)
    assert said == [(0, True)] and state.firing and looked(ERRORS, 0.1, n=99)[0] == [] and looked(ERRORS, 0.1, n=100)[0] == [(0, True)]
    assert looked(ERRORS, 0.0205)[0] == [], "a bound that lies within the interval is not broken beyond doubt"


def test_who_looks_again_at_the_same_windows_has_looked_once():
    twice = ERRORS.model_copy(update={"looks": 2})
    _, state, _ = looked(twice, 0.1)
    assert looked(twice, 0.1, state=state)[0] == [] and looked(twice, 0.1, state=replace(state, seen=""))[0] == [(0, True)]
