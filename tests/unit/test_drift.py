"""How far tonight's traffic has moved, and when that is told."""

# ruff: noqa: RUF001 - as models write it

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ks_2samp

from validation.draw import DRAWN, NO_CALL, SHORT, language, refuses
from validation.drift import (
    NOTHING,
    Moved,
    Profile,
    ks,
    merged,
    moved,
    profile_of,
    psi,
    references,
    to_plain,
)
from validation.files import write_json
from validation.suite import read_suite

SUITE = read_suite()


def profile(rows: int = 2000, seed: int = 1, longer: float = 1.0, **shares: dict[str, float]) -> Profile:
    """What was drawn of so many rows of one kind of traffic; `shares` replaces those of a category."""
    drawn = random.Random(seed)
    usual = {
        "language": {"en": 0.9, "de": 0.08, SHORT: 0.02},
        "tool": {NO_CALL: 0.5, "weather": 0.3, "route": 0.2},
        "refusal": {"no": 0.98, "yes": 0.02},
        "feedback": {"no": 0.9, "yes": 0.1},
    }
    counts = {
        name: Counter(drawn.choices(list(found), list(found.values()), k=rows))
        for name, found in (usual | shares).items()
    }
    return Profile(sorted(int(longer * drawn.lognormvariate(5, 0.6)) for _ in range(rows)), counts)


def told(now: Profile, before: Profile) -> dict[str, Moved]:
    return {each.drift.name: each for each in moved(now, before, SUITE.drifts, SUITE.reference)}


def broken(now: Profile, before: Profile) -> set[str]:
    return {name for name, each in told(now, before).items() if each.value > each.limit}


@pytest.mark.parametrize("rows", [200, 310, 3000])
def test_nights_of_the_same_traffic_are_told_nothing_of(rows: int) -> None:
    before = profile(7 * rows, seed=99)
    alarms = [broken(profile(rows, seed), before) for seed in range(12)]
    assert alarms == [set()] * 12


@pytest.mark.parametrize(
    ("now", "names"),
    [
        (profile(longer=2.0), {"prompt_length_stable", "prompt_length_near"}),
        (profile(language={"en": 0.8, "fr": 0.2}), {"language_stable"}),
        (profile(tool={NO_CALL: 0.2, "weather": 0.8}), {"tool_mix_stable"}),
        (profile(feedback={"yes": 0.5, "no": 0.5}), {"feedback_stable"}),
        (profile(refusal={"yes": 0.1, "no": 0.9}), {"refusals_stable"}),
        (profile(refusal={"yes": 0.2, "no": 0.8}), {"refusals_stable", "refusals_not_risen"}),
    ],
)
def test_what_moved_is_told_by_name(now: Profile, names: set[str]) -> None:
    assert broken(now, profile(10_000, seed=2)) == names


def test_only_refusals_that_rise_refuse_a_night() -> None:
    many, few = profile(refusal={"yes": 0.4, "no": 0.6}), profile(refusal={"no": 1.0})
    assert broken(few, many) == {"refusals_stable"}
    assert [each.name for each in SUITE.drifts if each.blocks] == ["refusals_not_risen"]


def test_without_enough_rows_nothing_is_judged_and_the_reason_is_told() -> None:
    for each in told(profile(100, longer=9), profile(2000)).values():
        assert each.not_judged == "tonight has 100 rows of it; 200 are needed"
    for each in told(profile(), NOTHING).values():
        assert each.not_judged == "the nights before have 0 rows to compare with; 200 are needed"


@given(st.lists(st.integers(0, 50), min_size=1), st.lists(st.integers(0, 50), min_size=1))
def test_the_distance_is_that_of_scipy(now: list[int], before: list[int]) -> None:
    theirs = ks_2samp(now, before, method="asymp").statistic
    assert ks(sorted(now), sorted(before))[0] == pytest.approx(theirs)


