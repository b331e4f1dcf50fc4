"""Intervals: they agree with scipy, with their definition, and keep their promise on small samples."""

import math
import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from training.statistics import (
    design_effect,
    detectable,
    holm,
    items_needed,
    paired_difference,
    swapped,
    tango,
    wilson,
)

counts = st.integers(0, 60).flatmap(
    lambda gained: st.integers(0, 60).flatmap(
        lambda lost: st.tuples(st.just(gained), st.just(lost), st.integers(max(1, gained + lost), 200))
    )
)


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_interval_of_a_share_is_scipys(sample: tuple[int, int]) -> None:
    successes, n = sample
    ours = wilson(successes, n)
    theirs = stats.binomtest(successes, n).proportion_ci(0.95, method="wilson")
    assert ours.low == pytest.approx(theirs.low, abs=1e-9)
    assert ours.high == pytest.approx(theirs.high, abs=1e-9)


def _score_by_likelihood(gained: int, lost: int, n: int, difference: float) -> float:
    """The score statistic from its definition: the share of lost items is found by maximising likelihood."""
    low, high = max(0.0, -difference), (1 - difference) / 2

    def unlikelihood(lost_share: float) -> float:
        gained_share, tied = lost_share + difference, 1 - 2 * lost_share - difference
        terms = ((gained, gained_share), (lost, lost_share), (n - gained - lost, tied))
        return -sum(count * math.log(max(share, 1e-300)) for count, share in terms if count)

    found = optimize.minimize_scalar(
        unlikelihood, bounds=(low, high), method="bounded", options={"xatol": 1e-12}
    )
    variance = n * (2 * found.x + difference - difference**2)
    return (gained - lost - n * difference) / math.sqrt(variance)


@settings(max_examples=60)
@given(counts)
def test_at_the_ends_of_the_paired_interval_the_score_is_the_quantile(
    case: tuple[int, int, int],
) -> None:
    gained, lost, n = case
    found = tango(gained, lost, n)
    assert -1 <= found.low <= (gained - lost) / n <= found.high <= 1
    z = stats.norm.ppf(0.975)
    if -0.999 < found.low < 0.999:
        assert _score_by_likelihood(gained, lost, n, found.low) == pytest.approx(z, abs=2e-3)
    if -0.999 < found.high < 0.999:
        assert _score_by_likelihood(gained, lost, n, found.high) == pytest.approx(-z, abs=2e-3)


@given(counts)
def test_swapping_the_two_mirrors_the_interval(case: tuple[int, int, int]) -> None:
    gained, lost, n = case
    one, other = tango(gained, lost, n), tango(lost, gained, n)
    assert one.low == pytest.approx(-other.high, abs=1e-9)
    assert one.high == pytest.approx(-other.low, abs=1e-9)


@pytest.mark.parametrize("n", [30, 100])
@pytest.mark.parametrize(("gains", "losses"), [(0.02, 0.02), (0.3, 0.0), (0.15, 0.05), (0.0, 0.0)])
def test_the_paired_interval_holds_the_true_difference_about_95_times_in_100(
    n: int, gains: float, losses: float
) -> None:
    covered = 0.0
    for gained in range(n + 1):
        for lost in range(n + 1 - gained):
            chance = stats.multinomial.pmf(
                [gained, lost, n - gained - lost], n, [gains, losses, 1 - gains - losses]
            )
            if chance > 1e-7:
                interval = tango(gained, lost, n)
                covered += chance * (interval.low - 1e-9 <= gains - losses <= interval.high + 1e-9)
    assert covered > 0.92


def test_no_discordant_item_still_leaves_room_for_a_difference() -> None:
    interval = tango(0, 0, 100)
    assert interval.low == pytest.approx(-interval.high)
    assert 0.03 < interval.high < 0.04  # z**2 / (n + z**2)


def test_more_items_narrow_the_interval() -> None:
    widths = [interval.high - interval.low for interval in (tango(3 * k, k, 10 * k) for k in (1, 3, 10, 30))]
    assert widths == sorted(widths, reverse=True)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=80))
