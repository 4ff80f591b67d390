"""Differential privacy: what a row can do is bounded, what is said to be spent is spent, and nothing else tells of the rows."""
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from mlray.governance.registry import bundle_of, open_registry
from mlray.learning.features import apply
from mlray.learning.fitting import Average, make_optimizer
from mlray.learning.fitting_privately import Budget, budget_of, private_pass, row_gradients
from mlray.learning.loss import loss_of
from mlray.learning.model import epochs
from mlray.learning.network import build
from mlray.running.reproduce import reproduce
from mlray.running.run import LocalBackend, make_job, train
from mlray.sources.rows import read_rows
from mlray.values.errors import SpecError, TrainingError
from mlray.values.recipe import Privacy, Train

pytest.importorskip("opacus")
CHANGES = {"privacy": Privacy(epsilon=3, noise="seed"), "epochs": 4, "batch_size": 64}


@pytest.fixture(scope="module")
def private(diabetes):
    "The shipped spec, under a budget that anybody can follow."
    return diabetes.model_copy(update={"train": diabetes.train.model_copy(update=CHANGES), "model": diabetes.model.model_copy(update={"members": 3, "hidden": (8,)})})


@pytest.fixture(scope="module")
def job(private, tmp_path_factory):
    from mlray.values.settings import Settings
    root = tmp_path_factory.mktemp("private")
    return make_job(private, read_rows(private, Settings(root=root, home=root)))


def tensors(job): return *map(torch.from_numpy, job.rows.tensors), torch.from_numpy(job.labels)
def same(a, b) -> bool: return set(a) == set(b) and all(torch.equal(a[n], b[n]) for n in a)


def test_noise_grows_as_the_promise_does():
    noise = [budget_of(Privacy(epsilon=e), Train(epochs=5, batch_size=100), 5000).noise_multiplier for e in (20, 5, 1, 0.2)]
    assert noise == sorted(noise) and noise[-1] > 5 * noise[0]
    longer = budget_of(Privacy(epsilon=1), Train(epochs=50, batch_size=100), 5000).noise_multiplier
    assert longer > noise[2]


def test_what_is_spent_is_what_opacus_counts():
    from opacus.accountants import PRVAccountant, RDPAccountant
    budget = budget_of(Privacy(epsilon=2), Train(epochs=7, batch_size=128), 9000)
    stepwise = RDPAccountant()
    for _ in range(7 * budget.steps): stepwise.step(noise_multiplier=budget.noise_multiplier, sample_rate=budget.sample_rate)
    assert math.isclose(budget.spent(7), stepwise.get_epsilon(budget.delta), rel_tol=1e-9) and 1.99 < budget.spent(7) <= 2
    tight = PRVAccountant()
    tight.history = stepwise.history
    assert budget.spent(7) >= tight.get_epsilon(budget.delta) - 0.02, "the bound stands above the tightest figure there is"
    assert budget.spent(3) < budget.spent(7) < budget.spent(8)


def test_a_promise_that_protects_nobody_is_refused():
    with pytest.raises(SpecError, match="giving one of them away"): budget_of(Privacy(epsilon=1, delta=0.01), Train(epochs=1, batch_size=10), 1000)


