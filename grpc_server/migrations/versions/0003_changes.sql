-- Whoever changes routes or tokens, a server, the command line or a person with psql: every server that listens
-- is told the table's name when the change commits, and reads it anew. NOTIFY serializes the commits of the
-- transactions that use it, so it belongs to tables that change seldom, and never to the log.

CREATE FUNCTION tell_changed() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_notify('agentloop_changed', TG_ARGV[0]);
    RETURN NULL;
END
$$;

CREATE TRIGGER tell_changed AFTER INSERT OR UPDATE OR DELETE OR TRUNCATE ON route
    FOR EACH STATEMENT EXECUTE FUNCTION tell_changed('route');
CREATE TRIGGER tell_changed AFTER INSERT OR UPDATE OR DELETE OR TRUNCATE ON route_target
    FOR EACH STATEMENT EXECUTE FUNCTION tell_changed('route');
CREATE TRIGGER tell_changed AFTER INSERT OR UPDATE OR DELETE OR TRUNCATE ON api_token
    FOR EACH STATEMENT EXECUTE FUNCTION tell_changed('api_token');
