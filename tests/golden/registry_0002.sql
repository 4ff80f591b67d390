BEGIN TRANSACTION;
CREATE TABLE alembic_version (
	version_num VARCHAR(32) NOT NULL, 
	CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num)
);
INSERT INTO "alembic_version" VALUES('0002');
CREATE TABLE aliases (
	name VARCHAR(64) NOT NULL, 
	alias VARCHAR(64) NOT NULL, 
	number INTEGER NOT NULL, 
	generation INTEGER NOT NULL, 
	PRIMARY KEY (name, alias), 
	FOREIGN KEY(name, number) REFERENCES versions (name, number)
);
INSERT INTO "aliases" VALUES('tiny','production',2,4);
INSERT INTO "aliases" VALUES('tiny','canary',1,1);
CREATE TABLE events (
	seq INTEGER NOT NULL, 
	created VARCHAR(32) NOT NULL, 
	actor VARCHAR(128) NOT NULL, 
	action VARCHAR(32) NOT NULL, 
	object VARCHAR(160) NOT NULL, 
	details JSON NOT NULL, prev VARCHAR(64), mac VARCHAR(64), 
	PRIMARY KEY (seq)
);
INSERT INTO "events" VALUES(1,'2026-01-01T00:00:00+00:00','ada','register','tiny/1','{"digest": "1be05fc9fdf08dc994169143380712c9b01152579ddec671beeb43efa6811e82"}','0000000000000000000000000000000000000000000000000000000000000000','f1cb976f35d6d240828c062519605b695b805a3d342f88ceb0ef9f961052f0fd');
INSERT INTO "events" VALUES(2,'2026-01-01T00:00:00+00:00','ada','register','tiny/2','{"digest": "d8baa81ae4c94645f3492671796e9d0fbff1d6b51e0ebd8224545f584f1cfbbf"}','f1cb976f35d6d240828c062519605b695b805a3d342f88ceb0ef9f961052f0fd','5b5feeec39ba6b1fe33a85a315f28c5db462bf2cc1f5ad756c4770ef68edc3d4');
INSERT INTO "events" VALUES(3,'2026-01-01T00:00:00+00:00','ada','register','tiny/3','{"digest": "28627ae54c0af283fc74e37eda50dbf19b96081ab634128c2c3f28620f816217"}','5b5feeec39ba6b1fe33a85a315f28c5db462bf2cc1f5ad756c4770ef68edc3d4','714d8858c62d9cb9d2d94cb4d8463ce85eb480af12c34619e43adcc42f986c0b');
INSERT INTO "events" VALUES(4,'2026-01-01T00:00:00+00:00','ada','refuse','tiny/1','{"alias": "production", "why": "it has no verdict of the gate quality. Run `mlray gate tiny/1` first."}','714d8858c62d9cb9d2d94cb4d8463ce85eb480af12c34619e43adcc42f986c0b','2cc5a3f3066dda708a5bcea07feb81170860269ade62c8857d1a335df29b35de');
INSERT INTO "events" VALUES(5,'2026-01-01T00:00:00+00:00','ada','gate','tiny/1','{"digest": "1be05fc9fdf08dc994169143380712c9b01152579ddec671beeb43efa6811e82", "gate": "quality", "passed": true, "page": "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"}','2cc5a3f3066dda708a5bcea07feb81170860269ade62c8857d1a335df29b35de','e8ebf61a9f883da504d05703419f4f8555b33b726b14b0bbc31bd8867c41a833');
INSERT INTO "events" VALUES(6,'2026-01-01T00:00:00+00:00','ada','promote','tiny/1','{"alias": "production", "generation": 1, "under": null, "digest": "1be05fc9fdf08dc994169143380712c9b01152579ddec671beeb43efa6811e82"}','e8ebf61a9f883da504d05703419f4f8555b33b726b14b0bbc31bd8867c41a833','af2def2c6457e38049a5070e8b24af4a662731a5c8867367d261b72f60f1bda0');
INSERT INTO "events" VALUES(7,'2026-01-01T00:00:00+00:00','ada','gate','tiny/2','{"digest": "d8baa81ae4c94645f3492671796e9d0fbff1d6b51e0ebd8224545f584f1cfbbf", "gate": "quality", "passed": true, "page": "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"}','af2def2c6457e38049a5070e8b24af4a662731a5c8867367d261b72f60f1bda0','f8e95d1786cf99a83e4ff84fa35e8adf974a9d1ca70bac25d59550d4eb1b8ebb');
INSERT INTO "events" VALUES(8,'2026-01-01T00:00:00+00:00','ada','promote','tiny/2','{"alias": "production", "generation": 2, "under": 1, "digest": "d8baa81ae4c94645f3492671796e9d0fbff1d6b51e0ebd8224545f584f1cfbbf"}','f8e95d1786cf99a83e4ff84fa35e8adf974a9d1ca70bac25d59550d4eb1b8ebb','e1e222d6e9b2aef0c97f56ded9ef186cef92f3519d97d7ef3927b6ae4b30a9c0');
INSERT INTO "events" VALUES(9,'2026-01-01T00:00:00+00:00','ada','gate','tiny/3','{"digest": "28627ae54c0af283fc74e37eda50dbf19b96081ab634128c2c3f28620f816217", "gate": "quality", "passed": true, "page": "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"}','e1e222d6e9b2aef0c97f56ded9ef186cef92f3519d97d7ef3927b6ae4b30a9c0','e61f7215d3a688e3cda0a7b2d766fe3ada22130d31e359c3a28ff5f4a8870d1e');
INSERT INTO "events" VALUES(10,'2026-01-01T00:00:00+00:00','ada','promote','tiny/3','{"alias": "production", "generation": 3, "under": 2, "digest": "28627ae54c0af283fc74e37eda50dbf19b96081ab634128c2c3f28620f816217"}','e61f7215d3a688e3cda0a7b2d766fe3ada22130d31e359c3a28ff5f4a8870d1e','73cb1d1b6b1c542eedee89317f7317a116c523cb112a1e55ce0299525c8961c1');
INSERT INTO "events" VALUES(11,'2026-01-01T00:00:00+00:00','ada','rollback','tiny/2','{"alias": "production", "generation": 4, "under": 1, "before": 3, "digest": "d8baa81ae4c94645f3492671796e9d0fbff1d6b51e0ebd8224545f584f1cfbbf"}','73cb1d1b6b1c542eedee89317f7317a116c523cb112a1e55ce0299525c8961c1','fec2eb1c2d65e97a121ce48d0822f3b7c91cb80e14a9405cdd203e4bc6da8358');
INSERT INTO "events" VALUES(12,'2026-01-01T00:00:00+00:00','ada','promote','tiny/1','{"alias": "canary", "generation": 1, "under": null, "digest": "1be05fc9fdf08dc994169143380712c9b01152579ddec671beeb43efa6811e82"}','fec2eb1c2d65e97a121ce48d0822f3b7c91cb80e14a9405cdd203e4bc6da8358','12be94f2c4619c814396fdf2516e5d93f3e326d1429d7d2c69fe9a1af26e94a5');
INSERT INTO "events" VALUES(13,'2026-01-01T00:00:00+00:00','ada','retire','tiny/3','{"why": "slow", "successor": "tiny/2"}','12be94f2c4619c814396fdf2516e5d93f3e326d1429d7d2c69fe9a1af26e94a5','b30d843000d42152c0c5a0b307aed379afcb29e7aa8d17093c00c750b38f6a3f');
INSERT INTO "events" VALUES(14,'2026-01-01T00:00:00+00:00','ada','key','0123abcd','{"role": "viewer", "sha256": "0000000000000000000000000000000000000000000000000000000000000000"}','b30d843000d42152c0c5a0b307aed379afcb29e7aa8d17093c00c750b38f6a3f','db8b072dcb4342390c412cb78c6c630c5b53f0a6f3d119f5c7a714a8a3e5e705');
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
INSERT INTO "evidence" VALUES(1,'1be05fc9fdf08dc994169143380712c9b01152579ddec671beeb43efa6811e82','quality',1,'{"passed": true, "findings": [{"measure": "roc_auc", "rule": "at least 0.8", "value": 0.9, "passed": true, "why": "kept", "waived": ""}]}','44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a','2026-01-01T00:00:00+00:00');
INSERT INTO "evidence" VALUES(2,'d8baa81ae4c94645f3492671796e9d0fbff1d6b51e0ebd8224545f584f1cfbbf','quality',1,'{"passed": true, "findings": [{"measure": "roc_auc", "rule": "at least 0.8", "value": 0.9, "passed": true, "why": "kept", "waived": ""}]}','44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a','2026-01-01T00:00:00+00:00');
INSERT INTO "evidence" VALUES(3,'28627ae54c0af283fc74e37eda50dbf19b96081ab634128c2c3f28620f816217','quality',1,'{"passed": true, "findings": [{"measure": "roc_auc", "rule": "at least 0.8", "value": 0.9, "passed": true, "why": "kept", "waived": ""}]}','44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a','2026-01-01T00:00:00+00:00');
CREATE TABLE keys (
	id VARCHAR(8) NOT NULL, 
	sha256 VARCHAR(64) NOT NULL, 
	role VARCHAR(32) NOT NULL, 
	created VARCHAR(32) NOT NULL, 
	PRIMARY KEY (id)
);
INSERT INTO "keys" VALUES('0123abcd','0000000000000000000000000000000000000000000000000000000000000000','viewer','2026-01-01T00:00:00+00:00');
CREATE TABLE moves (
	name VARCHAR(64) NOT NULL, 
	alias VARCHAR(64) NOT NULL, 
	generation INTEGER NOT NULL, 
	number INTEGER NOT NULL, 
	under INTEGER, 
	PRIMARY KEY (name, alias, generation), 
	FOREIGN KEY(name, number) REFERENCES versions (name, number)
);
INSERT INTO "moves" VALUES('tiny','production',1,1,NULL);
INSERT INTO "moves" VALUES('tiny','production',2,2,1);
INSERT INTO "moves" VALUES('tiny','production',3,3,2);
INSERT INTO "moves" VALUES('tiny','production',4,2,1);
INSERT INTO "moves" VALUES('tiny','canary',1,1,NULL);
CREATE TABLE versions (
	name VARCHAR(64) NOT NULL, 
	number INTEGER NOT NULL, 
	digest VARCHAR(64) NOT NULL, 
	spec_id VARCHAR(12) NOT NULL, 
	rows_digest VARCHAR(32) NOT NULL, 
	results JSON NOT NULL, 
	created VARCHAR(32) NOT NULL, 
	actor VARCHAR(128) NOT NULL, retired VARCHAR(32), 
	PRIMARY KEY (name, number), 
	UNIQUE (name, digest)
);
INSERT INTO "versions" VALUES('tiny',1,'1be05fc9fdf08dc994169143380712c9b01152579ddec671beeb43efa6811e82','56dc55815600','','{}','2026-01-01T00:00:00+00:00','ada',NULL);
INSERT INTO "versions" VALUES('tiny',2,'d8baa81ae4c94645f3492671796e9d0fbff1d6b51e0ebd8224545f584f1cfbbf','56dc55815600','','{}','2026-01-01T00:00:00+00:00','ada',NULL);
INSERT INTO "versions" VALUES('tiny',3,'28627ae54c0af283fc74e37eda50dbf19b96081ab634128c2c3f28620f816217','56dc55815600','','{}','2026-01-01T00:00:00+00:00','ada','2026-01-01T00:00:00+00:00');
CREATE INDEX ix_evidence_digest ON evidence (digest);
CREATE TRIGGER events_kept_UPDATE BEFORE UPDATE ON events BEGIN SELECT RAISE(ABORT, 'rows of the audit are only ever added'); END;
CREATE TRIGGER events_kept_DELETE BEFORE DELETE ON events BEGIN SELECT RAISE(ABORT, 'rows of the audit are only ever added'); END;
COMMIT;
