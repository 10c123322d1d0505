"""Choices: answers by hand, limits that nothing meets, round numbers."""

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.quantities.choices import NUM_LIMITS, choices, round_limits
from analysis.schemas import CHOICES, FRONTIER, polars_schema

PROPERTY = settings(deadline=None)


def frontier(*points: tuple[str, int, int, float], **columns: object) -> pl.DataFrame:
    """Points (optimizer, batch, devices, seconds) of one target."""
    row = dict.fromkeys(FRONTIER) | {"model": "lab", "target_loss_nats": 2.0, "protocol": "constant_ema"}
    row |= {"kind": "projected", "device": "H200", "verdict": "ok", "reasons": "", "explanation": ""} | columns
    rows = [
        row
        | {"optimizer": optimizer, "global_batch_tokens": batch, "num_devices": devices}
        | {"train_seconds": seconds, "device_seconds": seconds * devices}
        for optimizer, batch, devices, seconds in points
    ]
    return pl.DataFrame(rows, schema=polars_schema(FRONTIER), orient="row")


POINTS = frontier(("adamw", 256, 1, 40.0), ("adamw", 1024, 4, 20.0), ("muon", 1024, 1, 30.0), ("muon", 4096, 8, 5.0))


def answers(frame: pl.DataFrame, question: str) -> list[tuple[object, ...]]:
    return frame.filter(question=question).select("limit", "optimizer", "global_batch_tokens", "num_devices").rows()


def test_choices_are_the_fastest_within_a_budget_and_the_cheapest_within_a_deadline() -> None:
    made = choices(POINTS, budgets=[35, 60], deadlines=[35, 25, 5])
    assert list(made.columns) == list(CHOICES)
    assert answers(made, "fastest") == [(35.0, "muon", 1024, 1), (60.0, "muon", 4096, 8)]
    assert answers(made, "cheapest") == [(5.0, "muon", 4096, 8), (25.0, "muon", 4096, 8), (35.0, "muon", 1024, 1)]


def test_choices_beyond_every_point_are_null_with_the_nearest_in_words() -> None:
    made = choices(POINTS, budgets=[20.0], deadlines=[4.0])
    assert made["optimizer"].null_count() == made["train_seconds"].null_count() == 2
    assert set(made["verdict"]) == {"not_identified"}
    words = dict(made.select("question", "explanation").iter_rows())
    assert words["fastest"] == "no point costs as few device-seconds: the cheapest takes 30.0 s"
    assert words["cheapest"] == "no point is as fast: the fastest takes 5.00 s"


def test_choices_carry_the_verdict_and_the_interval_of_their_point() -> None:
    doubtful = frontier(
        ("muon", 1024, 1, 30.0), verdict="censored", reasons="censored", explanation="1 of 2 fell short",
        train_seconds_low=25.0, train_seconds_high=36.0,
    )  # fmt: skip
    (row,) = choices(doubtful, budgets=[50]).filter(question="fastest").iter_rows(named=True)
    assert (row["verdict"], row["explanation"]) == ("censored", "1 of 2 fell short")
    assert (row["train_seconds_low"], row["train_seconds_high"]) == (25.0, 36.0)


def test_choices_never_mix_devices_nor_kinds() -> None:
    fast = frontier(("adamw", 256, 1, 1.0), device="B200")
    measured = frontier(("adamw", 256, 1, 2.0), kind="measured")
    made = choices(pl.concat([POINTS, fast, measured]), budgets=[100], deadlines=[100])
    assert made.height == 6
    best = made.filter(question="fastest").select("kind", "device", "train_seconds").rows()
    assert best == [("measured", "H200", 2.0), ("projected", "B200", 1.0), ("projected", "H200", 5.0)]


def test_choices_leave_out_points_of_unknown_cost() -> None:
    unknown = POINTS.with_columns(device_seconds=pl.lit(None, dtype=pl.Float64))
    assert choices(unknown).is_empty()


def test_choices_at_round_limits_have_an_answer_each() -> None:
    made = choices(POINTS)
    assert made["optimizer"].null_count() == 0
    assert answers(made, "fastest") == [(50.0, "muon", 4096, 8)]
    assert answers(made, "cheapest") == [
        (5.0, "muon", 4096, 8),
        (10.0, "muon", 4096, 8),
        (20.0, "muon", 4096, 8),
        (50.0, "muon", 1024, 1),
    ]


@pytest.mark.parametrize("limits", [{"budgets": [0.0]}, {"deadlines": [-1.0]}, {"budgets": [float("nan")]}])
def test_a_limit_that_is_not_above_zero_is_refused(limits: dict[str, list[float]]) -> None:
    with pytest.raises(ValueError, match="give one above zero"):
        choices(POINTS, **limits)


@PROPERTY
@given(st.randoms(use_true_random=False), st.floats(1, 1000))
def test_choices_do_not_depend_on_the_order_of_rows(random: object, limit: float) -> None:
    shuffled = POINTS[random.sample(range(POINTS.height), POINTS.height)]
    assert choices(shuffled, [limit], [limit]).equals(choices(POINTS, [limit], [limit]))


@PROPERTY
@given(st.floats(1e-4, 1e8), st.floats(1, 1e6))
def test_round_limits_span_the_points(low: float, factor: float) -> None:
    limits = round_limits(low, low * factor)
    assert limits == sorted(set(limits))
    assert 1 <= len(limits) <= NUM_LIMITS
    assert low <= limits[0] < 2.5 * low * 1.001
    assert low * factor <= limits[-1] < 2.5 * low * factor * 1.001
    assert {f"{limit:e}"[0] for limit in limits} <= {"1", "2", "5"}
