"""From a notebook to a Ray Serve route, with the proof that the model may be there

Modules:

- `mlray.access`: Who may do what: keys, roles, actions
- `mlray.bundle`: What is shipped: one graph, its contract, its encoders, and where it came from
- `mlray.contract`: What a row must look like, said once and held everywhere
- `mlray.display`: One table, three faces: a terminal, a notebook, Markdown
- `mlray.errors`: One family of errors, each a short letter to a tired person
- `mlray.fairness`: How good for whom: every group metric from one table of counts
- `mlray.features`: Rows to numbers: learned once, on the training rows, and applied by one function everywhere
- `mlray.fetch`: Files by name, wherever they are: found, resumed, checked
- `mlray.gate`: May it go out: a candidate's measures against the rules, with every reason
- `mlray.model`: Numbers to scores: a network, and training as a generator of epochs
- `mlray.registry`: Versions, what was proved about them, and which of them is in production
- `mlray.run`: The story of one run, from rows to a registered version with its verdict
- `mlray.samples`: Real rows that are there without a download
- `mlray.score`: How good: every measure with its interval, over all rows and by group
- `mlray.service`: Answer a request: check the key, check the rows, predict, say which version did
- `mlray.settings`: Where to run: environments, from `settings.ini` and `MLRAY_*`
- `mlray.spec`: What to run: rows, contract, network, training, gates, route
- `mlray.table`: Rows: read, named by a fingerprint, and divided the same way every time
- `mlray.tracking`: Who listens to a run"""

__version__ = "0.1.0"