def test_independent_items_give_tangos_interval(pairs: list[tuple[bool, bool]]) -> None:
    first, second = [a for a, _ in pairs], [b for _, b in pairs]
    found = paired_difference(first, second)
    table = Counter(pairs)
    assert found.interval == tango(table[False, True], table[True, False], len(pairs))
    assert found.effective_n == len(pairs)
    assert found.difference == pytest.approx(found.second - found.first)


@given(
    st.lists(st.tuples(st.booleans(), st.booleans(), st.integers(0, 9)), min_size=2, max_size=80),
)
def test_clusters_never_narrow_the_interval(rows: list[tuple[bool, bool, int]]) -> None:
    first, second, clusters = ([row[i] for row in rows] for i in range(3))
    together = paired_difference(first, second, clusters)  # type: ignore[arg-type]
    alone = paired_difference(first, second)  # type: ignore[arg-type]
    assert together.interval.high - together.interval.low >= alone.interval.high - alone.interval.low - 1e-9
    assert together.effective_n <= len(rows)


def test_an_item_asked_ten_times_in_one_session_is_worth_one() -> None:
    draw = random.Random(1)
    once = [(draw.random() < 0.3, draw.random() < 0.6) for _ in range(40)]
    first = [a for a, _ in once for _ in range(10)]
    second = [b for _, b in once for _ in range(10)]
    clusters = [number for number in range(40) for _ in range(10)]
    repeated = paired_difference(first, second, clusters)
    single = paired_difference([a for a, _ in once], [b for _, b in once])
    assert repeated.effective_n == pytest.approx(40, rel=0.05)
    assert repeated.interval.low == pytest.approx(single.interval.low, abs=0.01)
    assert repeated.interval.high == pytest.approx(single.interval.high, abs=0.01)


def test_the_clustered_interval_is_about_as_wide_as_a_bootstrap_over_sessions() -> None:
    draw = np.random.default_rng(3)
    first, second, clusters = [], [], []
    for session in range(60):
        liked = draw.beta(0.6, 0.6)  # sessions differ much in how often the second is right
        for _ in range(6):
            first.append(bool(draw.random() < 0.2))
            second.append(bool(draw.random() < liked))
            clusters.append(session)
    ours = paired_difference(first, second, clusters)
    sums = np.zeros(60)
    np.add.at(sums, clusters, np.array(second, int) - np.array(first, int))
    theirs = stats.bootstrap(
        (sums / 6,), np.mean, n_resamples=4000, method="percentile", random_state=1
    ).confidence_interval
    assert ours.interval.low == pytest.approx(theirs.low, abs=0.03)
    assert ours.interval.high == pytest.approx(theirs.high, abs=0.03)


def test_one_session_alone_is_one_item() -> None:
    found = paired_difference([False] * 50, [True] * 50, ["s"] * 50)
    assert found.effective_n == 1
    assert found.interval.low < 0.3


def test_the_design_effect_of_single_items_is_one() -> None:
    assert design_effect([1, 0, -1, 1], list("abcd")) == 1


@pytest.mark.parametrize("case", [(1, 0), (-1, 5), (6, 5), (0, -1)])
def test_a_share_of_nothing_or_more_than_all_is_refused(case: tuple[int, int]) -> None:
    with pytest.raises(ValueError):
        wilson(*case)


@pytest.mark.parametrize("case", [(0, 0, 0), (-1, 0, 5), (0, -1, 5), (3, 3, 5)])
def test_impossible_pairs_are_refused(case: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError):
        tango(*case)


def test_results_that_do_not_pair_up_are_refused() -> None:
    with pytest.raises(ValueError, match="as many"):
        paired_difference([True], [True, False])
    with pytest.raises(ValueError, match="as many"):
        paired_difference([], [])
    with pytest.raises(ValueError, match="as many"):
        paired_difference([True], [True], [])


@pytest.mark.parametrize("level", [0.0, 1.0, 1.5])
def test_a_level_that_is_no_share_is_refused(level: float) -> None:
    with pytest.raises(ValueError, match="level"):
        wilson(1, 2, level)


# Exact tests, families, power.


