-- What the service keeps. Whoever reads the log reads the view learning_log, as the role agentloop_freeze:
--
--     SET ROLE agentloop_freeze;              -- in a session of a user who was granted the role, or
--     CREATE ROLE nightly LOGIN IN ROLE agentloop_freeze;   -- a user of its own
--
-- changed_xid is the transaction that wrote the row last. Transactions commit out of order, so neither a
-- serial number nor a time can tell which rows are new; "changed_xid < pg_snapshot_xmin(...)" can: every
-- transaction before that one has ended, so nothing can appear there any more.
--
-- JSON is stored as json, not jsonb: jsonb sorts the keys of objects (a tool's parameters would be rendered
-- in another order in training than they were in serving), turns numbers into others, and refuses
-- \u0000 and lone surrogates. Cast to jsonb for its operators.

CREATE TABLE inference (
    id            uuid PRIMARY KEY,          -- UUIDv7: its first 48 bits are the Unix time in ms
    server_id     text NOT NULL,
    caller        text NOT NULL,
    key_id        text NOT NULL,
    alias         text NOT NULL,
    model_version text NOT NULL,
    target_role   text NOT NULL CHECK (target_role IN ('stable', 'canary', 'shadow')),
    session_id    text NOT NULL,
    request       json NOT NULL,
    status        text NOT NULL DEFAULT 'started'
                  CHECK (status IN ('started', 'ok', 'cancelled', 'deadline', 'error', 'aborted')),
    finish_reason text CHECK (finish_reason IN ('stop', 'length', 'tool_calls')),
    answer        json,                      -- null until the end record is stored
    error         text NOT NULL DEFAULT '',
    input_tokens  int NOT NULL DEFAULT 0 CHECK (input_tokens >= 0),
    output_tokens int NOT NULL DEFAULT 0 CHECK (output_tokens >= 0),
    queue_ms      double precision NOT NULL DEFAULT 0,
    ttft_ms       double precision,
    total_ms      double precision NOT NULL DEFAULT 0,
    started_at    timestamptz NOT NULL,
    ended_at      timestamptz,
    changed_xid   xid8 NOT NULL DEFAULT pg_current_xact_id()
) PARTITION BY RANGE (id);

CREATE INDEX inference_changed_xid ON inference (changed_xid);
CREATE INDEX inference_started ON inference (server_id) WHERE status = 'started';

-- Rows of months without a partition, and ids that are no UUIDv7. See ensure_partitions.
CREATE TABLE inference_default PARTITION OF inference DEFAULT;

-- No foreign key: feedback may arrive before its inference.
CREATE TABLE feedback (
    id            uuid PRIMARY KEY,
    inference_id  uuid NOT NULL,
    caller        text NOT NULL,
    key_id        text NOT NULL,
    created_at    timestamptz NOT NULL,
    "boolean"     boolean,
    score         double precision,
    comment       text,
    demonstration json,
    changed_xid   xid8 NOT NULL DEFAULT pg_current_xact_id(),
    CHECK (num_nonnulls("boolean", score, comment, demonstration) = 1)
);

CREATE INDEX feedback_inference ON feedback (inference_id);
CREATE INDEX feedback_changed_xid ON feedback (changed_xid);

-- What the tables above would not take, and bytes of a spool that are no record.
CREATE TABLE dead_letter (
    id         uuid PRIMARY KEY,             -- a hash of the record: one that comes twice is stored once
    at         timestamptz NOT NULL DEFAULT now(),
    kind       text NOT NULL,
    reason     text NOT NULL,
    record     text NOT NULL                 -- the record's JSON, or the bytes as Latin-1
);

CREATE TABLE api_token (
    key_id        text PRIMARY KEY CHECK (key_id ~ '^[a-z0-9]{12}$'),
    name          text NOT NULL CHECK (name <> ''),
    secret_sha256 bytea NOT NULL CHECK (length(secret_sha256) = 32),
    scopes        text[] NOT NULL,
    created_at    timestamptz NOT NULL,
    expires_at    timestamptz,
    revoked_at    timestamptz
);