def test_gradients_of_rows_are_those_of_autograd(job):
    "TabM's shared layers and the tables of the encoding included; held against one backward pass a row."
    network, rows = build(job.features, job.model, seed=1).train(), [t[:6] for t in tensors(job)]
    found = row_gradients(network, rows, loss_of())
    for i in range(6):
        network.zero_grad()
        loss_of()(network(*(r[i:i + 1] for r in rows[:-1])), rows[-1][i:i + 1]).backward()
        for name, weight in network.named_parameters():
            if weight.numel(): torch.testing.assert_close(found[name][i], torch.zeros_like(weight) if weight.grad is None else weight.grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("factor", [1, 1e6])
def test_no_row_moves_the_weights_further_than_the_clip(job, factor):
    "One plain step, next to no noise, with and without a row that shouts: the whole step differs by clip / expected rows at most, in pieces as in one."
    rows = [t.clone() for t in tensors(job)]
    rows[0][0] *= factor
    recipe = Train(optimizer="torch.optim:SGD", learning_rate=1.0, weight_decay=0, epochs=1, batch_size=100, accumulate=200 if factor == 1 else 1)
    budget = Budget(3, 1e-5, 0.5, 1e-9, 1.0, 1, "seed")

    def step(rows):
        network = build(job.features, job.model.model_copy(update={"dropout": 0.0}), seed=1)
        private_pass(network, make_optimizer(network.parameters(), recipe), Average(network, 0, {}), rows, recipe, budget, loss_of(), epoch=1)
        return torch.cat([w.detach().flatten() for w in network.parameters()]).double()
    moved = float((step(rows) - step([r[1:] for r in rows])).norm())
    assert 0 < moved <= 0.5 / 100 * 1.001
    if factor > 1: assert moved > 0.5 / 100 * 0.99, "the row was not loud enough to show the bound"


def test_noise_has_the_size_that_the_accountant_reckons_with(job):
    "Rows without a say (none is drawn): what remains of a step is the noise."
    recipe, budget = Train(optimizer="torch.optim:SGD", learning_rate=1.0, weight_decay=0, epochs=1, batch_size=50), Budget(3, 1e-5, 2.0, 1.5, 0.0, 1, "system")

    def step():
        network = build(job.features, job.model.model_copy(update={"dropout": 0.0}), seed=1)
        before = torch.cat([w.detach().flatten().clone() for w in network.parameters()])
        private_pass(network, make_optimizer(network.parameters(), recipe), Average(network, 0, {}), tensors(job), recipe, budget, loss_of(), epoch=1)
        return torch.cat([w.detach().flatten() for w in network.parameters()]) - before
    first, second = step(), step()
    assert abs(float(first.std()) / (1.5 * 2.0 / 50) - 1) < 4 / math.sqrt(2 * len(first)) and not torch.equal(first, second)


def test_resumed_is_the_same_and_has_spent_the_same(job):
    whole = list(epochs(job))
    again = list(epochs(job, whole[1].state))
    assert len(whole) == 4 and [e.number for e in again] == [3, 4] and same(whole[-1].state.now, again[-1].state.now) and same(whole[-1].state.best, again[-1].state.best)
    assert again[-1].metrics == whole[-1].metrics and 2.9 < whole[-1].metrics["epsilon"] <= 3 and whole[-1].metrics["best_epoch"] == 4
    assert "train_loss" not in whole[-1].metrics
    other = list(epochs(replace(job, budget=replace(job.budget, noise="system"))))
    assert not same(whole[-1].state.now, other[-1].state.now) and other[-1].metrics["epsilon"] == whole[-1].metrics["epsilon"]


def test_shards_hold_every_row_once(job):
    parts = [job.shard(rank, 3) for rank in range(3)]
    assert sum(len(p.labels) for p in parts) == len(job.labels) and len({len(p.labels) for p in parts} | {p.budget for p in parts}) <= 3
    assert np.array_equal(np.sort(np.concatenate([p.rows.numbers[:, 1] for p in parts])), np.sort(job.rows.numbers[:, 1]))


def test_a_version_says_what_it_has_spent_and_tells_nothing_else(private, settings):
    run = train(private, settings)
    bundle = bundle_of(open_registry(settings), run.version)
    said = bundle.provenance["privacy"]
    assert 2.9 < said["epsilon"] <= 3 and said["noise"] == "seed" and said["steps"] == 4 * math.ceil(run.rows.parts.train.height / 64) and said["noise_multiplier"] > 0.3
    assert bundle.profile.columns == {}
    bounds = {n: (c.min, c.max) for n, c in private.contract.items()}
    for number in bundle.features.numbers: assert (number.edges[0], number.edges[-1]) == bounds[number.name]
    assert reproduce(bundle, "diabetes/1", settings, LocalBackend()).identical
    json.dumps(run.as_dict())


def test_noise_of_the_system_cannot_be_repeated(private, settings):
    hidden = private.model_copy(update={"train": private.train.model_copy(update={"privacy": Privacy(epsilon=3)})})
    run = train(hidden, settings)
    with pytest.raises(TrainingError, match="noise that nobody has kept"): reproduce(bundle_of(open_registry(settings), run.version), "diabetes/1", settings, LocalBackend())


def test_a_contract_that_leaves_something_open_is_a_letter(private, settings):
    column = private.contract["bmi"].model_copy(update={"max": None})
    with pytest.raises(SpecError, match="bmi: min and max"): train(private.model_copy(update={"contract": private.contract | {"bmi": column}}), settings)


def test_encoders_do_not_depend_on_rows(private, settings):
    rows = read_rows(private, settings)
    fewer = replace(rows, parts=replace(rows.parts, train=rows.parts.train.head(50)))
    assert make_job(private, rows).features == make_job(private, fewer).features
    first = make_job(private, rows)
    assert np.isfinite(apply(first.features, rows.parts.test, rows.parts.test.height).numbers).any()


@pytest.mark.ray
@pytest.mark.xdist_group("federation")
def test_two_workers_keep_the_same_promise(ray_cluster, job, tmp_path):
    "One worker gives the bits of this process; two draw other batches, and spend as much."
    from mlray.engines.train_on_ray import RayBackend
    here, one, two = (list(b.train(job, "p", tmp_path)) for b in (LocalBackend(), RayBackend(1), RayBackend(2)))
    assert same(here[-1].state.now, one[-1].state.now) and [e.metrics for e in here] == [e.metrics for e in one]
    assert two[-1].metrics["epsilon"] == here[-1].metrics["epsilon"] and not same(two[-1].state.now, here[-1].state.now) and len(two) == 4


@pytest.mark.parametrize("network", ["linear", "mlp"])
def test_a_network_of_one_member_answers_a_row_alone_as_among_others(diabetes, settings, network):
    "What privacy is best fitted with: packing would refuse it."
    changed = diabetes.model_copy(update={"model": diabetes.model.model_copy(update={"network": network}), "train": diabetes.train.model_copy(update={"epochs": 3})})
    assert str(train(changed, settings).version) == "diabetes/1"


def test_a_number_is_learned_on_a_scale_that_no_row_has_a_say_in(tmp_path):
    from mlray.values.settings import Settings, shipped
    from mlray.values.spec import changed, read_spec
    spec, settings = read_spec(shipped("configs") / "progression.yaml"), Settings(root=tmp_path, home=tmp_path, tracking="disabled")
    target = spec.task.targets[0]
    bounded = changed(spec, {"model.members": 2, "model.hidden": [8], "model.quantiles": [], "train.privacy": {"epsilon": 8, "noise": "seed"}, "train.epochs": 20} | {f"contract.{n}.{end}": value for n, c in spec.contract.items()
                             if c.type in ("integer", "number") and c.role in ("feature", "target") for end, value in (("min", 0 if c.min is None else c.min), ("max", 400 if c.max is None else c.max))})
    rows = read_rows(bounded, settings)
    job, fewer = make_job(bounded, rows), make_job(bounded, replace(rows, parts=replace(rows.parts, train=rows.parts.train[:100])))
    low, high = bounded.contract[target].min, bounded.contract[target].max
    assert job.task == fewer.task and math.isclose(job.task.center, (low + high) / 2) and math.isclose(job.task.spread, (high - low) / 12**0.5) and job.features == fewer.features
    run = train(bounded, settings)
    found, of_mean = run.evaluation.scorecard.overall["mean_absolute_error"].value, np.abs(rows.parts.test[target].to_numpy() - job.task.center).mean()
    assert found < of_mean, "better than the middle of the scale, which is all that is known before"
    assert bundle_of(open_registry(settings), run.version).provenance["privacy"]["epsilon"] <= 8
    with pytest.raises(SpecError, match=f"the scale of '{target}' is not learned from the rows: give it min and max"): changed(bounded, {f"contract.{target}.max": None})
