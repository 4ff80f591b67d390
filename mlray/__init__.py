"""From a notebook to a Ray Serve route, with the proof that the model may be there

Modules:

- `mlray.about`: What only people can say of a model: who answers for it, what it is for, what its rows are
- `mlray.accepted`: How far a growing source has been read, and the rows that came of it
- `mlray.access`: Who may do what: keys, roles, actions
- `mlray.adversarial`: How little it takes when somebody tries: FGSM and PGD on the numbers of a row
- `mlray.alert`: Tell who must know, once: what moved, for whom, since when, which rows, and what may be done
- `mlray.answer`: What one prediction looks like on the wire, for each kind of target
- `mlray.archive`: Segments become Parquet by day, model and version; read exactly, kept for a time, erased by person
- `mlray.arrow`: Rows in bulk: an Arrow IPC stream in, an Arrow IPC stream out
- `mlray.attestation`: What is signed here, by whom, and whether it is enough
- `mlray.audit`: A chain that breaks if it is touched
- `mlray.backup`: A copy of a running registry, and the way back from it
- `mlray.backup_cli`: The commands that keep a registry and bring it back
- `mlray.behaviour`: What a model must do whatever its scores are: invariance, direction, minimum function
- `mlray.bundle`: What is shipped: one graph, its contract, its encoders, and where it came from
- `mlray.calibration`: Scores that can be taken at their word: fitted on validation rows, shipped in the graph
- `mlray.card`: A version's papers, made from what is known of it: the model card, as Markdown, as a page, as JSON
- `mlray.catalogue`: Every data set that a version was made of, and what came of it
- `mlray.chart`: Plots as plain SVG: values with their intervals, lines, points, bars
- `mlray.checkpoints`: The states of a run on disk, and the newest of them that is whole
- `mlray.cli`: The door: `mlray` on the command line
- `mlray.client`: Ask a service from Python, and not give up too soon
- `mlray.cluster_cli`: `mlray cluster plan`: what a file would start
- `mlray.cluster_file`: A launcher or manifests, read and planned
- `mlray.cluster_on_ray`: Join a Ray cluster, or have one of one's own for a while
- `mlray.cluster_plan`: Whether a cluster is large enough for what is to run on it, and what it costs
- `mlray.column`: What one column of a table may hold, and what it is for
- `mlray.commands`: What each command does, with its vendors chosen
- `mlray.comparison`: Two models on the same rows: how far apart, and whether that can be chance
- `mlray.compliance`: What GDPR and the EU AI Act ask, the evidence there is, and what is missing
- `mlray.contract`: What a row must look like, said once and held everywhere
- `mlray.counterfactual`: What would have to be different for another answer: the smallest change that flips it
- `mlray.counts`: One small table that stands for all rows: slices × label × decision × score bin; tables add
- `mlray.data`: Which rows: their sources, and how they are divided
- `mlray.data_sheet`: The rows behind a version: what they are, where they came from, what was done to them
- `mlray.database`: One transaction, one line of audit, on SQLite or PostgreSQL
- `mlray.decision`: From a score to a decision: calibration, threshold and fairness, as intent
- `mlray.declared`: Rows to numbers without having seen a row: encoders that follow from the contract alone
- `mlray.deed`: What somebody who may do it does once, or is refused
- `mlray.display`: One table, three faces: a terminal, a notebook, Markdown
- `mlray.doctor`: What is wrong with this machine or cluster, and how to mend it
- `mlray.drift`: How far the rows have moved: distances with their intervals, one line a column, far and surely
- `mlray.errors`: One family of errors, each a short letter to a tired person
- `mlray.estimate`: What can be known before labels come: can the rows be told apart, and how good the answers should be
- `mlray.estimator`: Models of scikit-learn, LightGBM and XGBoost: the same rows, the same graph
- `mlray.estimator_graph`: Fitted estimators of scikit-learn, LightGBM and XGBoost as ONNX graphs that keep the laws
- `mlray.evaluation`: What a bundle does with rows it has not learned from
- `mlray.examination`: The facts of this machine, gathered without changing anything
- `mlray.explain`: Why this answer: a straight line through the model's answers nearby, the same to the byte for the same row
- `mlray.explain_image`: Which parts of an image an answer hangs on
- `mlray.explain_on_ray`: Many rows explained at once, on Ray Data
- `mlray.explain_row`: Why a row is answered as it is, when some of its columns are texts, pictures or signals
- `mlray.explain_text`: Which words an answer hangs on
- `mlray.explanation`: A bundle's answers, explained and shaken
- `mlray.faces`: What commands show: one value for programs, tables for people
- `mlray.fairness`: How good for whom: every group metric from one table of counts
- `mlray.feature`: How a column becomes numbers, and columns made from others
- `mlray.features`: Rows to numbers: learned once, on the training rows, and applied by one function everywhere
- `mlray.federate_on_ray`: Learning from rows that stay with their holders
- `mlray.feedback`: What became of an answer: labels, corrections, ratings, clicks, any number; late, early, twice, or never
- `mlray.fetch`: Files by name, wherever they are: found, resumed, checked
- `mlray.first_look`: A file with rows, looked at for the first time: how it is written, and a spec to begin with
- `mlray.fitting`: One pass over the rows: optimiser, learning rate, precision, and what stops it
- `mlray.fitting_privately`: One pass over the rows under differential privacy: what one row can do is bounded, and hidden by noise
- `mlray.gaps`: How far groups are apart, where answers are classes, labels or numbers
- `mlray.garbage`: Bytes that no row names any more, taken away without taking a live one
- `mlray.gate`: May it go out: a candidate's measures against the rules, with every reason
- `mlray.gate_on_papermill`: Run notebooks as gates: strictly, side by side, kept as evidence
- `mlray.gate_on_ray`: Gates as tasks of a cluster: each with the CPUs, GPUs and memory that it asks for
- `mlray.gate_page`: An executed notebook as proof: what it says, where it broke, and what of it may be kept
- `mlray.gate_report`: What gates found, for those who read it elsewhere: JUnit, GitHub, a summary, pages
- `mlray.gradient`: What the network itself says: what each feature adds to the logit
- `mlray.haproxy`: Close what is left open in front of a service
- `mlray.harmless`: May a graph be run: one that only computes, of its inputs, within bounds
- `mlray.importance`: What a model hangs on, over many rows: permutation importance, and explanations that add up
- `mlray.imported`: What a spec names by where it is imported from
- `mlray.infer`: A first contract, from rows, for a person to correct
- `mlray.intervals`: How far a number from counts can be trusted: effective rows, DeLong, and a bootstrap that never sees a row
- `mlray.journal`: One durable record for each answer, written before the answer is sent
- `mlray.keeping`: What of a row may be kept: all of a value, a pseudonym, a bucket, or nothing
- `mlray.lab`: `%load_ext mlray`: commands where the models are looked at
- `mlray.launcher`: What is wrong with a file for `ray up`
- `mlray.leakage`: What a model must not know: test rows it has learned from, and features that carry the answer
- `mlray.ledger`: Whether what is known is what was done
- `mlray.lineage`: What a version came from
- `mlray.local_line`: A straight line through scores nearby, with sums that come out the same everywhere
- `mlray.loss`: How wrong answers are: a loss for each kind of target, or one of your own, weighted by class and by row
- `mlray.made_columns`: Columns made from others, of one row or of many: expressions, and parts of dates
- `mlray.manifest`: What is wrong with manifests for KubeRay
- `mlray.membership`: Who is in there: whether a model tells which rows it has learned from
- `mlray.meters`: What a replica counts, for Prometheus
- `mlray.mirror_on_mlflow`: A folder that MLflow can load and serve
- `mlray.mitigation`: Training so that groups fare alike: weights of rows, and mixtures under a constraint
- `mlray.mixture`: Two means from their sums, compared at every look
- `mlray.mlflow`: What an MLflow client sends to `/invocations`
- `mlray.model`: Fitting a network: training as a generator of epochs
- `mlray.moments`: Means of anything a column can hold, from sums that add: errors of a regression, cost, latency
- `mlray.monitor`: How a version fares: what it is asked, what it answers, how good that is, for whom, and how fast
- `mlray.network`: Numbers to scores: TabM and its simpler relatives, and the graph they become
- `mlray.network_inputs`: What was learned about the rows, as the first layers of a network
- `mlray.oidc`: Who bears a token of the house's own identity provider
- `mlray.open_inference`: The Open Inference Protocol v2: a tensor a column
- `mlray.openapi`: The routes, described for people and programs
- `mlray.opened`: A registry that is open, who acts in it, and the keys by which they are known
- `mlray.outbox`: What others are to be told, kept until they have heard it
- `mlray.own_network`: Bring your own network: any `torch.nn.Module`, given what it asks for by name
- `mlray.paired`: Every measure of two models on the same rows, whatever they predict, and how far apart their groups are
- `mlray.papers_cli`: The commands of papers, data sets and the registry's own upkeep
- `mlray.pieces`: Rows that pass by in pieces, and a bounded sample that stands for all of them
- `mlray.plan`: What is to be served, read from the registry, and followed as it changes
- `mlray.point_in_time`: What was known of an entity at a moment, and never what came later
- `mlray.policy`: What an environment asks of a version that is let out
- `mlray.population`: Trials that learn from one another, and the schedule that one of them has lived
- `mlray.profile`: A table, counted: histograms on fixed bins that add up, a few kilobytes for any number of rows
- `mlray.progress`: A bar for a person who waits, in a terminal and in JupyterLab
- `mlray.project`: A project as it is to be written: its spec, its source, its gates
- `mlray.project_folder`: A new project in its folder: all of it, or nothing
- `mlray.project_pages`: The notebooks of a new project
- `mlray.proof`: A version, checked from the bytes up by somebody who trusts nobody here
- `mlray.proof_cli`: The commands of proof: sign, verify, who signs, and the audit
- `mlray.ranking`: Ranking and calibration from score bins, each with the bound of what the bins hide
- `mlray.rates`: What a confusion matrix says: every rate, for one matrix or a million
- `mlray.recipe`: What is fitted, and how: the network or the estimator, the loss, the optimiser
- `mlray.registry`: Versions, what was proved about them, and which of them is in production
- `mlray.registry_on_ray`: The registry, from any node of a cluster
- `mlray.release`: Who stands for a version, and how its end is announced
- `mlray.release_cli`: The commands of a release: who approves, what goes out and comes back, keys, mirrors
- `mlray.replay`: Two models on the same requests: which decisions flip, which way, and for whom
- `mlray.replayed`: What was asked in production, asked again of another version
- `mlray.reproduce`: The same run again, compared to the bit
- `mlray.request`: One row as it comes in a request, held to the same rules
- `mlray.robust`: How fragile: which answers flip when rows are slightly wrong, for whom, and what the contract catches first
- `mlray.rollout`: Does it stay out: promote, hold or roll back, valid however often one looks
- `mlray.rollout_policy`: How a new version takes over, as intent
- `mlray.rollout_run`: From windows to a decision about a canary
- `mlray.routes`: One table of everything that can be asked
- `mlray.rows`: From a spec to rows that may be learned from: found, read, held against the contract, divided
- `mlray.run`: The story of one run, from rows to a registered version with its verdict
- `mlray.runbook`: What to type when this model is let out, looked after, in trouble, or at its end
- `mlray.sample_networks`: Two networks of ten lines, one for pictures and one for text, as a user would bring them
- `mlray.samples`: Real rows that are there without a download
- `mlray.schema`: The JSON Schema of a spec, so that an editor completes and corrects while one writes
- `mlray.score`: How good: every measure with its interval, over all rows and by group
- `mlray.score_of_classes`: How good, where one of several classes is right, or any of several labels
- `mlray.score_of_counts`: A scorecard from counts alone: no row is seen again
- `mlray.score_of_numbers`: How good, where a number is predicted, or quantiles of it
- `mlray.search`: What to try next, and what was found
- `mlray.search_space`: Where to look for better values, as intent
- `mlray.serve_cli`: The commands of a service that runs: who gets which version
- `mlray.serve_on_ray`: HTTP in front of the service, on Ray Serve
- `mlray.serve_policy`: How a version answers, as intent
- `mlray.served`: One version that answers: rows of any kind in, scores out
- `mlray.service`: Answer a request: check the key, check the rows, choose a version, predict, say which version did
- `mlray.settings`: Where to run: environments, from `settings.ini` and `MLRAY_*`
- `mlray.shadow`: A version that answers too, and that nobody waits for
- `mlray.shapley`: Why this answer: the score, shared out among the features so that the shares add up
- `mlray.shards`: Encoded rows on disk, and the windows in which workers read them
- `mlray.signature`: Who says so: signed statements that anybody can check, offline, with stock tools
- `mlray.slices`: Where a model does worst: a search through slices of up to three conditions, corrected for having searched
- `mlray.source`: Rows as they are: from files, from a Delta table, from a database, from a topic, from a function
- `mlray.spec`: What to run: rows, contract, network, training, gates, route
- `mlray.standing`: Where a version stands, as the tables have it inside a transaction
- `mlray.statement`: What is claimed, in a form that others read: in-toto statements
- `mlray.store`: Bytes under their digest, on the disk when it says so
- `mlray.stream_on_ray`: A table larger than memory, brought by Ray Data to where workers read it
- `mlray.submit_cli`: `--on ADDRESS`: a command that runs on a cluster, and answers here
- `mlray.submit_on_ray`: Work sent to a cluster from outside, and what it says on the way
- `mlray.summary`: What a holder of rows may tell about them, so that encoders can be learned for all
- `mlray.survey`: All rows of a source held against the contract, piece by piece: more than fit into memory
- `mlray.table`: Rows: named by a fingerprint, and divided the same way every time
- `mlray.task`: What is to be predicted: one of two, one of several, any of several, a number, or quantiles of a number
- `mlray.text`: A text as the runs of words and characters in it, hashed
- `mlray.threshold`: Where the line is drawn: one line that does best by what was asked, or one for each group
- `mlray.topic`: A Kafka topic as rows: from an offset to the end that it had when it was opened
- `mlray.trace_on_openlineage`: What ran, on which rows, and what came of it, told to a lineage server
- `mlray.track_on_wandb`: One W&B run for each training
- `mlray.tracking`: Who listens to a run
- `mlray.traffic`: Which version answers whom
- `mlray.train_on_ray`: The same training loop, on as many Ray workers as there are
- `mlray.trial`: Fit to serve: how large a bundle is, how soon and how fast it answers, and what it says to requests that nobody should send
- `mlray.tune_on_ray`: A search for better values, on all cores, that goes on where it was killed
- `mlray.tuned`: What came of a search: its trials, its fronts, and the version of the best
- `mlray.vouching`: What the commands `sign`, `verify` and `signer` do
- `mlray.warm_kernels`: Kernels that have their imports behind them: one process loads the libraries once, and each gate's kernel is a copy of it
- `mlray.watching`: What `mlray monitor` and `mlray journal` do
- `mlray.watermark`: A source that grows, read from where it was left: each row once
- `mlray.white_box`: What only the network of a bundle can tell: attacks along its gradient, and its own importances
- `mlray.windows`: What was answered, counted once by version and hour, kept, and added up
- `mlray.wire`: What goes over the wire, in words that every route shares"""

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
