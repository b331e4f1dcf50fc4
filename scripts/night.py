"""One night, now: runs the DAG `nightly_loop` once, in the foreground, with a real Airflow on the given Postgres.

`make dag` and the demo call this. Production runs Airflow's own scheduler instead; the DAG is the same.
Airflow keeps its configuration and logs in `<state folder>/airflow` and its tables in a database named `airflow`.
The last line printed is the path of the cycle directory; the exit code is 0 if the run succeeded, else 1.

Everything runs in a session of its own at the lowest processor priority (`/proc/self/autogroup`: plain `nice`
does not reach across sessions), so that serving stays fast, and ends with this command.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Annotated

import psycopg
import typer
from psycopg import sql
from sqlalchemy.engine import URL, make_url

HOME = Path(__file__).resolve().parents[1]
DAG_ID = "nightly_loop"
DATABASE = "airflow"
_CYCLE_ID = "%Y%m%dT%H%M%SZ"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class NightError(Exception):
    """The night cannot start; the text says what to do."""


def database_url(airflow_url: str, database_url: str, state_dir: Path) -> URL:
    """Where Airflow's tables lie.

    The first that is given: `airflow_url`; the cluster of `database_url` (any libpq URI), database `airflow`; the
    local Postgres in `<state_dir>/postgres`, whose socket folder is line 5 of its `postmaster.pid`.

    Raises:
        NightError: none is given and no local Postgres runs.
    """
    if airflow_url:
        return make_url(airflow_url)
    if database_url:
        return make_url(database_url).set(drivername="postgresql+psycopg", database=DATABASE)
    pid_file = state_dir / "postgres" / "postmaster.pid"
    try:
        lines = pid_file.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise NightError(
            f"No Postgres runs in {pid_file.parent}: start the server (`make serve`) or "
            "`python -m grpc_server postgres`, or set AGENTLOOP_AIRFLOW_DATABASE_URL"
        ) from None
    return URL.create(
        "postgresql+psycopg", username="postgres", database=DATABASE, port=int(lines[3]), query={"host": lines[4]}
    )


def ensure_database(url: URL) -> None:
    """Creates the database of `url` if its cluster lacks it.

    Raises:
        NightError: the cluster does not answer, or refuses.
    """
    libpq = url.set(drivername="postgresql", database="postgres").render_as_string(hide_password=False)
    try:
        with psycopg.connect(libpq, autocommit=True, connect_timeout=10) as connection:
            found = connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", (url.database,)).fetchone()
            if found is None:
                with suppress(psycopg.errors.DuplicateDatabase):
                    connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(url.database or DATABASE)))
    except psycopg.Error as error:
        raise NightError(f"Postgres at {url.render_as_string()} is of no use: {error}") from error


def airflow_environment(url: URL, state_dir: Path, home: Path = HOME) -> dict[str, str]:
    """The variables that make Airflow run this checkout's DAG on `url`, ask nobody anything and tell nobody."""
    conn = url.render_as_string(hide_password=False)
    return {
        "AIRFLOW_HOME": str(state_dir / "airflow"),
        "AIRFLOW__CORE__DAGS_FOLDER": str(home / "dags"),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW__CORE__DEFAULT_TIMEZONE": "utc",
        "AIRFLOW__CORE__LAZY_LOAD_PLUGINS": "True",
        "AIRFLOW__CORE__UNIT_TEST_MODE": "False",
        "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": conn,
        "AIRFLOW__DATABASE__LOAD_DEFAULT_CONNECTIONS": "False",
        "AIRFLOW__LOGGING__BASE_LOG_FOLDER": str(state_dir / "airflow" / "logs"),
        "AIRFLOW__USAGE_DATA_COLLECTION__ENABLED": "False",
        "SCARF_ANALYTICS": "false",
        "DO_NOT_TRACK": "1",
        "AGENTLOOP_HOME": str(home),
    }


def _lowest_priority() -> None:
    """Puts this session last in line for the processor, where the kernel has autogroups; harmless elsewhere."""
    with suppress(OSError):
        Path("/proc/self/autogroup").write_text("19", encoding="ascii")
    os.nice(19)


@app.command("airflow", hidden=True)
def run_airflow(logical_date: str, conf: str) -> None:
    """Migrates Airflow's database, makes the pool and runs the DAG, all in this process: one import of Airflow."""
    _lowest_priority()
    started = time.monotonic()
    from airflow.cli.cli_parser import get_parser

    def airflow(*arguments: str) -> None:
        parsed = get_parser().parse_args(arguments)
        parsed.func(parsed)

    airflow("db", "migrate")
    print(f"migrated after {time.monotonic() - started:.1f} s", flush=True)
    airflow("pools", "set", "training", "1", "one slot: two fine-tunings would not fit into memory")
    print(f"pool after {time.monotonic() - started:.1f} s", flush=True)
    airflow("dags", "test", DAG_ID, logical_date, "--conf", conf)


@app.command("run")
def run(
    state_dir: Annotated[Path, typer.Option(envvar="AGENTLOOP_STATE_DIR", help="State folder.")] = Path("var"),
    cycles_dir: Annotated[Path, typer.Option(envvar="AGENTLOOP_CYCLES_DIR", help="Cycles folder.")] = Path("cycles"),
    cycle: Annotated[str, typer.Option(help="Go on with this cycle id rather than begin one.")] = "",
    airflow_url: Annotated[
        str, typer.Option("--airflow-database-url", envvar="AGENTLOOP_AIRFLOW_DATABASE_URL", help="SQLAlchemy URL.")
    ] = "",
    service_url: Annotated[
        str, typer.Option("--database-url", envvar="AGENTLOOP_DATABASE_URL", help="The service's database.")
    ] = "",
) -> None:
    """Runs one night and prints its cycle directory."""
    state_dir, cycles_dir = (HOME / state_dir).absolute(), (HOME / cycles_dir).absolute()
    try:
        url = database_url(airflow_url, service_url, state_dir)
        ensure_database(url)
    except NightError as error:
        typer.echo(f"night: {error}", err=True)
        raise typer.Exit(1) from None
    now = datetime.now(UTC)
    cycle_id = cycle or now.strftime(_CYCLE_ID)
    environment = os.environ | airflow_environment(url, state_dir)
    environment |= {"AGENTLOOP_STATE_DIR": str(state_dir), "AGENTLOOP_CYCLES_DIR": str(cycles_dir)}
    command = [sys.executable, __file__, "airflow", now.isoformat(), json.dumps({"cycle_id": cycle_id})]
    code = _foreground(command, environment)
    typer.echo(str(cycles_dir / cycle_id))
    raise typer.Exit(1 if code else 0)


def _foreground(command: list[str], environment: dict[str, str]) -> int:
    """Runs `command` in a session of its own, ends it when this process is told to end; its exit code."""
    process = subprocess.Popen(command, env=environment, cwd=HOME, start_new_session=True)

    def end(_signal: int, _frame: FrameType | None) -> None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, end)
    return process.wait()


if __name__ == "__main__":
    app()
