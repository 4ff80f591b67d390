"""A search: the same seed proposes the same, ASHA spends less, a killed driver loses nothing that was finished; and a version trained again is the same to the bit."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mlray.governance.registry import bundle_of, open_registry
from mlray.running.population import lived
from mlray.running.reproduce import reproduce
from mlray.running.run import LocalBackend, make_job, train
from mlray.running.search import Proposals, Proposing, Trial, best_of
from mlray.sources.rows import read_rows
from mlray.values.errors import SpecError, TrainingError
from mlray.values.settings import Settings, shipped
from mlray.values.spec import RunSpec, changed, parse_spec

DIABETES = (shipped("configs") / "diabetes.yaml").read_text()
SEARCH = """
search:
  trials: 8
  grace: 2
  space:
    train.learning_rate: {low: 1.0e-4, high: 0.1, log: true}
    model.dropout: {low: 0, high: 0.5}
    model.hidden: {choices: [[16], [32], [64, 64]]}
    model.bins: {low: 4, high: 12, integer: true}
"""


def spec_of(*overrides: str) -> RunSpec: return parse_spec(DIABETES + SEARCH, ["train.epochs=12", *overrides])


def in_a_home(folder: Path) -> Settings: return Settings(root=folder, home=folder / "home", object_store_mb=100, tracking="disabled")


@pytest.fixture
def project(tmp_path):
    "A folder with settings and a spec, and a command that runs there as a process of its own."
    (tmp_path / "settings.ini").write_text("[DEFAULT]\ntracking = disabled\nobject_store_mb = 100\n[local]\n")
    (tmp_path / "s.yaml").write_text(DIABETES + SEARCH)
    environ = {k: v for k, v in os.environ.items() if not k.startswith("MLRAY_")}

    def start(*words: str) -> subprocess.Popen:
        return subprocess.Popen([sys.executable, "-c", "from mlray.cli import main; main()", *words], cwd=tmp_path, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return tmp_path, start


# --- the spec

def test_a_path_that_does_not_exist(project):
    folder, start = project
    (folder / "s.yaml").write_text(DIABETES + SEARCH.replace("train.learning_rate", "train.learning_rat"))
    run = start("tune", "s.yaml")
    out, err = run.communicate(timeout=600)
    assert run.returncode == 2 and not out and "Traceback" not in err
    assert err.startswith("mlray: ") and "Did you mean 'train.learning_rate'?" in err and not (folder / ".mlray").exists()


def test_a_spec_without_a_search(project):
    folder, start = project
    (folder / "s.yaml").write_text(DIABETES)
    run = start("tune", "s.yaml")
    _, err = run.communicate(timeout=600)
    assert run.returncode == 2 and "no `search`" in err and not (folder / ".mlray").exists()


@pytest.mark.parametrize(("old", "new", "said"), [
    ("{low: 0, high: 0.5}", "{low: 0, high: 1.5}", "model.dropout cannot be 1.5"), ("integer: true", "log: true", "model.bins cannot be"), ("[64, 64]]", "[64, 0]]", "model.hidden cannot be"),
    ("{low: 0, high: 0.5}", "{low: 0}", "below high"), ("{low: 0, high: 0.5}", "{low: 0, high: 0.5, log: true}", "above 0"), ("{low: 0, high: 0.5}", "{low: 0, hihg: 0.5}", "Did you mean 'high'?"),
    ("grace: 2", "sampler: nsga2", "give prices"), ("grace: 2", "prices: [latensy]", "'latency', 'parameters' or 'seconds'"),
    ("grace: 2", "scheduler: pbt\n  epochs: 9", "epochs does not go with pbt"), ("trials: 8", "trials: 1\n  scheduler: pbt", "two trials or more"), ("grace: 2", "at_most: {parameters: 0}", "greater than 0"),
    ("grace: 2", "grase: 2", "Did you mean 'grace'?"), ("model.dropout", "data.split.seed", "no 'data.split.seed' to search"), ("{low: 0, high: 0.5}", "{}", "either low and high, or choices")])
def test_a_space_that_cannot_be(old, new, said):
    with pytest.raises(SpecError) as letter: parse_spec(DIABETES + SEARCH.replace(old, new))
    assert said in str(letter.value)


def test_a_search_belongs_to_what_is_asked_for_and_its_absence_changes_no_id():
    plain = parse_spec(DIABETES)
    assert spec_of("train.epochs=60").id != plain.id and "search" not in json.dumps(plain.model_dump(mode="json", exclude={"search"}))
    assert parse_spec(DIABETES, ["search=null"]).id == plain.id


# --- proposals

def proposed(*overrides: str, tell=lambda values: values["model.dropout"]) -> list[dict]:
    search, made = spec_of("search.trials=30", *overrides).search, []
    proposals = Proposals(search)
    for _ in range(search.trials):
        made.append(proposals.ask())
        proposals.tell(tell(made[-1]))
    return made


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_the_same_seed_proposes_the_same(sampler):
    first = proposed(f"search.sampler={sampler}")
    assert first == proposed(f"search.sampler={sampler}") != proposed(f"search.sampler={sampler}", "search.seed=1")
    assert len({json.dumps(values) for values in first}) == 30 and all(4 <= values["model.bins"] <= 12 and isinstance(values["model.bins"], int) for values in first)


def test_tpe_learns_and_random_does_not():
    last = lambda sampler: sum(values["model.dropout"] for values in proposed(f"search.sampler={sampler}")[-10:]) / 10
    assert last("tpe") < 0.15 < last("random")
    assert proposed("search.sampler=random") == proposed("search.sampler=random", tell=lambda values: -values["model.dropout"])


def planned(*overrides: str, value=lambda values: values["model.dropout"], parameters=lambda values: 1) -> list[dict]:
    "What a search tries whose results arrive in the order of proposal."
    search, known = spec_of("search.scheduler=none", *overrides).search, {}
    plan = Proposing(search, {"train": "1", "valid": "2"})
    while step := plan.next(known): known[step.key] = Trial(step.number, step.key, step.values, 1, value(step.values), None, .1, parameters(step.values))
    assert plan.ended
    return [known[key].values for key in plan.order]


@pytest.mark.parametrize("sampler", ["tpe", "nsga2"])
def test_two_goals_are_weighed(sampler):
    "Dropout near 0.2 is as good as it gets in one goal, and near 0.4 in the other: what lies between is on the front, and that is where a search of both ends up."
    share = lambda found: sum(0.19 <= values["model.dropout"] <= 0.41 for values in found[-20:]) / 20
    both = planned(f"search.sampler={sampler}", "search.prices=[parameters]", "search.trials=120", "search.parallel=4",
                   value=lambda v: (v["model.dropout"] - 0.2)**2, parameters=lambda v: (v["model.dropout"] - 0.4)**2)
    assert share(both) > 0.65 > share(planned("search.sampler=random", "search.trials=120"))


def test_patience_ends_a_search_at_the_same_trial_whoever_comes_first():
    tried = planned("search.trials=60", "search.patience=4", "search.parallel=3")
    known = [values["model.dropout"] for values in tried[:len(tried) - 2]] # what the decision knew
    assert len(tried) < 60 and len(known) - 1 - known.index(min(known)) == 4
    search, results = spec_of("search.scheduler=none", "search.trials=60", "search.patience=4", "search.parallel=3").search, {}
    plan, waiting = Proposing(search, {"train": "1", "valid": "2"}), []
    while not plan.ended or waiting: # three at a time, the newest of them always first to end
        while len(waiting) < 3 and (step := plan.next(results)): waiting.append(step)
        if waiting: results |= {(s := waiting.pop()).key: Trial(s.number, s.key, s.values, 1, s.values["model.dropout"], None, .1, 1)}
    assert [results[key].values for key in plan.order] == tried


# --- on Ray

@pytest.fixture(scope="module")
def tuned(ray_cluster, tmp_path_factory):
    "A search with ASHA and TPE past its random beginning, and what came of it."
    from mlray.engines.tune_on_ray import tune
    settings = in_a_home(tmp_path_factory.mktemp("tuned"))
    return settings, tune(spec_of("search.trials=14", "search.parallel=3"), settings)


@pytest.mark.ray
@pytest.mark.xdist_group("search")
class TestOnRay:
    def test_the_best_trial_becomes_a_version(self, tuned):
        settings, done = tuned
        good = [t.value for t in done.trials if not t.failed]
        assert len(good) == 14 == len({t.key for t in done.trials}) and done.best.value == min(good) and [t.number for t in done.trials] == [*range(1, 15)]
        bundle = bundle_of(open_registry(settings), done.run.version)
        assert bundle.provenance["search"] == {"name": f"diabetes-{spec_of('search.trials=14', 'search.parallel=3').id}-search", "trial": done.best.number, "seed": 0}
        assert bundle.spec.model.hidden == tuple(done.best.values["model.hidden"]) and bundle.spec.model.bins == done.best.values["model.bins"]
        said = json.loads(json.dumps(done.as_dict(), allow_nan=False))
        assert said["version"] == "diabetes/1" and said["overrides"] == done.best.values and len(said["trials"]) == 14 and said["verdict"]["findings"]

    def test_a_trial_finds_what_a_run_finds(self, tuned, tmp_path):
        "The trial's metric is, to the bit, that of the same spec trained in this process: the loop is the same, and so are the encoders, whatever `model.bins`."
        _, done = tuned
        for trial in (done.best, max(done.trials, key=lambda t: t.values["model.bins"])):
            spec = changed(spec_of(), trial.values)
            losses = [e.metrics["valid_loss"] for e in LocalBackend().train(make_job(spec, read_rows(spec, in_a_home(tmp_path))), "d", tmp_path)]
            assert trial.value == min(losses[:trial.epochs]) and trial.early == min(losses[:2])

    @pytest.mark.chaos
    def test_the_same_seed_gives_the_same_trials_and_asha_spends_less(self, tuned, tmp_path):
        from mlray.engines.tune_on_ray import search_trials
        _, done = tuned
        spec, settings = spec_of("search.trials=14", "search.parallel=3"), in_a_home(tmp_path)
        again = search_trials(spec, read_rows(spec, settings), settings)
        assert [(t.key, t.early) for t in again] == [(t.key, t.early) for t in done.trials]
        whole = changed(spec, {"search.scheduler": "none", "search.sampler": "random"})
        every = search_trials(whole, read_rows(whole, settings), settings)
        stopped = search_trials(changed(whole, {"search.scheduler": "asha"}), read_rows(whole, settings), settings)
        assert [t.key for t in stopped] == [t.key for t in every] and sum(t.epochs for t in stopped) < 0.75 * sum(t.epochs for t in every)

    def test_a_search_that_is_done_runs_nothing(self, tuned):
        from mlray.engines.tune_on_ray import search_trials
        settings, done = tuned
        spec, said = spec_of("search.trials=14", "search.parallel=3"), []
        assert search_trials(spec, read_rows(spec, settings), settings, said.append) == done.trials and said == ["14 trials are known already"]

    def test_other_rows_are_another_search(self, tuned, tmp_path):
        from mlray.engines.tune_on_ray import search_trials
        settings, _ = tuned
        spec = spec_of("search.trials=14", "search.parallel=3")
        other, said = changed(spec, {"data.split.seed": 3, "search.trials": 2}), []
        search_trials(other, read_rows(other, settings), settings, said.append)
        assert search_trials(other, read_rows(changed(other, {"data.split.seed": 4}), settings), settings, said.append) and sum("trial " in s for s in said) == 4

    def test_a_trial_that_fails_ends_itself_and_a_small_space_ends_the_search(self, ray_cluster, tmp_path):
        from mlray.engines.tune_on_ray import search_trials
        spec = parse_spec(DIABETES + "search: {trials: 9, space: {train.learning_rate: {choices: [1.0e-3, 1.0e+30]}}}", ["train.epochs=5"])
        trials = search_trials(spec, read_rows(spec, in_a_home(tmp_path)), in_a_home(tmp_path))
        assert len(trials) == 2 and {bool(t.failed) for t in trials} == {True, False}
        assert next(t for t in trials if t.failed).value is None and "Lower train.learning_rate" in next(t for t in trials if t.failed).failed

    def test_a_population_learns_and_its_winner_is_reproduced(self, ray_cluster, tmp_path):
        "The winner's state went from trial to trial through files; trained in one go, its schedule comes to the same losses, to the bit."
        from mlray.engines.tune_on_ray import tune
        spec, settings = spec_of("search.scheduler=pbt", "search.trials=4", "search.grace=3"), in_a_home(tmp_path)
        done = tune(spec, settings)
        assert [len([t for t in done.trials if t.behind == at]) for at in (0, 3, 6, 9)] == [4, 4, 4, 4] and len({t.key for t in done.trials}) == 16
        keys = {t.key: t for t in done.trials}
        followed = [t for t in done.trials if t.parent and t.values != keys[t.parent].values]
        assert followed and all(t.values["model.hidden"] == keys[t.parent].values["model.hidden"] for t in followed)
        assert not list((settings.home / "runs").glob("*-search/states"))
        late = max(followed, key=lambda t: t.behind)
        for trial in (late, done.best):
            lives = changed(spec, lived(keys, trial))
            losses = [e.metrics["valid_loss"] for e in LocalBackend().train(make_job(lives, read_rows(lives, settings)), "d", tmp_path)]
            assert losses[trial.behind + trial.epochs - 1] == trial.last and min(losses[:trial.behind + trial.epochs]) == trial.value
        assert lived(keys, late)["train.changes"]
        assert reproduce(bundle_of(open_registry(settings), done.run.version), "diabetes/1", settings, LocalBackend()).identical

    def test_a_budget_ends_a_search_and_what_costs_too_much_is_not_chosen(self, ray_cluster, tmp_path):
        from mlray.engines.tune_on_ray import search_trials, tune
        spec, settings = spec_of("search.trials=500", "search.epochs=60", "search.prices=[latency, parameters]", "search.at_most={parameters: 16000}"), in_a_home(tmp_path)
        done = tune(spec, settings)
        spent = sum(t.epochs for t in done.trials)
        assert 60 <= spent <= 60 + 4 * 12 and len(done.trials) < 60
        affordable = [t for t in done.trials if t.parameters <= 16000]
        assert done.best == best_of(affordable) and len(affordable) < len(done.trials) and all(t.latency > 0 for t in done.trials)
        assert done.as_dict()["pareto"].keys() == {"latency parameters"} and "<svg" in done._repr_html_()
        assert search_trials(spec, read_rows(spec, settings), settings) == done.trials # it is spent: nothing more is run

    @pytest.mark.chaos
    def test_a_trial_of_two_workers_finds_what_a_run_of_two_finds(self, ray_cluster, tmp_path):
        from mlray.engines.train_on_ray import RayBackend
        from mlray.engines.tune_on_ray import search_trials
        spec, settings = spec_of("search.workers=2", "search.trials=3", "search.scheduler=none"), in_a_home(tmp_path)
        with pytest.raises(SpecError, match="RayBackend"): search_trials(spec, read_rows(spec, settings), settings)
        with pytest.raises(TrainingError, match="the cluster has"): search_trials(changed(spec, {"search.workers": 999}), read_rows(spec, settings), settings, each=RayBackend(999))
        trials = search_trials(spec, read_rows(spec, settings), settings, each=RayBackend(2))
        assert len(trials) == 3 and not any(t.failed for t in trials)
        one = changed(spec, trials[0].values)
        losses = [e.metrics["valid_loss"] for e in RayBackend(2).train(make_job(one, read_rows(one, settings)), "d", tmp_path)]
        assert trials[0].value == min(losses[:trials[0].epochs])

    @pytest.mark.chaos
    def test_a_trial_of_two_workers_that_is_stopped_gives_its_cores_back(self, ray_cluster, tmp_path):
        import ray

        from mlray.engines.train_on_ray import RayBackend
        from mlray.engines.tune_on_ray import search_trials
        spec, settings = spec_of("search.workers=2", "search.trials=6", "search.sampler=random", "search.grace=1", "search.reduction=2", "train.epochs=40", "train.patience=40"), in_a_home(tmp_path)
        trials = search_trials(spec, read_rows(spec, settings), settings, each=RayBackend(2))
        assert len(trials) == 6 and not any(t.failed for t in trials) and min(t.epochs for t in trials) < 40 == max(t.epochs for t in trials)
        until = time.monotonic() + 10
        while (free := ray.available_resources().get("CPU", 0)) < ray.cluster_resources()["CPU"] and time.monotonic() < until: time.sleep(0.1)
        assert free == ray.cluster_resources()["CPU"]
        budget = changed(spec, {"search.epochs": 10, "search.trials": 50})
        assert len(search_trials(budget, read_rows(budget, settings), settings, each=RayBackend(2))) < 10

    def test_two_workers_are_reproduced(self, ray_cluster, tmp_path, diabetes):
        from mlray.engines.train_on_ray import RayBackend
        settings = in_a_home(tmp_path)
        run = train(changed(diabetes, {"train.epochs": 4}), settings, RayBackend(2))
        made = reproduce(bundle_of(open_registry(settings), run.version), "diabetes/1", settings, RayBackend(2))
        assert made.identical and made.differences == ()


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")] if path.is_file() else []


@pytest.mark.chaos
@pytest.mark.ray
@pytest.mark.xdist_group("search")
def test_a_driver_killed_twice_loses_nothing_and_repeats_nothing(project):
    folder, start = project
    words = ("tune", "s.yaml", "train.epochs=40", "train.patience=40", "train.batch_size=8", "search.grace=10", "--json")
    path, before = folder / ".mlray/runs" / f"diabetes-{parse_spec(DIABETES + SEARCH, words[2:6]).id}-search/results.jsonl", []
    for wanted in (2, 5):
        run = start(*words)
        while len(lines(path)) < wanted:
            assert run.poll() is None, run.communicate()
            time.sleep(0.02)
        os.kill(run.pid, signal.SIGKILL)
        run.wait()
        kept = lines(path)
        assert wanted <= len(kept) < 8 and kept[:len(before)] == before
        before = kept
        with path.open("ab") as file: file.write(b'{"number": 7, "key": "0') # the machine died, too, in the middle of a line
    run = start(*words)
    out, err = run.communicate(timeout=600)
    said = json.loads(out)
    assert run.returncode == (0 if said["verdict"]["passed"] else 1), err
    assert lines(path)[:len(before)] == before and len(lines(path)) == 8 == len({t["key"] for t in lines(path)}) == len(path.read_bytes().splitlines())
    proposals = Proposals(spec_of().search) # eight trials are TPE's random beginning: what an undisturbed search tries
    assert [t["values"] for t in said["trials"]] == [proposals.ask() for _ in range(8)] and sorted(t["key"] for t in said["trials"]) == sorted(t["key"] for t in lines(path))
    assert said["version"] == "diabetes/1" and f"{len(before)} trials are known already" in err


# --- again, to the bit

def test_an_untouched_version_is_reproduced(project):
    _, start = project
    start("train", "s.yaml", "train.epochs=3").communicate()
    run = start("reproduce", "diabetes/1", "--json")
    said = json.loads(run.communicate(timeout=600)[0])
    assert run.returncode == 0 and said["identical"] and said["differences"] == [] and said["weights"]["then"] == said["weights"]["now"]
    assert start("reproduce", "diabetes/2").wait() == 2


def test_changed_rows_are_named(project):
    from mlray.samples import diabetes
    folder, start = project
    text = DIABETES.replace("{call: mlray.samples:diabetes}", "{file: rows.csv}")
    assert text != DIABETES
    (folder / "s.yaml").write_text(text)
    diabetes().write_csv(folder / "rows.csv")
    start("train", "s.yaml", "train.epochs=3").communicate()
    diabetes().tail(400).write_csv(folder / "rows.csv")
    run = start("reproduce", "diabetes/1", "--json")
    said = json.loads(run.communicate(timeout=600)[0])
    assert run.returncode == 1 and not said["identical"] and {d["what"] for d in said["differences"]} == {"training rows", "validation rows", "test rows"}


def test_a_changed_package_is_named(trained, tmp_path):
    from safetensors.numpy import load

    from mlray.shipping.bundle import pack, predict
    settings, run = trained
    bundle = bundle_of(open_registry(settings), run.version)
    job = make_job(bundle.spec, run.rows)
    older = {**bundle.provenance, "packages": {**bundle.provenance["packages"], "torch": "2.12.0"}}
    made = pack(tmp_path / "bundle", bundle.spec, bundle.features, (bundle.path / "model.onnx").read_bytes(), load((bundle.path / "weights.safetensors").read_bytes()), older,
                job.valid_rows, predict(bundle, run.rows.parts.valid, run.rows.parts.valid.height))
    again = reproduce(made, "diabetes/9", settings, LocalBackend())
    assert again.identical and [(d.what, d.then) for d in again.differences] == [("package torch", "2.12.0")] and "although this has changed: package torch" in again.finding


@pytest.mark.chaos
@pytest.mark.ray
def test_a_search_in_a_notebook_has_its_card(tmp_path):
    "In a real kernel, on a real Ray: one card for the trials, with the front at its end, and one for the training of the best."
    import nbformat
    from nbclient import NotebookClient
    (tmp_path / "s.yaml").write_text(DIABETES + SEARCH)
    code = 'import mlray; from mlray.values.settings import Settings; from pathlib import Path\nfound = mlray.tune(mlray.read_spec("s.yaml", ["train.epochs=4", "search.trials=4"]), Settings(root=Path("."), home=Path("home"), object_store_mb=100, tracking="disabled"))'
    page = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code), nbformat.v4.new_code_cell("found")])
    NotebookClient(page, timeout=400, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = page.cells[0].outputs
    assert [o.output_type for o in outputs] == ["display_data", "display_data"], [str(o)[:300] for o in outputs]
    search, training = (o.data["text/html"] for o in outputs)
    assert "trial 4/4" in search and "best is" in search and "valid_loss against parameters" in search and "epoch 4/4" in training and "diabetes/1" in training
    assert "valid_loss against" in page.cells[1].outputs[0].data["text/html"]
    print(outputs[0].data["text/plain"])
