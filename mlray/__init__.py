"""From a notebook to a Ray Serve route, with the proof that the model may be there

## What is where

One noun, one notebook, one module; a chapter is a folder of notebooks and a package of that name: `nbs/04_shipping/02_bundle.ipynb` is `mlray.shipping.bundle`. A notebook imports only from the chapters before and from smaller numbers of its own, so reading order, dependency order and test order are one. Each chapter begins with a page that says what is in it, which is also `help(mlray.shipping)`; each module's sentence stands in `help(mlray)` and [`nbs/llms.txt`](nbs/llms.txt).

```text
nbs/
  00_values/        what is asked for, as data; and how any of it is shown
      a spec's parts    errors  column  data  decision  task  recipe  feature  behaviour  search_space  rollout_policy  serve_policy  imported  about
      the whole         spec  schema  settings
      how it shows      display  vega  chart  page
  01_learning/      rows to numbers to scores
      rows              contract  request  infer  table  point_in_time  made_columns  text
      features          features  declared  profile  summary
      networks          network_inputs  own_network  network  loss  fitting  fitting_privately  model  folds  pieces  shards
      estimators        estimator_graph  mitigation  estimator  reduction
      after training    calibration
  02_measures/      how good, and how good for whom
      how good          score  counts  rates  ranking  intervals  score_of_counts  moments  comparison  score_of_classes  score_of_numbers  paired
      for whom          fairness  gaps  group_sums  slices  threshold
  03_judgement/     why this answer, how fragile, how far the world has moved; and what follows: may it go out, does it stay out, must it be trained again
      why               local_line  explain  shapley  counterfactual  explain_text  explain_image  importance  gradient  explain_row
      how fragile       robust  adversarial  membership
      what would flip   replay
      how far moved     drift  estimate  leakage
      may it go out     gate
      does it stay out  mixture  live_gaps  arm  rollout
      what comes next   retrain  work_list
  04_shipping/      what is shipped: one graph with its contract, its encoders and its threshold
      a bundle          harmless  bundle  answer
      other forms of it optimise  export
  05_governance/    who may do what, what was done, and how anybody can check it
      who may           access  oidc  policy
      what was done     audit  store  database  deed  standing  opened  reading  lease
      who says so       signature  statement  attestation  proof  anchoring
      versions          registry  ledger  outbox  release  catalogue  lineage
      upkeep            garbage  triggers  backup
  06_sources/       where rows come from, and which of them are accepted
      reading           fetch  topic  source
      checked           accepted  mirror  rows
      growing, large    watermark  survey
  07_running/       the story of a run: rows, training, evaluation, verdict, version, papers
      judging a bundle  explanation  white_box  evaluation
      a run             checkpoints  remote_checkpoints  tracking  progress  run  reproduce  optimised
      a search          search  population  tuned
      papers            card  data_sheet  runbook  compliance  gate_page  portrait
  08_monitoring/    what production was asked, what it answered, and what became of it
      what is kept      journal  keeping  archive  feedback  windows  replayed  beside  forgotten  whose
      what it says      monitor  look  alert  delivery  error_analysis
      what follows      rollout_run  rollout_step  believed  labelled  retraining
  09_serving/       the story of a request: rows in, answers out, over any wire
      a request         wire  served  traffic  routes  meters  service  plan  asgi  gathering  openapi  trial
      beside the answer shadow  sunset
      other wires       open_inference  arrow  mlflow  inference_messages
      many at once      jobs  job_desk  batch  batch_run  batch_in_bucket
      away from here    answer_pieces  answer_script  edge_folder  page_script  edge_page
  10_engines/       what acts outside this process: one vendor, one file
      a cluster         cluster_on_ray  nodes_on_ray  registry_on_ray  submit_on_ray
      training          train_on_ray  stream_on_ray  tune_on_ray  federate_on_ray
      serving           haproxy  scaling_on_ray  serve_on_ray  grpc_on_ray  predict_on_ray  front_on_ray  watch_on_ray  explain_on_ray
      gates             gate_on_papermill  warm_kernels  gate_on_ray
      who listens       track_on_wandb  mirror_on_mlflow  trace_on_openlineage  trace_on_opentelemetry
  11_pages/         what people look at in a browser: the console, and what gates have found
      the console       console_seal  console  console_live  console_look  console_pages  console_acts  console_alone
      reports           gate_report  error_page
  12_operations/    a project begun, a machine examined, a cluster planned
      a new project     first_look  project  project_pages  project_folder
      is it fit         doctor  examination
      a cluster         cluster_plan  launcher  manifest  cluster_file  serve_manifest  schedule  place
  13_command_line/  what each command does, with its vendors chosen
      what commands do  commands  faces  vouching  noting  watching
      in a notebook     lab  anywhere
      the commands      release_cli  proof_cli  papers_cli  cluster_cli  serve_cli  batch_cli  export_cli  rollout_cli  delivery_cli  watch_cli  schedule_cli  console_cli  submit_cli  lab_cli  optimise_cli  backup_cli  region_cli
      the first screen  first_screen
  samples  sample_networks  client  cli
                    what people name: rows to try things with; networks to try things with; ask a service, typed; the command `mlray`
  gates/            notebooks that let a model out
  reports/          notebooks about a version in production: its mistakes
  tutorials/        from the first ten minutes to a season in production
  explanations/     operating it; contributing; a glossary for two trades; mlray beside other tools; why these dependencies; what did not work
  benchmarks/       mlray and its peers on the same work
mlray/              the library, generated from nbs/, a package a chapter (edit the notebook, then nbdev-export); migrations/ are Alembic's
configs/            run specs
cluster/            launchers for `ray up` and KubeRay, alerts, a dashboard; constraints.txt: every package, at the version that was tested
tests/              what does not teach: chapters, laws, faults, the command line, Ray, HTTP
settings.ini        environments: local, staging, production
```

Start reading at [`nbs/07_running/10_run.ipynb`](nbs/07_running/10_run.ipynb), the story of a run in forty lines, or at [`nbs/09_serving/09_service.ipynb`](nbs/09_serving/09_service.ipynb), the story of a request.

Modules:

- `mlray.cli`: The door: `mlray` on the command line
- `mlray.client`: Ask a service from Python, and not give up too soon
- `mlray.command_line.anywhere`: Train, tune and gate from a notebook: here, on Ray, or on a cluster
- `mlray.command_line.backup_cli`: The commands that keep a registry and bring it back
- `mlray.command_line.batch_cli`: `mlray predict`: a file in, a file of answers out
- `mlray.command_line.cluster_cli`: `mlray cluster plan`: what a file would start
- `mlray.command_line.commands`: What each command does, with its vendors chosen
- `mlray.command_line.console_cli`: The command of the console
- `mlray.command_line.delivery_cli`: How models are delivered: one command, one table a model
- `mlray.command_line.export_cli`: `mlray export`: a folder, or a page, that answers without mlray
- `mlray.command_line.faces`: What commands show: one value for programs, tables for people
- `mlray.command_line.first_screen`: What `mlray --help` says: the commands in the order of a model's life
- `mlray.command_line.lab`: `%load_ext mlray`: commands where the models are looked at
- `mlray.command_line.lab_cli`: JupyterLab with the tutorials, or with a project's own notebooks
- `mlray.command_line.noting`: What commands leave in the catalogue of what they have read
- `mlray.command_line.optimise_cli`: `mlray optimise`: a version made smaller and quicker, if that costs nothing that its rules forbid
- `mlray.command_line.papers_cli`: The commands of papers, data sets and the registry's own upkeep
- `mlray.command_line.proof_cli`: The commands of proof: sign, verify, who signs, and the audit
- `mlray.command_line.region_cli`: A release that moves from region to region
- `mlray.command_line.release_cli`: The commands of a release: who approves, what goes out and comes back, keys, mirrors
- `mlray.command_line.rollout_cli`: The commands of a rollout: look after it, look at it, end it
- `mlray.command_line.schedule_cli`: The command that hands a job to the scheduler a team has
- `mlray.command_line.serve_cli`: The commands of a service that runs: who gets which version
- `mlray.command_line.submit_cli`: `--on ADDRESS`: a command that runs on a cluster, and answers here
- `mlray.command_line.vouching`: What the commands `sign`, `verify`, `signer` and `audit` do
- `mlray.command_line.watch_cli`: The commands that follow a model in production: retrain, worklist, errors
- `mlray.command_line.watching`: What `mlray monitor` and `mlray journal` do
- `mlray.engines.cluster_on_ray`: Join a Ray cluster, or have one of one's own for a while
- `mlray.engines.explain_on_ray`: Many rows explained at once, on Ray Data
- `mlray.engines.federate_on_ray`: Learning from rows that stay with their holders
- `mlray.engines.front_on_ray`: Requests that are answered in front of what Ray Serve puts around a replica
- `mlray.engines.gate_on_papermill`: Run notebooks as gates: strictly, side by side, kept as evidence
- `mlray.engines.gate_on_ray`: Gates as tasks of a cluster: each with the CPUs, GPUs and memory that it asks for
- `mlray.engines.grpc_on_ray`: gRPC in front of the service, on Ray Serve
- `mlray.engines.haproxy`: Close what is left open in front of a service
- `mlray.engines.mirror_on_mlflow`: A folder that MLflow can load and serve
- `mlray.engines.nodes_on_ray`: What each node of a cluster says of itself, and for how many there is room
- `mlray.engines.predict_on_ray`: The pieces of a batch, answered by all nodes of a cluster
- `mlray.engines.registry_on_ray`: The registry, from any node of a cluster
- `mlray.engines.scaling_on_ray`: How many replicas there are, on Ray Serve
- `mlray.engines.serve_on_ray`: HTTP in front of the service, on Ray Serve
- `mlray.engines.stream_on_ray`: A table larger than memory, brought by Ray Data to where workers read it
- `mlray.engines.submit_on_ray`: Work sent to a cluster from outside, and what it says on the way
- `mlray.engines.trace_on_openlineage`: What ran, on which rows, and what came of it, told to a lineage server
- `mlray.engines.trace_on_opentelemetry`: Where the time of a request went
- `mlray.engines.track_on_wandb`: One W&B run for each training
- `mlray.engines.train_on_ray`: The same training loop, on as many Ray workers as there are
- `mlray.engines.tune_on_ray`: A search for better values, on all cores, that goes on where it was killed
- `mlray.engines.warm_kernels`: Kernels that have their imports behind them: one process loads the libraries once, and each gate's kernel is a copy of it
- `mlray.engines.watch_on_ray`: A rollout's controller beside the service, which Ray starts again when it dies
- `mlray.governance.access`: Who may do what: keys, roles, actions
- `mlray.governance.anchoring`: Heads of the audit, signed, and noted where who keeps the database does not
- `mlray.governance.attestation`: What is signed here, by whom, and whether it is enough
- `mlray.governance.audit`: A chain that breaks if it is touched
- `mlray.governance.backup`: A copy of a running registry, and the way back from it
- `mlray.governance.catalogue`: Every data set that was ever read, and what came of it
- `mlray.governance.database`: One transaction, one line of audit, on SQLite or PostgreSQL
- `mlray.governance.deed`: What somebody who may do it does once, or is refused
- `mlray.governance.garbage`: Bytes that no row names any more, taken away without taking a live one
- `mlray.governance.lease`: Of several controllers one acts, and one that was overtaken is refused
- `mlray.governance.ledger`: Whether what is known is what was done
- `mlray.governance.lineage`: What a version came from
- `mlray.governance.oidc`: Who bears a token of the house's own identity provider
- `mlray.governance.opened`: A registry that is open, who acts in it, and the keys by which they are known
- `mlray.governance.outbox`: What others are to be told, kept until they have heard it
- `mlray.governance.policy`: What an environment asks of a version that is let out
- `mlray.governance.proof`: A version, checked from the bytes up by somebody who trusts nobody here
- `mlray.governance.reading`: What was read of which source, by whom and when
- `mlray.governance.registry`: Versions, what was proved about them, and which of them is in production
- `mlray.governance.release`: Who stands for a version, and how its end is announced
- `mlray.governance.signature`: Who says so: signed statements that anybody can check, offline, with stock tools
- `mlray.governance.standing`: Where a version stands, as the tables have it inside a transaction
- `mlray.governance.statement`: What is claimed, in a form that others read: in-toto statements
- `mlray.governance.store`: Bytes under their digest, on the disk when it says so
- `mlray.governance.triggers`: One run for each trigger, whoever looks, and whoever dies
- `mlray.judgement.adversarial`: How little it takes when somebody tries: FGSM and PGD on the numbers of a row
- `mlray.judgement.arm`: What two versions did on the traffic so far, in sums that add up
- `mlray.judgement.counterfactual`: What would have to be different for another answer: the smallest change that flips it
- `mlray.judgement.drift`: How far the rows have moved: distances with their intervals, one line a column, far and surely
- `mlray.judgement.estimate`: What can be known before labels come: can the rows be told apart, and how good the answers should be
- `mlray.judgement.explain`: Why this answer: a straight line through the model's answers nearby, the same to the byte for the same row
- `mlray.judgement.explain_image`: Which parts of an image an answer hangs on
- `mlray.judgement.explain_row`: Why a row is answered as it is, when some of its columns are texts, pictures or signals
- `mlray.judgement.explain_text`: Which words an answer hangs on
- `mlray.judgement.gate`: May it go out: a candidate's measures against the rules, with every reason
- `mlray.judgement.gradient`: What the network itself says: what each feature adds to the logit
- `mlray.judgement.importance`: What a model hangs on, over many rows: permutation importance, and explanations that add up
- `mlray.judgement.leakage`: What a model must not know: test rows it has learned from, and features that carry the answer
- `mlray.judgement.live_gaps`: How far groups are apart in what they are answered, at every look
- `mlray.judgement.local_line`: A straight line through scores nearby, with sums that come out the same everywhere
- `mlray.judgement.membership`: Who is in there: whether a model tells which rows it has learned from
- `mlray.judgement.mixture`: Two means from their sums, compared at every look
- `mlray.judgement.replay`: Two models on the same requests: which decisions flip, which way, and for whom
- `mlray.judgement.retrain`: Is it time for the next version: due, not yet, or stopped, with the reasons
- `mlray.judgement.robust`: How fragile: which answers flip when rows are slightly wrong, for whom, and what the contract catches first
- `mlray.judgement.rollout`: Does it stay out: promote, hold or roll back, valid however often one looks
- `mlray.judgement.shapley`: Why this answer: the score, shared out among the features so that the shares add up
- `mlray.judgement.work_list`: Which answers should somebody label next
- `mlray.learning.calibration`: Scores that can be taken at their word: fitted on validation rows, shipped in the graph
- `mlray.learning.contract`: What a row must look like, said once and held everywhere
- `mlray.learning.declared`: Rows to numbers without having seen a row: encoders that follow from the contract alone
- `mlray.learning.estimator`: Models of scikit-learn, LightGBM and XGBoost: the same rows, the same graph
- `mlray.learning.estimator_graph`: Fitted estimators of scikit-learn, LightGBM and XGBoost as ONNX graphs that keep the laws
- `mlray.learning.features`: Rows to numbers: learned once, on the training rows, and applied by one function everywhere
- `mlray.learning.fitting`: One pass over the rows: optimiser, learning rate, precision, and what stops it
- `mlray.learning.fitting_privately`: One pass over the rows under differential privacy: what one row can do is bounded, and hidden by noise
- `mlray.learning.folds`: Several networks that each keep other rows back, and answer as one
- `mlray.learning.infer`: A first contract, from rows, for a person to correct
- `mlray.learning.loss`: How wrong answers are: a loss for each kind of target, or one of your own, weighted by class and by row
- `mlray.learning.made_columns`: Columns made from others, of one row or of many: expressions, and parts of dates
- `mlray.learning.mitigation`: Training so that groups fare alike: weights of rows, and mixtures under a constraint
- `mlray.learning.model`: Fitting a network: training as a generator of epochs
- `mlray.learning.network`: Numbers to scores: TabM and its simpler relatives, and the graph they become
- `mlray.learning.network_inputs`: What was learned about the rows, as the first layers of a network
- `mlray.learning.own_network`: Bring your own network: any `torch.nn.Module`, given what it asks for by name
- `mlray.learning.pieces`: Rows that pass by in pieces, and a bounded sample that stands for all of them
- `mlray.learning.point_in_time`: What was known of an entity at a moment, and never what came later
- `mlray.learning.profile`: A table, counted: histograms on fixed bins that add up, a few kilobytes for any number of rows
- `mlray.learning.reduction`: Exponentiated gradient over models that are dear: a class of them that grows while a budget lasts
- `mlray.learning.request`: One row as it comes in a request, held to the same rules
- `mlray.learning.shards`: Encoded rows on disk, and the windows in which workers read them
- `mlray.learning.summary`: What a holder of rows may tell about them, so that encoders can be learned for all
- `mlray.learning.table`: Rows: named by a fingerprint, and divided the same way every time
- `mlray.learning.text`: A text as the runs of words and characters in it, hashed
- `mlray.measures.comparison`: Two models on the same rows: how far apart, and whether that can be chance
- `mlray.measures.counts`: One small table that stands for all rows: slices × label × decision × score bin; tables add
- `mlray.measures.fairness`: How good for whom: every group metric from one table of counts
- `mlray.measures.gaps`: How far groups are apart, where answers are classes, labels or numbers
- `mlray.measures.group_sums`: Gaps between groups from sums alone, for traffic whose rows nobody keeps together
- `mlray.measures.intervals`: How far a number from counts can be trusted: effective rows, DeLong, and a bootstrap that never sees a row
- `mlray.measures.moments`: Means of anything a column can hold, from sums that add: errors of a regression, cost, latency
- `mlray.measures.paired`: Every measure of two models on the same rows, whatever they predict, and how far apart their groups are
- `mlray.measures.ranking`: Ranking and calibration from score bins, each with the bound of what the bins hide
- `mlray.measures.rates`: What a confusion matrix says: every rate, for one matrix or a million
- `mlray.measures.score`: How good: every measure with its interval, over all rows and by group
- `mlray.measures.score_of_classes`: How good, where one of several classes is right, or any of several labels
- `mlray.measures.score_of_counts`: A scorecard from counts alone: no row is seen again
- `mlray.measures.score_of_numbers`: How good, where a number is predicted, or quantiles of it
- `mlray.measures.slices`: Where a model does worst: a search through slices of up to three conditions, corrected for having searched
- `mlray.measures.threshold`: Where the line is drawn: one line that does best by what was asked, or one for each group
- `mlray.monitoring.alert`: Tell who must know, once: what moved, for whom, since when, which rows, and what may be done
- `mlray.monitoring.archive`: Segments become Parquet by day, model and version; read exactly, kept for a time, erased by person
- `mlray.monitoring.believed`: Which labels from production a next version may learn from
- `mlray.monitoring.beside`: What a shadow answered, beside what was answered
- `mlray.monitoring.delivery`: How soon, how often, how safely, and for how much: releases in one table
- `mlray.monitoring.error_analysis`: Where a version is wrong, for whom, in which way, and what may be the cause
- `mlray.monitoring.feedback`: What became of an answer: labels, corrections, ratings, clicks, any number; late, early, twice, or never
- `mlray.monitoring.forgotten`: Rows of a person that lie beside the journal: put aside, or accepted to learn from
- `mlray.monitoring.journal`: One durable record for each answer, written before the answer is sent
- `mlray.monitoring.keeping`: What of a row may be kept: all of a value, a pseudonym, a bucket, or nothing
- `mlray.monitoring.labelled`: Answers with their labels, as rows to learn from; and those that should get one
- `mlray.monitoring.look`: Whether a promise is broken, beyond what chance does in a season of looks
- `mlray.monitoring.monitor`: How a version fares: what it is asked, what it answers, how good that is, for whom, and how fast
- `mlray.monitoring.replayed`: What was asked in production, asked again of another version
- `mlray.monitoring.retraining`: The story of a next version: looked, claimed, trained, gated, proposed
- `mlray.monitoring.rollout_run`: From windows to a decision about a canary
- `mlray.monitoring.rollout_step`: A rollout goes on by itself: look, decide, act, and say why
- `mlray.monitoring.whose`: Whose rows: by the name that callers give, or by what stands in a column
- `mlray.monitoring.windows`: What was answered, counted once by version and hour, kept, and added up
- `mlray.operations.cluster_file`: A launcher or manifests, read and planned
- `mlray.operations.cluster_plan`: Whether a cluster is large enough for what is to run on it, and what it costs
- `mlray.operations.doctor`: What is wrong with this machine or cluster, and how to mend it
- `mlray.operations.examination`: The facts of this machine, gathered without changing anything
- `mlray.operations.first_look`: A file with rows, looked at for the first time: how it is written, and a spec to begin with
- `mlray.operations.launcher`: What is wrong with a file for `ray up`
- `mlray.operations.manifest`: What is wrong with manifests for KubeRay
- `mlray.operations.place`: Which cluster is meant by `--on`: an address, an environment, a region
- `mlray.operations.project`: A project as it is to be written: its spec, its source, its gates
- `mlray.operations.project_folder`: A new project in its folder: all of it, or nothing
- `mlray.operations.project_pages`: The notebooks of a new project
- `mlray.operations.schedule`: A command at its times, as cron, Kubernetes, GitHub or Airflow write it
- `mlray.operations.serve_manifest`: The application as a file: for `serve deploy`, and as a RayService for KubeRay
- `mlray.pages.console`: Who looks at the pages, and whether they may
- `mlray.pages.console_acts`: What can be done on the pages, and the whole console
- `mlray.pages.console_alone`: The console on a laptop, without a cluster
- `mlray.pages.console_live`: What production does now, and has done: the pages of traffic, drift, alerts and the journal
- `mlray.pages.console_look`: What every page of the console has around it
- `mlray.pages.console_pages`: What there is, what is proved of it, and who did it: the pages of models and versions
- `mlray.pages.console_seal`: The key with which sessions of the console are sealed
- `mlray.pages.error_page`: A notebook about the mistakes of a version, executed
- `mlray.pages.gate_report`: What gates found, for those who read it elsewhere: JUnit, GitHub, a summary, pages
- `mlray.running.card`: A version's papers, made from what is known of it: the model card, as Markdown, as a page, as JSON
- `mlray.running.checkpoints`: The states of a run on disk, and the newest of them that is whole
- `mlray.running.compliance`: What GDPR and the EU AI Act ask, the evidence there is, and what is missing
- `mlray.running.data_sheet`: The rows behind a version: what they are, where they came from, what was done to them
- `mlray.running.evaluation`: What a bundle does with rows it has not learned from
- `mlray.running.explanation`: A bundle's answers, explained and shaken
- `mlray.running.gate_page`: An executed notebook as proof: what it says, where it broke, and what of it may be kept
- `mlray.running.optimised`: A smaller version of a version, registered only if the rules of its spec hold against the one it came from
- `mlray.running.population`: Trials that learn from one another, and the schedule that one of them has lived
- `mlray.running.portrait`: What the page of a gate shows of answers: pictures beside its tables
- `mlray.running.progress`: A bar for a person who waits, in a terminal and in JupyterLab
- `mlray.running.remote_checkpoints`: The states of a run in a bucket, with what a disk promises
- `mlray.running.reproduce`: The same run again, compared to the bit
- `mlray.running.run`: The story of one run, from rows to a registered version with its verdict
- `mlray.running.runbook`: What to type when this model is let out, looked after, in trouble, or at its end
- `mlray.running.search`: What to try next, and what was found
- `mlray.running.tracking`: Who listens to a run
- `mlray.running.tuned`: What came of a search: its trials, its fronts, and the version of the best
- `mlray.running.white_box`: What only the network of a bundle can tell: attacks along its gradient, and its own importances
- `mlray.sample_networks`: Two networks of ten lines, one for pictures and one for text, as a user would bring them
- `mlray.samples`: Real rows that are there without a download
- `mlray.serving.answer_pieces`: What the script of an exported folder is made of: checks and encoders, in plain Python
- `mlray.serving.answer_script`: The script of an exported folder, made of the pieces that its model needs
- `mlray.serving.arrow`: Rows in bulk: an Arrow IPC stream in, an Arrow IPC stream out
- `mlray.serving.asgi`: A request of HTTP as a server hands it over, read with as few steps as it takes
- `mlray.serving.batch`: Cut a source into pieces that anybody can read alone, and answer one of them
- `mlray.serving.batch_in_bucket`: A batch whose answers go to a bucket, with what a folder promises
- `mlray.serving.batch_run`: A file in, a file of answers out: larger than memory, and none lost or doubled when it is killed
- `mlray.serving.edge_folder`: A folder that answers with onnxruntime and numpy alone
- `mlray.serving.edge_page`: The same bundle as a page: a form made from the contract, answered in the browser
- `mlray.serving.gathering`: Requests that wait at the same moment are scored together
- `mlray.serving.inference_messages`: The Open Inference Protocol's messages of protobuf
- `mlray.serving.job_desk`: Where jobs are handed in, asked after and fetched, and who does them
- `mlray.serving.jobs`: Large batches, answered later
- `mlray.serving.meters`: What a replica counts, for Prometheus
- `mlray.serving.mlflow`: What an MLflow client sends to `/invocations`
- `mlray.serving.open_inference`: The Open Inference Protocol v2: a tensor a column
- `mlray.serving.openapi`: The routes, described for people and programs
- `mlray.serving.page_script`: What an exported page runs: checks, encoders and answers in JavaScript, and a form made from the contract
- `mlray.serving.plan`: What is to be served, read from the registry, and followed as it changes
- `mlray.serving.routes`: One table of everything that can be asked
- `mlray.serving.served`: One version that answers: rows of any kind in, scores out
- `mlray.serving.service`: Answer a request: check the key, check the rows, choose a version, predict, say which version did
- `mlray.serving.shadow`: A version that answers too, and that nobody waits for
- `mlray.serving.sunset`: The end of a version, said to those who use it
- `mlray.serving.traffic`: Which version answers whom
- `mlray.serving.trial`: Fit to serve: how large a bundle is, how soon and how fast it answers, and what it says to requests that nobody should send
- `mlray.serving.wire`: What goes over the wire, in words that every route shares
- `mlray.shipping.answer`: What one prediction looks like on the wire, for each kind of target
- `mlray.shipping.bundle`: What is shipped: one graph, its contract, its encoders, and where it came from
- `mlray.shipping.export`: A bundle as plain data: what numpy and a browser can read
- `mlray.shipping.harmless`: May a graph be run: one that only computes, of its inputs, within bounds
- `mlray.shipping.optimise`: A bundle made smaller and quicker: integers for weights, and zeros for those that hardly matter
- `mlray.sources.accepted`: How far a growing source has been read, and the rows that came of it
- `mlray.sources.fetch`: Files by name, wherever they are: found, resumed, checked
- `mlray.sources.mirror`: A folder of files, in a bucket as it is here
- `mlray.sources.rows`: From a spec to rows that may be learned from: found, read, held against the contract, divided
- `mlray.sources.source`: Rows as they are: from files, from a Delta table, from a database, from a topic, from a function
- `mlray.sources.survey`: All rows of a source held against the contract, piece by piece: more than fit into memory
- `mlray.sources.topic`: A Kafka topic as rows: from an offset to the end that it had when it was opened
- `mlray.sources.watermark`: A source that grows, read from where it was left: each row once
- `mlray.values.about`: What only people can say of a model: who answers for it, what it is for, what its rows are
- `mlray.values.behaviour`: What a model must do whatever its scores are: invariance, direction, minimum function
- `mlray.values.chart`: Plots as plain SVG: values with their intervals, lines, points, bars
- `mlray.values.column`: What one column of a table may hold, and what it is for
- `mlray.values.data`: Which rows: their sources, and how they are divided
- `mlray.values.decision`: From a score to a decision: calibration, threshold and fairness, as intent
- `mlray.values.display`: One table, three faces: a terminal, a notebook, Markdown; and a value as JSON has it
- `mlray.values.errors`: One family of errors, each a short letter to a tired person
- `mlray.values.feature`: How a column becomes numbers, and columns made from others
- `mlray.values.imported`: What a spec names by where it is imported from
- `mlray.values.page`: One look for every page: its colours, its tables, and a page that needs nothing else
- `mlray.values.recipe`: What is fitted, and how: the network or the estimator, the loss, the optimiser
- `mlray.values.rollout_policy`: How a new version takes over, and when one is wanted, as intent
- `mlray.values.schema`: The JSON Schema of a spec, so that an editor completes and corrects while one writes
- `mlray.values.search_space`: Where to look for better values, as intent
- `mlray.values.serve_policy`: How a version answers, as intent
- `mlray.values.settings`: Where to run: environments, from `settings.ini` and `MLRAY_*`
- `mlray.values.spec`: What to run: rows, contract, network, training, gates, route
- `mlray.values.task`: What is to be predicted: one of two, one of several, any of several, a number, or quantiles of a number
- `mlray.values.vega`: Plots that can be looked at closely: zoomed, dragged, read point by point"""

