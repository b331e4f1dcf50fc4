"""One night, now: runs the DAG `nightly_loop` once, in the foreground, on a real Airflow and Postgres.

`make dag` and the demo call this. Production runs Airflow's own scheduler instead; the DAG is the same.
Airflow keeps its configuration and logs in `<state folder>/airflow`, its tables in a database `airflow`.
The last line printed is the path of the cycle directory; the exit code is 0 if the run succeeded, else 1.

All of it ends with this command. The steps run at the lowest processor priority (see the DAG). Airflow itself
takes 10 s of processor time a night, 3 of them before the first step: its three commands share one process.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import psycopg
import typer
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

HOME = Path(__file__).resolve().parents[1]
DAG_ID = "nightly_loop"
WARMUP_DAG_ID = "warmup_loop"
DATABASE = "airflow"
GRACE_SECONDS = 5  # from SIGTERM to SIGKILL
CYCLE_ID = "%Y%m%dT%H%M%SZ"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class NightError(Exception):
    """The night cannot start; the text says what to do."""


def database_url(airflow_url: str, service_dsn: str, state_dir: Path) -> URL:
    """Where Airflow's tables lie.

    The first that is given: `airflow_url`; the cluster of `service_dsn` (anything that libpq reads), database
    `airflow`; the local Postgres of a server with this state folder, by its `postmaster.pid` (line 4 is its
    port, line 5 its socket folder).

    Raises:
        NightError: none is given and no local Postgres runs, or what is given cannot be read.
    """
    try:
        if airflow_url:
            return make_url(airflow_url)
        if service_dsn:
            return _sibling(conninfo_to_dict(service_dsn))
    except (ArgumentError, psycopg.ProgrammingError) as error:
        raise NightError(f"the database's address cannot be read: {error}") from None
    pid_file = state_dir / "postgres" / "cluster" / "postmaster.pid"
    try:
        lines = pid_file.read_text(encoding="utf-8").splitlines()
        return _sibling(
            {"user": "postgres", "port": lines[3].strip(), "host": str(pid_file.parent / lines[4].strip())}
        )
    except (OSError, IndexError):
        raise NightError(
            f"no Postgres runs in {pid_file.parent}: start the server (`make serve`), or set "
            "AGENTLOOP_DATABASE_URL or AGENTLOOP_AIRFLOW_DATABASE_URL"
        ) from None


def _sibling(service: dict[str, Any]) -> URL:
    """The database `airflow` beside the service's; a socket folder goes into the URL's query."""
    rest = {name: str(value) for name, value in service.items() if value is not None and name != "dbname"}
    user, password, port = (rest.pop(name, None) for name in ("user", "password", "port"))
    host = None if rest.get("host", "/").startswith("/") else rest.pop("host")
    return URL.create(
        "postgresql+psycopg", user, password, host, int(port) if port else None, database=DATABASE, query=rest
    )


def ensure_database(url: URL) -> None:
    """Creates the database of `url` if its cluster lacks it.

    Raises:
        NightError: the cluster does not answer, or refuses.
    """
    libpq = url.set(drivername="postgresql", database="postgres").render_as_string(hide_password=False)
    try:
        with psycopg.connect(libpq, autocommit=True, connect_timeout=10) as connection:
            found = connection.execute(
                "SELECT 1 FROM pg_database WHERE datname = %s", (url.database,)
            ).fetchone()
            if found is None:
                with suppress(psycopg.errors.DuplicateDatabase):
                    connection.execute(
                        sql.SQL("CREATE DATABASE {}").format(sql.Identifier(url.database or DATABASE))
                    )
    except psycopg.Error as error:
        raise NightError(f"Postgres at {url.render_as_string()} is of no use: {error}") from error


def airflow_environment(url: URL, state_dir: Path, home: Path = HOME) -> dict[str, str]:
    """The variables that make Airflow run this checkout's DAG on `url` and tell nobody."""
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
        "AIRFLOW__LOGGING__JSON_LOGS": "True",
        "AIRFLOW__LOGGING__BASE_LOG_FOLDER": str(state_dir / "airflow" / "logs"),
        "AIRFLOW__USAGE_DATA_COLLECTION__ENABLED": "False",
        "SCARF_ANALYTICS": "false",
        "DO_NOT_TRACK": "1",
        "AGENTLOOP_HOME": str(home),
    }


PREPARATIONS = (
    ["db", "migrate"],
    ["pools", "set", "training", "1", "one slot: two fine-tunings would not fit into memory"],
)
"""What a database of Airflow's needs before a night: its tables, and the pool."""


def airflow(*commands: list[str]) -> None:
    """Runs commands of Airflow in this process, one after another; each ends the process if it fails."""
    from airflow.cli.cli_parser import get_parser

    for arguments in commands:
        command = get_parser().parse_args(arguments)
        command.func(command)


@app.command("airflow", hidden=True)
def run_airflow(dag_id: str, logical_date: str, conf: str) -> None:
    """Migrates Airflow's database, makes the pool and runs the DAG, in one process."""
    airflow(*PREPARATIONS, ["dags", "test", dag_id, logical_date, "--conf", conf])


