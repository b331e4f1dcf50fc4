"""The year on a page: true quality of what serves, night by night, with promotions, attacks and failures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup, escape

from benchmarks.year.calendar import ATTACKS

Ledger = Sequence[Mapping[str, Any]]

WIDTH, HEIGHT, LEFT, BOTTOM = 1100, 260, 40, 30
_PAGE = Markup(
    '<!doctype html><html lang="en"><meta charset="utf-8"><title>A year of nights</title><style>'
    "body{{font:15px/1.5 system-ui,sans-serif;max-width:1140px;margin:2em auto;color:#222}}"
    "svg{{width:100%;height:auto}} .axis{{stroke:#999}} text{{font-size:11px;fill:#555}}"
    " .serves{{fill:none;stroke:#0b6;stroke-width:2}} .best{{fill:none;stroke:#aaa;stroke-dasharray:4 3}}"
    " .candidate{{fill:#69c}} .promoted{{stroke:#0b6}} .attack{{fill:#fcc}} .failed{{fill:#c00}}"
    " .mishap{{fill:#e90}} i{{display:inline-block;width:1em;height:.7em;margin:0 .3em 0 1em}}"
    "</style><h1>A year of nights</h1>{body}</html>"
)
_LEGEND = Markup(
    "<p>Green: true share of right answers of the model that serves; dashed: of the best that ever served;"
    " blue dots: of each night's candidate; upright lines: promotions. Red bands: attacks; orange marks:"
    " mishaps; red marks: nights that failed.</p>"
)


def page(ledger: Ledger) -> str:
    """The HTML page, which needs nothing from elsewhere."""
    body = Markup().join(
        [
            Markup("<p>{} nights, {} promotions.</p>").format(
                len(ledger), sum(line["outcome"] == "promoted" for line in ledger)
            ),
            _LEGEND,
            Markup("<h2>On the target</h2>"),
            _chart(ledger, "target"),
            Markup("<h2>On what callers ask that night</h2>"),
            _chart(ledger, "callers"),
            Markup("<h2>Bytes of a cycle, without its model</h2>"),
            _curve([line["bytes"] / 1e6 for line in ledger], "MB"),
            Markup("<h2>Bytes of the log, of which three months are kept</h2>"),
            _curve([line["log_bytes"] / 1e6 for line in ledger], "MB"),
        ]
    )
    return str(_PAGE.format(body=body))


def _chart(ledger: Ledger, quality: str) -> Markup:
    top = 1.05 * max(
        max(line["best"][quality], line.get("candidate", line["best"])[quality]) for line in ledger
    )
    frame = _Frame(len(ledger), top)
    drawn = [frame.axes("share of right answers")]
    for at, line in enumerate(ledger):
        events = ", ".join(line["events"])
        if any(event in ATTACKS for event in line["events"]):
            drawn.append(frame.band(at, events))
        elif line["events"]:
            drawn.append(frame.mark(at, "mishap", events))
        if line["outcome"] == "failed":
            drawn.append(frame.mark(at, "failed", f"failed at {line['step']}"))
        if line["outcome"] == "promoted":
            drawn.append(frame.upright(at, line["candidate"]["name"]))
        if "candidate" in line:
            drawn.append(frame.dot(at, line["candidate"][quality]))
    drawn.append(frame.path([line["best"][quality] for line in ledger], "best"))
    drawn.append(frame.path([line["champion"][quality] for line in ledger], "serves"))
    return frame.drawing(drawn)


def _curve(values: Sequence[float], unit: str) -> Markup:
    frame = _Frame(len(values), 1.05 * max(values) or 1.0)
    return frame.drawing([frame.axes(unit), frame.path(values, "serves")])


class _Frame:
    """Where a night and a value are on the drawing."""

    def __init__(self, nights: int, top: float) -> None:
        self._step, self._top, self._nights = (WIDTH - LEFT) / nights, top, nights

    def x(self, night: float) -> float:
        return round(LEFT + night * self._step, 1)

    def y(self, value: float) -> float:
        return round((HEIGHT - BOTTOM) * (1 - value / self._top), 1)

    def axes(self, label: str) -> Markup:
        base = self.y(0)
        ticks = Markup().join(
            Markup('<text x="{}" y="{}" text-anchor="end">{:.3g}</text>').format(
                LEFT - 4, self.y(self._top * part / 4) + 10, self._top * part / 4
            )
            for part in range(5)
        )
        nights = Markup().join(
            Markup('<text x="{}" y="{}">{}</text>').format(self.x(night), HEIGHT - 8, night)
            for night in range(0, self._nights, max(1, self._nights // 12))
        )
        return Markup('<line class="axis" x1="{}" x2="{}" y1="{}" y2="{}"/><title>{}</title>{}{}').format(
            LEFT, WIDTH, base, base, escape(label), ticks, nights
        )

    def band(self, night: int, said: str) -> Markup:
        return Markup(
            '<rect class="attack" x="{}" y="0" width="{}" height="{}"><title>{}</title></rect>'
        ).format(self.x(night), max(1.0, round(self._step, 1)), HEIGHT - BOTTOM, said)

    def mark(self, night: int, kind: str, said: str) -> Markup:
        return Markup('<circle class="{}" cx="{}" cy="{}" r="3"><title>{}</title></circle>').format(
            kind, self.x(night + 0.5), 6 if kind == "failed" else HEIGHT - BOTTOM, said
        )

    def upright(self, night: int, said: str) -> Markup:
        return Markup(
            '<line class="promoted" x1="{0}" x2="{0}" y1="0" y2="{1}"><title>{2}</title></line>'
        ).format(self.x(night + 0.5), HEIGHT - BOTTOM, said)

    def dot(self, night: int, value: float) -> Markup:
        return Markup('<circle class="candidate" cx="{}" cy="{}" r="1.6"/>').format(
            self.x(night + 0.5), self.y(value)
        )

    def path(self, values: Sequence[float], kind: str) -> Markup:
        points = " ".join(f"{self.x(at + 0.5)},{self.y(value)}" for at, value in enumerate(values))
        return Markup('<polyline class="{}" points="{}"/>').format(kind, points)

    def drawing(self, parts: Sequence[Markup]) -> Markup:
        return Markup('<svg viewBox="0 0 {} {}" role="img">{}</svg>').format(
            WIDTH, HEIGHT, Markup().join(parts)
        )