__version__ = "0.1.0"

import sys as _sys
from collections.abc import Sequence as _Sequence
from importlib import import_module as _import_module
from importlib.machinery import ModuleSpec as _ModuleSpec
from pathlib import Path as _Path
from types import ModuleType as _ModuleType

import lazy_loader as _lazy

__getattr__, __dir__, __all__ = _lazy.attach(
    __name__,
    submod_attrs={
        "values.spec": ["read_spec"],
        "values.settings": ["read_settings"],
        "command_line.anywhere": ["train", "tune", "run_gates"],
        "running.evaluation": ["evaluate", "read_candidate"],
        "judgement.gate": ["judge"],
        "shipping.bundle": ["load_bundle", "predict"],
        "governance.registry": ["Registry", "open_registry"],
        "serving.service": ["Service"],
        "measures.score": ["scorecard"],
        "measures.fairness": ["fairness_report"],
        "command_line.lab": ["load_ipython_extension"],
    },
)


class _ByName:
    """Finds `mlray.bundle` in its chapter, as the very same module.

    What outlives a process (a spec's `call`, a manifest's `import_path`, an MLflow folder's loader, a gate of one's own) names a module without its chapter, so that chapters can be drawn anew."""
    def find_spec(self, name: str, path: _Sequence[str] | None = None, target: object = None) -> _ModuleSpec | None:
        package, _, module = name.rpartition(".")
        if package != __name__ or not module.isidentifier(): return None
        chapter = next((at.parent.name for folder in path or () for at in _Path(folder).glob(f"*/{module}.py") if (at.parent / "__init__.py").is_file()), None)
        return _ModuleSpec(name, self, loader_state=f"{package}.{chapter}.{module}") if chapter else None # type: ignore[arg-type]

    def create_module(self, spec: _ModuleSpec) -> _ModuleType:
        found = _import_module(spec.loader_state)
        spec.loader_state = found.__spec__
        return found

    def exec_module(self, module: _ModuleType) -> None: module.__spec__ = module.__spec__ and module.__spec__.loader_state


_sys.meta_path.append(_ByName()) # asked last, and only for what there is nowhere else
