-- The trace (W3C Trace Context, 32 hexadecimal digits) in which an inference was asked; empty where none was recorded.
ALTER TABLE inference ADD COLUMN trace_id text NOT NULL DEFAULT '';
