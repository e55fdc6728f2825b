BEGIN TRANSACTION;
CREATE TABLE api_keys (
        id TEXT PRIMARY KEY,
        tenant TEXT NOT NULL REFERENCES tenants (name),
        secret_sha256 BLOB NOT NULL CHECK (length(secret_sha256) = 32),
        scopes TEXT NOT NULL,
        created REAL NOT NULL,
        expires REAL,
        revoked REAL
    ) STRICT;
INSERT INTO "api_keys" VALUES('85326b4247871474','clinic',X'8A777CE4F1F821572EDCA16277192A8F8F86AC3BABED047ECD9C318337E44902','infer models usage',1795900000.0,1795996400.0,NULL);
INSERT INTO "api_keys" VALUES('cf0ea39329d6a6bb','insurer',X'55749D3AC1985886C2C43F52C319E13AFCF9C00CDB965A39B986A65936B62B89','infer models usage',1795900000.0,NULL,1795953600.0);
INSERT INTO "api_keys" VALUES('be4d1bbcb5b389e5','clinic',X'B58FE290A8A47DFC47D5034F98C85A9FEE7F1338C5AEDBA487E4C7ECCF400673','infer models usage',1795910000.0,NULL,NULL);
CREATE TABLE audit (
        number INTEGER PRIMARY KEY AUTOINCREMENT,
        at REAL NOT NULL,
        action TEXT NOT NULL,
        tenant TEXT NOT NULL,
        detail TEXT NOT NULL
    ) STRICT
    ;
INSERT INTO "audit" VALUES(1,1795953600.0,'add','clinic','key 85326b4247871474, scopes infer models usage');
INSERT INTO "audit" VALUES(2,1795953600.0,'add','insurer','key cf0ea39329d6a6bb, scopes infer models usage');
INSERT INTO "audit" VALUES(3,1795953600.0,'rotate','clinic','key be4d1bbcb5b389e5, scopes infer models usage');
INSERT INTO "audit" VALUES(4,1795953600.0,'revoke','insurer','key cf0ea39329d6a6bb');
INSERT INTO "audit" VALUES(5,1795953600.0,'limit','clinic','digits: 500 a month');
INSERT INTO "audit" VALUES(6,1795953600.0,'limit','clinic','rate 50, burst 100');
CREATE TABLE budgets (
        tenant TEXT NOT NULL REFERENCES tenants (name),
        model TEXT NOT NULL,
        units INTEGER CHECK (units >= 0),
        period TEXT NOT NULL CHECK (period IN ('day', 'month')),
        PRIMARY KEY (tenant, model)
    ) STRICT, WITHOUT ROWID;
INSERT INTO "budgets" VALUES('clinic','digits',500,'month');
CREATE TABLE tenants (
        name TEXT PRIMARY KEY,
        created REAL NOT NULL
    , rate_per_second REAL CHECK (rate_per_second > 0), burst INTEGER CHECK (burst >= 1)) STRICT;
INSERT INTO "tenants" VALUES('clinic',1795900000.0,50.0,100);
INSERT INTO "tenants" VALUES('insurer',1795900000.0,NULL,NULL);
CREATE TABLE usage (
        tenant TEXT NOT NULL REFERENCES tenants (name),
        model TEXT NOT NULL,
        start TEXT NOT NULL,
        used INTEGER NOT NULL CHECK (used >= 0),
        PRIMARY KEY (tenant, model, start)
    ) STRICT, WITHOUT ROWID
    ;
INSERT INTO "usage" VALUES('clinic','digits','2026-11',7);
INSERT INTO "usage" VALUES('clinic','other','2026-11-29',3);
CREATE INDEX api_keys_of_tenant ON api_keys (tenant);
DELETE FROM "sqlite_sequence";
INSERT INTO "sqlite_sequence" VALUES('audit',6);
COMMIT;
PRAGMA user_version = 2;
