"""Postgres on a real host: backups, a point in time, a lost disk, ended certificates (`make soak`)."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import ssl
from collections.abc import AsyncIterator, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote
from uuid import UUID

import psycopg
import pytest

from grpc_server import migrations
from grpc_server.adapters.postgres import PostgresStore
from grpc_server.adapters.spool import FileSpool
from grpc_server.drain import Drain
from tests import records as make
from tests.estate import GATEWAY, Estate, Played, estate

pytestmark = [pytest.mark.soak, pytest.mark.timeout(5400)]

PASSWORD = "a long & odd: password/'1"
FIGURES = "/var/lib/prometheus/node-exporter/agentloop_backup.prom"


@pytest.fixture(scope="module")
def company(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Estate]:
    """One host: gateway and database."""
    with estate(tmp_path_factory.mktemp("estate"), Path("/no/model"), [], {}) as there:
        bare = there.play("site")
        assert bare.code == 0, bare.out
        again = there.play("site")
        assert (again.code, again.changed) == (0, {GATEWAY: 0}), again.out
        yield there


def dsn(company: Estate, password: str = PASSWORD) -> str:
    ca_file = company.folder / "inventory/tls/ca.crt"
    return (
        f"postgresql://agentloop:{quote(password, safe='')}@{company.hosts[GATEWAY].address}:5432/agentloop"
        f"?sslmode=verify-full&sslrootcert={ca_file}&connect_timeout=5"
    )


def query(company: Estate, sql: str) -> list[tuple[Any, ...]]:
    with psycopg.connect(dsn(company)) as connection:
        return connection.execute(sql).fetchall()


class Server:
    """What a server does with its log, and no more: accepts, spools, drains, all the while."""

    def __init__(self, spool: FileSpool) -> None:
        self.spool = spool
        self.accepted: set[UUID] = set()

    async def accept(self, count: int) -> None:
        for _ in range(count):
            start = make.started()
            await self.spool.append(start)
            self.accepted.add(start.id)
            await self.spool.append(make.feedback(start.id))
            await self.spool.append(make.ended(start.id))

    async def run(self) -> None:
        while True:
            await self.accept(1)
            await asyncio.sleep(0.05)

    async def stored(self, company: Estate, seconds: float = 120) -> None:
        """Return when each has its row, its answer and its feedback, once."""
        wanted = set(self.accepted)
        for _ in range(int(seconds)):
            with contextlib.suppress(psycopg.Error):
                rows = query(company, "SELECT id, status FROM inference")
                said = query(company, "SELECT inference_id FROM feedback")
                if wanted <= {one for one, status in rows if status == "ok"}:
                    assert len(said) == len({one for (one,) in said})
                    if wanted <= {one for (one,) in said}:
                        return
            await asyncio.sleep(1)
        raise AssertionError(f"not all of {len(wanted)} are stored; the spool: {self.spool.state()}")


@pytest.fixture
async def server(company: Estate, tmp_path: Path) -> AsyncIterator[Server]:
    await asyncio.to_thread(migrations.migrate, dsn(company))
    spool = FileSpool(tmp_path / "spool", "server-1", 1 << 28, keep_seconds=86400)
    store = PostgresStore(dsn(company))
    await spool.open()
    await store.open()
    made = Server(spool)
    drain = Drain(spool, store, dead_letters=store)
    tasks = [asyncio.create_task(drain.run()), asyncio.create_task(made.run())]
    yield made
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await store.close()
    await spool.close()


async def played(company: Estate, playbook: str, **variables: Any) -> Played:
    """While the server goes on."""
    return await asyncio.to_thread(company.play, playbook, "-e", json.dumps(variables))


async def test_postgres_goes_back_to_a_point_in_time_while_servers_write_and_no_accepted_row_is_lost(
    company: Estate, server: Server
) -> None:
    host = company.hosts[GATEWAY]
    figures = host.run(f"cat {FIGURES}")
    assert 'agentloop_backup_ended_timestamp_seconds{stanza="main",type="full"}' in figures

    await server.accept(50)
    await server.stored(company)
    await asyncio.sleep(2)
    moment = host.run("date --utc '+%Y-%m-%d %H:%M:%S+00'").strip()
    await asyncio.sleep(2)
    await server.accept(50)
    await server.stored(company)
    host.run("sudo -u postgres psql --dbname=agentloop --command='DROP TABLE feedback CASCADE'")

    unsaid = await played(company, "restore")
    assert unsaid.code != 0
    assert "it must be `latest`, or a moment" in unsaid.out
    early = await played(company, "restore", to="2020-01-01 00:00:00+00", loses_rows=True)
    assert early.code != 0
    assert "between the end of the oldest and now" in early.out
    refused = await played(company, "restore", to=moment)
    assert refused.code != 0
    assert "write to it" in refused.out
    restored = await played(company, "restore", to=moment, while_writing=True)
    assert restored.code == 0, restored.out
    await server.accept(10)
    await server.stored(company)
    assert server.spool.dead_letters() == 0
    assert query(company, "SELECT count(*) FROM dead_letter") == [(0,)]

    again = await played(company, "restore", to=moment, while_writing=True)
    assert (again.code, again.changed) == (0, {GATEWAY: 0}), again.out
    fresh = await played(company, "backup")
    assert (fresh.code, fresh.changed) == (0, {GATEWAY: 0}), fresh.out
    another = await played(company, "backup", newer_than=0)
    assert (another.code, another.changed) == (0, {GATEWAY: 1}), another.out
    host.run(f"grep 'type=\"incr\"' {FIGURES}")


async def test_a_disk_that_is_lost_with_the_database_loses_no_accepted_row(
    company: Estate, server: Server
) -> None:
    host = company.hosts[GATEWAY]
    await server.accept(50)
    await server.stored(company)
    host.run("systemctl kill --signal=KILL postgresql@15-main; rm -rf /var/lib/postgresql/15/main")
    await server.accept(50)
    checked = await asyncio.to_thread(company.play, "restore", "-e", "to=latest", "--check")
    assert checked.code == 0, checked.out
    restored = await played(company, "restore", to="latest")
    assert restored.code == 0, restored.out
    await server.stored(company)
    assert server.spool.dead_letters() == 0


def greeting(company: Estate) -> str:
    """What a caller of the gateway gets: the name in its certificate, or why there is no connection."""
    trusted = ssl.create_default_context(cafile=str(company.folder / "inventory/tls/ca.crt"))
    trusted.set_alpn_protocols(["h2"])
    try:
        with (
            socket.create_connection((company.hosts[GATEWAY].address, 50051), 5) as plain,
            trusted.wrap_socket(plain, server_hostname=GATEWAY) as wrapped,
        ):
            return str(wrapped.getpeercert())
    except ssl.SSLError as error:
        return str(error)


def test_an_ended_certificate_is_refused_before_it_is_given_and_replaced_where_it_is(company: Estate) -> None:
    host = company.hosts[GATEWAY]
    ended = company.authority.sign(GATEWAY, timedelta(seconds=-10), address=host.address)
    company.certify(GATEWAY, ended)
    for playbook in ("site", "rotate-credentials"):
        refused = company.play(playbook)
        assert refused.code != 0
        assert f"the certificate of {GATEWAY} is not given to it: it ends on" in refused.out
        assert refused.changed == {GATEWAY: 0}
    assert GATEWAY in greeting(company)

    # What the passing of time does: the certificate that they have ends.
    for path, content in {
        "/etc/postgresql/15/main/server.crt": ended.certificate,
        "/etc/postgresql/15/main/server.key": ended.key,
        "/etc/haproxy/tls/gateway.pem": ended.certificate + b"\n" + ended.key,
    }.items():
        host.run(f"cat > {path} <<'END'\n{content.decode()}END")
    host.run("systemctl reload postgresql@15-main haproxy")
    with pytest.raises(psycopg.OperationalError, match="certificate"):
        query(company, "SELECT 1")
    assert "certificate has expired" in greeting(company)

    began = host.run("systemctl show --property=ActiveEnterTimestamp postgresql@15-main haproxy")
    company.certify(GATEWAY)
    company.write_secrets("another password")
    rotated = company.play("rotate-credentials")
    assert rotated.code == 0, rotated.out
    assert GATEWAY in greeting(company)
    with psycopg.connect(dsn(company, "another password")) as connection:
        assert connection.execute("SELECT 1").fetchall() == [(1,)]
    with pytest.raises(psycopg.OperationalError, match="password"):
        query(company, "SELECT 1")
    assert host.run("systemctl show --property=ActiveEnterTimestamp postgresql@15-main haproxy") == began
    again = company.play("rotate-credentials")
    assert (again.code, again.changed) == (0, {GATEWAY: 0}), again.out
