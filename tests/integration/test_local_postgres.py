"""The Postgres of our own: shared by processes, started again after a kill, and gone with its last user."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest

from grpc_server.adapters import local_postgres
from grpc_server.adapters.local_postgres import LocalPostgres, LocalPostgresError
from tests.coverage_files import untraced

KEEPER = "import sys; from pathlib import Path; from grpc_server.adapters.local_postgres import keep; "
KEEPER += "keep(Path(sys.argv[1]))"


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with a cluster, as a first run leaves it."""
    place = tmp_path_factory.mktemp("cluster") / "pg"
    with LocalPostgres(place):
        pass
    return place


@pytest.fixture
def place(made_once: Path, tmp_path: Path) -> Path:
    """A copy of it: quicker than to make one."""
    subprocess.run(["cp", "-a", made_once, tmp_path / "pg"], check=True)
    return tmp_path / "pg"


def keeper(data_dir: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", KEEPER, str(data_dir)], stdout=subprocess.PIPE, text=True, cwd=Path.cwd()
    )


def dsn_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def answer(dsn: str, sql: str = "SELECT 1") -> object:
    with psycopg.connect(dsn, connect_timeout=5) as connection:
        row = connection.execute(sql).fetchone()
        return row and row[0]


def until(what: Callable[[], object], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if what():
                return
        except psycopg.Error:
            pass
        time.sleep(0.05)
    raise AssertionError(f"not within {seconds} s")


def runs(pid: int) -> bool:
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def has_ended(pid: int) -> bool:
    """Whether it ends within moments: a process that has let go of all it had is not quite gone yet."""
    until = time.monotonic() + 10
    while runs(pid) and time.monotonic() < until:
        time.sleep(0.02)
    return not runs(pid)


@pytest.mark.parametrize("name", ["plain", "with spaces, a comma & é %41 'quoted'", "long-" + "x" * 120])
def test_it_runs_in_any_folder_and_its_dsn_needs_no_escaping(tmp_path: Path, name: str) -> None:
    with LocalPostgres(tmp_path / name) as postgres:
        dsn = postgres.dsn("agentloop")
        assert dsn.isascii()
        assert not set("% '&") & set(dsn)
        assert answer(dsn, "SELECT pg_read_file('postmaster.pid') <> ''")
        assert answer(dsn, "SHOW server_encoding") == "UTF8"
        assert answer(dsn, "SHOW listen_addresses") == ""
        pid = postgres.pid
        assert pid is not None
        folder = Path(dsn.partition("?host=")[2])
        assert folder.stat().st_mode & 0o077 == 0
    assert has_ended(pid)
    assert not list(folder.glob(".s.PGSQL*")) if folder.exists() else True


def test_it_keeps_what_was_written(place: Path) -> None:
    with LocalPostgres(place) as postgres, psycopg.connect(postgres.dsn("one")) as connection:
        connection.execute("CREATE TABLE kept AS SELECT 42 AS answer")
    with LocalPostgres(place) as postgres:
        assert answer(postgres.dsn("one"), "SELECT answer FROM kept") == 42


def test_databases_are_made_when_they_are_asked_for(place: Path) -> None:
    with LocalPostgres(place) as postgres:
        for name in ("agentloop", "airflow", "mlflow", "agentloop"):
            assert answer(postgres.dsn(name), "SELECT current_database()") == name
        assert answer(postgres.dsn("postgres"), "SELECT current_database()") == "postgres"


def test_the_last_to_leave_stops_the_server(place: Path) -> None:
    first, second = LocalPostgres(place), LocalPostgres(place)
    first.__enter__()
    second.__enter__()
    pid = first.pid
    assert pid is not None
    assert second.pid == pid
    first.__exit__(None, None, None)
    assert answer(second.dsn("agentloop")) == 1
    second.__exit__(None, None, None)
    assert has_ended(pid)
    assert second.pid is None
    with pytest.raises(LocalPostgresError, match="no Postgres runs"):
        second.dsn()


def test_two_processes_share_one_server_and_may_start_at_once(place: Path) -> None:
    keepers = [keeper(place) for _ in range(2)]
    dsns = [dsn_of(process) for process in keepers]
    assert dsns[0] == dsns[1]
    keepers[0].send_signal(signal.SIGTERM)
    assert keepers[0].wait(30) == 0
    assert answer(dsns[1]) == 1
    keepers[1].send_signal(signal.SIGINT)
    assert keepers[1].wait(30) == 0
    with pytest.raises(psycopg.OperationalError):
        answer(dsns[1])


def test_the_server_outlives_a_killed_keeper_and_the_next_one_takes_it_over(place: Path) -> None:
    killed = keeper(place)
    dsn = dsn_of(killed)
    with psycopg.connect(dsn) as connection:
        connection.execute("CREATE TABLE kept AS SELECT 42 AS answer")
    killed.kill()
    killed.wait()
    assert answer(dsn, "SELECT answer FROM kept") == 42
    with LocalPostgres(place) as postgres:
        pid = postgres.pid
        assert pid is not None
        assert answer(postgres.dsn("agentloop"), "SELECT answer FROM kept") == 42
    assert has_ended(pid)


def test_a_killed_server_is_started_again_with_what_was_written(place: Path) -> None:
    with LocalPostgres(place) as postgres:
        dsn = postgres.dsn("agentloop")
        with psycopg.connect(dsn) as connection:
            connection.execute("CREATE TABLE kept AS SELECT 42 AS answer")
        pid = postgres.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        until(lambda: postgres.pid not in (None, pid) and answer(dsn, "SELECT answer FROM kept") == 42)


def test_a_file_left_by_a_killed_server_does_not_stop_the_next(place: Path) -> None:
    with LocalPostgres(place):
        lines = (place / "cluster/postmaster.pid").read_text().splitlines()
    lines[0] = str(os.getpid())  # the number is another process's by now
    (place / "cluster/postmaster.pid").write_text("\n".join(lines))
    with LocalPostgres(place) as postgres:
        assert answer(postgres.dsn("agentloop")) == 1


def test_an_initialisation_that_was_killed_is_done_anew(tmp_path: Path) -> None:
    (tmp_path / "pg/cluster.new/base").mkdir(parents=True)
    (tmp_path / "pg/cluster").mkdir()
    with LocalPostgres(tmp_path / "pg") as postgres:
        assert answer(postgres.dsn("agentloop")) == 1


def test_a_server_that_does_not_start_says_why(place: Path) -> None:
    with LocalPostgres(place):
        pass
    (place / "cluster/postgresql.conf").write_text("no_such_setting = 1\n")
    with pytest.raises(LocalPostgresError, match="no_such_setting"):
        LocalPostgres(place).__enter__()


def test_a_missing_package_is_told_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(LocalPostgresError, match="AGENTLOOP_DATABASE_URL"):
        LocalPostgres(tmp_path / "pg").__enter__()


def test_a_socket_folder_of_someone_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    user = local_postgres._system_user()
    folder = local_postgres._socket_folder(Path("/a folder"), user)
    folder.chmod(0o755)
    with pytest.raises(LocalPostgresError, match="belongs to someone else"):
        local_postgres._socket_folder(Path("/a folder"), user)


def test_its_log_does_not_grow_for_ever(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_postgres, "LOG_BYTES", 10)
    with LocalPostgres(place):
        pass
    with LocalPostgres(place):
        pass
    assert (place / "postgres.log.1").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="as another user, the server runs as that user")
