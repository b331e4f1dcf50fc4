#!/bin/bash
# Postgres in a container: makes its cluster on the first start, with a database each for the service, Airflow and
# MLflow (their migration tables collide in one), owned by a role of that name. Their password is the file
# POSTGRES_PASSWORD_FILE; it is read on the first start only. Ended before it was whole, it begins anew.
set -euo pipefail
: "${PGDATA:?}" "${POSTGRES_PASSWORD_FILE:?the file with the password of agentloop, airflow and mlflow}"

if [[ ! -e $PGDATA/PG_VERSION ]]; then
  new=$PGDATA.new
  rm -rf "$new"
  initdb --pgdata "$new" --username postgres --auth-local peer --auth-host scram-sha-256 --encoding UTF8 \
    --locale C.UTF-8 --data-checksums > /dev/null
  echo 'host all all all scram-sha-256' >> "$new/pg_hba.conf"
  pg_ctl --pgdata "$new" --wait --options "-c listen_addresses='' -c unix_socket_directories=/tmp" start > /dev/null
  for name in agentloop airflow mlflow; do
    psql --quiet --host /tmp --username postgres --no-psqlrc --set ON_ERROR_STOP=1 --set name="$name" \
      --set password="$(< "$POSTGRES_PASSWORD_FILE")" <<'SQL'
CREATE ROLE :"name" LOGIN PASSWORD :'password';
CREATE DATABASE :"name" OWNER :"name";
SQL
  done
  # What freezes the log reads one view as this role, which only a superuser may make.
  psql --quiet --host /tmp --username postgres --no-psqlrc --set ON_ERROR_STOP=1 \
    --command 'CREATE ROLE agentloop_freeze NOLOGIN' --command 'GRANT agentloop_freeze TO agentloop WITH ADMIN OPTION'
  pg_ctl --pgdata "$new" --wait --mode fast stop > /dev/null
  mv "$new" "$PGDATA"
fi
exec postgres -D "$PGDATA" -c listen_addresses='*' -c unix_socket_directories=/tmp "$@"
