-- What a server was asked to cancel and does not run itself: the others are told, and whoever runs it ends it and
-- writes its name down. Rows live for a minute; what a crash takes of them nobody misses.
CREATE UNLOGGED TABLE cancellation (
    id           uuid PRIMARY KEY,
    inference_id uuid NOT NULL,
    caller       text,                     -- whose it must be; null: anybody's, as an administrator asks
    asked_at     timestamptz NOT NULL DEFAULT now(),
    ended_by     text                      -- the server that has ended it
);

CREATE TRIGGER tell_changed AFTER INSERT OR UPDATE ON cancellation
    FOR EACH STATEMENT EXECUTE FUNCTION tell_changed('cancellation');
