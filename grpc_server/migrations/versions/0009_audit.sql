-- Callers read their own rows, the newest first, and one conversation's: each page walks one of these downwards.
CREATE INDEX inference_caller ON inference (caller, id);
CREATE INDEX inference_session ON inference (session_id, id) WHERE session_id <> '';
