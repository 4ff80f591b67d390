"""Does it stay out: the level is exact where it can be computed, simulated where it cannot; evidence adds up; every bad canary leaves for its own reason."""
import json
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy.special import betaln, xlogy

from mlray.judgement.arm import EDGES, Arm, Evidence, Mean, latencies, mean_of
from mlray.judgement.mixture import difference, interval
from mlray.judgement.rollout import Decision, Finding, Hold, Promote, RollBack, decide, decision_from
from mlray.measures.counts import confusion, tabulated
from mlray.measures.fairness import gaps
from mlray.values.errors import DataError, SpecError
from mlray.values.rollout_policy import Check, Rollout
from mlray.values.spec import Rule, parse_spec

# ---- the interval, against other ways to compute it -----------------------------------------------------------------


def log_likelihood(total, n, p): return xlogy(total, p) + xlogy(n - total, 1 - p)
def log_mixture(total, n): return betaln(total + 0.5, n - total + 0.5) - betaln(0.5, 0.5)


def pooled_log_e(a, n, b, m):
    "The e-process against equal means, in closed form."
    return log_mixture(a, n) + log_mixture(b, m) - log_likelihood(a + b, n + m, (a + b) / np.maximum(n + m, 1))


pair = st.integers(0, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


@settings(max_examples=200, deadline=None)
@given(pair, pair, st.floats(1e-6, 0.5))
def test_zero_is_outside_exactly_when_the_closed_form_rejects(canary, champion, alpha):
    (a, n), (b, m) = canary, champion
    log_e, (low, high) = pooled_log_e(a, n, b, m), difference(a, n, b, m, alpha)
    if abs(log_e + np.log(alpha)) < 1e-6: return
    assert ((low > 0) | (high < 0)) == (log_e >= -np.log(alpha))


@settings(max_examples=100, deadline=None)
@given(pair, pair, st.floats(1e-6, 0.5))
def test_an_interval_holds_what_was_seen_and_turns_with_its_arms(canary, champion, alpha):
    (a, n), (b, m) = canary, champion
    low, high = difference(a, n, b, m, alpha)
    assert -1 <= low <= high <= 1
    if n and m: assert low - 1e-9 <= a / n - b / m <= high + 1e-9
    back = difference(b, m, a, n, alpha)
    assert (low, high) == (-back[1], -back[0])
    assert np.allclose(difference(n - a, n, m - b, m, alpha), (-high, -low), atol=1e-6)
    wider = difference(a, n, b, m, alpha / 2)
    assert wider[0] <= low + 1e-12 and high <= wider[1] + 1e-12


@pytest.mark.parametrize(("a", "n", "b", "m"), [(0, 0, 0, 0), (0, 40, 3, 50), (7, 10, 2, 90), (10, 10, 0, 10), (2.5, 20, 30.25, 80)])
def test_the_ends_are_those_of_a_search_over_all_pairs(a, n, b, m):
    grid = np.linspace(0, 1, 2001)
    inside = log_mixture(a, n) + log_mixture(b, m) - log_likelihood(a, n, grid)[:, None] - log_likelihood(b, m, grid)[None, :] < np.log(20)
    found = (grid[:, None] - grid[None, :])[inside]
    assert np.allclose(difference(a, n, b, m, 0.05), (found.min(), found.max()), atol=2e-3)
    alone = grid[log_mixture(a, n) - log_likelihood(a, n, grid) < np.log(20)]
    assert np.allclose(interval(a, n, 0.05), (alone.min(), alone.max()), atol=1e-3)


def test_large_counts_keep_their_digits():
    low, high = (float(x) for x in difference(1_000_000, 10**9, 1_000_000, 10**9))
    assert -2e-5 < low < -1e-6 and abs(low + high) < 1e-12


# ---- the level ------------------------------------------------------------------------------------------------------


def chance_ever(wrong, p, q, looks):
    "Exactly: the probability that `wrong(a, b, n)` holds at any look, both arms getting a request between looks."
    alive = np.ones((1, 1))
    for n in range(1, looks + 1):
        step = np.zeros((n + 1, n + 1))
        for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)): step[i:i + n, j:j + n] += alive * (p if i else 1 - p) * (q if j else 1 - q)
        a, b = np.arange(n + 1)[:, None], np.arange(n + 1)[None, :]
        alive = np.where(wrong(*np.broadcast_arrays(a, b), n), 0.0, step)
    return 1 - alive.sum()


