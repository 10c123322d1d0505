"""Pareto sets and step functions: by hand, against the definition, invariants."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.statistics.pareto import Points, compare, undominated

PROPERTY = settings(deadline=None)
COORDINATES = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=20)


def points(*pairs: tuple[float, float]) -> Points:
    """One draw of points (seconds, cost)."""
    seconds, costs = np.log(np.array(pairs)).T
    return Points(seconds[None], costs[None])


def compared(baseline: Points, challenger: Points) -> tuple[float, float, float, float]:
    """Share, cost ratio, first and last deadline."""
    found = compare(baseline, challenger)
    return tuple(float(part[0]) for part in (found.share, *map(np.exp, found[1:])))


def kept(pairs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    x, y = np.array(pairs, dtype=float).T
    return [pair for pair, mark in zip(pairs, undominated(x, y), strict=True) if mark]


@PROPERTY
@given(COORDINATES)
def test_undominated_is_what_the_definition_says(pairs: list[tuple[int, int]]) -> None:
    """Whole numbers on a small grid: ties in one coordinate and in both are common."""
    free = [p for p in pairs if not any(o[0] <= p[0] and o[1] <= p[1] and o != p for o in pairs)]
    assert kept(pairs) == free


@PROPERTY
@given(COORDINATES, st.integers(0, 3), st.integers(0, 3), st.data())
def test_undominated_is_blind_to_a_dominated_point(
    pairs: list[tuple[int, int]], slower: int, dearer: int, data: st.DataObject
) -> None:
    x, y = data.draw(st.sampled_from(pairs))
    worse = (x + slower, y + dearer + (slower == 0))
    assert sorted(kept([*pairs, worse])) == sorted(kept(pairs))


@PROPERTY
@given(COORDINATES, st.randoms(use_true_random=False))
def test_undominated_does_not_depend_on_the_order(pairs: list[tuple[int, int]], random: object) -> None:
    assert sorted(kept(random.sample(pairs, len(pairs)))) == sorted(kept(pairs))


def test_undominated_puts_points_of_unknown_cost_last() -> None:
    assert undominated(np.array([1.0, 2.0, 3.0]), np.array([np.inf, 5.0, np.inf])).tolist() == [True, True, False]


def test_undominated_of_nothing_is_nothing() -> None:
    assert undominated(np.empty(0), np.empty(0)).tolist() == []


def test_compare_weighs_deadlines_by_their_logs() -> None:
    """From 2 s to 8 s the baseline costs 8; the challenger 4 until 4 s, then 1: ratios 2 and 8 over an octave each."""
    baseline, challenger = points((1, 8), (8, 1)), points((2, 4), (4, 1))
    assert compared(baseline, challenger) == pytest.approx((1.0, 4.0, 2.0, 8.0))


def test_compare_shares_the_axis_where_frontiers_cross() -> None:
    """The challenger is dearer on one octave of three: ratios 1/2, 2, 2."""
    baseline, challenger = points((1, 4), (8, 1)), points((1, 8), (2, 2))
    assert compared(baseline, challenger) == pytest.approx((2 / 3, 2 ** (1 / 3), 1.0, 8.0))


def test_compare_begins_where_both_meet_the_deadline_and_ends_where_both_are_done() -> None:
    baseline, challenger = points((1, 8), (2, 4), (64, 9)), points((1.5, 2), (32, 2), (16, 1))
    *_, start, end = compared(baseline, challenger)
    assert (start, end) == pytest.approx((1.5, 16.0))


def test_compare_of_single_points_is_at_the_one_deadline() -> None:
    assert compared(points((3, 6)), points((2, 2))) == pytest.approx((1.0, 3.0, 3.0, 3.0))
    assert compared(points((2, 2)), points((3, 6))) == pytest.approx((0.0, 1 / 3, 3.0, 3.0))


PAIRS = st.lists(st.tuples(st.floats(0.1, 100), st.floats(0.1, 100)), min_size=1, max_size=8)


@PROPERTY
@given(PAIRS, PAIRS, st.randoms(use_true_random=False))
def test_compare_does_not_depend_on_the_order_of_points(ours: list, theirs: list, random: object) -> None:
    shuffled = random.sample(ours, len(ours)), random.sample(theirs, len(theirs))
    assert compared(points(*ours), points(*theirs)) == pytest.approx(compared(*(points(*p) for p in shuffled)))


@PROPERTY
@given(PAIRS, PAIRS, st.floats(1.0, 10), st.floats(1.0, 10), st.data())
def test_compare_is_blind_to_dominated_points(
    ours: list, theirs: list, slower: float, dearer: float, data: st.DataObject
) -> None:
    seconds, cost = data.draw(st.sampled_from(ours))
    more = [*ours, (seconds * slower, cost * dearer)]
    assert compared(points(*more), points(*theirs)) == pytest.approx(compared(points(*ours), points(*theirs)))


@PROPERTY
@given(PAIRS, PAIRS)
def test_compare_of_swapped_sides_inverts_the_ratio(ours: list, theirs: list) -> None:
    share, ratio, *ends = compared(points(*ours), points(*theirs))
    swapped_share, swapped_ratio, *swapped_ends = compared(points(*theirs), points(*ours))
    assert swapped_ratio == pytest.approx(1 / ratio)
    assert swapped_ends == pytest.approx(ends)
    assert share + swapped_share <= 1 + 1e-9


@PROPERTY
@given(PAIRS, PAIRS, st.floats(0.01, 100), st.floats(0.01, 100))
def test_compare_is_blind_to_units(ours: list, theirs: list, seconds: float, cost: float) -> None:
    scaled = [[(x * seconds, y * cost) for x, y in side] for side in (ours, theirs)]
    share, ratio, start, end = compared(points(*ours), points(*theirs))
    expected = (share, ratio, start * seconds, end * seconds)
    assert compared(*(points(*side) for side in scaled)) == pytest.approx(expected)


def test_compare_takes_every_draw_by_itself() -> None:
    first, second = points((1, 8), (8, 1)), points((1, 4), (8, 1))
    both = Points(*(np.concatenate(pair) for pair in zip(first, second, strict=True)))
    challenger = points((2, 4), (4, 1))
    twice = Points(*(np.concatenate([part, part]) for part in challenger))
    found = compare(both, twice)
    for place, one in enumerate((first, second)):
        assert [part[place] for part in found] == pytest.approx([part[0] for part in compare(one, challenger)])
