-- Whether a night may learn from a row, and what was replaced in its texts before it reached a disk: how often, by
-- kind, as in {"EMAIL": 2}; null where nothing was. A row without text has `withheld` in its request and answer.
ALTER TABLE inference
    ADD COLUMN learning         boolean NOT NULL DEFAULT true,
    ADD COLUMN request_redacted json,
    ADD COLUMN answer_redacted  json;

ALTER TABLE feedback
    ADD COLUMN learning boolean NOT NULL DEFAULT true,
    ADD COLUMN redacted json;

-- As before, but for rows and feedback of callers who are not to be learned from.
CREATE OR REPLACE VIEW learning_log AS
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
    WHERE learning
    GROUP BY inference_id
) f ON f.inference_id = i.id
WHERE i.status <> 'started' AND i.learning;