def outside(margin, alpha):
    def wrong(a, b, n):
        low, high = difference(a, n, b, n, alpha)
        return (low > margin) | (high < margin)
    return wrong


def z_test(a, b, n):
    pooled = (a + b) / (2 * n)
    with np.errstate(divide="ignore", invalid="ignore"): return np.abs(a - b) / n > 1.2816 * np.sqrt(2 * pooled * (1 - pooled) / n)


@pytest.mark.parametrize(("p", "q"), [(0.5, 0.5), (0.1, 0.1), (0.01, 0.01), (0.0, 0.0), (0.3, 0.1), (0.9, 0.7)])
def test_the_truth_is_missed_at_any_look_no_more_often_than_alpha(p, q):
    chance = chance_ever(outside(p - q, 0.2), p, q, 60)
    assert chance <= 0.2
    if p == q == 0.5: assert chance > 0.01, "the interval never misses: it says nothing, or this test cannot fail"


def test_a_z_test_is_caught_by_the_same_computation():
    assert chance_ever(z_test, 0.5, 0.5, 60) > 0.4    # at a nominal 0.2


def every_look(generator, draw, runs, looks, share):
    "Sums and numbers of both arms after each request; each request is the canary's with probability `share`."
    values, canary = draw(generator, (runs, looks)), generator.random((runs, looks)) < share
    return (of.cumsum(axis=1) for of in (values * canary, 1.0 * canary, values * ~canary, 1.0 * ~canary))


def ever_rejected(a, n, b, m, alpha):
    "Per run, whether equal means were ever called worse, and ever better, looking after each request."
    p, q = a / np.maximum(n, 1), b / np.maximum(m, 1)
    at_most = log_likelihood(a, n, p) + log_likelihood(b, m, q) - log_likelihood(a + b, n + m, (a + b) / (n + m))
    possible = at_most >= -np.log(alpha) # a mixture never exceeds the maximum, so elsewhere zero is inside
    low, high = np.full(a.shape, -1.0), np.full(a.shape, 1.0)
    low[possible], high[possible] = difference(a[possible], n[possible], b[possible], m[possible], alpha)
    return (low > 0).any(axis=1), (high < 0).any(axis=1)


