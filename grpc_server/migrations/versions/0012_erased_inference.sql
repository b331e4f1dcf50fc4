-- One inference may be erased alone: the digest is then of its id.
ALTER TABLE erasure DROP CONSTRAINT erasure_kind_check;
ALTER TABLE erasure ADD CONSTRAINT erasure_kind_check CHECK (kind IN ('caller', 'session', 'inference'));