@given(st.integers(0, 60), st.integers(0, 60), st.integers(0, 30))
def test_with_one_item_a_session_the_exact_test_is_mcnemars(gained: int, lost: int, same: int) -> None:
    differences = [1] * gained + [-1] * lost + [0] * same
    ours = swapped(differences, range(len(differences)))
    if gained + lost == 0:
        assert ours == 1
    else:
        theirs = stats.binomtest(gained, gained + lost, alternative="greater").pvalue
        assert ours == pytest.approx(theirs, rel=1e-9)


@given(st.lists(st.tuples(st.integers(-1, 1), st.integers(0, 4)), min_size=1, max_size=30))
def test_the_exact_test_counts_all_ways_to_swap_whole_sessions(rows: list[tuple[int, int]]) -> None:
    sums = Counter[int]()
    for difference, cluster in rows:
        sums[cluster] += difference
    totals = [0]
    for total in sums.values():
        totals = [each + sign * total for each in totals for sign in (-1, 1)]
    expected = sum(total >= sum(sums.values()) for total in totals) / len(totals)
    assert swapped([d for d, _ in rows], [c for _, c in rows]) == pytest.approx(expected)


def test_ten_copies_of_one_session_prove_no_more_than_one() -> None:
    assert swapped([1] * 10, ["one"] * 10) == 0.5
    assert swapped([1] * 10, range(10)) == pytest.approx(1 / 1024)


def test_under_no_difference_the_exact_test_rejects_no_more_often_than_alpha() -> None:
    for discordant in range(1, 60):
        chance = sum(
            stats.binom.pmf(gained, discordant, 0.5)
            for gained in range(discordant + 1)
            if swapped([1] * gained + [-1] * (discordant - gained), range(discordant)) <= 0.025
        )
        assert chance <= 0.025 + 1e-12


def test_holm_is_as_published_and_one_claim_alone_is_not_corrected() -> None:
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "c": 0.06, "b": 0.06})
    assert holm({"a": 0.2}) == {"a": 0.2}
    assert holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0}
    assert holm({}) == {}


def _power(n: int, gains: float, losses: float, alpha: float) -> float:
    """Chance that the exact test shows it, by going through all samples."""
    found = 0.0
    for discordant in range(n + 1):
        here = stats.binom.pmf(discordant, n, gains + losses)
        if here < 1e-9:
            continue
        least = stats.binom.isf(alpha, discordant, 0.5) + 1
        found += here * stats.binom.sf(least - 1, discordant, gains / (gains + losses))
    return found


@pytest.mark.parametrize("n", [60, 100, 400])
@pytest.mark.parametrize("discordance", [0.0, 0.1, 0.3])
@pytest.mark.parametrize("alpha", [0.01, 0.025])
def test_the_difference_that_n_items_are_said_to_show_is_shown_about_as_often_as_said(
    n: int, discordance: float, alpha: float
) -> None:
    difference = detectable(n, discordance, alpha=alpha, power=0.8)
    assert difference is not None
    either = max(discordance, difference)
    assert 0.74 < _power(n, (either + difference) / 2, (either - difference) / 2, alpha) < 0.97


def test_more_items_show_smaller_differences_and_too_few_none() -> None:
    found = [detectable(n, 0.2, alpha=0.01, power=0.8) for n in (30, 100, 1000)]
    assert all(found) and found == sorted(found, key=lambda each: -(each or 0))
    assert detectable(3, 0.2, alpha=0.01, power=0.8) is None


def test_what_is_not_there_no_number_of_items_would_show() -> None:
    assert items_needed(0.0, 0.2, alpha=0.01, power=0.8) == math.inf
    assert items_needed(-0.1, 0.2, alpha=0.01, power=0.8, margin=0.1) == math.inf


def test_within_a_margin_the_items_needed_are_those_whose_interval_is_within() -> None:
    """Where no answer changed, Tango's interval reaches down z² / (n + z²)."""
    needed = items_needed(0.0, 0.0, alpha=0.025, power=0.5, margin=0.1)
    assert tango(0, 0, math.ceil(needed)).low > -0.1 > tango(0, 0, math.floor(needed) - 1).low