KINDS = {"no errors": lambda g, s: np.zeros(s), "1 % errors": lambda g, s: 1.0 * (g.random(s) < 0.01), "50 % errors": lambda g, s: 1.0 * (g.random(s) < 0.5),
         "a uniform loss": lambda g, s: g.random(s), "a skewed loss": lambda g, s: g.beta(0.05, 1.0, s),
         "errors that come and go": lambda g, s: 1.0 * (g.random(s) < np.where(np.arange(s[1]) // 200 % 2, 0.3, 0.01)),
         "errors that grow": lambda g, s: 1.0 * (g.random(s) < np.linspace(0.0, 0.5, s[1]))}


@pytest.mark.parametrize("kind", KINDS)
def test_a_a_in_short(kind):
    worse, better = ever_rejected(*every_look(np.random.default_rng(1), KINDS[kind], 200, 1000, 0.5), 0.05)
    assert (worse | better).mean() <= 0.05


@pytest.mark.chaos
@pytest.mark.parametrize("share", [0.05, 0.5])
@pytest.mark.parametrize("kind", KINDS)
def test_a_thousand_a_a_rollouts_looked_at_after_every_request(kind, share):
    generator, worse, better = np.random.default_rng(0), [], []
    for _ in range(20):
        w, b = ever_rejected(*every_look(generator, KINDS[kind], 50, 20_000, share), 0.05)
        worse += w.tolist(); better += b.tolist()
    print(f"\nA/A, {kind}, share {share:.0%}: of {len(worse)} rollouts of 20 000 requests, called worse {sum(worse)}, called better {sum(better)}; at most 50 allowed together")
    assert len(worse) == 1000 and np.mean(np.array(worse) | np.array(better)) <= 0.05


@pytest.mark.chaos
@pytest.mark.parametrize("rate", [0.0, 0.01, 0.05])
def test_a_thousand_rollouts_at_the_very_margin(rate):
    "The canary is worse by exactly what is tolerated: the hardest case for both errors, `worse` (it is not) and `below` (nor that)."
    generator, margin, n = np.random.default_rng(0), 0.01, np.arange(1, 3001)
    worse, below = [], []
    for _ in range(20):
        a, b = (generator.random((50, len(n))) < rate + margin).cumsum(axis=1), (generator.random((50, len(n))) < rate).cumsum(axis=1)
        low, high = difference(a, n, b, n, 0.05)
        worse += (low > margin).any(axis=1).tolist(); below += (high < margin).any(axis=1).tolist()
    print(f"\nat the margin, champion {rate:.0%}: of {len(worse)} rollouts of 3 000 requests a side, called worse {sum(worse)}, called within {sum(below)}")
    assert np.mean(np.array(worse) | np.array(below)) <= 0.05


def whole_rollout(generator, policy, champion, canary, requests, group_gap=0.0):
    "Decide after every request of the first step, until something is decided; the action, and after how many canary requests."
    share, evidence = policy.steps[0], Evidence(policy.steps[0])
    for _ in range(requests):
        for name, rate in (("canary", canary), ("champion", champion)):
            group, label = generator.choice(["a", "b"]), generator.random() < 0.5
            right = generator.random() < (0.8 - group_gap if name == "canary" and group == "a" else 0.8)
            cell = tuple(int(name == ("t" if right else "f") + ("p" if label == right else "n")) for name in FOUR)
            arm = Arm(1, {"error_rate": mean_of([generator.random() < rate]), "invalid_rate": Mean(0, 1)}, latencies([generator.lognormal(-4, 0.5)]), tabulated(("sex",), {(group,): cell}))
            evidence += Evidence(share, **{name: arm})
        decision = decide(evidence, policy, [Rule(metric="equal_opportunity_difference", by=("sex",), at_most=0.1, within=0.1)])
        if not isinstance(decision, Hold): return decision, evidence.canary.requests
    return decision, evidence.canary.requests


STRICT = Rollout(steps=(0.5, 1.0), checks=(Check(metric="error_rate", margin=0, demand="better", minimum=1), Check(metric="invalid_rate", margin=0.01, minimum=1)))


@pytest.mark.chaos
def test_whole_a_a_rollouts_with_every_metric_decided_after_every_request():
    ends = [whole_rollout(np.random.default_rng(i), STRICT, 0.05, 0.05, 400)[0] for i in range(40)]
    print(f"\nwhole A/A rollouts: {sum(isinstance(d, RollBack) for d in ends)} rolled back, {sum(isinstance(d, Promote) for d in ends)} promoted as better, of {len(ends)}")
    assert sum(not isinstance(d, Hold) for d in ends) <= 2


def test_a_whole_rollout_ends_for_its_reason():
    decision, after = whole_rollout(np.random.default_rng(0), STRICT, 0.01, 0.5, 400)
    assert isinstance(decision, RollBack) and decision.because == ("error_rate",) and 10 < after < 100


@pytest.mark.chaos
def test_power_looked_at_after_every_request():
    "Figures for the reader: canary requests until a multiple of a champion's 1 % is called worse, half of the requests each, alpha 0.05."
    generator, n, found = np.random.default_rng(0), np.arange(1, 8001), {}
    for times in (2, 5, 10):
        a, b = ((generator.random((60, len(n))) < rate).cumsum(axis=1) for rate in (0.01 * times, 0.01))
        for margin in (0.0, 0.005):
            worse = difference(a, n, b, n, 0.05)[0] > margin
            at = np.where(worse.any(axis=1), worse.argmax(axis=1) + 1.0, np.inf)
            found[times, margin] = np.median(at)
            print(f"\n{times} × 1 %, tolerated {margin}: rolled back {worse.any(axis=1).mean():.0%} within {len(n)}; half by {np.median(at):g}, nine in ten by {np.percentile(at, 90, method='higher'):g} requests")
    assert found[10, 0.0] < found[5, 0.0] < found[2, 0.0]


# ---- decisions ------------------------------------------------------------------------------------------------------

POLICY = Rollout(alpha=0.05)


def arm(n, errors=0, invalid=0, seconds=0.02, slow=(), counts=None):
    return Arm(n, {"error_rate": Mean(errors, n), "invalid_rate": Mean(invalid, n)}, latencies([*slow, *[seconds] * (n - len(slow))]), counts)


def groups(a, b):
    "Labelled rows of two groups: (tp, fp, fn, tn) each."
    return tabulated(("sex",), {("a",): a, ("b",): b})


FOUR = ("tp", "fp", "fn", "tn")
FAIR = [Rule(metric="equal_opportunity_difference", by=("sex",), at_most=0.1), Rule(metric="roc_auc", at_least=0.9)]
EVEN, UNEVEN, MANY = groups((900, 100, 100, 900), (900, 100, 100, 900)), groups((990, 190, 10, 810), (810, 10, 190, 990)), groups((18_000, 2000, 2000, 18_000), (18_000, 2000, 2000, 18_000))


@pytest.mark.parametrize("policy", [POLICY, STRICT, Rollout(checks=()), Rollout(checks=(Check(metric="x", margin=1, demand="not worse", minimum=1),), latency=None)])
@pytest.mark.parametrize("champion", [Arm(), arm(100_000, 500)])
def test_no_traffic_is_no_decision(policy, champion):
    for share in policy.steps: assert isinstance(decide(Evidence(share, champion=champion), policy, FAIR), Hold)


def test_a_policy_that_checks_nothing_promotes_nothing():
    assert decide(Evidence(0.01, arm(10_000), arm(100_000)), Rollout(checks=(), latency=None)).why == "the policy checks nothing"


def test_one_failure_at_hardly_any_traffic_is_no_decision():
    eager = Rollout(checks=[Check(metric="error_rate", margin=0, minimum=1)], latency=None)
    for policy in (POLICY, eager):
        for n in range(1, 30): assert isinstance(decide(Evidence(0.01, arm(n, 1), arm(99 * n)), policy), Hold)


@pytest.mark.parametrize(("canary", "because"), [
    (arm(2000, errors=2000), ("error_rate",)), (arm(2000, invalid=400), ("invalid_rate",)), (arm(2000, seconds=0.04), ("latency",)),
    (arm(2000, slow=[np.inf] * 400), ("latency",)), (arm(2000, counts=UNEVEN), ("equal_opportunity_difference[sex]",)),
    (arm(2000, errors=2000, seconds=1.0), ("error_rate", "latency"))])
def test_a_bad_canary_leaves_for_its_reason(canary, because):
    decision = decide(Evidence(0.05, canary, arm(38_000, 100, counts=EVEN)), POLICY, FAIR)
    assert isinstance(decision, RollBack) and decision.because == because and decision.share == 0
    for name in because: assert name in decision.why


def test_a_good_canary_goes_on():
    decision = decide(Evidence(0.05, arm(20_000, 50, counts=EVEN), arm(380_000, 1000, counts=EVEN)), POLICY, FAIR)
    assert isinstance(decision, Promote) and decision.share == 0.25 and len(decision.findings) == 4 and "promote" in decision._repr_markdown_()


def test_an_unfair_canary_is_as_accurate():
    def right(c): return np.trace(confusion(c).sum(0)) / c.rows
    assert right(UNEVEN) == right(EVEN)


@pytest.mark.parametrize(("rule", "verdict"), [
    (Rule(metric="equal_opportunity_difference", by=("sex",), at_most=0.3), "within"), (Rule(metric="equal_opportunity_difference", by=("sex",), within=0.05), "worse"),
    (Rule(metric="equal_opportunity_ratio", by=("sex",), at_least=0.95), "worse"), (Rule(metric="equal_opportunity_ratio", by=("sex",), at_least=0.6), "within"),
    (Rule(metric="equalized_odds_difference", by=("sex",), at_most=0.1), "worse"), (Rule(metric="accuracy_difference", by=("sex",), at_most=0.1), "within"),
    (Rule(metric="demographic_parity_difference", by=("sex",), at_most=0.01), "worse"), (Rule(metric="accuracy_ratio", by=("sex",), at_least=0.999), "undecided")])
def test_rules_about_groups(rule, verdict):
    found = decide(Evidence(0.05, arm(4000, counts=UNEVEN), arm(76_000, counts=MANY)), POLICY, [rule]).findings[-1]
    assert (found.kind, found.verdict) == ("fairness", verdict) and found.low <= found.high


@pytest.mark.parametrize(("canary", "says"), [(None, "0 of at least 100 labelled rows"), (groups((9, 1, 1, 9), (9, 1, 1, 9)), "40 of at least 100"), (tabulated(("age",), {("young",): (500, 0, 0, 0)}), "counted by sex"),
                                              (tabulated(("sex",), {("a",): (500, 0, 0, 0)}), "one group"), (tabulated(("sex",), {(str(i),): (50, 0, 0, 0) for i in range(17)}), "17 groups")])
def test_groups_that_cannot_be_judged_hold_the_rollout(canary, says):
    decision = decide(Evidence(0.05, arm(20_000, 50, counts=canary), arm(380_000, 1000)), POLICY, FAIR)
    assert isinstance(decision, Hold) and says in decision.why and decision.findings[-1].verdict == "too little"


def test_as_many_groups_are_judged_as_alpha_is_shared_among():
    many = lambda n: tabulated(("sex",), {(str(i),): (450, 50, 50, 450) for i in range(n)})
    said = lambda ours, theirs, rule: decide(Evidence(0.05, arm(20_000, 50, counts=many(ours)), arm(380_000, 1000, counts=many(theirs))), POLICY, [rule]).findings[-1]
    alone, beside = (Rule(metric="equal_opportunity_difference", by=("sex",), **p) for p in ({"at_most": 0.9}, {"within": 0.9}))
    assert [said(n, 2, alone).verdict for n in (1, 2, 16, 17)] == ["too little", "within", "within", "too little"]
    assert [said(2, n, beside).verdict for n in (1, 2, 16, 17)] == ["too little", "within", "within", "too little"] and "17 groups" in said(2, 17, beside).why
    nobody = decide(Evidence(0.05, arm(20_000), arm(380_000, counts=many(2))), POLICY, [alone]).findings[-1]
    assert (nobody.low, nobody.high, nobody.canary, nobody.verdict) == (0, 1, None, "too little"), "without a row a gap may be any"


def test_latency_is_judged_from_its_minimum_on_and_shown_as_shares():
    policy = Rollout(checks=(), latency={"ratio": 1.4, "minimum": 100})
    slow = lambda n, m: decide(Evidence(0.05, arm(n, seconds=10.0), arm(m, seconds=1.0, slow=[100.0] * (m // 2))), policy).findings[0]
    assert [slow(*each).verdict for each in ((99, 100), (100, 99), (100, 100))] == ["too little", "too little", "worse"] and (slow(100, 100).canary, slow(100, 100).champion) == (1.0, 0.5)


@pytest.mark.parametrize(("demand", "enough"), [("better", {"better"}), ("within", {"better", "within"}), ("not worse", {"better", "within", "undecided"})])
def test_what_is_demanded_and_what_nothing_live_can_tell(demand, enough):
    verdicts = ("better", "within", "undecided", "worse", "too little", "not judged")
    assert {v for v in verdicts if Finding("mean", "x", None, None, -1, 1, 0, v, demand, "").met} == enough | {"not judged"}, "who cannot be told of is waited for by nobody"


def test_a_mean_is_its_sum_over_its_number(): assert Mean(1.0, 4).value == 0.25 and np.isnan(Mean().value) and (Mean(1, 4) + Mean(2, 4)).value == 0.375 and mean_of([0.25, 1]).value == 0.625


@pytest.mark.parametrize("rule", [Rule(metric="roc_auc", by=("sex",), at_least=0.5), Rule(metric="accuracy_difference", by=("sex",), at_least=0.5), Rule(metric="accuracy_ratio", by=("sex",), at_most=0.5)])
def test_a_rule_that_cannot_be_kept_is_refused(rule):
    with pytest.raises(SpecError, match="Rule"): decide(Evidence(0.05), POLICY, [rule])


def test_back_at_once_or_step_by_step():
    bad = [Evidence(s, arm(2000, errors=2000), arm(38_000)) for s in (0.01, 0.05, 0.25)]
    stepwise = POLICY.model_copy(update={"rollback": "stepwise"})
    assert [decide(e, POLICY).share for e in bad] == [0, 0, 0] and [decide(e, stepwise).share for e in bad] == [0, 0.01, 0.05]


def test_a_step_visited_again_has_less_of_alpha():
    stepwise = POLICY.model_copy(update={"rollback": "stepwise"})
    spans = [(f.low, f.high) for v in (1, 2, 3) for f in decide(Evidence(0.05, arm(2000, 9), arm(38_000, 99), visit=v), stepwise).findings[:1]]
    for (low, high), (lower, higher) in pairwise(spans): assert lower < low and high < higher


def test_a_limit_in_requests_ends_a_rollout_that_shows_nothing():
    tight = Rollout(checks=[Check(metric="conversion", margin=0, higher_is_better=True, demand="better")], latency=None, limit=1000)
    def ab(n): return Evidence(0.05, Arm(n, {"conversion": Mean(n // 10, n)}), Arm(19 * n, {"conversion": Mean(19 * n // 10, 19 * n)}))
    assert isinstance(decide(ab(900), tight), Hold)
    decision = decide(ab(1000), tight)
    assert isinstance(decision, RollBack) and decision.because == () and "not shown within 1000 requests: conversion" in decision.why


def test_shadow_disagreement_is_bounded_on_the_canary_alone():
    shadow = Rollout(checks=[Check(metric="disagreement", at_most=0.05)], latency=None)
    def seen(k): return decide(Evidence(0.01, Arm(2000, {"disagreement": Mean(k, 2000)})), shadow)
    assert [type(seen(k)) for k in (20, 90, 200)] == [Promote, Hold, RollBack]
    assert seen(90).findings[0].champion is None


def test_the_last_step_has_nothing_to_compare_with(): assert isinstance(decide(Evidence(1.0, arm(2000, 2000)), POLICY), Hold)


def test_wrong_evidence_is_a_letter():
    with pytest.raises(SpecError, match=r"0\.1 is not a step.*0\.01, 0\.05, 0\.25, 1"): decide(Evidence(0.1), POLICY)
    with pytest.raises(DataError, match="two steps"): Evidence(0.01) + Evidence(0.05)
    for bad in ((float("nan"), 3), (4, 3), (-1, 3)):
        with pytest.raises(DataError, match="between 0 and 3"): Mean(*bad)
    for bad in (float("nan"), 1.1, -0.1):
        with pytest.raises(DataError, match="between 0 and 1"): mean_of([0.5, bad])
    with pytest.raises(DataError, match="NaN"): latencies([float("nan")])
    unmeasured = decide(Evidence(0.05, Arm(500, {"error_rat": Mean(0, 500)}), Arm(500)), POLICY).findings[0]
    assert unmeasured.verdict == "too little" and "Did you mean 'error_rat'" in unmeasured.why


def test_alpha_is_spent_once():
    "Two compared steps, six parts of weight: half a percent each; shared again among edges, rules, arms, rates and pairs of groups."
    policy = Rollout(alpha=0.06, steps=(0.1, 0.5, 1.0), checks=[Check(metric="error_rate", margin=0.01, weight=2), Check(metric="invalid_rate", margin=0.01, higher_is_better=True)],
                     latency={"weight": 1, "ratio": 1.4}, fairness={"weight": 2, "groups": 4})
    rules = [Rule(metric="equal_opportunity_difference", by=("sex",), at_most=0.1), Rule(metric="equalized_odds_ratio", by=("sex",), at_least=0.1, within=0.1)]
    found = decide(Evidence(0.1, arm(2000, 90, 40, seconds=0.9, counts=UNEVEN), arm(18_000, 300, 200, counts=EVEN)), policy, rules).findings
    unit = 0.06 / 2 / 6
    expected = [difference(90, 2000, 300, 18_000, 2 * unit), difference(200, 18_000, 40, 2000, unit), difference(2000, 2000, 0, 18_000, unit / 63), difference(990, 1000, 810, 1000, unit / 6)]
    assert [f.low for f in found[:4]] == pytest.approx([float(low) for low, _ in expected], abs=1e-12)
    assert [f.high for f in (*found[:2], found[3])] == pytest.approx([float(high) for _, high in (*expected[:2], expected[3])], abs=1e-12)
    low, high = interval([190, 10], 1000, unit / 2 / 2 / 4)    # false positives: the rate whose ratio is the worse one
    assert (found[4].low, found[4].high) == pytest.approx((1 - high.min() / low.max(), 1 - low.min() / high.max()), abs=1e-12)


def test_a_champion_that_was_hardly_seen_is_no_comparison():
    lonely = decide(Evidence(0.25, arm(5000, 5000), arm(99)), POLICY)
    assert isinstance(lonely, Hold) and lonely.findings[0].verdict == "too little" and "99 of at least 100" in lonely.why


# ---- laws -----------------------------------------------------------------------------------------------------------

requests = st.lists(st.tuples(st.booleans(), st.booleans(), st.floats(0, 1), st.floats(0, 1e6), st.sampled_from("ab"), st.sampled_from(["tp", "fp", "fn", "tn"])), max_size=120)
EAGER = Rollout(alpha=0.5, steps=(0.5, 1.0), checks=[Check(metric="error_rate", margin=0.1, minimum=1), Check(metric="loss", margin=0.2, minimum=1, demand="not worse")],
                latency={"minimum": 1, "margin": 0.3, "demand": "not worse"}, fairness={"minimum": 1})


def evidence_of(part):
    def one(side):
        rows = [r for r in part if r[0] == side]
        counts = sum((tabulated(("sex",), {(r[4],): tuple(int(name == r[5]) for name in FOUR)}) for r in rows), tabulated(("sex",), {}))
        return Arm(len(rows), {"error_rate": mean_of([r[1] for r in rows]), "loss": mean_of([r[2] for r in rows])}, latencies([r[3] for r in rows]), counts)
    return Evidence(0.5, one(True), one(False))


@settings(max_examples=60, deadline=None)
@given(requests, st.lists(st.integers(0, 120), max_size=4), st.randoms())
def test_any_division_of_the_requests_gives_the_same_decision(rows, cuts, random):
    ends = [0, *sorted(cuts), 120]
    parts = [evidence_of(rows[a:b]) for a, b in pairwise(ends)]
    random.shuffle(parts)
    together = Evidence(0.5)
    for part in parts: together += part
    whole = decide(evidence_of(rows), EAGER, FAIR)
    assert decide(together, EAGER, FAIR) == whole
    stored = json.dumps(whole.as_dict(), allow_nan=False)
    assert decision_from(json.loads(stored)) == whole and isinstance(whole, Decision)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 3000).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(0, n))), pair, st.sampled_from(["better", "within", "not worse"]), st.sampled_from([0.0, 0.01, 0.3]))
def test_more_errors_never_turn_a_rollback_into_a_promotion(canary, champion, demand, margin):
    n, few, many = canary[0], *sorted(canary[1:])
    policy = Rollout(alpha=0.5, steps=(0.5, 1.0), checks=[Check(metric="error_rate", margin=margin, demand=demand, minimum=1)], latency=None)
    order = {RollBack: 0, Hold: 1, Promote: 2}
    before, after = (order[type(decide(Evidence(0.5, Arm(n, {"error_rate": Mean(k, n)}), Arm(champion[1], {"error_rate": Mean(*champion)})), policy))] for k in (few, many))
    assert after <= before


cells = st.lists(st.tuples(*[st.integers(1, 300)] * 4), min_size=2, max_size=5)


@settings(max_examples=60, deadline=None)
@given(cells, cells, st.sampled_from([f"{family}_{kind}" for family in ("demographic_parity", "equal_opportunity", "equalized_odds", "accuracy") for kind in ("difference", "ratio")]))
def test_the_bounds_of_a_gap_hold_the_gap_that_was_counted(ours, theirs, metric):
    ratio, many = metric.endswith("_ratio"), Rollout(fairness={"minimum": 1})
    rule = Rule(metric=metric, by=("g",), within=0.1, **({"at_least": 0.5} if ratio else {"at_most": 0.5}))
    counts = [tabulated(("g",), {(str(i),): c for i, c in enumerate(side)}) for side in (ours, theirs)]
    alone, compared = decide(Evidence(0.05, Arm(counts=counts[0]), Arm(counts=counts[1])), many, [rule]).findings[-2:]
    counted = [gaps(side)[metric].value for side in counts]
    far, far_theirs = (1 - gap if ratio else gap for gap in counted)
    assert alone.low - 1e-9 <= far <= alone.high + 1e-9 and compared.low - 1e-9 <= far - far_theirs <= compared.high + 1e-9
    assert [alone.canary, compared.canary, compared.champion] == [counted[0], *counted]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 500), min_size=63, max_size=63), st.integers(0, 3))
def test_what_is_slower_by_the_ratio_and_no_more_is_never_called_worse(counts, quarters):
    champion, canary = (*counts, 0, 0, 0), (*[0] * quarters, *counts, 0, 0, 0)[:66]
    slower = Rollout(checks=(), latency={"ratio": 2 ** 0.75, "margin": 1e-9, "minimum": 1, "demand": "not worse"})
    assert decide(Evidence(0.05, Arm(latency=canary), Arm(latency=champion)), slower).findings[0].verdict != "worse"


def test_a_latency_falls_where_its_edge_says():
    for i in (0, 1, 17, 64): assert latencies([EDGES[i]])[i] == 1 and latencies([np.nextafter(EDGES[i], 1e9)])[i + 1] == 1


# ---- the section of the spec ----------------------------------------------------------------------------------------

SPEC = """
name: credit
data: {train: {file: credit.csv}}
contract: {income: {type: number}, default: {type: boolean, role: target}}
rollout:
  steps: [0.05, 1.0]
  rollback: stepwise
  checks: [{metric: error_rate, margin: 0.01}, {metric: accuracy, margin: 0.02, higher_is_better: true, demand: not worse}]
  latency: {ratio: 2.0}
"""


def test_the_section_reads_and_changes_the_run():
    spec = parse_spec(SPEC)
    assert spec.rollout.checks[1].higher_is_better and spec.id != parse_spec(SPEC.replace("0.05,", "0.1,")).id and parse_spec(SPEC, ["rollout.latency=null"]).rollout.latency is None


@pytest.mark.parametrize(("old", "new", "says"), [("margin: 0.01", "margn: 0.01", "Did you mean 'margin'"), ("ratio:", "rato:", "Did you mean 'ratio'"), ("stepwise", "gradual", "rollback"), ("1.0]", "0.5]", "end at 1.0"),
                                                  ("error_rate, margin: 0.01", "error_rate", "either margin or at_most"), ("metric: accuracy", "metric: error_rate", "checked once")])
def test_a_wrong_section_is_a_letter(old, new, says):
    with pytest.raises(SpecError, match=says): parse_spec(SPEC.replace(old, new))


def test_a_rate_promised_to_every_group_is_kept_up_by_the_worst_of_them():
    "The group that falls below leaves in the finding; groups with few rows say nothing."
    def arm(f, m): return Arm(4000, {}, (), tabulated(("sex",), {("f",): (f, 0, 1000 - f, 1000), ("m",): (m, 0, 1000 - m, 1000), ("x",): (0, 0, 3, 0)}))
    policy, kept = Rollout(steps=(0.5, 1.0), checks=(), latency=None), Rule(metric="recall", by=("sex",), at_least=0.6, within=0.1)
    good, bad = decide(Evidence(0.5, arm(800, 850), arm(800, 850)), policy, [kept]), decide(Evidence(0.5, arm(400, 850), arm(800, 850)), policy, [kept])
    assert isinstance(good, Promote) and {f.verdict for f in good.findings} <= {"better", "within"}
    assert isinstance(bad, RollBack) and all(", f: " in f.why and f.canary == 0.4 for f in bad.findings if f.verdict == "worse")
    few = decide(Evidence(0.5, arm(40, 85)), policy, [Rule(metric="false_positive_rate", by=("sex",), at_most=0.5)])
    assert all(f.verdict == "better" for f in few.findings), few.findings
    none = decide(Evidence(0.5, Arm(5), Arm(5)), policy, [kept])
    assert {f.verdict for f in none.findings} == {"too little"} and "100 labelled rows" in none.findings[0].why
