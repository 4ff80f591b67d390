BEGIN TRANSACTION;
CREATE TABLE alembic_version (
	version_num VARCHAR(32) NOT NULL, 
	CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num)
);
INSERT INTO "alembic_version" VALUES('0004');
CREATE TABLE aliases (
	name VARCHAR(64) NOT NULL, 
	alias VARCHAR(64) NOT NULL, 
	number INTEGER NOT NULL, 
	generation INTEGER NOT NULL, 
	PRIMARY KEY (name, alias), 
	FOREIGN KEY(name, number) REFERENCES versions (name, number)
);
INSERT INTO "aliases" VALUES('tiny','production',1,3);
CREATE TABLE approvals (
	seq INTEGER NOT NULL, 
	name VARCHAR(64) NOT NULL, 
	number INTEGER NOT NULL, 
	alias VARCHAR(64) NOT NULL, 
	actor VARCHAR(128) NOT NULL, 
	role VARCHAR(32) NOT NULL, 
	note TEXT NOT NULL, 
	created VARCHAR(32) NOT NULL, 
	withdrawn INTEGER, 
	spent INTEGER, 
	PRIMARY KEY (seq), 
	FOREIGN KEY(name, number) REFERENCES versions (name, number)
);
INSERT INTO "approvals" VALUES(9,'tiny',1,'production','grace','promoter','seen','2026-01-01T00:00:00+00:00',NULL,1);
INSERT INTO "approvals" VALUES(11,'tiny',2,'production','grace','promoter','seen','2026-01-01T00:00:00+00:00',NULL,2);
INSERT INTO "approvals" VALUES(13,'tiny',3,'production','grace','promoter','','2026-01-01T00:00:00+00:00',14,NULL);
CREATE TABLE environments (
	digest VARCHAR(64) NOT NULL, 
	packages TEXT NOT NULL, 
	PRIMARY KEY (digest)
);
INSERT INTO "environments" VALUES('5f5f5f5f5f5f5f5f5f5f5f5f5f5f5f5f5f5f5f5f5f5f5f5f5f5f5f5f5f5f5f5f','polars==2.1.0
');
CREATE TABLE events (
	seq INTEGER NOT NULL, 
	created VARCHAR(32) NOT NULL, 
	actor VARCHAR(128) NOT NULL, 
	action VARCHAR(32) NOT NULL, 
	object VARCHAR(160) NOT NULL, 
	details JSON NOT NULL, prev VARCHAR(64), mac VARCHAR(64), 
	PRIMARY KEY (seq)
);
INSERT INTO "events" VALUES(1,'2026-01-01T00:00:00+00:00','root','create signer','36fda99a1a760fe8fda47ff2040165ee2418f19e4e5a23e9dc5910f47cf31091','{"name": "ada", "algorithm": "ed25519"}','0000000000000000000000000000000000000000000000000000000000000000','77582e488620c5a7bb3878ff192b49590cce527a89acbf9980f69fcd6ce9fd2d');
INSERT INTO "events" VALUES(2,'2026-01-01T00:00:00+00:00','ada','register','tiny/1','{"digest": "41031de8dfd421e9cfca6365d4328158742add0bf7579a7e136cea93910c37e0", "signatures": [["41031de8dfd421e9cfca6365d4328158742add0bf7579a7e136cea93910c37e0", "36fda99a1a760fe8fda47ff2040165ee2418f19e4e5a23e9dc5910f47cf31091", "4a3a7d8c498a5b7839a8dab3816ffe91c78a5ace0b69fae5a54d7e86e7896a9f"]], "lineage": "e36461fbfcdcecceffa96528b31326a771fcd13afd9a1568a67655077044617a"}','77582e488620c5a7bb3878ff192b49590cce527a89acbf9980f69fcd6ce9fd2d','b8073273f1ce98eb03e2c0ef2b1371165a7db0032617547ddce12440049dc227');
INSERT INTO "events" VALUES(3,'2026-01-01T00:00:00+00:00','ada','register','tiny/2','{"digest": "4bb2dab11f44611b0ce5b8b8aa000a68f857409f6e0e222da010090b732b8766", "signatures": [["4bb2dab11f44611b0ce5b8b8aa000a68f857409f6e0e222da010090b732b8766", "36fda99a1a760fe8fda47ff2040165ee2418f19e4e5a23e9dc5910f47cf31091", "2ad4d148767d10ed5427eb6d922ed936808952ffa2fe7678d4bf52c9f3784892"]], "lineage": "82fa03694103ea61604c0056d9bffa7097dd071bb8b6129c6eb0c551573962c0"}','b8073273f1ce98eb03e2c0ef2b1371165a7db0032617547ddce12440049dc227','4e24155ef48b88940cb03da7fac8fca63e3729794084dab9ef1ce206041f75d5');
INSERT INTO "events" VALUES(4,'2026-01-01T00:00:00+00:00','ada','register','tiny/3','{"digest": "1e41674a8fa1d0796f4a5686c308e07be68c15b77388d91217c8f3526091d7b6", "signatures": [["1e41674a8fa1d0796f4a5686c308e07be68c15b77388d91217c8f3526091d7b6", "36fda99a1a760fe8fda47ff2040165ee2418f19e4e5a23e9dc5910f47cf31091", "a813e0281e8a611d4019723fef5b3b3c6215c9800f108b1472a47993f80fb188"]], "lineage": "6c8b0bddcd02e30c31437413a5907ded52bad5711bd461f7ad823cf8f0267564"}','4e24155ef48b88940cb03da7fac8fca63e3729794084dab9ef1ce206041f75d5','8e60d4d3ebe6a5e9df7a7f8e98eaf61b4325fd59fc7c48c4f7e4e62d695f0bb0');
INSERT INTO "events" VALUES(5,'2026-01-01T00:00:00+00:00','ada','gate','tiny/1','{"digest": "41031de8dfd421e9cfca6365d4328158742add0bf7579a7e136cea93910c37e0", "gate": "quality", "passed": true, "page": "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a", "statement": "3154428785e7be7146d886f6603c33c61d1c50c8f90ae717ddd104a4e39b8793", "signatures": [["3154428785e7be7146d886f6603c33c61d1c50c8f90ae717ddd104a4e39b8793", "36fda99a1a760fe8fda47ff2040165ee2418f19e4e5a23e9dc5910f47cf31091", "93fa57faf45427ba00eff1c319f4937853581344a710c17c4bde96ff09b15234"]]}','8e60d4d3ebe6a5e9df7a7f8e98eaf61b4325fd59fc7c48c4f7e4e62d695f0bb0','5a1f6df45ba60fbf6f6db37c11c6ee52d7820005fb614a228882c5cbcfbef006');
INSERT INTO "events" VALUES(6,'2026-01-01T00:00:00+00:00','ada','gate','tiny/2','{"digest": "4bb2dab11f44611b0ce5b8b8aa000a68f857409f6e0e222da010090b732b8766", "gate": "quality", "passed": true, "page": "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a", "statement": "c10eaedc1daa094c92b593f73a6682888d88bc134198c4b80e549146febbfd5f", "signatures": [["c10eaedc1daa094c92b593f73a6682888d88bc134198c4b80e549146febbfd5f", "36fda99a1a760fe8fda47ff2040165ee2418f19e4e5a23e9dc5910f47cf31091", "498914034ea36dceb865f0e737bbfe546d4351b5e3c2c30e70fedf32ff24f67b"]]}','5a1f6df45ba60fbf6f6db37c11c6ee52d7820005fb614a228882c5cbcfbef006','2ab2b509eafa93fffa402cf9325b2d95f81b54de0819203744d6726636bed233');
INSERT INTO "events" VALUES(7,'2026-01-01T00:00:00+00:00','ada','gate','tiny/3','{"digest": "1e41674a8fa1d0796f4a5686c308e07be68c15b77388d91217c8f3526091d7b6", "gate": "quality", "passed": true, "page": "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a", "statement": "cd11a0f7bdf9a8d74a481d4c0e4179c8ced3815497a1d2334ad12c279b3c401d", "signatures": [["cd11a0f7bdf9a8d74a481d4c0e4179c8ced3815497a1d2334ad12c279b3c401d", "36fda99a1a760fe8fda47ff2040165ee2418f19e4e5a23e9dc5910f47cf31091", "0a52da34c5068e65d594293a31a9959e25512ce26c7b54ab70052cc5bce028e2"]]}','2ab2b509eafa93fffa402cf9325b2d95f81b54de0819203744d6726636bed233','ec414d0392024fd2ac326a36903e99cfbd21fc96c5d63c4d8de9bf4af40907dc');
INSERT INTO "events" VALUES(8,'2026-01-01T00:00:00+00:00','alan','refuse','tiny/1','{"asked": "model:promote", "alias": "production", "why": "tiny/1 may not be promoted to production: 0 of 1 approvals are there, by promoter or admin. `mlray approve tiny/1 --for production` gives one."}','ec414d0392024fd2ac326a36903e99cfbd21fc96c5d63c4d8de9bf4af40907dc','eb20f0cc6690c012777e4cb914d9dedd63cff6fc1344b0944b130231657680f9');
INSERT INTO "events" VALUES(9,'2026-01-01T00:00:00+00:00','grace','approve','tiny/1','{"alias": "production", "role": "promoter", "note": "seen", "digest": "41031de8dfd421e9cfca6365d4328158742add0bf7579a7e136cea93910c37e0"}','eb20f0cc6690c012777e4cb914d9dedd63cff6fc1344b0944b130231657680f9','d5c25792a36dea0e9a5e6ff74995ab3f071e5cdd65a705cde7593ef67c027f18');
INSERT INTO "events" VALUES(10,'2026-01-01T00:00:00+00:00','alan','promote','tiny/1','{"alias": "production", "generation": 1, "under": null, "digest": "41031de8dfd421e9cfca6365d4328158742add0bf7579a7e136cea93910c37e0", "approvals": [9], "once": "key tiny/1"}','d5c25792a36dea0e9a5e6ff74995ab3f071e5cdd65a705cde7593ef67c027f18','1c92e203474b25d4e68d2d79fd2dbfac8103aa6bbe41e80d120c5a329e7aeffb');
INSERT INTO "events" VALUES(11,'2026-01-01T00:00:00+00:00','grace','approve','tiny/2','{"alias": "production", "role": "promoter", "note": "seen", "digest": "4bb2dab11f44611b0ce5b8b8aa000a68f857409f6e0e222da010090b732b8766"}','1c92e203474b25d4e68d2d79fd2dbfac8103aa6bbe41e80d120c5a329e7aeffb','9507231e505742eaa282ffc51d302eff5784abba84a192016e1d8784cd3988a9');
INSERT INTO "events" VALUES(12,'2026-01-01T00:00:00+00:00','alan','promote','tiny/2','{"alias": "production", "generation": 2, "under": 1, "digest": "4bb2dab11f44611b0ce5b8b8aa000a68f857409f6e0e222da010090b732b8766", "approvals": [11], "once": "key tiny/2"}','9507231e505742eaa282ffc51d302eff5784abba84a192016e1d8784cd3988a9','c0c7680709d5cc72c47d9860e9798b123088f4d0db784b81c4e9ef841f29fe09');
INSERT INTO "events" VALUES(13,'2026-01-01T00:00:00+00:00','grace','approve','tiny/3','{"alias": "production", "role": "promoter", "note": "", "digest": "1e41674a8fa1d0796f4a5686c308e07be68c15b77388d91217c8f3526091d7b6"}','c0c7680709d5cc72c47d9860e9798b123088f4d0db784b81c4e9ef841f29fe09','1aee08d1b8b7450dcb62c7b06ffe690e9fa581a94f6943d2925ca48703b46e75');
INSERT INTO "events" VALUES(14,'2026-01-01T00:00:00+00:00','grace','withdraw','tiny/3','{"alias": "production", "approvals": [13], "note": "wait"}','1aee08d1b8b7450dcb62c7b06ffe690e9fa581a94f6943d2925ca48703b46e75','6fe2dd9e955c651bda923433661624c63eb89f92d752e07240474a8975aebca0');
INSERT INTO "events" VALUES(15,'2026-01-01T00:00:00+00:00','alan','rollback','tiny/1','{"alias": "production", "generation": 3, "under": null, "before": 2, "digest": "41031de8dfd421e9cfca6365d4328158742add0bf7579a7e136cea93910c37e0"}','6fe2dd9e955c651bda923433661624c63eb89f92d752e07240474a8975aebca0','c399b436910f6b23b599bbb3dc764c70995ea267ebf8543430f6d64ddfd1ad98');
INSERT INTO "events" VALUES(16,'2026-01-01T00:00:00+00:00','alan','deprecate','tiny/3','{"why": "slow", "sunset": "2026-01-31", "successor": "tiny/2"}','c399b436910f6b23b599bbb3dc764c70995ea267ebf8543430f6d64ddfd1ad98','b5b839d199728f99795b9e3dd2b028e8a87bde4dfe65bb29b89c3c3f227353a4');
INSERT INTO "events" VALUES(17,'2026-01-01T00:00:00+00:00','alan','retire','tiny/3','{"why": "slow", "successor": "tiny/2", "served": [], "anyway": "tiny/3 was promised until 2026-01-31"}','b5b839d199728f99795b9e3dd2b028e8a87bde4dfe65bb29b89c3c3f227353a4','a2630fd03d9f743275393a5cc1a1a99d9510789ed2d720e1641ef3c9081866cb');
INSERT INTO "events" VALUES(18,'2026-01-01T00:00:00+00:00','root','key','0123abcd','{"role": "viewer", "sha256": "0000000000000000000000000000000000000000000000000000000000000000", "owner": "eve", "models": "tiny*", "expires": "2027-01-01T00:00:00+00:00"}','a2630fd03d9f743275393a5cc1a1a99d9510789ed2d720e1641ef3c9081866cb','3a9991e19142d73d4f17abcd2b624ba2444cc29ab672a726151ac13c5f965e62');
INSERT INTO "events" VALUES(19,'2026-01-01T00:00:00+00:00','root','key','4567cdef','{"role": "tester", "sha256": "1111111111111111111111111111111111111111111111111111111111111111", "owner": null, "models": "*", "expires": null}','3a9991e19142d73d4f17abcd2b624ba2444cc29ab672a726151ac13c5f965e62','16c95cf4511a72ead958af6d81478eced48f6745eb154f1120df1e5477068822');
INSERT INTO "events" VALUES(20,'2026-01-01T00:00:00+00:00','root','revoke','4567cdef','{"why": "left"}','16c95cf4511a72ead958af6d81478eced48f6745eb154f1120df1e5477068822','f7079c88ac7b345bbd395c54c9298df35aa5590d0328ec99436a726f53cb3cae');
CREATE TABLE evidence (
	id INTEGER NOT NULL, 
	digest VARCHAR(64) NOT NULL, 
	gate VARCHAR(64) NOT NULL, 
	passed BOOLEAN NOT NULL, 
	verdict JSON NOT NULL, 
	page VARCHAR(64) NOT NULL, 
	created VARCHAR(32) NOT NULL, statement VARCHAR(64), 
	PRIMARY KEY (id)
);
INSERT INTO "evidence" VALUES(1,'41031de8dfd421e9cfca6365d4328158742add0bf7579a7e136cea93910c37e0','quality',1,'{"passed": true, "findings": [{"measure": "roc_auc", "rule": "at least 0.8", "value": 0.9, "passed": true, "why": "kept", "waived": ""}]}','44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a','2026-01-01T00:00:00+00:00','3154428785e7be7146d886f6603c33c61d1c50c8f90ae717ddd104a4e39b8793');
INSERT INTO "evidence" VALUES(2,'4bb2dab11f44611b0ce5b8b8aa000a68f857409f6e0e222da010090b732b8766','quality',1,'{"passed": true, "findings": [{"measure": "roc_auc", "rule": "at least 0.8", "value": 0.9, "passed": true, "why": "kept", "waived": ""}]}','44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a','2026-01-01T00:00:00+00:00','c10eaedc1daa094c92b593f73a6682888d88bc134198c4b80e549146febbfd5f');
INSERT INTO "evidence" VALUES(3,'1e41674a8fa1d0796f4a5686c308e07be68c15b77388d91217c8f3526091d7b6','quality',1,'{"passed": true, "findings": [{"measure": "roc_auc", "rule": "at least 0.8", "value": 0.9, "passed": true, "why": "kept", "waived": ""}]}','44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a','2026-01-01T00:00:00+00:00','cd11a0f7bdf9a8d74a481d4c0e4179c8ced3815497a1d2334ad12c279b3c401d');
CREATE TABLE keys (
	id VARCHAR(8) NOT NULL, 
	sha256 VARCHAR(64) NOT NULL, 
	role VARCHAR(32) NOT NULL, 
	created VARCHAR(32) NOT NULL, owner VARCHAR(128), models VARCHAR(1024), expires VARCHAR(32), revoked VARCHAR(32), 
	PRIMARY KEY (id)
);
INSERT INTO "keys" VALUES('0123abcd','0000000000000000000000000000000000000000000000000000000000000000','viewer','2026-01-01T00:00:00+00:00','eve','tiny*','2027-01-01T00:00:00+00:00',NULL);
INSERT INTO "keys" VALUES('4567cdef','1111111111111111111111111111111111111111111111111111111111111111','tester','2026-01-01T00:00:00+00:00',NULL,'*',NULL,'2026-01-01T00:00:00+00:00');
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
INSERT INTO "moves" VALUES('tiny','production',3,1,NULL);
CREATE TABLE outbox (
	seq INTEGER NOT NULL, 
	target VARCHAR(32) NOT NULL, 
	delivered VARCHAR(32), 
	attempts INTEGER NOT NULL, 
	error TEXT, 
	PRIMARY KEY (seq, target)
);
INSERT INTO "outbox" VALUES(2,'mlflow',NULL,0,NULL);
INSERT INTO "outbox" VALUES(3,'mlflow',NULL,0,NULL);
INSERT INTO "outbox" VALUES(4,'mlflow',NULL,0,NULL);
INSERT INTO "outbox" VALUES(10,'mlflow',NULL,0,NULL);
INSERT INTO "outbox" VALUES(12,'mlflow',NULL,0,NULL);
INSERT INTO "outbox" VALUES(15,'mlflow',NULL,0,NULL);
INSERT INTO "outbox" VALUES(16,'mlflow',NULL,0,NULL);
INSERT INTO "outbox" VALUES(17,'mlflow',NULL,0,NULL);
CREATE TABLE requests (
	"key" VARCHAR(128) NOT NULL, 
	asked VARCHAR(64) NOT NULL, 
	result JSON NOT NULL, 
	seq INTEGER NOT NULL, 
	PRIMARY KEY ("key")
);
INSERT INTO "requests" VALUES('key tiny/1','5aef9f04e8e36aaafc49a52dadfe802dfb6a8e5d82d2c0b3ce7e9792ee45d2fc','{"generation": 1}',10);
INSERT INTO "requests" VALUES('key tiny/2','b5276ce83377639f2bbdf65577d47b63debde77f1b7fa91c576a44b43e12a1f4','{"generation": 2}',12);
CREATE TABLE signatures (
	about VARCHAR(64) NOT NULL, 
	signer VARCHAR(64) NOT NULL, 
	envelope VARCHAR(64) NOT NULL, 
	created VARCHAR(32) NOT NULL, 
	PRIMARY KEY (about, signer)
);
INSERT INTO "signatures" VALUES('41031de8dfd421e9cfca6365d4328158742add0bf7579a7e136cea93910c37e0','36fda99a1a760fe8fda47ff2040165ee2418f19e4e5a23e9dc5910f47cf31091','4a3a7d8c498a5b7839a8dab3816ffe91c78a5ace0b69fae5a54d7e86e7896a9f','2026-01-01T00:00:00+00:00');
INSERT INTO "signatures" VALUES('4bb2dab11f44611b0ce5b8b8aa000a68f857409f6e0e222da010090b732b8766','36fda99a1a760fe8fda47ff2040165ee2418f19e4e5a23e9dc5910f47cf31091','2ad4d148767d10ed5427eb6d922ed936808952ffa2fe7678d4bf52c9f3784892','2026-01-01T00:00:00+00:00');
INSERT INTO "signatures" VALUES('1e41674a8fa1d0796f4a5686c308e07be68c15b77388d91217c8f3526091d7b6','36fda99a1a760fe8fda47ff2040165ee2418f19e4e5a23e9dc5910f47cf31091','a813e0281e8a611d4019723fef5b3b3c6215c9800f108b1472a47993f80fb188','2026-01-01T00:00:00+00:00');
INSERT INTO "signatures" VALUES('3154428785e7be7146d886f6603c33c61d1c50c8f90ae717ddd104a4e39b8793','36fda99a1a760fe8fda47ff2040165ee2418f19e4e5a23e9dc5910f47cf31091','93fa57faf45427ba00eff1c319f4937853581344a710c17c4bde96ff09b15234','2026-01-01T00:00:00+00:00');
INSERT INTO "signatures" VALUES('c10eaedc1daa094c92b593f73a6682888d88bc134198c4b80e549146febbfd5f','36fda99a1a760fe8fda47ff2040165ee2418f19e4e5a23e9dc5910f47cf31091','498914034ea36dceb865f0e737bbfe546d4351b5e3c2c30e70fedf32ff24f67b','2026-01-01T00:00:00+00:00');
INSERT INTO "signatures" VALUES('cd11a0f7bdf9a8d74a481d4c0e4179c8ced3815497a1d2334ad12c279b3c401d','36fda99a1a760fe8fda47ff2040165ee2418f19e4e5a23e9dc5910f47cf31091','0a52da34c5068e65d594293a31a9959e25512ce26c7b54ab70052cc5bce028e2','2026-01-01T00:00:00+00:00');
CREATE TABLE versions (
	name VARCHAR(64) NOT NULL, 
	number INTEGER NOT NULL, 
	digest VARCHAR(64) NOT NULL, 
	spec_id VARCHAR(12) NOT NULL, 
	rows_digest VARCHAR(32) NOT NULL, 
	results JSON NOT NULL, 
	created VARCHAR(32) NOT NULL, 
	actor VARCHAR(128) NOT NULL, retired VARCHAR(32), parent VARCHAR(64), lineage JSON, deprecated VARCHAR(32), sunset VARCHAR(10), successor VARCHAR(160), 
	PRIMARY KEY (name, number), 
	UNIQUE (name, digest)
);
INSERT INTO "versions" VALUES('tiny',1,'41031de8dfd421e9cfca6365d4328158742add0bf7579a7e136cea93910c37e0','ce2fb342b21c','','{"values": {"roc_auc": 0.9}}','2026-01-01T00:00:00+00:00','ada',NULL,NULL,'{"code": {"commit": "0000000000000000000000000000000000000000", "changed": false}, "environment": "5f5f5f5f5f5f5f5f5f5f5f5f5f5f5f5f5f5f5f5f5f5f5f5f5f5f5f5f5f5f5f5f", "run": "tiny-1"}',NULL,NULL,NULL);
INSERT INTO "versions" VALUES('tiny',2,'4bb2dab11f44611b0ce5b8b8aa000a68f857409f6e0e222da010090b732b8766','ce2fb342b21c','','{"values": {"roc_auc": 0.9}}','2026-01-01T00:00:00+00:00','ada',NULL,NULL,'{"code": {"commit": "0000000000000000000000000000000000000000", "changed": false}, "environment": "5f5f5f5f5f5f5f5f5f5f5f5f5f5f5f5f5f5f5f5f5f5f5f5f5f5f5f5f5f5f5f5f", "run": "tiny-2"}',NULL,NULL,NULL);
INSERT INTO "versions" VALUES('tiny',3,'1e41674a8fa1d0796f4a5686c308e07be68c15b77388d91217c8f3526091d7b6','ce2fb342b21c','','{"values": {"roc_auc": 0.9}}','2026-01-01T00:00:00+00:00','ada','2026-01-01T00:00:00+00:00',NULL,'{"code": {"commit": "0000000000000000000000000000000000000000", "changed": false}, "environment": "5f5f5f5f5f5f5f5f5f5f5f5f5f5f5f5f5f5f5f5f5f5f5f5f5f5f5f5f5f5f5f5f", "run": "tiny-3"}','2026-01-01T00:00:00+00:00','2026-01-31','tiny/2');
CREATE INDEX ix_evidence_digest ON evidence (digest);
CREATE TRIGGER events_kept_UPDATE BEFORE UPDATE ON events BEGIN SELECT RAISE(ABORT, 'rows of the audit are only ever added'); END;
CREATE TRIGGER events_kept_DELETE BEFORE DELETE ON events BEGIN SELECT RAISE(ABORT, 'rows of the audit are only ever added'); END;
CREATE INDEX versions_of_parent ON versions (parent);
CREATE INDEX approvals_of_version ON approvals (name, number);
COMMIT;
