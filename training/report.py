"""The page that a person reads in the morning: what the night did, why, and what to do now.

It reads whatever files the night left, so that it also tells of one that was skipped or that failed, and
writes report.html (one file that loads nothing) and, last, manifest.json.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import zip_longest
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from training import bfcl, cycle
from training.night import Night, Step
from training.plots import curve
from training.verdict import accuracy, verdict

PAGE = "report.html"
EXAMPLES = 10
"""Answers that got better, and as many that got worse, are shown."""

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
        undefined=StrictUndefined,
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
        plots=plots(night),
        suites=suites(night),
        better=changed(night, became_right=True),
        worse=changed(night, became_right=False),
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
class Plot:
    """A curve, its title, and the sentence that says what it shows."""

    title: str
    drawing: str
    says: str


@dataclass(frozen=True, slots=True)
class Example:
    """One question, what was said to it, and what should have been; all as text that is not yet escaped."""

    suite: str
    item_id: str
    asked: str
    expected: str
    champion: str
    candidate: str


@dataclass(frozen=True, slots=True)
class Changes:
    """How many answers changed, and the first of them."""

    count: int
    shown: list[Example]


def tiles(night: Night) -> list[Tile]:
    """The figures of the night, those that are known."""
    found = []
    if night.dataset:
        new = night.dataset["new_train"] + night.dataset["new_gate"]
        found.append(Tile("New examples", f"{new:,}", f"of {night.dataset.get('rows', 0):,} logged rows"))
    candidate = accuracy(night, "candidate")
    if candidate:
        found.append(
            Tile(
                "Right answers",
                percent(candidate["accuracy"]),
                f"{percent(candidate['ci_low'])} to {percent(candidate['ci_high'])}, of {candidate['n']}",
            )
        )
    losses = [line["loss"] for line in night.training if line.get("loss") is not None]
    if losses:
        found.append(Tile("Loss", f"{losses[-1]:.2f}", f"from {losses[0]:.2f}, {len(losses)} steps"))
    if night.quantize:
        found.append(Tile("Model", f"{night.quantize['size_bytes'] / 1e6:,.0f} MB", night.quantize["type"]))
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
    counts = [
        (_words(reason), count) for reason, count in (night.dataset.get("excluded") or {}).items() if count
    ]
    return sorted(counts, key=lambda each: -each[1])


def expectations(night: Night) -> list[Mapping[str, Any]]:
    """What the snapshot was held to: all that can refuse it, and the rows' rules that were broken."""
    return [
        each for each in night.validation.get("expectations", ()) if each["blocking"] or not each["success"]
    ]


def plots(night: Night) -> list[Plot]:
    """Loss and memory over the steps of the fine-tuning."""
    found = []
    losses = _points(night.training, "loss")
    if losses:
        says = f"from {losses[0][1]:.2f} to {losses[-1][1]:.2f} in {len(losses)} steps"
        drawing = curve(losses, label=f"Loss: {says}", x_label="step", smooth=True)
        found.append(Plot("Loss", drawing, says))
    memory = _points(night.training, "memory_gb")
    if memory:
        says = f"{max(value for _, value in memory):.1f} GB at most"
        found.append(Plot("Memory, GB", curve(memory, label=f"Memory: {says}", x_label="step"), says))
    return found


def suites(night: Night) -> list[tuple[str, list[tuple[str, Mapping[str, Any]]]]]:
    """By suite, the one that the gate judges first before the others, each subject's figures."""
    order = ("base_constrained", "best_ever", "champion", "candidate")
    return [
        (
            _words(suite),
            [(_words(name), night.summary[suite][name]) for name in order if name in night.summary[suite]],
        )
        for suite in _suite_names(night)
        if night.summary[suite]
    ]


def _suite_names(night: Night) -> list[str]:
    judged = [check["suite"] for check in night.gate.get("checks", ())]
    return sorted(night.summary, key=lambda suite: judged.index(suite) if suite in judged else len(judged))