CREATE TABLE route (
    alias      text PRIMARY KEY CHECK (alias <> ''),
    revision   bigint NOT NULL CHECK (revision > 0),
    changed_at timestamptz NOT NULL DEFAULT now(),
    changed_by text NOT NULL
);

CREATE TABLE route_target (
    alias         text NOT NULL REFERENCES route ON DELETE CASCADE,
    position      int NOT NULL,
    model_version text NOT NULL CHECK (model_version <> ''),
    role          text NOT NULL CHECK (role IN ('stable', 'canary', 'shadow')),
    weight        int NOT NULL CHECK (weight BETWEEN 0 AND 100),
    PRIMARY KEY (alias, position)
);

-- Who changed what: server_started, token_created, token_revoked, route_set.
CREATE TABLE event (
    id      bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    at      timestamptz NOT NULL DEFAULT now(),
    kind    text NOT NULL,
    actor   text NOT NULL,
    subject text NOT NULL,
    detail  json NOT NULL DEFAULT '{}'
);

CREATE INDEX event_at ON event (at);
-- A start of a server is acted on once, however often its record is stored.
CREATE UNIQUE INDEX event_server_started ON event (actor, at) WHERE kind = 'server_started';

-- One row per ended inference, with all the feedback on it so far. Feedback is grouped first, then joined: with a
-- LATERAL, and before the tables have statistics, Postgres looks for each inference's newest feedback along the
-- index of transactions (measured: 3.4 s for 5,000 rows, growing with the square).
CREATE VIEW learning_log AS
SELECT i.id AS inference_id,
       GREATEST(i.changed_xid, f.changed_xid)::text AS changed_xid,
       i.caller, i.key_id, i.alias, i.model_version, i.target_role, i.session_id,
       i.request,
       COALESCE(i.answer, '{"role":"assistant","content":"","tool_calls":[],"tool_name":""}') AS answer,
       i.status, i.finish_reason, i.error, i.input_tokens, i.output_tokens,
       i.queue_ms, i.ttft_ms, i.total_ms, i.started_at, i.ended_at,
       COALESCE(f.feedback, '[]') AS feedback
FROM inference i
LEFT JOIN (
    SELECT inference_id,
           max(changed_xid) AS changed_xid,
           json_agg(json_build_object(
               'id', id,
               'created_at', to_char(created_at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"+00:00"'),
               'caller', caller,
               'boolean', "boolean",
               'score', score,
               'comment', comment,
               'demonstration', demonstration
           ) ORDER BY created_at, id) AS feedback
    FROM feedback
    GROUP BY inference_id
) f ON f.inference_id = i.id
WHERE i.status <> 'started';

-- The role belongs to the cluster, and may be there already: made by hand, or for another database.
DO $$
BEGIN
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'agentloop_freeze') THEN
        CREATE ROLE agentloop_freeze NOLOGIN;
    END IF;
EXCEPTION
    WHEN duplicate_object OR unique_violation THEN NULL;
    WHEN insufficient_privilege THEN
        RAISE EXCEPTION 'the role agentloop_freeze is missing, and % may not create it', current_user
            USING HINT = 'Run once as a superuser: CREATE ROLE agentloop_freeze NOLOGIN;';
END
$$;

GRANT SELECT ON learning_log TO agentloop_freeze;

-- Who migrates may also freeze: SET ROLE agentloop_freeze (superusers may anyway).
DO $$
BEGIN
    EXECUTE format('GRANT agentloop_freeze TO %I', current_user);
EXCEPTION
    -- internal_error: "tuple concurrently updated", as another database's migration does the same.
    WHEN insufficient_privilege OR invalid_grant_operation OR unique_violation OR internal_error THEN NULL;
END
$$;
