"""The page that a person reads in the morning: what the night did, why, and what to do now.

It reads whatever files the night left, so that it also tells of one that was skipped or that failed, and
writes report.html (one file that loads nothing) and, last, manifest.json.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import ChainableUndefined, Environment, FileSystemLoader, Undefined

from agentloop.night import Night, Step, moment
from training import cycle
from training.changed_answers import changed
from training.report_figures import canary, curves, drifts, is_drift
from training.verdict import accuracy, verdict

PAGE = "report.html"
_OWN = (PAGE, cycle.MANIFEST, "steps/report.json")
_TEMPLATE = "report.html.j2"
_MADE_OF = re.compile(r'<meta name="made-of" content="([0-9a-f]{64})">')


def run(directory: Path) -> Path:
    """Write report.html and then manifest.json, unless they tell of the same files; return the page's path.

    Raises:
        FileNotFoundError: if there is no such cycle.
    """
    if not directory.is_dir():
        raise FileNotFoundError(f"there is no cycle in {directory}")
    page = directory / PAGE
    made_of = _made_of(directory)
    if not _tells_of(page, made_of) or not (directory / cycle.MANIFEST).is_file():
        with (
            cycle.step(directory, "report", packages=["jinja2"], outputs=[PAGE, cycle.MANIFEST]),
            cycle.new_file(page) as building,
        ):
            building.write_text(render(Night(directory), made_of), encoding="utf-8")
        cycle.write_manifest(directory)
    return page


def render(night: Night, made_of: str = "") -> str:
    """The page, as text."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=ChainableUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "duration": duration, "clock": clock, "number": number}
    environment.filters["figures"] = figures
    return environment.get_template(_TEMPLATE).render(
        made_of=made_of,
        night=night,
        verdict=verdict(night),
        tiles=tiles(night),
        timeline=timeline(night.steps),
        excluded=excluded(night),
        expectations=expectations(night),
        plots=curves(night),
        drifts=drifts(night),
        canary=canary(night),
        suites=suites(night),
        checks=checks(night),
        rows=max(_count(night.dataset.get("rows")), 1),
        new_train=_count(night.dataset.get("new_train")),
        new_gate=_count(night.dataset.get("new_gate")),
        better=changed(night, _suite_names(night), became_right=True),
        worse=changed(night, _suite_names(night), became_right=False),
        links=links(night),
        written=datetime.now(UTC),
    )


@dataclass(frozen=True, slots=True)
class Tile:
    """One figure that is read at a glance."""

    name: str
    value: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class Bar:
    """A step on the time line; `left` and `width` in percent of the night."""

    step: Step
    left: float
    width: float


@dataclass(frozen=True, slots=True)
class Link:
    """Where more is told: a file beside the page, or a page of this host."""

    name: str
    href: str
    note: str = ""


def tiles(night: Night) -> list[Tile]:
    """The figures of the night, those that are known."""
    found = []
    if night.dataset:
        new = _count(night.dataset.get("new_train")) + _count(night.dataset.get("new_gate"))
        found.append(
            Tile("New examples", f"{new:,}", f"of {_count(night.dataset.get('rows')):,} logged rows")
        )
    candidate = accuracy(night, "candidate")
    if candidate and _is_figure(candidate):
        found.append(
            Tile(
                "Right answers",
                percent(candidate["accuracy"]),
                f"{percent(candidate['ci_low'])} to {percent(candidate['ci_high'])}, of {candidate['n']}",
            )
        )
    losses = [line["loss"] for line in night.training if isinstance(line.get("loss"), int | float)]
    if losses:
        found.append(Tile("Loss", f"{losses[-1]:.2f}", f"from {losses[0]:.2f}, {len(losses)} steps"))
    if size := _count(night.quantize.get("size_bytes")):
        found.append(Tile("Model", f"{size / 1e6:,.0f} MB", str(night.quantize.get("type", ""))))
    if night.peak_memory_gb:
        found.append(Tile("Peak memory", f"{night.peak_memory_gb:.1f} GB", "of the largest step"))
    if night.seconds:
        found.append(Tile("Time", _minutes(night.seconds), _span(night)))
    return found


def _minutes(seconds: float) -> str:
    """The two largest units at most, as they fit on a tile."""
    return duration(seconds).partition(" min ")[0] + " min" if 60 <= seconds < 3600 else duration(seconds)


def _span(night: Night) -> str:
    began = [step.started_at for step in night.steps if step.started_at]
    ended = [at + timedelta(seconds=each.seconds or 0) for at, each in _timed(night.steps)]
    return f"{min(began):%H:%M} to {max(ended):%H:%M} UTC" if began else ""


def _timed(steps: Iterable[Step]) -> list[tuple[datetime, Step]]:
    return [(step.started_at, step) for step in steps if step.started_at is not None]


def timeline(steps: Sequence[Step]) -> list[Bar]:
    """Every step with its place between the night's first start and last end."""
    timed = _timed(steps)
    first = min((at.timestamp() for at, _ in timed), default=0.0)
    last = max((at.timestamp() + (step.seconds or 0.0) for at, step in timed), default=0.0)
    span = last - first or 1.0
    return [
        Bar(
            step,
            100 * (step.started_at.timestamp() - first) / span if step.started_at else 0.0,
            max(100 * (step.seconds or 0.0) / span, 0.4) if step.started_at else 0.0,
        )
        for step in steps
    ]


