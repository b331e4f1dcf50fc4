"""A cycle's directory: which cycle came before, what a step has finished, and what it took.

A step reads files, writes files, and follows one pattern:

    inputs = cycle.inputs_of({"train": dataset}, options)
    if cycle.done(record, inputs):              # the same inputs made what is there: nothing to do
        return
    # One at a time; notes duration, memory, versions; clears away what a killed attempt left.
    with cycle.step(directory, "curate", seed=7, outputs=["dataset"]):
        with cycle.new_directory(output) as building:
            ...                                 # `output` appears at the end, whole
            cycle.write_json(building / "record.json", {"inputs": inputs, ...})
"""

from __future__ import annotations

import fcntl
import glob
import hashlib
import json
import os
import platform
import re
import resource
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path
from time import monotonic
from types import FrameType
from typing import Any

import psutil

from training.unlearn_lock import refuse_while_unlearning

NOTHING_TO_DO = 99
"""Exit code of a step that has nothing to do: Airflow skips what follows."""

MANIFEST = "manifest.json"
_ID = re.compile(r"\d{8}T\d{6}Z")
_ID_FORMAT = "%Y%m%dT%H%M%SZ"
_STEPS = "steps"
_SAMPLE_SECONDS = 1.0
# Where `make install` puts packages that do not belong among those that are imported.
_BESIDE = [str(Path(sys.prefix, "converter")), str(Path(sys.prefix, "llama.cpp").resolve().parents[1])]
_TOLD_TO_END = 128 + signal.SIGTERM


class StepRunningError(RuntimeError):
    """Another process runs the same step of the same cycle now."""


# Which cycles there are.


def started_at(cycle_id: str) -> datetime:
    """The UTC start of the DAG run that a cycle id is.

    Raises:
        ValueError: if it is not of the form YYYYMMDDTHHMMSSZ.
    """
    if not _ID.fullmatch(cycle_id):
        raise ValueError(f"cycle id is {cycle_id!r}; it must be like 20260131T020000Z")
    return datetime.strptime(cycle_id, _ID_FORMAT).replace(tzinfo=UTC)


def cycle_id(started: datetime) -> str:
    """The id of the cycle whose DAG run started then; `started` must know its time zone."""
    return started.astimezone(UTC).strftime(_ID_FORMAT)


def judged_before(cycle: Path) -> list[Path]:
    """Earlier cycles beside `cycle` that have a verdict (gate.json), oldest first."""
    started_at(cycle.resolve().name)
    return [
        other
        for other in sorted(cycle.resolve().parent.iterdir())
        if _ID.fullmatch(other.name) and other.name < cycle.resolve().name and (other / "gate.json").is_file()
    ]