def changed(night: Night, *, became_right: bool) -> Changes:
    """The questions that only the candidate answered right, or only the champion; suites take turns."""
    by_suite = []
    for suite in _suite_names(night):
        answers: dict[str, dict[str, Any]] = {}
        for line in night.lines(f"evaluation/{suite}.jsonl"):
            answers.setdefault(line["item_id"], {})[line["subject"]] = line
        by_suite.append(
            [
                (suite, item_id, both)
                for item_id, both in sorted(answers.items())
                if "champion" in both
                and "candidate" in both
                and both["candidate"]["correct"] is became_right
                and both["champion"]["correct"] is not became_right
            ]
        )
    turns: list[tuple[str, str, Mapping[str, Any]]] = [
        change for turn in zip_longest(*by_suite) for change in turn if change is not None
    ]
    questions = _questions(night)
    return Changes(len(turns), [_example(*each, questions) for each in turns[:EXAMPLES]])


def _example(
    suite: str, item_id: str, both: Mapping[str, Any], questions: Mapping[str, tuple[str, str]]
) -> Example:
    asked, expected = questions.get(item_id) or _leaderboard(item_id)
    return Example(
        suite=_words(suite),
        item_id=item_id,
        asked=asked,
        expected=expected,
        champion=said(both["champion"]["answer"]),
        candidate=said(both["candidate"]["answer"]),
    )


def _questions(night: Night) -> dict[str, tuple[str, str]]:
    """Question and right answer of the cycle's own gate items, by id."""
    return {
        line["inference_id"]: (_last_words(line["request"]["messages"]), said(line["demonstration"]))
        for line in night.lines("dataset/gate.jsonl")
    }


def _leaderboard(item_id: str) -> tuple[str, str]:
    """Question and an accepted answer of an item of the leaderboard; "" where it is not installed."""
    try:
        item = bfcl.item(item_id)
    except (LookupError, OSError, ValueError):
        return "", ""
    call = {"name": item.demonstration.name, "arguments": item.demonstration.arguments}
    return shortened(item.messages[-1].content), said({"content": "", "tool_calls": [call]})


def said(message: Mapping[str, Any]) -> str:
    """An answer in a line: its calls as `name(key=value, …)`, else its text, shortened."""
    calls = [
        f"{call['name']}({', '.join(f'{key}={_value(value)}' for key, value in call['arguments'].items())})"
        for call in message.get("tool_calls", ())
    ]
    return shortened("; ".join(calls) or message.get("content", "")) or "(nothing)"


def shortened(text: str, characters: int = 160) -> str:
    """White space as single spaces, what cannot be printed as �, and no longer than `characters`."""
    plain = "".join(letter if letter.isprintable() else "�" for letter in " ".join(text.split()))
    return plain if len(plain) <= characters else f"{plain[: characters - 1]}…"


def figures(metrics: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The names of figures that every version has, requests first."""
    common = set.intersection(*(set(found) for found in metrics.values()))
    return sorted(common, key=lambda name: (name != "requests", name))


def percent(share: float) -> str:
    """A share as whole percents."""
    return f"{100 * share:.0f} %"


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
    if at is None:
        return ""
    moment = datetime.fromisoformat(at) if isinstance(at, str) else at
    return moment.astimezone(UTC).strftime("%H:%M:%S")


def number(value: Any) -> str:
    """A figure to three places at most; a dash for none."""
    if value is None:
        return "\N{EN DASH}"
    if isinstance(value, float):
        return f"{value:.3f}".rstrip("0").rstrip(".")
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _value(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _last_words(messages: Sequence[Mapping[str, Any]]) -> str:
    return shortened(str(messages[-1]["content"])) if messages else ""


def _points(lines: Iterable[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    return [
        (float(line["step"]), float(line[key]))
        for line in lines
        if isinstance(line.get(key), int | float) and math.isfinite(line[key]) and "step" in line
    ]


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
