"""A server for evaluation alone: own engine process, throwaway database, own state; nothing of it stays.

It is the same program that serves, started with a state folder of its own, on free ports.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import monotonic

from grpc_server.domain import chat_format, held_call
from training import cycle

START_SECONDS = 180.0
STOP_SECONDS = 30.0
_PREFIX = "AGENTLOOP_"
_HOW = ("CONTEXT_TOKENS", "THREADS")
_INHERITED = ("MODEL_NAME", "OLLAMA_BIN", *_HOW)
_LOCK = ".lock"
# Told to stop when this process dies, however it does (prctl(2)). By a program of its own: a child of a
# process that has used gRPC must not run Python between fork and exec.
_ENDED_WITH_US = ("setpriv", "--pdeathsig", "TERM", "--")


class ServerFailedError(RuntimeError):
    """The server of its own did not start, or died; the text ends with its last words."""


@dataclass(frozen=True, slots=True)
class OwnServer:
    """Where it listens, a token with the scope admin, and its process."""

    address: str
    token: str = field(repr=False)
    pid: int


def generator(engine: str) -> dict[str, str]:
    """What a greedy answer of a server of its own depends on, besides the model and the request.

    The engine with its version (a library's; of a program its path and sha256), the settings that say how a
    model runs, this program's version, and the sha256 of the code that renders prompts,
    parses answers, and holds calls to their schema.
    """
    settings = {name: value for name in _HOW if (value := os.environ.get(_PREFIX + name))}
    return settings | {
        "engine": engine,
        "engine_version": _ollama() if engine == "ollama" else _version("xllamacpp"),
        "program_version": _version("agent-loop-service"),
        "chat_format": cycle.sha256(Path(chat_format.__file__)),
        "held_call": cycle.sha256(Path(held_call.__file__)),
    }


def _ollama() -> str:
    program = shutil.which(os.environ.get(_PREFIX + "OLLAMA_BIN") or "ollama")
    return f"{Path(program).resolve()} {cycle.sha256(Path(program))}" if program else ""


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


@asynccontextmanager
async def own_server(
    parent: Path,
    *,
    engine: str,
    parallel: int,
    program: Sequence[str] = (sys.executable, "-m", "grpc_server"),
) -> AsyncIterator[OwnServer]:
    """Start a server with its state in a new folder under `parent`; stop it and delete the folder at the end.

    Raises:
        ServerFailedError: if it does not become ready within START_SECONDS.
    """
    with _folder(parent) as folder:
        environment = _environment(folder, engine, parallel)
        with (folder / "server.log").open("wb") as log:
            process = await asyncio.create_subprocess_exec(
                *_ENDED_WITH_US,
                *program,
                "serve",
                cwd=folder,
                env=environment,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        try:
            address = await _ready(process, folder)
            token = await _token(program, folder, environment)
            yield OwnServer(address, token, process.pid)
            if process.returncode is not None:
                raise ServerFailedError(f"the server for evaluation died: {_last_words(folder)}")
        finally:
            await _stop(process)


def _environment(folder: Path, engine: str, parallel: int) -> dict[str, str]:
    """This process's, with none of the live server's settings but those that say how a model runs."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith(_PREFIX)}
    for name in _INHERITED:
        if value := os.environ.get(_PREFIX + name):
            ours[_PREFIX + name] = value
    root = str(Path(__file__).resolve().parents[1])
    return ours | {
        _PREFIX + "STATE_DIR": str(folder),
        _PREFIX + "BASE_GGUF": str(folder / "none.gguf"),  # it installs nothing by itself
        _PREFIX + "ENGINE": engine,
        _PREFIX + "PARALLEL": str(parallel),
        _PREFIX + "GRPC_ADDRESS": "127.0.0.1:0",
        _PREFIX + "HTTP_ADDRESS": "127.0.0.1:0",
        _PREFIX + "SERVER_ID": "evaluation",
        "PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH", "")))),
    }


async def _ready(process: asyncio.subprocess.Process, folder: Path) -> str:
    """The address in server.json, which a server writes when it is ready."""
    until = monotonic() + START_SECONDS
    while monotonic() < until:
        with suppress(FileNotFoundError):
            written = json.loads((folder / "server.json").read_text(encoding="utf-8"))
            return str(written["grpc_address"])
        if process.returncode is not None:
            raise ServerFailedError(
                f"the server for evaluation ended with {process.returncode}: {_last_words(folder)}"
            )
        await asyncio.sleep(0.1)
    raise ServerFailedError(
        f"the server for evaluation was not ready within {START_SECONDS:.0f} s: {_last_words(folder)}"
    )


async def _token(program: Sequence[str], folder: Path, environment: Mapping[str, str]) -> str:
    process = await asyncio.create_subprocess_exec(
        *_ENDED_WITH_US,
        *program,
        *("tokens", "create", "--name", "evaluation", "--scopes", "admin", "--json"),
        cwd=folder,
        env=environment,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        told, complained = await process.communicate()
    finally:
        await _stop(process)
    if process.returncode != 0:
        raise ServerFailedError(f"no token for evaluation: {complained.decode(errors='replace').strip()}")
    return str(json.loads(told)["token"])


async def _stop(process: asyncio.subprocess.Process) -> None:
    """Ask it to end, wait, and insist. Finishes even if this task is being cancelled."""
    if process.returncode is not None:
        return
    with suppress(ProcessLookupError):
        process.terminate()
    try:
        await asyncio.shield(asyncio.wait_for(process.wait(), STOP_SECONDS))
    except TimeoutError:
        process.kill()
        await process.wait()


def _last_words(folder: Path) -> str:
    said = (folder / "server.log").read_text(encoding="utf-8", errors="replace").strip()
    return "\n".join(said.splitlines()[-20:]) or "it said nothing"


@contextmanager
def _folder(parent: Path) -> Iterator[Path]:
    """A new folder, deleted at the end; one that a killed evaluation left is deleted now."""
    parent.mkdir(parents=True, exist_ok=True)
    with (parent / _LOCK).open("w") as whole:
        fcntl.flock(whole, fcntl.LOCK_EX)  # none is deleted between its creation and its lock
        for other in parent.glob("run-*"):
            _delete_if_left(other)
        folder = Path(tempfile.mkdtemp(dir=parent, prefix="run-"))
        lock = (folder / _LOCK).open("w")
        fcntl.flock(lock, fcntl.LOCK_EX)
    with lock:
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _delete_if_left(folder: Path) -> None:
    with (folder / _LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return  # another evaluation runs in it now
        shutil.rmtree(folder, ignore_errors=True)
