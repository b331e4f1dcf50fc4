-- Whom a server has lent its GPU to, so that one which starts anew does not load its models into the memory of a
-- training that runs. While a server runs it goes by its own monotonic clock; these times are the database's.
CREATE TABLE gpu_lease (
    server_id  text PRIMARY KEY,
    id         uuid NOT NULL,
    holder     text NOT NULL,
    expires_at timestamptz NOT NULL,       -- unless it is renewed
    ends_at    timestamptz NOT NULL        -- however often it is renewed
);
