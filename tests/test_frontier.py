"""Frontier: measured and projected points with their intervals, marks of the undominated, devices kept apart."""

from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.inputs.records import Records
from analysis.quantities.cells import Cells, estimate_cells
from analysis.quantities.cost_model import CostOptions
from analysis.quantities.frontier import GROUP, MARKS, frontier
from analysis.quantities.targets import targets
from analysis.schemas import FRONTIER, polars_schema
from analysis.statistics.noise import t_quantile
from tests.synthetic import Laboratory, Planted, plan, records
from tests.test_cost_model import timings, with_runs

LAB = Laboratory()
CELL = ["optimizer", "target_loss_nats", "global_batch_tokens"]
COLUMNS = ("train_seconds", "device_seconds")


def cells_of(made: Records) -> Cells:
    return estimate_cells(targets(made), 0.9)


def points(made: Records, **keywords: object) -> pl.DataFrame:
    return frontier(made, cells_of(made), 0.9, **keywords)[0]


@pytest.fixture(scope="module")
def lab() -> Records:
    return records(LAB)


@pytest.fixture(scope="module")
def cells(lab: Records) -> Cells:
    return cells_of(lab)


@pytest.fixture(scope="module")
def drawn(lab: Records, cells: Cells) -> pl.DataFrame:
    return frontier(lab, cells, 0.9)[0]


def with_cell(frame: pl.DataFrame, cells: Cells) -> pl.DataFrame:
    """Add the interval of T, in logs from T, to each point."""
    ends = [
        (pl.col(f"tokens_to_target_{end}") / pl.col("tokens_to_target")).log().alias(end) for end in ("low", "high")
    ]
    return frame.join(cells.cells.select(*CELL, "tokens_to_target", *ends), on=CELL)


def logs(frame: pl.DataFrame, end: str) -> list[float]:
    return (frame[f"train_seconds_{end}"] / frame["train_seconds"]).log().to_list()


def test_frontier_has_the_columns_of_its_schema(drawn: pl.DataFrame) -> None:
    assert drawn.schema == polars_schema(FRONTIER)
    assert set(drawn["kind"]) == {"measured", "projected"}


def test_measured_seconds_are_those_of_the_chosen_runs(drawn: pl.DataFrame, cells: Cells) -> None:
    means = cells.chosen.group_by(CELL).agg(pl.col("train_seconds_to_target").log().mean().exp())
    both = drawn.filter(kind="measured").join(means, on=CELL)
    assert both.height == 24
    assert both["train_seconds"].to_list() == pytest.approx(both["train_seconds_to_target"].to_list())


def test_projection_on_one_device_agrees_with_the_measurement(drawn: pl.DataFrame) -> None:
    on_one = drawn.filter(num_devices=1)
    both = on_one.filter(kind="measured").join(on_one.filter(kind="projected"), on=CELL)
    assert both.height == 24
    assert both["train_seconds"].to_list() == pytest.approx(both["train_seconds_right"].to_list(), rel=1e-3)
    assert both["model_error"].to_list() == pytest.approx([0.0] * 24, abs=1e-3)
    assert drawn.filter(kind="projected")["model_error"].is_null().all()


def test_the_interval_of_tokens_carries_over_to_time_and_cost(drawn: pl.DataFrame, cells: Cells) -> None:
    joined = with_cell(drawn, cells)
    assert joined.height == drawn.height
    for end in ("low", "high"):
        assert logs(joined, end) == pytest.approx(joined[end].to_list())
        cost = drawn[f"device_seconds_{end}"] / drawn["device_seconds"]
        assert cost.to_list() == pytest.approx((drawn[f"train_seconds_{end}"] / drawn["train_seconds"]).to_list())


def test_measured_intervals_widen_with_the_spread_of_seconds_between_runs() -> None:
    """Of two runs a cell one takes a fifth longer a token: sd .1 √2 / 2 each, pooled over 8 cells, √2 for the mean."""
    made = records(replace(LAB, targets=(2.0,), fresh_seeds=()))
    even = cells_of(made)
    factor = pl.when(pl.col("init_seed") == 0).then(np.exp(0.2)).otherwise(1.0)
    uneven = replace(even, chosen=even.chosen.with_columns(pl.col("train_seconds_to_target") * factor))
    before, after = (with_cell(frontier(made, own, 0.9)[0], own).filter(optimizer="muon") for own in (even, uneven))
    measured, projected = (after.filter(kind=kind) for kind in ("measured", "projected"))
    spread = t_quantile(0.9, dof=4) * 0.1
    assert logs(measured, "high") == pytest.approx(np.hypot(measured["high"].to_numpy(), spread))
    assert logs(measured, "low") == pytest.approx(-np.hypot(measured["low"].to_numpy(), spread))
    assert logs(projected, "high") == pytest.approx(logs(before.filter(kind="projected"), "high"))


