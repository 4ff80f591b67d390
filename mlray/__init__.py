"""From a notebook to a Ray Serve route, with the proof that the model may be there

Modules:

- `mlray.accepted`: How far a growing source has been read, and the rows that came of it
- `mlray.access`: Who may do what: keys, roles, actions
- `mlray.adversarial`: How little it takes when somebody tries: FGSM and PGD on the numbers of a row
- `mlray.answer`: What one prediction looks like on the wire, for each kind of target
- `mlray.behaviour`: What a model must do whatever its scores are: invariance, direction, minimum function
- `mlray.bundle`: What is shipped: one graph, its contract, its encoders, and where it came from
- `mlray.calibration`: Scores that can be taken at their word: fitted on validation rows, shipped in the graph
- `mlray.checkpoints`: The states of a run on disk, and the newest of them that is whole
- `mlray.cli`: The door: `mlray` on the command line
- `mlray.cluster_on_ray`: Join a Ray cluster, or have one of one's own for a while
- `mlray.commands`: What each command does, with its vendors chosen
- `mlray.contract`: What a row must look like, said once and held everywhere
- `mlray.counterfactual`: What would have to be different for another answer: the smallest change that flips it
- `mlray.counts`: One small table that stands for all rows: slices × label × decision × score bin; tables add
- `mlray.decision`: From a score to a decision: calibration, threshold and fairness, as intent
- `mlray.declared`: Rows to numbers without having seen a row: encoders that follow from the contract alone
- `mlray.display`: One table, three faces: a terminal, a notebook, Markdown
- `mlray.drift`: How far the rows have moved: distances with their intervals, one line a column, far and surely
- `mlray.errors`: One family of errors, each a short letter to a tired person
- `mlray.estimate`: What can be known before labels come: can the rows be told apart, and how good the answers should be
- `mlray.estimator`: Models of scikit-learn, LightGBM and XGBoost: the same rows, the same graph
- `mlray.evaluation`: What a bundle does with rows it has not learned from
- `mlray.explain`: Why this answer: a straight line through the model's answers nearby, the same to the byte for the same row
- `mlray.features`: Rows to numbers: learned once, on the training rows, and applied by one function everywhere
- `mlray.federate_on_ray`: Learning from rows that stay with their holders
- `mlray.fetch`: Files by name, wherever they are: found, resumed, checked
- `mlray.fitting`: One pass over the rows: optimiser, learning rate, precision, and what stops it
- `mlray.fitting_privately`: One pass over the rows under differential privacy: what one row can do is bounded, and hidden by noise
- `mlray.gaps`: How far groups are apart, where answers are classes, labels or numbers
- `mlray.gate`: May it go out: a candidate's measures against the rules, with every reason
- `mlray.gate_on_papermill`: Run notebooks as gates: strictly, side by side, kept as evidence
- `mlray.haproxy`: Close what is left open in front of a service
- `mlray.importance`: What a model hangs on, over many rows: permutation importance, and explanations that add up
- `mlray.leakage`: What a model must not know: test rows it has learned from, and features that carry the answer
- `mlray.loss`: How wrong answers are: a loss for each kind of target, or one of your own, weighted by class and by row
- `mlray.mitigation`: Training so that groups fare alike: weights of rows, and mixtures under a constraint
- `mlray.own_network`: Bring your own network: any `torch.nn.Module`, given what it asks for by name
- `mlray.point_in_time`: What was known of an entity at a moment, and never what came later
- `mlray.population`: Trials that learn from one another, and the schedule that one of them has lived
- `mlray.profile`: A table, counted: histograms on fixed bins that add up, a few kilobytes for any number of rows
- `mlray.progress`: A bar for a person who waits, in a terminal and in JupyterLab
- `mlray.ranking`: Ranking and calibration from score bins, each with the bound of what the bins hide
- `mlray.registry`: Versions, what was proved about them, and which of them is in production
- `mlray.reproduce`: The same run again, compared to the bit
- `mlray.robust`: How fragile: which answers flip when rows are slightly wrong, for whom, and what the contract catches first
- `mlray.rollout`: Does it stay out: promote, hold or roll back, valid however often one looks
- `mlray.rows`: From a spec to rows that may be learned from: found, read, held against the contract, divided
- `mlray.run`: The story of one run, from rows to a registered version with its verdict
- `mlray.samples`: Real rows that are there without a download
- `mlray.score`: How good: every measure with its interval, over all rows and by group
- `mlray.search`: What to try next, and what was found
- `mlray.serve_on_ray`: HTTP in front of the service, on Ray Serve
- `mlray.service`: Answer a request: check the key, check the rows, predict, say which version did
- `mlray.settings`: Where to run: environments, from `settings.ini` and `MLRAY_*`
- `mlray.shapley`: Why this answer: the score, shared out among the features so that the shares add up
- `mlray.slices`: Where a model does worst: a search through slices of up to three conditions, corrected for having searched
- `mlray.source`: Rows as they are: from files, from a Delta table, from a database, from a topic, from a function
- `mlray.spec`: What to run: rows, contract, network, training, gates, route
- `mlray.summary`: What a holder of rows may tell about them, so that encoders can be learned for all
- `mlray.survey`: All rows of a source held against the contract, piece by piece: more than fit into memory
- `mlray.table`: Rows: named by a fingerprint, and divided the same way every time
- `mlray.task`: What is to be predicted: one of two, one of several, any of several, a number, or quantiles of a number
- `mlray.topic`: A Kafka topic as rows: from an offset to the end that it had when it was opened
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
        "lab": ["load_ipython_extension"],
    },
)
