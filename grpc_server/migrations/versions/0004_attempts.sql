-- Which model versions were asked before the one that answered: empty where the first one did. model_version and
-- target_role of a row are then those of the last attempt, whose answer it holds; until the end record is stored,
-- those of the first.
ALTER TABLE inference ADD COLUMN attempts json NOT NULL DEFAULT '[]';