def test_a_cell_of_which_runs_fell_short_takes_its_seconds_per_token_from_those_that_did_not(
    lab: Records, cells: Cells
) -> None:
    """The mean of the survivors' seconds is too short; T by the likelihood of all runs is not."""
    longer = cells.cells.with_columns(pl.col("tokens_to_target") * 1.2)
    before, after = (
        frontier(lab, replace(cells, cells=frame), 0.9)[0].filter(kind="measured") for frame in (cells.cells, longer)
    )
    assert after["train_seconds"].to_list() == pytest.approx((before["train_seconds"] * 1.2).to_list())


def test_device_seconds_are_seconds_times_devices(drawn: pl.DataFrame) -> None:
    product = drawn["train_seconds"].to_numpy() * drawn["num_devices"].to_numpy()
    assert np.allclose(drawn["device_seconds"].to_numpy(), product)


def test_projections_give_a_device_no_fewer_tokens_than_were_measured(drawn: pl.DataFrame) -> None:
    projected = drawn.filter(kind="projected")
    assert (projected["global_batch_tokens"] / projected["num_devices"]).min() == min(LAB.batches)
    assert projected["num_devices"].max() == max(LAB.batches) // min(LAB.batches)


def test_projections_stop_at_the_devices_asked_for(lab: Records) -> None:
    assert points(lab, options=CostOptions(max_devices=5))["num_devices"].max() == 4


def test_projections_take_timings_where_there_are_any(lab: Records, cells: Cells) -> None:
    timed, costs = frontier(lab, cells, 0.9, timings=timings({256: 1.0, 1024: 2.0}))
    muon = timed.filter(optimizer="muon", kind="projected", global_batch_tokens=4096, target_loss_nats=2.0)
    steps = cells.cells.filter(optimizer="muon", global_batch_tokens=4096, target_loss_nats=2.0)["steps_to_target"]
    seconds = dict(muon.select("num_devices", "train_seconds").iter_rows())
    assert seconds[1] == pytest.approx(steps.item() * (4 * 2.0 + 3e-3))
    assert seconds[16] == pytest.approx(steps.item() * (1.0 + 3e-3), rel=1e-3)
    error = timed.filter(optimizer="muon", kind="measured")["model_error"]
    assert (error > 10).all()
    assert any(f"worst {error.max():+.1%}" in source for source in costs["source"])


@pytest.mark.parametrize(("cost", "mark"), MARKS.items())
def test_frontier_keeps_exactly_the_points_that_none_beats(cost: str, mark: str, drawn: pl.DataFrame) -> None:
    for _, group in drawn.group_by(GROUP):
        pairs = group.select("train_seconds", cost).rows()
        for point, marked in zip(pairs, group[mark], strict=True):
            beaten = any(o[0] <= point[0] and o[1] <= point[1] and o != point for o in pairs)
            assert marked is not beaten
        assert group[mark].any()


@settings(max_examples=8, deadline=None)
@given(st.sampled_from([512, 2048]), st.floats(8.0, 30.0))
def test_a_dominated_run_changes_no_frontier(batch: int, factor: float) -> None:
    """A batch at which AdamW needs many times the tokens; its step costs are timed, so that no fit moves."""
    small = replace(LAB, targets=(2.0,), optimizers={"adamw": Planted(180_000.0, 2_000.0)})
    slow = Planted(factor * 180_000.0, 2_000.0)
    more = replace(small, batches=(batch,), optimizers={"adamw": slow}, draw=3)
    options = {"timings": timings({256: 0.003, 1024: 0.01}, optimizer="adamw")}
    before = points(records(small), **options)
    after = points(records(small, [*plan(small), *plan(more)]), **options)
    assert after.height > before.height
    for mark in MARKS.values():
        kept = [frame.filter(mark).select(*CELL, "num_devices", "kind").rows() for frame in (before, after)]
        assert kept[0] == kept[1]


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_frontier_does_not_depend_on_the_order_of_rows(seed: int) -> None:
    made = records(replace(LAB, targets=(2.0,)))
    cells, first = cells_of(made), points(made)
    shuffled = replace(
        cells,
        cells=cells.cells.sample(fraction=1, shuffle=True, seed=seed),
        chosen=cells.chosen.sample(fraction=1, shuffle=True, seed=seed),
    )
    runs = made.runs.sample(fraction=1, shuffle=True, seed=seed)
    again, _ = frontier(replace(made, runs=runs), shuffled, 0.9)
    numbers = pl.selectors.float()
    assert again.select(~numbers).equals(first.select(~numbers))
    for name in first.select(numbers).columns:
        assert again[name].to_list() == pytest.approx(first[name].to_list(), abs=1e-12)


