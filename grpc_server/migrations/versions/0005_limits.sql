-- How much a token's caller may use, on each server; null: as much as there is.
ALTER TABLE api_token
    ADD COLUMN requests_per_minute int CHECK (requests_per_minute > 0),
    ADD COLUMN tokens_per_minute   int CHECK (tokens_per_minute > 0),
    ADD COLUMN concurrent_streams  int CHECK (concurrent_streams > 0),
    ADD COLUMN aliases             text[] CHECK (cardinality(aliases) > 0);