def excluded(night: Night) -> list[tuple[str, int]]:
    """Why rows were not used, the commonest first."""
    told = night.dataset.get("excluded")
    counts = [
        (_words(reason), _count(count))
        for reason, count in (told.items() if isinstance(told, dict) else ())
        if _count(count)
    ]
    return sorted(counts, key=lambda each: -each[1])


def expectations(night: Night) -> list[Mapping[str, Any]]:
    """What the snapshot was held to: all that can refuse it, and what else was broken; drift stands apart."""
    told = night.validation.get("expectations")
    return [
        each
        for each in (told if isinstance(told, list) else ())
        if isinstance(each, dict) and (each.get("blocking") or not each.get("success")) and not is_drift(each)
    ]


def suites(night: Night) -> list[tuple[str, list[tuple[str, Mapping[str, Any]]]]]:
    """By suite, the one that the gate judges first before the others, each subject's figures."""
    order = ("base_constrained", "best_ever", "champion", "candidate")
    return [
        (
            _words(suite),
            [
                (_words(name), night.summary[suite][name])
                for name in order
                if _is_figure(night.summary[suite].get(name))
            ],
        )
        for suite in _suite_names(night)
        if night.summary[suite]
    ]


def _is_figure(value: Any) -> bool:
    """Whether these are a subject's figures on a suite, as evaluation writes them."""
    names = ("accuracy", "ci_low", "ci_high", "n", "correct")
    return isinstance(value, dict) and all(isinstance(value.get(name), int | float) for name in names)


def _suite_names(night: Night) -> list[str]:
    judged = [check["suite"] for check in checks(night)]
    known = [suite for suite, subjects in night.summary.items() if isinstance(subjects, dict)]
    return sorted(known, key=lambda suite: judged.index(suite) if suite in judged else len(judged))


def checks(night: Night) -> list[dict[str, Any]]:
    """The gate's checks, each with all that the page shows; None where a record does not say it."""
    told = night.gate.get("checks")
    texts = {"name": "", "rule": "", "suite": ""}
    numbers = dict.fromkeys(("n", "champion", "candidate", "difference", "ci_low", "ci_high"))
    found = []
    for each in told if isinstance(told, list) else ():
        if isinstance(each, dict):
            flags = {
                name: bool(each.get(name, name == "blocking")) for name in ("holds", "refuted", "blocking")
            }
            known = {name: str(each.get(name, "")) for name in texts}
            values = {name: each[name] for name in numbers if isinstance(each.get(name), int | float)}
            found.append(numbers | known | values | flags)
    return found


def links(night: Night) -> list[Link]:
    """Everything that the night left for a reader, as far as it is there."""
    files = {
        "Data docs": "validation/data_docs/index.html",
        "Dataset card": "dataset/card.md",
        "Model card": "MODEL_CARD.md",
        "Evidence of the erasure": "unlearn.html",
        "Manifest": cycle.MANIFEST,
    }
    found = [Link(name, path) for name, path in files.items() if _made(night, path)]
    run, experiment = night.registry.get("run_id"), night.registry.get("experiment_id")
    if run and experiment:
        page = f"http://127.0.0.1:5000/#/experiments/{quote(str(experiment))}/runs/{quote(str(run))}"
        found.append(Link("MLflow", page, "while make mlflow runs on this host"))
    return found


def _made(night: Night, path: str) -> bool:
    return path == cycle.MANIFEST or (night.directory / path).is_file()  # the manifest comes after the page


def figures(metrics: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The names of figures that every version has, requests first."""
    common = set.intersection(*(set(found) for found in metrics.values()))
    return sorted(common, key=lambda name: (name != "requests", name))


def percent(share: Any) -> str:
    """A share as whole percents; a dash for none."""
    return f"{100 * share:.0f} %" if isinstance(share, int | float) else "\N{EN DASH}"


def duration(seconds: float | None) -> str:
    """Seconds for a reader: 0.4 s, 58 s, 5 min 22 s, 2 h 5 min."""
    if seconds is None:
        return ""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def clock(at: datetime | str | None) -> str:
    """A moment's time of day, UTC."""
    found = at if isinstance(at, datetime) else moment(at)
    return found.astimezone(UTC).strftime("%H:%M:%S") if found else ""


def number(value: Any) -> str:
    """A figure to three places at most; a dash for none."""
    if value is None or isinstance(value, Undefined):
        return "\N{EN DASH}"
    if isinstance(value, float):
        return f"{value:.3f}".rstrip("0").rstrip(".")
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _count(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else 0


def _words(name: str) -> str:
    return name.replace("_", " ")


def _made_of(directory: Path) -> str:
    """One sha256 of all that the page tells of: the small files of the cycle, and the names of the large."""
    digest = hashlib.sha256(Path(__file__).with_name(_TEMPLATE).read_bytes())
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        if path.is_file() and not name.startswith(".") and "/." not in name and name not in _OWN:
            digest.update(f"{name}\0".encode())
            if path.suffix in (".json", ".jsonl"):
                digest.update(path.read_bytes())
    return digest.hexdigest()


def _tells_of(page: Path, made_of: str) -> bool:
    if not page.is_file():
        return False
    found = _MADE_OF.search(page.read_text(encoding="utf-8")[:2000])
    return found is not None and found[1] == made_of
