"""Every night, by itself: a whole Airflow on this machine, until it is told to end. `make airflow` runs this.

Its scheduler runs the DAGs of `dags/` as their schedules say, with LocalExecutor: tasks are processes here.
Its pages are on loopback, for one user, `admin`. Its tables lie beside the service's, in the database
`airflow`; configuration and logs in `<state folder>/airflow`, secrets too, in files that only this user may
read.

There is no triggerer: no task of ours is deferred, and the deadline alert is called in the executor. A
component that ends takes the others with it, and the exit code is 1: whatever supervises this (systemd, `make
airflow` in a terminal) starts it again, and tasks that were running are tried again when their heartbeats are
missed.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Annotated
from urllib.error import URLError
from urllib.request import urlopen

import psutil
import typer
from cryptography.fernet import Fernet

from scripts.night import (
    HOME,
    PREPARATIONS,
    NightError,
    airflow,
    airflow_environment,
    database_url,
    ensure_database,
    server_environment,
)

USER = "admin"
READY_SECONDS = 300
GRACE_SECONDS = 10  # from SIGTERM to SIGKILL
TASKS = 4  # at once; two of them hardly do anything, since what is heavy takes the training pool
_LOOK_SECONDS = 0.5

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def environment_of(folder: Path, port: int, executor: str = "LocalExecutor") -> dict[str, str]:
    """The settings of a whole Airflow whose files are in `folder`, besides `airflow_environment`.

    What must be the same in each component, and after a restart, is drawn once and kept there.
    """
    kept = _kept(
        folder / "secrets.json",
        {
            "AIRFLOW__API__SECRET_KEY": secrets.token_urlsafe(32),
            "AIRFLOW__API_AUTH__JWT_SECRET": secrets.token_urlsafe(48),
            "AIRFLOW__CORE__FERNET_KEY": Fernet.generate_key().decode(),
        },
    )
    _kept(folder / "passwords.json", {USER: secrets.token_urlsafe(12)})
    address = f"http://127.0.0.1:{port}"
    return kept | {
        "AIRFLOW__CORE__EXECUTOR": executor,
        "AIRFLOW__CORE__PARALLELISM": str(TASKS),
        "AIRFLOW__CORE__EXECUTION_API_SERVER_URL": f"{address}/execution/",
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_USERS": f"{USER}:admin",
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_PASSWORDS_FILE": str(folder / "passwords.json"),
        "AIRFLOW__API__HOST": "127.0.0.1",
        "AIRFLOW__API__PORT": str(port),
        "AIRFLOW__API__BASE_URL": address,
        "AIRFLOW__API__WORKERS": "1",
    }


def _kept(path: Path, drawn: dict[str, str]) -> dict[str, str]:
    """What a file says; `drawn`, if it is not there, is written to it for this user alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file():
        new = path.with_name(f".{path.name}.{os.getpid()}")
        with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            json.dump(drawn, file)
        new.replace(path)
    found: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))
    return found


def commands(port: int) -> dict[str, list[str]]:
    """The components, by name, each as the arguments of `airflow`."""
    return {
        "api-server": ["api-server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"],
        "scheduler": ["scheduler", "--skip-serve-logs"],  # it would listen on all addresses
        "dag-processor": ["dag-processor"],
    }


@app.command("prepare", hidden=True)
def prepare() -> None:
    """Migrates Airflow's database and makes the pool."""
    airflow(*PREPARATIONS)


