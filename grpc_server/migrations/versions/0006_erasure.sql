-- A caller's or a session's rows that were erased. Who it was is not kept, only what tells it again: records that a
-- spool still had of before are dropped as they arrive.
CREATE TABLE erasure (
    id           uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    kind         text NOT NULL CHECK (kind IN ('caller', 'session')),
    salt         bytea NOT NULL,
    digest       bytea NOT NULL,           -- SHA-256 of the salt and the name
    before       timestamptz NOT NULL,     -- what began earlier is erased
    requested_by text NOT NULL,
    finished_at  timestamptz,
    counts       json NOT NULL DEFAULT '{}'
);

-- Inferences that are gone (`whole`), or of which only feedback is: their ends, and feedback on them, are dropped
-- as they arrive, and the cycles' files are searched for them.
CREATE TABLE erased (
    inference_id uuid NOT NULL,
    erasure      uuid NOT NULL REFERENCES erasure ON DELETE CASCADE,
    whole        boolean NOT NULL,
    PRIMARY KEY (inference_id, erasure)
);