@app.callback(invoke_without_command=True)
def run(
    context: typer.Context,
    state_dir: Annotated[Path, typer.Option(envvar="AGENTLOOP_STATE_DIR", help="State folder.")] = Path(
        "var"
    ),
    cycles_dir: Annotated[Path, typer.Option(envvar="AGENTLOOP_CYCLES_DIR", help="Cycles folder.")] = Path(
        "cycles"
    ),
    cycle: Annotated[str, typer.Option(help="Go on with this cycle id rather than begin one.")] = "",
    warmup: Annotated[
        list[Path] | None,
        typer.Option(
            help="Train the first champion from this imported set rather than from the log; repeatable."
        ),
    ] = None,
    airflow_url: Annotated[
        str,
        typer.Option(
            "--airflow-database-url", envvar="AGENTLOOP_AIRFLOW_DATABASE_URL", help="SQLAlchemy URL."
        ),
    ] = "",
    service_dsn: Annotated[
        str, typer.Option("--database-url", envvar="AGENTLOOP_DATABASE_URL", help="The service's database.")
    ] = "",
) -> None:
    """Run one night, now, and print its cycle directory."""
    if context.invoked_subcommand:
        return
    state_dir, cycles_dir = (HOME / state_dir).absolute(), (HOME / cycles_dir).absolute()
    now = datetime.now(UTC)
    cycle_id = cycle or now.strftime(CYCLE_ID)
    try:
        if cycle:
            _check_cycle_id(cycle)
        server = server_environment(state_dir, os.environ)
        url = database_url(airflow_url, service_dsn, state_dir)
        ensure_database(url)
    except NightError as error:
        typer.echo(f"night: {error}", err=True)
        raise typer.Exit(1) from None
    environment = os.environ | airflow_environment(url, state_dir) | server
    environment |= {"AGENTLOOP_STATE_DIR": str(state_dir), "AGENTLOOP_CYCLES_DIR": str(cycles_dir)}
    # Deadlines are for schedulers to see; `dags test` of Airflow 3.3.2 ends a run that has one with an error.
    environment |= {"AGENTLOOP_NIGHT_LATE_MINUTES": "0"}
    conf: dict[str, object] = {"cycle_id": cycle_id}
    if warmup:
        conf["sets"] = [str((HOME / each).absolute()) for each in warmup]
    command = [
        "setpriv",
        "--pdeathsig",
        "KILL",
        sys.executable,
        __file__,
        "airflow",
        WARMUP_DAG_ID if warmup else DAG_ID,
        now.isoformat(),
        json.dumps(conf),
    ]
    log = state_dir / "airflow" / "nights" / f"{cycle_id}.jsonl"
    typer.echo(f"Night {cycle_id}. Airflow's own log: {log}")
    code = _foreground(command, environment, log)
    typer.echo(str(cycles_dir / cycle_id))
    raise typer.Exit(1 if code else 0)


def _check_cycle_id(text: str) -> None:
    try:
        datetime.strptime(text, CYCLE_ID)
    except ValueError:
        raise NightError(f"--cycle is {text!r}; it must be like 20260102T030405Z") from None


def server_environment(state_dir: Path, environment: Mapping[str, str]) -> dict[str, str]:
    """How the steps reach the live server, where `environment` does not say: as its `server.json` does.

    Raises:
        NightError: there is no token, which would show only after the training.
    """
    if not (environment.get("AGENTLOOP_TOKEN") or environment.get("AGENTLOOP_TOKEN_FILE")):
        raise NightError(
            "no token for the live server: set AGENTLOOP_TOKEN_FILE to a file with one of the scope admin "
            "(`.venv/bin/python -m grpc_server tokens create --name night --scopes admin` prints one)"
        )
    try:
        server = json.loads((state_dir / "server.json").read_text(encoding="utf-8"))
        found = {
            "AGENTLOOP_SERVER": str(server["grpc_url"]),
            "AGENTLOOP_METRICS_URL": f"{server['http_url']}/metrics",
        }
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return {name: value for name, value in found.items() if not environment.get(name)}


def _foreground(command: list[str], environment: dict[str, str], log: Path) -> int:
    """Runs `command` in a session of its own, shows what its steps say, and returns its exit code.

    All of its output goes to `log`. It ends when this process is told to end, and its steps with it.
    """
    process = subprocess.Popen(
        command,
        env=environment,
        cwd=HOME,
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )

    def end(number: int, _frame: FrameType | None) -> None:
        # A running task takes SIGTERM for its step's failure, and would be retried: hence the alarm.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL if number == signal.SIGALRM else signal.SIGTERM)
        signal.alarm(GRACE_SECONDS)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGALRM):
        signal.signal(number, end)
    log.parent.mkdir(parents=True, exist_ok=True)
    told = Told()
    with log.open("a", encoding="utf-8") as file:
        for line in process.stdout or ():
            file.write(line)
            file.flush()
            if shown := told.shown(line.rstrip("\n")):
                typer.echo(shown)
    code = process.wait()
    signal.alarm(0)
    return code


class Told:
    """Which of Airflow's log lines (JSON) a person at the terminal wants to see, and how."""

    def __init__(self) -> None:
        self._in_step = False

    def shown(self, line: str) -> str:
        """What to show for `line`; empty if nothing."""
        try:
            record = json.loads(line)
            event, logger = str(record["event"]), str(record.get("logger", ""))
        except (ValueError, KeyError, TypeError):
            return line  # not Airflow's: a warning or a traceback of a process that has no log yet
        if event.startswith("[DAG TEST] starting task_id="):
            return f"── {event.removeprefix('[DAG TEST] starting task_id=').split()[0]}"
        if logger.endswith("SubprocessHook"):
            return self._of_step(event)
        if event == "Skipping task.":
            return f"   skipped: {record.get('reason', '')}"
        if record.get("level") in {"error", "critical"}:
            causes = [
                f"{e.get('exc_type')}: {e.get('exc_value')}"
                for e in record.get("exception") or record.get("error_detail") or ()
            ]
            return "   " + "; ".join([event, *causes])
        return ""

    def _of_step(self, event: str) -> str:
        """The step's own lines: those between Airflow's two marks."""
        if event == "Output:":
            self._in_step = True
        elif event.startswith("Command exited with return code"):
            self._in_step = False
        elif self._in_step:
            return f"   {event}"
        return ""


if __name__ == "__main__":
    app()