def test_started_by_root_it_runs_as_a_user_of_its_own(place: Path) -> None:
    with LocalPostgres(place) as postgres:
        owner = Path(f"/proc/{postgres.pid}").stat().st_uid
        assert pwd.getpwuid(owner).pw_name == local_postgres.SYSTEM_USER


AS_NOBODY = """
import os, pwd, sys
from pathlib import Path
import psycopg
from grpc_server.adapters.local_postgres import LocalPostgres
with LocalPostgres(Path(sys.argv[1])) as postgres:
    postgres.dsn("agentloop")  # before: what is imported late, root's interpreter may not show to others
user = pwd.getpwnam("nobody")
os.setgroups([])
os.setgid(user.pw_gid)
os.setuid(user.pw_uid)
with LocalPostgres(Path(sys.argv[2]) / "pg") as postgres:
    with psycopg.connect(postgres.dsn("agentloop")) as connection:
        print(Path(f"/proc/{postgres.pid}").stat().st_uid, connection.execute("SELECT 1").fetchone()[0])
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become someone else")
def test_started_by_anyone_else_it_runs_as_them(place: Path) -> None:
    user = pwd.getpwnam("nobody")
    folder = Path(tempfile.mkdtemp())  # where others may go, whatever another run of pytest does
    os.chown(folder, user.pw_uid, user.pw_gid)
    try:
        done = subprocess.run(
            [sys.executable, "-c", AS_NOBODY, str(place), str(folder)],
            cwd=Path.cwd(),
            env=untraced(),  # nobody may not write what coverage measures
            check=False,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert (done.returncode, done.stdout) == (0, f"{user.pw_uid} 1\n"), done.stderr
    finally:
        shutil.rmtree(folder)
