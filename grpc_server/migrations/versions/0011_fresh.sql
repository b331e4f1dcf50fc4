-- As before, but a session may say from which transaction on it wants the log:
--
--     SELECT set_config('agentloop.changed_from', '1234567', true);
--
-- The view then leaves out what no transaction from that one on has touched, and finds the rest along the indexes of
-- changed_xid. A condition on the view's own changed_xid cannot do that: it is the newer one of two tables, so the
-- whole log was read, and all its feedback grouped, for one night's rows. Where nothing is set the view shows all. What
-- it shows of a row, and the row's changed_xid, do not depend on the setting.
CREATE OR REPLACE VIEW learning_log AS
WITH fresh AS (
    SELECT id FROM inference
    WHERE changed_xid >= COALESCE(NULLIF(current_setting('agentloop.changed_from', true), ''), '0')::xid8
    UNION
    SELECT inference_id FROM feedback
    WHERE learning
      AND changed_xid >= COALESCE(NULLIF(current_setting('agentloop.changed_from', true), ''), '0')::xid8
)
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
    WHERE learning AND inference_id IN (SELECT id FROM fresh)
    GROUP BY inference_id
) f ON f.inference_id = i.id
WHERE i.status <> 'started' AND i.learning AND i.id IN (SELECT id FROM fresh);
