-- Whether the nights may learn from a token's caller, and whether the log may keep what it says.
ALTER TABLE api_token
    ADD COLUMN learning boolean NOT NULL DEFAULT true,
    ADD COLUMN text     boolean NOT NULL DEFAULT true;