# Files that appear whole or not at all.


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: if the file does not hold one JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a JSON {type(value).__name__}; it must hold an object")
    return value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write one object: keys sorted, indented by 2, on disk before its name appears."""
    with new_file(path) as building:
        text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
        building.write_text(text + "\n", encoding="utf-8")


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A path to write to; when the block ends well, what is there becomes `path` by an atomic rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(descriptor)
    building = Path(name)
    try:
        yield building
        building.chmod(0o644)
        _sync(building)
        building.replace(path)
        _sync(path.parent)
    finally:
        building.unlink(missing_ok=True)


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A directory to fill; when the block ends well it becomes `path`, in place of any that was there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield building
        building.chmod(0o755)
        for file in building.rglob("*"):
            if file.is_file():
                _sync(file)
        if path.exists():
            former = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.")) / "former"
            path.rename(former)
            building.rename(path)
            shutil.rmtree(former.parent)
        else:
            building.rename(path)
        _sync(path.parent)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def discard_unfinished(path: Path) -> None:
    """Remove what a process that was killed while it made `path` has left beside it.

    Only for who is alone in making it: another's unfinished work looks the same.
    """
    for left in path.parent.glob(f".{glob.escape(path.name)}.*"):
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# What a step has read, and whether its output is of that.


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes in lower-case hex, read in pieces.

    Of a folder, that of its files' names and hashes; hidden files do not count.
    """
    if path.is_dir():
        digest = hashlib.sha256()
        for each in sorted(path.rglob("*")):
            name = each.relative_to(path).as_posix()
            if each.is_file() and not name.startswith(".") and "/." not in name:
                digest.update(f"{name}\0{sha256(each)}\n".encode())
        return digest.hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def inputs_of(files: Mapping[str, Path], options: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What a step's output depends on: `{"files": {name: sha256}, "options": {...}}`.

    Raises:
        FileNotFoundError: if one of `files` is not there.
    """
    return {
        "files": {name: sha256(path) for name, path in files.items()},
        "options": json.loads(json.dumps(options or {}, default=str)),
    }


def done(record: Path, inputs: Mapping[str, Any], outputs: Sequence[Path] = ()) -> bool:
    """Whether `record` says under "inputs" that it was made of these, and `outputs` are all there."""
    if not record.is_file() or not all(output.exists() for output in outputs):
        return False
    try:
        return read_json(record).get("inputs") == inputs
    except ValueError:
        return False


# What a step took.


@contextmanager
def step(
    cycle: Path,
    name: str,
    *,
    seed: int | None = None,
    packages: Sequence[str] = (),
    outputs: Sequence[str] = (),
) -> Iterator[None]:
    """Run a step: alone, and with a note in `steps/<name>.json` of how it went.

    What an attempt that was killed left beside its `outputs` (names in the cycle, of this step alone) is
    removed first. SIGTERM ends the block by SystemExit, so that it puts away itself what it has begun.

    The note has outcome (done, failed) with its reason, started_at and ended_at (UTC), seconds,
    peak_memory_gb (of this process and all its children together, 10^9 bytes, sampled each second), versions
    (Python, and each of `packages`), processor (its model), gpu_energy_joules (of all GPUs of the host,
    whoever used them; None where there is none, or it does not tell), seed.

    Raises:
        StepRunningError: if another process is in the same step of this cycle.
        BusyError: if something is unlearned among these cycles.
    """
    notes = cycle / _STEPS
    notes.mkdir(parents=True, exist_ok=True)
    with (notes / f".{name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StepRunningError(
                f"{name} of {cycle.name} is running in another process; wait for it"
            ) from None
        refuse_while_unlearning(cycle.resolve().parent)
        for output in (*(cycle / each for each in outputs), notes / f"{name}.json"):
            discard_unfinished(output)
        started, clock = datetime.now(UTC), monotonic()
        outcome, reason, peak, energy = "done", "", _Peak(), gpu_energy()
        try:
            with _ended_by_sigterm(), _watched(peak):
                yield
        except BaseException as error:
            outcome, reason = "failed", f"{type(error).__name__}: {error}".removesuffix(": ")
            if isinstance(error, SystemExit) and error.code == _TOLD_TO_END:
                reason = "it was told to end (SIGTERM)"
            raise
        finally:
            note = {
                "outcome": outcome,
                "reason": reason,
                "started_at": started.isoformat(),
                "ended_at": datetime.now(UTC).isoformat(),
                "seconds": round(monotonic() - clock, 3),
                "peak_memory_gb": round(peak.bytes / 1e9, 3),
                "versions": versions(packages),
                "processor": processor(),
                "gpu_energy_joules": _since(energy),
                "seed": seed,
            }
            write_json(notes / f"{name}.json", note)


def gpu_energy() -> float | None:
    """Joules that all GPUs of this host have taken since their driver was loaded; None where none tells.

    Source: NVML's nvmlDeviceGetTotalEnergyConsumption (millijoules; Volta and newer).
    """
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(each) for each in range(pynvml.nvmlDeviceGetCount())]
        spent = [pynvml.nvmlDeviceGetTotalEnergyConsumption(each) for each in handles]
        return sum(spent) / 1000 if spent else None
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()


def _since(energy: float | None) -> float | None:
    now = None if energy is None else gpu_energy()
    return None if energy is None or now is None else round(now - energy, 1)


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM raises SystemExit in the block, once; where the block is not in the main thread, it kills."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, _frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_IGN)  # Airflow and the kernel both tell: the second changes nothing
        raise SystemExit(_TOLD_TO_END)

    former = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if former is None else former)


def versions(packages: Sequence[str]) -> dict[str, str]:
    """The versions of Python, of this service, and of each of `packages` as it is installed here."""
    found = {"python": platform.python_version()}
    for package in ("agent-loop-service", *packages):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            beside = distributions(name=package, path=_BESIDE)
            found[package] = next((each.version for each in beside), "not installed")
    return found


def processor() -> str:
    """The processor's model, as Linux names it; elsewhere what Python knows of it."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text(encoding="utf-8").splitlines() if information.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()


class _Peak:
    """The most bytes seen; never less than the kernel's own record for this process."""

    def __init__(self) -> None:
        self.bytes = 0

    def sample(self) -> None:
        own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        self.bytes = max(self.bytes, own, _tree_bytes())


@contextmanager
def _watched(peak: _Peak) -> Iterator[None]:
    """Sample the memory of this process and its children until the block ends."""
    over = threading.Event()

    def watch() -> None:
        peak.sample()
        while not over.wait(_SAMPLE_SECONDS):
            peak.sample()

    watcher = threading.Thread(target=watch, name="peak-memory", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()
        peak.sample()


def _tree_bytes() -> int:
    """Memory of this process and its children, a page that several share counted once (PSS)."""
    total = 0
    own = psutil.Process()
    for process in (own, *own.children(recursive=True)):
        try:
            total += process.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied):  # it ended while we looked
            continue
    return total


# The end of a cycle.


def write_manifest(cycle: Path) -> dict[str, Any]:
    """Write manifest.json, the last file of a cycle, and return it.

    It holds sha256 and size of every file of the cycle, what each output says it was made of (`inputs`), and
    every step's duration, peak memory, versions and seed. Its `erasures` stay: they tell what is gone.
    """
    files, inputs = {}, {}
    for path in sorted(cycle.rglob("*")):
        relative = path.relative_to(cycle)
        hidden = any(part.startswith(".") for part in relative.parts)
        if not path.is_file() or hidden or relative.name == MANIFEST:
            continue
        files[str(relative)] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
        if path.suffix == ".json":
            made_of = _inputs_in(path)
            if made_of is not None:
                inputs[str(relative)] = made_of
    before = read_json(cycle / MANIFEST) if (cycle / MANIFEST).is_file() else {}
    steps = {path.stem: read_json(path) for path in sorted((cycle / _STEPS).glob("*.json"))}
    manifest = {
        "cycle_id": cycle.resolve().name,
        "written_at": datetime.now(UTC).isoformat(),
        "files": files,
        "inputs": inputs,
        "steps": steps,
        "erasures": before.get("erasures", []),
        "seconds": round(sum(each["seconds"] for each in steps.values()), 3),
        "peak_memory_gb": max((each["peak_memory_gb"] for each in steps.values()), default=0.0),
    }
    write_json(cycle / MANIFEST, manifest)
    return manifest


def _inputs_in(path: Path) -> Any:
    try:
        return read_json(path).get("inputs")
    except ValueError:
        return None
