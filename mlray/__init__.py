"""From a notebook to a Ray Serve route, with the proof that the model may be there

Modules:

- `mlray.access`: Who may do what: keys, roles, actions
- `mlray.bundle`: What is shipped: one graph, its contract, its encoders, and where it came from
- `mlray.checkpoints`: The states of a run on disk, and the newest of them that is whole
- `mlray.cli`: The door: `mlray` on the command line
- `mlray.cluster_on_ray`: Join a Ray cluster, or have one of one's own for a while
- `mlray.commands`: What each command does, with its vendors chosen
- `mlray.contract`: What a row must look like, said once and held everywhere
- `mlray.display`: One table, three faces: a terminal, a notebook, Markdown
- `mlray.drift`: How far the rows have moved: distances with their intervals, one line a column, far and surely
- `mlray.errors`: One family of errors, each a short letter to a tired person
- `mlray.estimate`: What can be known before labels come: can the rows be told apart, and how good the answers should be
- `mlray.evaluation`: What a bundle does with rows it has not learned from
- `mlray.fairness`: How good for whom: every group metric from one table of counts
- `mlray.features`: Rows to numbers: learned once, on the training rows, and applied by one function everywhere
- `mlray.fetch`: Files by name, wherever they are: found, resumed, checked
- `mlray.fitting`: One pass over the rows: optimiser, learning rate, precision, and what stops it
- `mlray.gate`: May it go out: a candidate's measures against the rules, with every reason
- `mlray.gate_on_papermill`: Run notebooks as gates: strictly, side by side, kept as evidence
- `mlray.haproxy`: Close what is left open in front of a service
- `mlray.leakage`: What a model must not know: test rows it has learned from, and features that carry the answer
- `mlray.point_in_time`: What was known of an entity at a moment, and never what came later
- `mlray.population`: Trials that learn from one another, and the schedule that one of them has lived
- `mlray.profile`: A table, counted: histograms on fixed bins that add up, a few kilobytes for any number of rows
- `mlray.registry`: Versions, what was proved about them, and which of them is in production
- `mlray.reproduce`: The same run again, compared to the bit
- `mlray.rollout`: Does it stay out: promote, hold or roll back, valid however often one looks
- `mlray.rows`: From a spec to rows that may be learned from: found, read, held against the contract, divided
- `mlray.run`: The story of one run, from rows to a registered version with its verdict
- `mlray.samples`: Real rows that are there without a download
- `mlray.score`: How good: every measure with its interval, over all rows and by group
- `mlray.search`: What to try next, and what was found
- `mlray.serve_on_ray`: HTTP in front of the service, on Ray Serve
- `mlray.service`: Answer a request: check the key, check the rows, predict, say which version did
- `mlray.settings`: Where to run: environments, from `settings.ini` and `MLRAY_*`
- `mlray.source`: Rows as they are: from files, from a Delta table, from a database, from a function
- `mlray.spec`: What to run: rows, contract, network, training, gates, route
- `mlray.table`: Rows: named by a fingerprint, and divided the same way every time
- `mlray.track_on_wandb`: One W&B run for each training
- `mlray.tracking`: Who listens to a run
- `mlray.train_on_ray`: The same training loop, on as many Ray workers as there are
- `mlray.tune_on_ray`: A search for better values, on all cores, that goes on where it was killed
- `mlray.watermark`: A source that grows, read from where it was left: each row once"""

__version__ = "0.1.0"

import lazy_loader as _lazy

__getattr__, __dir__, __all__ = _lazy.attach(
    __name__,
    submod_attrs={
        "spec": ["read_spec"],
        "settings": ["read_settings"],
        "run": ["train"],
        "evaluation": ["evaluate", "read_candidate"],
        "gate": ["judge"],
        "bundle": ["load_bundle", "predict"],
        "registry": ["Registry", "open_registry"],
        "service": ["Service"],
        "score": ["scorecard"],
        "fairness": ["fairness_report"],
    },
)
