"""One curve as inline SVG: no script, no font, nothing to load."""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup, escape

WIDTH, HEIGHT = 460, 216
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 16, 14, 38

Point = tuple[float, float]


def curve(points: Sequence[Point], *, label: str, x_label: str, smooth: bool = False) -> Markup:
    """`points` (x ascending) as a line from a y axis at 0; `smooth` draws a running mean over faint values.

    Raises:
        ValueError: if there are no points, or one that is not finite.
    """
    if not points or not all(math.isfinite(x) and math.isfinite(y) for x, y in points):
        raise ValueError("a curve needs points, all of them finite")
    xs, ys = [x for x, _ in points], [y for _, y in points]
    y_ticks = ticks(min(0.0, *ys), max(ys), 4)
    x_ticks = [tick for tick in ticks(xs[0], xs[-1], 6) if xs[0] <= tick <= xs[-1]]
    low, high = y_ticks[0], y_ticks[-1]

    def x_at(x: float) -> float:
        width = WIDTH - _LEFT - _RIGHT
        return round(_LEFT + width * ((x - xs[0]) / (xs[-1] - xs[0]) if xs[-1] > xs[0] else 0.5), 1)

    def y_at(y: float) -> float:
        height = HEIGHT - _TOP - _BOTTOM
        return round(_TOP + height * (1 - (y - low) / (high - low)), 1)

    def path(values: Sequence[float]) -> str:
        return "M" + " L".join(f"{x_at(x)} {y_at(y)}" for x, y in zip(xs, values, strict=True))

    drawn = [
        f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y_at(y)}" y2="{y_at(y)}"/>'
        f'<text class="tick" x="{_LEFT - 7}" y="{y_at(y) + 3.5}" text-anchor="end">{y:g}</text>'
        for y in y_ticks
    ]
    drawn += [
        f'<text class="tick" x="{x_at(x)}" y="{HEIGHT - 20}" text-anchor="middle">{x:g}</text>'
        for x in x_ticks
    ]
    drawn.append(
        f'<text class="tick" x="{WIDTH - _RIGHT}" y="{HEIGHT - 5}" text-anchor="end">{escape(x_label)}</text>'
    )
    line = running_mean(ys, max(1, len(ys) // 20)) if smooth else ys
    if smooth:
        drawn.append(f'<path class="faint" d="{path(ys)}"/>')
    drawn.append(f'<path class="curve" d="{path(line)}"/>')
    drawn.append(f'<circle class="dot" cx="{x_at(xs[-1])}" cy="{y_at(line[-1])}" r="3.5"/>')
    return Markup(  # noqa: S704 - numbers, and a label that is escaped
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">{"".join(drawn)}</svg>'
    )


def ticks(low: float, high: float, wanted: int) -> list[float]:
    """About `wanted` round numbers, 1, 2 or 5 times a power of ten apart, that enclose `low` and `high`."""
    span = (high - low) or abs(high) or 1.0
    raw = span / wanted
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{number * step:.12g}") for number in range(first, max(last, first + 1) + 1)]


def running_mean(values: Sequence[float], reach: int) -> list[float]:
    """Each value's mean with the `reach` before and after it, fewer at the ends."""
    means = []
    for at in range(len(values)):
        near = values[max(0, at - reach) : at + reach + 1]
        means.append(sum(near) / len(near))
    return means