def on_two_devices(made: Records) -> Records:
    name = pl.when(pl.col("init_seed") == 0).then(pl.lit("A100")).otherwise(pl.lit("H200"))
    return with_runs(made, name.alias("device"))


def test_runs_of_different_devices_make_different_points_and_frontiers() -> None:
    made = on_two_devices(records(replace(LAB, targets=(2.0,), fresh_seeds=())))
    both = points(made)
    for kind in ("measured", "projected"):
        per_device = both.filter(kind=kind).group_by("device").len().sort("device").rows()
        assert [name for name, _ in per_device] == ["A100", "H200"]
        assert per_device[0][1] == per_device[1][1]
    assert both.filter("on_frontier").group_by("optimizer", "kind", "device").len().height == 8


def test_a_table_without_devices_gives_seconds_and_no_cost() -> None:
    made = records(replace(LAB, targets=(2.0,)))
    nothing = [
        pl.lit(None, dtype=kind).alias(name) for name, kind in (("device", pl.String), ("num_devices", pl.Int64))
    ]
    measured = points(with_runs(made, *nothing)).filter(kind="measured")
    assert set(measured["device"]) == {"unstated"}
    assert measured["train_seconds"].is_not_null().all()
    for name in ("device_seconds", "on_frontier", "model_error"):
        assert measured[name].is_null().all()
    assert all("number of devices is not stated" in words for words in measured["explanation"])


def test_a_table_without_seconds_gives_no_point() -> None:
    made = records(replace(LAB, targets=(2.0,)))
    runs = with_runs(made, pl.lit(None, dtype=pl.Float64).alias("train_seconds"))
    evaluations = made.evaluations.with_columns(train_seconds=pl.lit(None, dtype=pl.Float64))
    empty, costs = frontier(
        replace(runs, evaluations=evaluations), cells_of(replace(made, evaluations=evaluations)), 0.9
    )
    assert empty.is_empty()
    assert empty.schema == polars_schema(FRONTIER)
    assert costs.is_empty()


def test_points_carry_the_verdict_of_their_cell(drawn: pl.DataFrame, cells: Cells) -> None:
    joined = drawn.join(cells.cells.select(*CELL, "reasons"), on=CELL)
    assert joined["reasons"].to_list() == joined["reasons_right"].to_list()
    assert "warmup_confounded" in set(drawn["verdict"])
    assert {"warmup" in words for words in drawn.filter(verdict="warmup_confounded")["explanation"]} == {True}


def with_cpu_share(share: float) -> Records:
    made = records(replace(LAB, targets=(2.0,)))
    return replace(
        made,
        runs=made.runs.with_columns(threads=pl.lit(2, dtype=pl.Int64)),
        evaluations=made.evaluations.with_columns(train_cpu_seconds=pl.col("train_seconds") * 2 * share),
    )


@pytest.mark.parametrize(("share", "verdicts"), [(0.61, {"shared_machine"}), (0.95, {"ok"})])
def test_times_of_a_busy_machine_are_doubtful(share: float, verdicts: set[str]) -> None:
    made = points(with_cpu_share(share))
    assert set(made["verdict"]) == verdicts
    assert all(("CPU share 61%" in words) == (verdicts != {"ok"}) for words in made["explanation"])


def test_projections_from_timings_are_free_of_the_doubts_about_the_runs() -> None:
    made = points(with_cpu_share(0.61), timings=timings({256: 0.01}))
    muon = made.filter(optimizer="muon")
    assert set(muon.filter(kind="measured")["verdict"]) == {"shared_machine"}
    assert set(muon.filter(kind="projected")["verdict"]) == {"ok"}


def test_cost_model_prints_every_constant_with_its_source_and_its_error(lab: Records, cells: Cells) -> None:
    costs = frontier(lab, cells, 0.9)[1]
    assert {"bandwidth", "latency", "lab adamw per_step", "lab muon per_token"} <= set(costs["name"])
    assert all(costs["source"])
    fitted = costs.filter(pl.col("name").str.ends_with("per_token"))["source"]
    assert all("against 12 measured points: median error" in source for source in fitted)
