-- A registry of schema 2, as sqlite3's iterdump() writes it.
PRAGMA user_version = 2;
BEGIN TRANSACTION;
CREATE TABLE addresses (                           -- every address that was ever in use
    network TEXT NOT NULL,
    host INTEGER NOT NULL,
    freed INTEGER,                                 -- a counter, not a clock; NULL while in use
    PRIMARY KEY (network, host)) WITHOUT ROWID;
INSERT INTO "addresses" VALUES('fd00:faa5:0:100',10,NULL);
INSERT INTO "addresses" VALUES('fd00:faa5:0:100',11,NULL);
INSERT INTO "addresses" VALUES('fd00:faa5:0:100',12,NULL);
INSERT INTO "addresses" VALUES('fd00:faa5:1:0',10,NULL);
INSERT INTO "addresses" VALUES('fd00:faa5:1:0',11,NULL);
INSERT INTO "addresses" VALUES('fd00:faa5:1:0',12,1);
INSERT INTO "addresses" VALUES('fd00:faa5:1:0',13,NULL);
CREATE TABLE deployments (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, subnet INTEGER NOT NULL UNIQUE);
INSERT INTO "deployments" VALUES(1,'default',0);
CREATE TABLE functions (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    deployment INTEGER NOT NULL REFERENCES deployments,
    name TEXT NOT NULL,
    ipv6 TEXT NOT NULL UNIQUE,
    revision INTEGER,                              -- the number of the live one; NULL while the first is deploying
    created INTEGER NOT NULL,
    UNIQUE (deployment, name));
INSERT INTO "functions" VALUES(1,1,'hello','fd00:faa5:1:0::a',2,1795637330);
INSERT INTO "functions" VALUES(2,1,'api','fd00:faa5:1:0::b',1,1795637330);
INSERT INTO "functions" VALUES(4,1,'half','fd00:faa5:1:0::d',NULL,1795637330);
CREATE TABLE invites (
    id TEXT PRIMARY KEY,
    secret BLOB NOT NULL,
    name TEXT,
    role TEXT NOT NULL,
    expires INTEGER NOT NULL,
    redeemed INTEGER,
    public_key TEXT,
    peer INTEGER REFERENCES peers ON DELETE CASCADE) WITHOUT ROWID;
INSERT INTO "invites" VALUES('1d39a7bf653580cc',X'67795075956F35DAB974688DCBF55273B6023B52AD3A39D45963608DCEC81696','phone','peer',4102444800,NULL,NULL,NULL);
INSERT INTO "invites" VALUES('3c889e764c3ffd49',X'C28390E9E1B68CF47EED788A2F45C01FA7F834F565EE4B98FCB038542A718EB8',NULL,'peer',2795637330,1795637330,'BAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQ=',3);
CREATE TABLE meta (key TEXT PRIMARY KEY, value NOT NULL) WITHOUT ROWID;
INSERT INTO "meta" VALUES('instance','fc0361');
INSERT INTO "meta" VALUES('serial',2025003);
CREATE TABLE peers (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    name TEXT NOT NULL UNIQUE,
    public_key TEXT NOT NULL UNIQUE,
    preshared_key TEXT,
    ipv6 TEXT NOT NULL UNIQUE,
    role TEXT NOT NULL CHECK (role IN ('peer', 'admin')),
    state TEXT NOT NULL CHECK (state IN ('live', 'removing')),
    created INTEGER NOT NULL);
INSERT INTO "peers" VALUES(1,'laptop','AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=','AgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgI=','fd00:faa5:0:100::a','admin','live',1795637330);
INSERT INTO "peers" VALUES(2,'lost','AwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwM=',NULL,'fd00:faa5:0:100::b','peer','removing',1795637330);
INSERT INTO "peers" VALUES(3,'tablet','BAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQ=',NULL,'fd00:faa5:0:100::c','peer','live',1795637330);
CREATE TABLE revisions (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    function INTEGER NOT NULL REFERENCES functions ON DELETE CASCADE,
    number INTEGER NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('deploying', 'live')),
    created INTEGER NOT NULL, source TEXT,
    UNIQUE (function, number));
INSERT INTO "revisions" VALUES(2,2,1,'live',1795637330,NULL);
INSERT INTO "revisions" VALUES(4,1,2,'live',1795637330,NULL);
INSERT INTO "revisions" VALUES(5,4,1,'deploying',1795637330,NULL);
DELETE FROM "sqlite_sequence";
INSERT INTO "sqlite_sequence" VALUES('functions',4);
INSERT INTO "sqlite_sequence" VALUES('revisions',5);
INSERT INTO "sqlite_sequence" VALUES('peers',3);
COMMIT;