@given(st.dictionaries(st.text(), st.integers(0, 99)), st.dictionaries(st.text(), st.integers(0, 99)))
def test_the_index_is_finite_and_never_below_zero(now: dict[str, int], before: dict[str, int]) -> None:
    value, chance = psi(Counter(now), Counter(before))
    assert 0 <= value < 100
    assert chance >= 0
    assert psi(Counter(before), Counter(before))[0] == pytest.approx(0)


def test_the_index_is_that_of_its_definition() -> None:
    found, _ = psi(Counter(a=700_000, b=300_000), Counter(a=500_000, b=500_000))
    assert found == pytest.approx(0.2 * 0.33647 + 0.2 * 0.51083, rel=1e-3)


def cycle(root: Path, name: str, verdict: bool = True, **found: object) -> Path:
    folder = root / name
    write_json(folder / "validation" / "profile.json", to_plain(profile(300)) | found)
    if verdict:
        write_json(folder / "gate.json", {})
    return folder


def test_the_reference_is_the_last_judged_nights_before_this_one(tmp_path: Path) -> None:
    names = [f"202601{day:02}T020000Z" for day in range(1, 13)]
    for name in names:
        cycle(tmp_path, name, verdict=name != names[8])
    cycle(tmp_path, "notes")
    tonight = tmp_path / names[10]
    assert [path.parents[1].name for path in references(tonight, 7)] == [*names[2:8], names[9]]
    assert merged(references(tonight, 7)).rows("language") == 7 * 300
    first = tmp_path / names[0]
    assert references(first, 7) == []


def test_a_profile_comes_back_as_it_was_and_a_damaged_one_is_left_out(tmp_path: Path) -> None:
    good = cycle(tmp_path, "20260101T020000Z") / "validation" / "profile.json"
    assert merged([good]) == profile(300)
    for damage in ({"language": 7}, {"prompt_length": ["long"]}, {"tool": {"x": None}}):
        bad = cycle(tmp_path, "20260102T020000Z", **damage) / "validation" / "profile.json"
        assert merged([good, bad]) == profile(300)
    bad.write_text("{")
    assert merged([bad, tmp_path / "nowhere"]) == NOTHING


def test_a_profile_keeps_no_more_than_the_commonest_tools() -> None:
    many = Profile((), dict(NOTHING.counts) | {"tool": Counter({str(n): n + 1 for n in range(5000)})})
    kept = json.loads(json.dumps(to_plain(many)))["tool"]
    assert len(kept) == 1000
    assert "4999" in kept


def test_what_a_row_says_nothing_of_is_counted_nowhere() -> None:
    rows = [
        dict.fromkeys(name for name, _ in DRAWN)
        | {"drawn": True, "prompt_length": 5, "language": "en", "feedback": True},
        dict.fromkeys((name for name, _ in DRAWN), None),
    ]
    found = profile_of(pa.Table.from_pylist(rows, schema=pa.schema(DRAWN)))
    assert (found.rows("prompt_length"), found.rows("language"), found.rows("tool")) == (1, 1, 0)
    assert found.counts["feedback"] == Counter(yes=1)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Calculate the area of a triangle whose base is 10 and whose height is 5 centimetres.", "en"),
        ("Wie wird morgen das Wetter in der Nähe von München sein, und brauche ich einen Schirm?", "de"),
        ("Quel temps fera-t-il demain à Paris, et dois-je prendre un parapluie avec moi ?", "fr"),
        ("Какая завтра будет погода в Москве, и нужен ли мне будет зонт?", "ru"),
        ("2 + 2 = ?", SHORT),
        ("", SHORT),
    ],
)
def test_the_language_of_a_prompt_is_told(text: str, expected: str) -> None:
    assert language(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("I’m sorry, but I can’t help with that.", True),
        ("I  cannot\nassist with this request", True),
        ("Es tut mir leid, aber ich kann das nicht.", True),
        ("It rains in Oslo.", False),
        ("x" * 400 + " I cannot help", False),
        ("", False),
    ],
)
def test_a_refusal_is_known_by_how_it_begins(text: str, expected: bool) -> None:
    assert refuses(text) is expected
