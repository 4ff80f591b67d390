BEGIN TRANSACTION;
CREATE TABLE alembic_version (
	version_num VARCHAR(32) NOT NULL, 
	CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num)
);
INSERT INTO "alembic_version" VALUES('0001');
CREATE TABLE aliases (
	name VARCHAR(64) NOT NULL, 
	alias VARCHAR(64) NOT NULL, 
	number INTEGER NOT NULL, 
	generation INTEGER NOT NULL, 
	PRIMARY KEY (name, alias), 
	FOREIGN KEY(name, number) REFERENCES versions (name, number)
);
INSERT INTO "aliases" VALUES('tiny','production',2,2);
CREATE TABLE events (
	seq INTEGER NOT NULL, 
	created VARCHAR(32) NOT NULL, 
	actor VARCHAR(128) NOT NULL, 
	action VARCHAR(32) NOT NULL, 
	object VARCHAR(160) NOT NULL, 
	details JSON NOT NULL, 
	PRIMARY KEY (seq)
);
INSERT INTO "events" VALUES(1,'2026-01-01T00:00:00+00:00','ada','register','tiny/1','{"digest": "0493859b9b767c5f37fd096799ca97f70400f01c031510e4cb901a2c1a1a4cc6"}');
INSERT INTO "events" VALUES(2,'2026-01-01T00:00:00+00:00','ada','register','tiny/2','{"digest": "2292c8cde74148e915e179cc685ef913829dca6393b86d12852f9777819bda6c"}');
INSERT INTO "events" VALUES(3,'2026-01-01T00:00:00+00:00','ada','refuse','tiny/1','{"alias": "production", "why": "it has no verdict of the gate quality. Run `mlray gate tiny/1` first."}');
INSERT INTO "events" VALUES(4,'2026-01-01T00:00:00+00:00','ada','gate','tiny/1','{"gate": "quality", "passed": true, "page": "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"}');
INSERT INTO "events" VALUES(5,'2026-01-01T00:00:00+00:00','ada','promote','tiny/1','{"alias": "production", "generation": 1, "digest": "0493859b9b767c5f37fd096799ca97f70400f01c031510e4cb901a2c1a1a4cc6"}');
INSERT INTO "events" VALUES(6,'2026-01-01T00:00:00+00:00','ada','gate','tiny/2','{"gate": "quality", "passed": true, "page": "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"}');
INSERT INTO "events" VALUES(7,'2026-01-01T00:00:00+00:00','ada','promote','tiny/2','{"alias": "production", "generation": 2, "digest": "2292c8cde74148e915e179cc685ef913829dca6393b86d12852f9777819bda6c"}');
INSERT INTO "events" VALUES(8,'2026-01-01T00:00:00+00:00','ada','key','0123abcd','{"role": "viewer"}');
CREATE TABLE evidence (
	id INTEGER NOT NULL, 
	digest VARCHAR(64) NOT NULL, 
	gate VARCHAR(64) NOT NULL, 
	passed BOOLEAN NOT NULL, 
	verdict JSON NOT NULL, 
	page VARCHAR(64) NOT NULL, 
	created VARCHAR(32) NOT NULL, 
	PRIMARY KEY (id)
);
INSERT INTO "evidence" VALUES(1,'0493859b9b767c5f37fd096799ca97f70400f01c031510e4cb901a2c1a1a4cc6','quality',1,'{"passed": true, "findings": [{"measure": "roc_auc", "rule": "at least 0.8", "value": 0.9, "passed": true, "why": "kept", "waived": ""}]}','44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a','2026-01-01T00:00:00+00:00');
INSERT INTO "evidence" VALUES(2,'2292c8cde74148e915e179cc685ef913829dca6393b86d12852f9777819bda6c','quality',1,'{"passed": true, "findings": [{"measure": "roc_auc", "rule": "at least 0.8", "value": 0.9, "passed": true, "why": "kept", "waived": ""}]}','44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a','2026-01-01T00:00:00+00:00');
CREATE TABLE keys (
	id VARCHAR(8) NOT NULL, 
	sha256 VARCHAR(64) NOT NULL, 
	role VARCHAR(32) NOT NULL, 
	created VARCHAR(32) NOT NULL, 
	PRIMARY KEY (id)
);
INSERT INTO "keys" VALUES('0123abcd','abababababababababababababababababababababababababababababababab','viewer','2026-01-01T00:00:00+00:00');
CREATE TABLE versions (
	name VARCHAR(64) NOT NULL, 
	number INTEGER NOT NULL, 
	digest VARCHAR(64) NOT NULL, 
	spec_id VARCHAR(12) NOT NULL, 
	rows_digest VARCHAR(32) NOT NULL, 
	results JSON NOT NULL, 
	created VARCHAR(32) NOT NULL, 
	actor VARCHAR(128) NOT NULL, 
	PRIMARY KEY (name, number), 
	UNIQUE (name, digest)
);
INSERT INTO "versions" VALUES('tiny',1,'0493859b9b767c5f37fd096799ca97f70400f01c031510e4cb901a2c1a1a4cc6','bc82f3188127','','{}','2026-01-01T00:00:00+00:00','ada');
INSERT INTO "versions" VALUES('tiny',2,'2292c8cde74148e915e179cc685ef913829dca6393b86d12852f9777819bda6c','bc82f3188127','','{}','2026-01-01T00:00:00+00:00','ada');
CREATE INDEX ix_evidence_digest ON evidence (digest);
COMMIT;
