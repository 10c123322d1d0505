"""Cost model and frontier: constants recovered, projections by hand, dominance."""

from dataclasses import replace

import numpy as np
import polars as pl
import pytest

from analysis.estimate import estimate
from analysis.inputs.records import Records
from analysis.quantities.frontier import (
    BANDWIDTH_BYTES_PER_SECOND,
    LATENCY_SECONDS,
    StepCost,
    device_counts,
    fit_step_costs,
)
from tests.synthetic import STEP_SECONDS, TOKEN_SECONDS, Laboratory, records

LAB = Laboratory()


def test_step_costs_recover_the_planted_seconds() -> None:
    for cost in fit_step_costs(records(LAB).runs).values():
        assert cost.per_step_seconds == pytest.approx(STEP_SECONDS, rel=1e-6)
        assert cost.per_token_seconds == pytest.approx(TOKEN_SECONDS, rel=1e-6)


def test_step_cost_of_one_batch_is_all_per_token_and_projects_to_no_more_devices() -> None:
    made = records(replace(LAB, batches=(1024,)))
    for cost in fit_step_costs(made.runs).values():
        assert cost.per_step_seconds is None
        assert cost.per_token_seconds == pytest.approx(TOKEN_SECONDS + STEP_SECONDS / 1024)
        assert "not projected to more devices" in cost.source
    estimates = estimate(made)
    assert set(estimates.frontier["num_devices"]) == {1}
    constants = dict(estimates.cost_model.select("name", "value").iter_rows())
    assert constants["lab adamw per_step"] is None


def test_projections_give_a_device_no_fewer_tokens_than_were_measured() -> None:
    projected = estimate(records(LAB)).frontier.filter(pl.col("kind") == "projected")
    per_device = projected["global_batch_tokens"] / projected["num_devices"]
    assert per_device.min() == min(LAB.batches)
    assert projected["num_devices"].max() == max(LAB.batches) // min(LAB.batches)


def with_cpu_share(share: float) -> Records:
    made = records(LAB)
    return replace(
        made,
        runs=made.runs.with_columns(threads=pl.lit(2)),
        evaluations=made.evaluations.with_columns(train_cpu_seconds=pl.col("train_seconds") * 2 * share),
    )


@pytest.mark.parametrize(("share", "verdict"), [(0.61, "shared_machine"), (0.95, "ok")])
def test_times_of_a_busy_machine_are_doubtful(share: float, verdict: str) -> None:
    frontier = estimate(with_cpu_share(share)).frontier
    assert set(frontier["verdict"]) == {verdict}
    assert all(("CPU share 61%" in reason) == (verdict != "ok") for reason in frontier["explanation"])


def test_times_without_a_processor_clock_are_not_doubted() -> None:
    assert set(estimate(records(LAB)).frontier["verdict"]) == {"ok"}


def test_step_seconds_add_an_all_reduce_beyond_one_device() -> None:
    cost = StepCost(1e-3, 1e-6, min_tokens_per_device=1, num_params=1_000_000, source="")
    assert cost.step_seconds(8192, 1) == pytest.approx(1e-3 + 8192e-6)
    ring = 2 * 3 / 4 * 4e6 / BANDWIDTH_BYTES_PER_SECOND + 2 * LATENCY_SECONDS
    assert cost.step_seconds(8192, 4) == pytest.approx(1e-3 + 2048e-6 + ring)


@pytest.mark.parametrize(
    ("sequences", "counts"), [(1, [1]), (4, [1, 2, 4]), (12, [1, 2, 4]), (4096, [2**k for k in range(11)])]
)
def test_device_counts_give_each_device_equally_many_whole_sequences(sequences: int, counts: list[int]) -> None:
    assert device_counts(sequences) == counts


def test_frontier_projection_on_one_device_agrees_with_the_measurement() -> None:
    points = estimate(records(LAB)).frontier.filter(pl.col("num_devices") == 1)
    keys = ["optimizer", "target_loss_nats", "global_batch_tokens"]
    both = points.filter(kind="measured").join(points.filter(kind="projected"), on=keys)
    assert both.height == 24
    assert both["train_seconds"].to_list() == pytest.approx(both["train_seconds_right"].to_list(), rel=1e-3)


@pytest.mark.parametrize(("cost", "mark"), [("device_seconds", "on_frontier"), ("train_flops", "on_flops_frontier")])
def test_frontier_keeps_exactly_the_points_that_none_beats(cost: str, mark: str) -> None:
    frontier = estimate(records(LAB)).frontier
    for _, group in frontier.group_by("kind", "optimizer", "target_loss_nats"):
        points = group.select("train_seconds", cost).rows()
        for point, marked in zip(points, group[mark], strict=True):
            beaten = any(o[0] <= point[0] and o[1] <= point[1] and o != point for o in points)
            assert marked is not beaten
        assert group[mark].any()


def test_frontier_device_seconds_are_seconds_times_devices() -> None:
    frontier = estimate(records(LAB)).frontier
    product = frontier["train_seconds"].to_numpy() * frontier["num_devices"].to_numpy()
    assert np.allclose(frontier["device_seconds"].to_numpy(), product)


def test_cost_model_prints_every_constant_with_its_source() -> None:
    table = estimate(records(LAB)).cost_model
    assert {"bandwidth", "latency", "lab adamw per_step", "lab muon per_token"} <= set(table["name"])
    assert all(table["source"])
    assert all("assumed" in source for source in table.filter(pl.col("name").is_in(["bandwidth", "latency"]))["source"])
