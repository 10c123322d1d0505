"""Cost of a step: constants recovered from runs and from timings, the all-reduce by hand, doubts about clocks."""

from dataclasses import replace

import numpy as np
import polars as pl
import pytest

from analysis.inputs.records import Records
from analysis.quantities.cost_model import CostOptions, Place, StepCost, constants
from analysis.quantities.step_costs import step_costs
from analysis.schemas import polars_schema
from harness.record import TIMING_COLUMNS
from tests.synthetic import STEP_SECONDS, TOKEN_SECONDS, Laboratory, records

LAB = Laboratory(targets=(2.0,))
MUON = Place("lab", "muon", "test")
COST = StepCost(
    micro_batch_seconds={1: 1e-6},
    per_step_seconds=3e-3,
    matrix_seconds=2e-3,
    min_tokens_per_device=256,
    sequence_length=64,
    num_params=1_000_000,
    num_matrix_params=800_000,
    source="",
)


def timings(seconds: dict[int, float], **changes: object) -> pl.DataFrame:
    """Timings of Muon by micro-batch size: an optimizer of 3 ms, 2 of them for matrices."""
    row = {
        "run_id": "elsewhere", "model": "lab", "optimizer": "muon", "device": "test", "threads": 1,
        "precision": "fp32", "optimizer_seconds": 3e-3, "matrix_seconds": 2e-3, "repeats": 30, "spread": 0.02,
        "cpu_share": 0.99,
    } | changes  # fmt: skip
    rows = [row | {"micro_batch_tokens": size, "micro_batch_seconds": each} for size, each in seconds.items()]
    return pl.DataFrame(rows, schema=polars_schema(TIMING_COLUMNS))


def with_runs(made: Records, *columns: pl.Expr) -> Records:
    return replace(made, runs=made.runs.with_columns(*columns))


def step_seconds(cost: StepCost, batch: int, devices: int, **options: object) -> float:
    return float(cost.step_seconds(np.array([batch]), np.array([devices]), CostOptions(**options))[0])


def test_step_costs_recover_the_planted_seconds() -> None:
    for cost in step_costs(records(LAB)).values():
        assert cost.per_step_seconds == pytest.approx(STEP_SECONDS, rel=1e-6)
        assert cost.micro_batch_seconds[1] == pytest.approx(TOKEN_SECONDS, rel=1e-6)
        assert not cost.is_timed


