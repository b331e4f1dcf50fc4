"""Curves as inline SVG."""

import math
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.plots import HEIGHT, WIDTH, curve, running_mean, ticks

numbers = st.floats(min_value=-1e6, max_value=1e6, allow_nan=False, allow_subnormal=False)


@given(numbers, numbers, st.integers(2, 8))
def test_ticks_are_even_round_and_enclose_what_they_measure(one: float, other: float, wanted: int) -> None:
    low, high = sorted((one, other))
    found = ticks(low, high, wanted)
    slack = 1e-6 * max(abs(low), abs(high), 1e-3)
    assert found[0] <= low + slack and found[-1] >= high - slack
    assert 2 <= len(found) <= 2 * wanted + 3


def test_ticks_are_what_a_person_would_choose() -> None:
    assert ticks(0, 2.2, 4) == [0, 1, 2, 3]
    assert ticks(1, 96, 6) == [0, 20, 40, 60, 80, 100]
    assert ticks(0, 0.35, 4) == [0, 0.1, 0.2, 0.3, 0.4]


def test_a_running_mean_of_a_line_is_that_line_within_its_ends() -> None:
    assert running_mean([0, 1, 2, 3, 4], 1) == [0.5, 1, 2, 3, 3.5]


points = st.lists(numbers, min_size=1, max_size=60).map(lambda ys: [(float(x), y) for x, y in enumerate(ys)])


@given(points, st.booleans())
def test_every_curve_is_well_formed_and_inside_its_frame(
    points: list[tuple[float, float]], smooth: bool
) -> None:
    drawn = ET.fromstring(str(curve(points, label="<Loss> & more", x_label="step", smooth=smooth)))
    assert drawn.get("aria-label") == "<Loss> & more"
    for path in drawn.iter("path"):
        numbers = [float(each) for each in path.get("d", "").replace("M", "").replace("L", "").split()]
        assert all(0 <= x <= WIDTH for x in numbers[::2])
        assert all(0 <= y <= HEIGHT for y in numbers[1::2])


@pytest.mark.parametrize("points", [[], [(0.0, math.nan)], [(0.0, math.inf)]])
def test_what_is_no_curve_is_refused(points: list[tuple[float, float]]) -> None:
    with pytest.raises(ValueError, match="finite"):
        curve(points, label="Loss", x_label="step")