@app.callback(invoke_without_command=True)
def run(
    context: typer.Context,
    port: Annotated[
        int, typer.Option(envvar="AGENTLOOP_AIRFLOW_PORT", min=0, max=65535, help="Of its pages; 0: any.")
    ] = 8090,
    state_dir: Annotated[Path, typer.Option(envvar="AGENTLOOP_STATE_DIR", help="State folder.")] = Path(
        "var"
    ),
    cycles_dir: Annotated[Path, typer.Option(envvar="AGENTLOOP_CYCLES_DIR", help="Cycles folder.")] = Path(
        "cycles"
    ),
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
    """Run Airflow with the nightly DAGs until told to end. Exit: 0 told to end, 1 a part failed."""
    if context.invoked_subcommand:
        return
    state_dir, cycles_dir = (HOME / state_dir).absolute(), (HOME / cycles_dir).absolute()
    try:
        port = free_port(port)
        server = server_environment(state_dir, os.environ)
        url = database_url(airflow_url, service_dsn, state_dir)
        ensure_database(url)
        folder = state_dir / "airflow"
        environment = os.environ | airflow_environment(url, state_dir) | server
        # What is set comes last: heartbeats, parallelism, another executor are the operator's to choose.
        environment |= {
            name: value for name, value in environment_of(folder, port).items() if name not in os.environ
        }
        environment |= {"AGENTLOOP_STATE_DIR": str(state_dir), "AGENTLOOP_CYCLES_DIR": str(cycles_dir)}
        with told_to_end() as told, components(port, environment, folder) as running:
            ready(running, port, told, folder)
            if not told:
                typer.echo(
                    f"Airflow: http://127.0.0.1:{port}, user {USER}, password {password(folder)}\n"
                    "New DAGs are paused: switch nightly_loop and retention on there. Ctrl-C ends it all."
                )
            watch(running, told, folder)
    except NightError as error:
        typer.echo(f"airflow: {error}", err=True)
        raise typer.Exit(1) from None


def free_port(port: int) -> int:
    """`port`, or any that is free where that is 0.

    Raises:
        NightError: another program listens on it.
    """
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", port))
        except OSError as error:
            raise NightError(
                f"port {port} cannot be had ({error.strerror}): is an Airflow running already? Else set"
                " AGENTLOOP_AIRFLOW_PORT"
            ) from None
        return int(listener.getsockname()[1])


def password(folder: Path) -> str:
    """The password of USER."""
    found: dict[str, str] = json.loads((folder / "passwords.json").read_text(encoding="utf-8"))
    return found[USER]


@contextmanager
def told_to_end() -> Iterator[list[int]]:
    """A list that is empty until SIGTERM, SIGINT or SIGHUP comes."""
    told: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        told.append(number)

    former = {each: signal.signal(each, note) for each in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    try:
        yield told
    finally:
        for each, handler in former.items():
            signal.signal(each, handler)


@contextmanager
def components(
    port: int, environment: Mapping[str, str], folder: Path
) -> Iterator[dict[str, subprocess.Popen[bytes]]]:
    """All of Airflow's processes; none of them, nor any of their tasks, outlives the block.

    Raises:
        NightError: the database could not be prepared.
    """
    running: dict[str, subprocess.Popen[bytes]] = {}
    try:
        typer.echo("Airflow's tables ...")
        prepared = _start(
            "prepare", [sys.executable, "-m", "scripts.scheduler", "prepare"], environment, folder
        )
        running["prepare"] = prepared
        if prepared.wait():
            raise NightError(f"its database could not be prepared: {_last_words(folder, 'prepare')}")
        del running["prepare"]
        typer.echo("Airflow's parts ...")
        for name, words in commands(port).items():
            running[name] = _start(name, [sys.executable, "-m", "airflow", *words], environment, folder)
        yield running
    finally:
        _end(running.values())


def _start(
    name: str, command: list[str], environment: Mapping[str, str], folder: Path
) -> subprocess.Popen[bytes]:
    with (folder / f"{name}.log").open("ab") as log:
        return subprocess.Popen(
            ["setpriv", "--pdeathsig", "TERM", *command],
            env=environment,
            cwd=HOME,
            start_new_session=True,  # Ctrl-C is ours alone
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def ready(running: Mapping[str, subprocess.Popen[bytes]], port: int, told: list[int], folder: Path) -> None:
    """Wait until all parts say that they are well, or we are told to end.

    Raises:
        NightError: one ended, or they took too long.
    """
    until = time.monotonic() + READY_SECONDS
    while not told and not _healthy(port):
        _all_run(running, folder)
        if time.monotonic() > until:
            raise NightError(f"it was not ready within {READY_SECONDS} s; its logs are in {folder}")
        time.sleep(_LOOK_SECONDS)


def _healthy(port: int) -> bool:
    try:
        with urlopen(f"http://127.0.0.1:{port}/api/v2/monitor/health", timeout=5) as answer:
            parts = json.load(answer)
    except (URLError, OSError, ValueError):
        return False
    return all((parts.get(name) or {}).get("status") == "healthy" for name in ("scheduler", "dag_processor"))


def watch(running: Mapping[str, subprocess.Popen[bytes]], told: list[int], folder: Path) -> None:
    """Return when we are told to end.

    Raises:
        NightError: a part ended by itself.
    """
    while not told:
        _all_run(running, folder)
        time.sleep(_LOOK_SECONDS)


def _all_run(running: Mapping[str, subprocess.Popen[bytes]], folder: Path) -> None:
    for name, process in running.items():
        if process.poll() is not None:
            raise NightError(f"{name} ended with {process.returncode}: {_last_words(folder, name)}")


def _last_words(folder: Path, name: str) -> str:
    said = (folder / f"{name}.log").read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(said[-10:]) or "it said nothing"


def _end(processes: Iterable[subprocess.Popen[bytes]]) -> None:
    """Ask all to end, with what they started, and insist after GRACE_SECONDS."""
    tree = list(_with_children(processes))
    for process in tree:
        with suppress(psutil.NoSuchProcess):
            process.terminate()
    _, alive = psutil.wait_procs(tree, timeout=GRACE_SECONDS)
    for process in alive:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=GRACE_SECONDS)


def _with_children(processes: Iterable[subprocess.Popen[bytes]]) -> Iterator[psutil.Process]:
    for each in processes:
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(each.pid)
            yield process
            yield from process.children(recursive=True)


if __name__ == "__main__":
    app(prog_name="python -m scripts.scheduler")