def test_runs_whose_batch_changed_say_nothing_of_a_step() -> None:
    made = records(LAB)
    changed = made.runs.with_columns(step=pl.col("tokens_seen") // 64, train_seconds=pl.col("train_seconds") * 9)
    changed = changed.with_columns(run_id=pl.col("run_id") + "-changed")
    assert step_costs(replace(made, runs=pl.concat([made.runs, changed]))) == step_costs(made)


def test_step_cost_of_one_batch_is_all_per_token_and_known_on_no_more_devices() -> None:
    for cost in step_costs(records(replace(LAB, batches=(1024,)))).values():
        assert cost.per_step_seconds is None
        assert cost.micro_batch_seconds[1] == pytest.approx(TOKEN_SECONDS + STEP_SECONDS / 1024)
        assert list(cost.is_known(np.array([1024, 1024]), np.array([1, 2]))) == [True, False]
        assert "not projected to more devices" in cost.source


def test_step_seconds_add_a_ring_all_reduce_beyond_one_device() -> None:
    assert step_seconds(COST, 8192, 1) == pytest.approx(3e-3 + 8192e-6)
    ring = 2 * 3 / 4 * 4e6 / 25e9 + 2 * 20e-6
    assert step_seconds(COST, 8192, 4) == pytest.approx(3e-3 + 2048e-6 + ring)
    slower = step_seconds(COST, 8192, 4, bandwidth_bytes_per_second=25e6, latency_seconds=1.0)
    assert slower == pytest.approx(3e-3 + 2048e-6 + 2 * 3 / 4 * 4e6 / 25e6 + 2.0)


def test_shared_optimizer_does_a_part_of_the_matrices_and_gathers_the_rest() -> None:
    replicated = step_seconds(COST, 8192, 4)
    gathered = 3 / 4 * 4 * 800_000 / 25e9 + 2 * 20e-6
    shared = step_seconds(COST, 8192, 4, optimizer_sharing="shared")
    assert shared == pytest.approx(replicated - 2e-3 * 3 / 4 + gathered)
    assert step_seconds(COST, 8192, 1, optimizer_sharing="shared") == step_seconds(COST, 8192, 1)


def test_sharing_changes_nothing_where_there_are_no_matrices() -> None:
    for cost in step_costs(records(LAB)).values():
        assert cost.matrix_seconds == 0
        assert step_seconds(cost, 4096, 4, optimizer_sharing="shared") == step_seconds(cost, 4096, 4)


def test_without_a_number_of_parameters_one_device_alone_is_known() -> None:
    cost = replace(COST, num_params=None)
    assert step_seconds(cost, 8192, 1) == step_seconds(COST, 8192, 1)
    assert np.isnan(step_seconds(cost, 8192, 2))


@pytest.mark.parametrize(
    ("sequences", "counts"), [(1, [1]), (4, [1, 2, 4]), (12, [1, 2, 4]), (4096, [2**k for k in range(11)])]
)
def test_known_device_counts_give_each_device_equally_many_whole_sequences(sequences: int, counts: list[int]) -> None:
    powers = 2 ** np.arange(11)
    cost = replace(COST, min_tokens_per_device=64)
    known = cost.is_known(np.full(11, 64 * sequences), powers)
    assert powers[known].tolist() == counts


def test_known_devices_get_no_fewer_tokens_than_were_timed() -> None:
    powers = 2 ** np.arange(11)
    assert powers[COST.is_known(np.full(11, 4096), powers)].tolist() == [1, 2, 4, 8, 16]


def test_timed_compute_splits_into_the_largest_micro_batch_that_divides() -> None:
    seconds = {256: 0.01, 1024: 0.03, 2048: 0.05}
    cost = step_costs(records(LAB), timings(seconds))[MUON]
    assert cost.is_timed
    assert step_seconds(cost, 4096, 1) == pytest.approx(2 * 0.05 + 3e-3)
    assert step_seconds(cost, 1024, 1) == pytest.approx(0.03 + 3e-3)
    assert step_seconds(cost, 768, 1) == pytest.approx(3 * 0.01 + 3e-3)
    assert np.isnan(step_seconds(cost, 320, 1))
    assert cost.min_tokens_per_device == 256


def test_timings_of_one_optimizer_leave_the_other_fitted() -> None:
    costs = step_costs(records(LAB), timings({256: 0.01}))
    assert costs[MUON].is_timed
    assert not costs[MUON._replace(optimizer="adamw")].is_timed


def test_timings_on_another_device_count_for_nothing() -> None:
    assert not step_costs(records(LAB), timings({256: 0.01}, device="another"))[MUON].is_timed


def test_a_variant_takes_its_own_timings_before_those_of_its_name() -> None:
    made = records(LAB)
    first, second = made.runs.filter(optimizer="muon")["run_id"][:2]
    name = pl.when(pl.col("run_id") == first).then(pl.lit("muon, newton_schulz=quintic"))
    name = name.when(pl.col("run_id") == second).then(pl.lit("muon, momentum=0.9")).otherwise("optimizer")
    rows = [timings({256: 0.01}, run_id=first, optimizer_seconds=4e-3), timings({256: 0.01}, optimizer_seconds=6e-3)]
    costs = step_costs(with_runs(made, name.alias("optimizer")), pl.concat(rows))
    assert costs[MUON._replace(optimizer="muon, newton_schulz=quintic")].per_step_seconds == 4e-3
    assert costs[MUON._replace(optimizer="muon, momentum=0.9")].per_step_seconds == pytest.approx(5e-3)


def test_a_micro_batch_takes_the_least_time_over_the_optimizers_of_its_model() -> None:
    both = pl.concat([timings({256: 0.01, 1024: 0.05}), timings({256: 0.02, 1024: 0.04}, optimizer="adamw")])
    for cost in step_costs(records(LAB), both).values():
        assert cost.micro_batch_seconds == {256: 0.01, 1024: 0.04}
    other = both.with_columns(model=pl.when(pl.col("optimizer") == "adamw").then(pl.lit("larger")).otherwise("model"))
    assert step_costs(records(LAB), other)[MUON].micro_batch_seconds == {256: 0.01, 1024: 0.05}


def test_fit_estimates_matrices_by_their_flops_and_never_more_than_the_step() -> None:
    flops = {"optimizer_flops_per_step": 1e6, "flops_per_token": 1e4}
    made = with_runs(records(LAB), *(pl.lit(value).alias(name) for name, value in flops.items()))
    assert step_costs(made)[MUON].matrix_seconds == pytest.approx(100 * TOKEN_SECONDS)
    huge = with_runs(made, pl.lit(1e12).alias("optimizer_flops_per_step"))
    assert step_costs(huge)[MUON].matrix_seconds == pytest.approx(STEP_SECONDS)


def test_each_device_has_its_own_fit() -> None:
    made = records(LAB)
    fast = pl.col("init_seed") == 0
    made = with_runs(
        made,
        pl.when(fast).then(pl.lit("fast")).otherwise(pl.lit("slow")).alias("device"),
        pl.when(fast).then(pl.col("train_seconds") / 4).otherwise(pl.col("train_seconds")).alias("train_seconds"),
    )
    costs = step_costs(made)
    assert {place.device for place in costs} == {"fast", "slow"}
    for place, cost in costs.items():
        factor = {"fast": 0.25, "slow": 1.0}[place.device]
        assert cost.micro_batch_seconds[1] == pytest.approx(factor * TOKEN_SECONDS)


def test_a_device_that_is_not_stated_is_one_of_its_own() -> None:
    costs = step_costs(with_runs(records(LAB), pl.lit(None, dtype=pl.String).alias("device")))
    assert {place.device for place in costs} == {"unstated"}


@pytest.mark.parametrize(("share", "names"), [(0.61, ["shared_machine"]), (0.95, []), (None, [])])
def test_timings_beside_other_work_are_doubtful(share: float | None, names: list[str]) -> None:
    cost = step_costs(records(LAB), timings({256: 0.01}, cpu_share=share))[MUON]
    assert [finding.name for finding in cost.findings] == names


def test_constants_say_where_each_number_is_from() -> None:
    options = CostOptions(bandwidth_bytes_per_second=1e9, optimizer_sharing="shared")
    costs = step_costs(records(LAB), timings({256: 0.01, 1024: 0.03}))
    rows = {
        row["name"]: row for row in constants(costs, {MUON: "against 4 measured points: median error +2%"}, options)
    }
    assert rows["lab muon micro_batch_1024"]["value"] == 0.03
    assert rows["lab muon optimizer"]["source"].endswith("against 4 measured points: median error +2%")
    assert "timed alone, median of 30 steps with a spread of up to 2%" in rows["lab muon optimizer"]["source"]
    assert "no micro-batch was timed alone" in rows["lab adamw per_step"]["source"]
    assert rows["bandwidth"]["value"] == 1e9
    assert "8 Gb/s" in rows["bandwidth"]["source"]
    assert all("assumed" in rows[name]["source"] for name in ("bandwidth", "latency", "optimizer_sharing"))
    assert "gathers the rest" in rows["optimizer_sharing"]["source"]


@pytest.mark.parametrize("wrong", [{"bandwidth_bytes_per_second": 0.0}, {"latency_seconds": -1.0}, {"max_devices": 0}])
def test_options_outside_their_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="bandwidth of"):
        CostOptions(**wrong)
