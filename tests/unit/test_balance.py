"""Balance: equal parts of what room there is, and weights that let no loud service own the model."""

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training import balance
from training.curation_rules import Balance, Rules


@given(st.dictionaries(st.text(max_size=3), st.integers(0, 50), max_size=8), st.integers(0, 200))
def test_equal_parts_take_all_there_is_room_for_and_the_least_of_them_is_as_great_as_can_be(
    counts: dict[str, int], room: int
) -> None:
    parts = balance.equal_parts(counts, room)
    assert sum(parts.values()) == min(room, sum(counts.values()))
    assert all(parts[name] <= count for name, count in counts.items())
    cut = [parts[name] for name, count in counts.items() if parts[name] < count]
    if cut:  # nobody who got all has more than one who did not, but for what cannot be divided
        assert max(parts.values()) <= min(cut) + 1


def lines(**callers: int) -> list[dict[str, Any]]:
    return [
        {
            "inference_id": f"{caller}-{number:04}",
            "caller": caller,
            "tool": "weather",
            "cycle": caller,
            "base": 1.0,
        }
        for caller, count in callers.items()
        for number in range(count)
    ]


def shares(found: list[Any]) -> dict[str, float]:
    weights: Counter[str] = Counter()
    for line in found:
        weights[line["caller"]] += line["weight"]
    return {caller: weight / sum(weights.values()) for caller, weight in weights.items()}


def test_who_says_ten_times_as_much_has_five_times_the_weight() -> None:
    wide = Balance(caller=0.7, tool=1, session=1, bounds=(0.01, 100))
    found = shares(balance.weighted(lines(loud=1000, quiet=100), wide))
    assert found["loud"] / found["quiet"] == pytest.approx(10**0.7, rel=1e-3)
    equal = shares(balance.weighted(lines(loud=1000, quiet=100), wide.model_copy(update={"caller": 0})))
    assert equal["loud"] == pytest.approx(0.5, rel=1e-2)


def test_weights_are_bounded_and_what_is_said_alike_weighs_alike() -> None:
    found = balance.weighted(lines(loud=1000, quiet=1), Balance())
    assert found[-1]["weight"] == 5.0 and found[0]["weight"] == pytest.approx(0.85, abs=0.01)
    assert {line["weight"] for line in balance.weighted(lines(a=50, b=50, c=50), Balance())} == {1.0}
    assert balance.weighted([], Balance()) == []
    again = balance.weighted(balance.weighted(lines(loud=30, quiet=2), Balance()), Balance())
    assert again == balance.weighted(lines(loud=30, quiet=2), Balance()), (
        "weights do not multiply over nights"
    )


def nights_of(caller: str, nights: range, each: int) -> list[dict[str, Any]]:
    return [{**line, "cycle": str(night)} for night in nights for line in lines(**{caller: each})]


def test_who_comes_for_a_few_nights_weighs_no_more_than_who_says_as_much_every_night() -> None:
    """Else an example of a caller that turns up to poison three nights weighed five of anybody else's."""
    steady = [*nights_of("a", range(40), 15), *nights_of("b", range(40), 15)]
    guest = nights_of("guest", range(3), 15)
    found = balance.weighted([*steady, *guest], Balance(tool=1, session=1))
    assert {line["weight"] for line in found} == {1.0}
    quiet = balance.weighted([*steady, *nights_of("quiet", range(40), 1)], Balance(tool=1, session=1))
    assert quiet[-1]["weight"] > 4, "a quiet caller is one that says little every night"


def test_older_nights_have_equal_parts_of_their_share() -> None:
    old = lines(monday=90, tuesday=10, friday=40)
    replayed, taken = balance.with_room(old, [], Rules(cap=50))
    assert Counter(line["cycle"] for line in replayed) == {"monday": 20, "tuesday": 10, "friday": 20}
    assert taken == []
    newest = [line["inference_id"] for line in replayed if line["cycle"] == "monday"]
    assert newest == [f"monday-{number:04}" for number in range(70, 90)]
    assert balance.with_room(old, [], Rules(cap=200)) == (old, [])


def test_accepted_answers_make_room_for_demonstrations() -> None:
    old = [{**line, "source": "accepted"} for line in lines(a=8)] + lines(b=4)
    assert [line["caller"] for line in balance.with_room(old, [], Rules(cap=6))[0]].count("b") == 4
    assert [line["caller"] for line in balance.with_room(old, [], Rules(cap=3))[0]] == ["b"] * 3


def test_shares_tell_who_the_dataset_is_of() -> None:
    found = balance.shares(balance.weighted(lines(loud=30, quiet=2), Balance()))
    assert found["caller"]["loud"]["examples"] == 30
    assert sum(each["weight_share"] for each in found["caller"].values()) == pytest.approx(1, abs=1e-3)
    assert (found["sessions"], found["largest_session"], found["tools"]) == (32, 1, 1)
    nothing = balance.shares([])
    assert (nothing["caller"], nothing["weight"]["mean"]) == ({}, 0.0)
