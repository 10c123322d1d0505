"""Tokens to a target: interpolation, status, protocol."""

import math
import time
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.inputs.records import Records
from analysis.quantities.targets import targets
from tests.synthetic import FLOPS_PER_TOKEN, Laboratory, plan, records

LAB = Laboratory(noise=0.0)


def one_run(losses: dict[int, float], **changes: object) -> Records:
    """Return a run of batch 1024 with averaged losses at given tokens, targets as in LAB."""
    made = records(LAB, [run for run in plan(LAB) if run.batch == 1024][:1])
    row = made.evaluations.head(1).with_columns(train_seconds=0.0, train_flops=0.0)
    rows = [
        row.with_columns(
            step=pl.lit(tokens // 1024, pl.Int64),
            tokens_seen=pl.lit(tokens, pl.Int64),
            train_flops=pl.lit(tokens * FLOPS_PER_TOKEN),
            train_seconds=pl.lit(tokens * 1e-4),
            val_loss_averaged_nats=pl.lit(loss),
            val_loss_nats=pl.lit(loss + 0.1),
        )
        for tokens, loss in losses.items()
    ]
    runs = made.runs.with_columns(pl.lit(value).alias(name) for name, value in changes.items())
    return Records(made.manifest, runs, pl.concat(rows))


def at(loss: float, made: Records) -> dict[str, object]:
    return targets(made).row(by_predicate=pl.col("target_loss_nats") == loss, named=True)


def test_targets_interpolate_linearly_in_log_tokens() -> None:
    row = at(2.1, one_run({0: 4.8, 10240: 2.2, 40960: 2.0}))
    assert row["status"] == "reached"
    assert row["tokens_to_target"] == pytest.approx(20480)
    assert row["steps_to_target"] == pytest.approx(20)
    assert row["flops_to_target"] == pytest.approx(20480 * FLOPS_PER_TOKEN)
    assert row["train_seconds_to_target"] == pytest.approx(2.048)


def test_steps_are_those_taken_where_the_batch_changed() -> None:
    """After 20 steps of 512 tokens come 30 of 1024: the tokens to the target are 10 of them further on."""
    made = one_run({0: 4.8, 10240: 2.2, 40960: 2.0})
    taken = pl.col("tokens_seen").replace_strict({0: 0, 10240: 20, 40960: 50})
    row = at(2.1, replace(made, evaluations=made.evaluations.with_columns(step=taken)))
    assert (row["tokens_to_target"], row["steps_to_target"]) == (pytest.approx(20480), pytest.approx(30))


def test_targets_take_the_first_crossing_on_the_running_minimum() -> None:
    row = at(2.1, one_run({0: 4.8, 10240: 2.15, 20480: 2.5, 40960: 2.05, 81920: 2.3, 163840: 1.9}))
    assert row["tokens_to_target"] == pytest.approx(20480 * 2**0.5)


def test_targets_hit_exactly_at_a_mark_are_that_mark() -> None:
    assert at(2.0, one_run({0: 4.8, 10240: 2.2, 40960: 2.0}))["tokens_to_target"] == pytest.approx(40960)


def test_targets_not_reached_are_censored_where_the_run_ended() -> None:
    row = at(2.0, one_run({0: 4.8, 10240: 2.2, 40960: 2.01}))
    assert (row["status"], row["tokens_to_target"], row["tokens_seen"]) == ("not_reached", None, 40960)
    assert (row["steps_to_target"], row["flops_to_target"], row["train_seconds_to_target"]) == (None, None, None)


@pytest.mark.parametrize("losses", [{0: 4.8, 10240: 1.9}, {10240: 1.9, 20480: 1.8}])
def test_targets_reached_at_the_first_mark_have_no_tokens(losses: dict[int, float]) -> None:
    row = at(2.0, one_run(losses))
    assert (row["status"], row["tokens_to_target"]) == ("reached_at_first_eval", None)


def test_targets_of_a_diverged_run_do_not_count_even_if_crossed() -> None:
    row = at(2.2, one_run({0: 4.8, 10240: 2.5, 40960: 2.0}, status="diverged"))
    assert (row["status"], row["tokens_to_target"]) == ("diverged", None)


def test_targets_read_raw_weights_unless_the_protocol_averages() -> None:
    losses = {0: 4.8, 10240: 2.3, 40960: 2.0}
    averaged, raw = at(2.1, one_run(losses)), at(2.1, one_run(losses, protocol="constant_raw"))
    assert averaged["tokens_to_target"] == pytest.approx(10240 * 4 ** (2 / 3))
    assert raw["tokens_to_target"] == pytest.approx(40960)


def test_targets_leave_out_marks_without_a_loss() -> None:
    made = one_run({0: 4.8, 10240: 2.2, 20480: 2.15, 40960: 2.0})
    gap = pl.when(pl.col("tokens_seen") != 20480).then("val_loss_averaged_nats").alias("val_loss_averaged_nats")
    row = at(2.1, Records(made.manifest, made.runs, made.evaluations.with_columns(gap)))
    assert row["tokens_to_target"] == pytest.approx(20480)


def test_targets_recover_the_planted_tokens_of_every_run() -> None:
    lab = replace(LAB, noise=0.1)
    found = targets(records(lab)).filter(pl.col("target_loss_nats") == 2.0)
    truth = {run.run_id: run.log_tokens for run in plan(lab)}
    assert found.height == len(truth)
    for run_id, tokens in found.select("run_id", "tokens_to_target").filter(pl.col("tokens_to_target") > 0).iter_rows():
        assert np.log(tokens) == pytest.approx(truth[run_id], abs=0.01)  # the curve bends a little between marks


def crossing(losses: dict[int, float], target: float) -> tuple[str, float | None]:
    """Return status and tokens, one mark after the other."""
    lowest, before = math.inf, 0
    for tokens, loss in losses.items():
        if loss <= target:
            if before == 0:
                return "reached_at_first_eval", None
            return "reached", before * (tokens / before) ** ((lowest - target) / (lowest - loss))
        lowest, before = min(lowest, loss), tokens
    return "not_reached", None


@given(st.lists(st.lists(st.floats(1.8, 2.6), min_size=2, max_size=8), min_size=1, max_size=6))
@settings(max_examples=50, deadline=None)
def test_targets_of_many_runs_are_those_of_each_alone(curves: list[list[float]]) -> None:
    runs = [
        {0: 4.8} | {1024 * 2**number: loss for number, loss in enumerate(curve)} if len(curve) % 2 else
        {1024 * 2**number: loss for number, loss in enumerate(curve)}
        for curve in curves
    ]  # fmt: skip
    found = targets(united([one_run(losses) for losses in runs]))
    for number, losses in enumerate(runs):
        for target in LAB.targets:
            row = found.row(
                by_predicate=(pl.col("run_id") == str(number)) & (pl.col("target_loss_nats") == target), named=True
            )
            status, tokens = crossing(losses, target)
            assert row["status"] == status
            assert row["tokens_to_target"] == (None if tokens is None else pytest.approx(tokens))
            assert row["lowest_loss_nats"] == min(losses.values())


def united(made: list[Records]) -> Records:
    """Return several records of one run as one, the runs called by their places."""
    runs = pl.concat(records.runs.with_columns(run_id=pl.lit(str(number))) for number, records in enumerate(made))
    rows = pl.concat(
        records.evaluations.with_columns(run_id=pl.lit(str(number))) for number, records in enumerate(made)
    )
    return Records(made[0].manifest, runs, rows)


def test_targets_not_reached_are_bounded_by_the_last_mark_with_a_loss() -> None:
    made = one_run({0: 4.8, 10240: 2.2, 20480: 2.1, 40960: 1.0})
    lost = pl.when(pl.col("tokens_seen") != 40960).then("val_loss_averaged_nats").alias("val_loss_averaged_nats")
    row = at(2.0, replace(made, evaluations=made.evaluations.with_columns(lost)))
    assert (row["status"], row["bound_tokens"], row["tokens_seen"]) == ("not_reached", 20480, 40960)


def test_targets_reached_at_the_first_mark_are_bounded_by_it() -> None:
    row = at(2.0, one_run({0: 4.8, 10240: 1.9, 20480: 1.8}))
    assert (row["status"], row["bound_tokens"]) == ("reached_at_first_eval", 10240)
    assert at(2.1, one_run({0: 4.8, 10240: 2.2, 20480: 2.0}))["bound_tokens"] is None


@pytest.mark.parametrize("protocol", ["decayed", "branched_decay", "branched_batch"])
def test_targets_leave_out_protocols_of_which_only_the_end_counts(protocol: str) -> None:
    assert targets(one_run({0: 4.8, 10240: 2.2, 40960: 2.0}, protocol=protocol)).is_empty()
    assert targets(one_run({0: 4.8, 10240: 2.2, 40960: 2.0}, protocol="mid_schedule")).height == len(LAB.targets)


def test_targets_leave_out_runs_evaluated_once_but_those_that_diverged_among_others() -> None:
    curve, end = {10240: 2.2, 40960: 2.0}, {40960: 2.0}
    found = targets(united([one_run(curve), one_run(end), one_run(end, status="diverged")]))
    assert found["run_id"].unique().sort().to_list() == ["0", "2"]
    assert targets(united([one_run(end), one_run(end, status="diverged")])).is_empty()


def test_targets_of_a_run_without_any_loss_are_not_reached_and_unbounded() -> None:
    made = one_run({0: 4.8, 10240: 2.2})
    row = at(
        2.0, replace(made, evaluations=made.evaluations.with_columns(val_loss_averaged_nats=pl.lit(None, pl.Float64)))
    )
    assert (row["status"], row["bound_tokens"], row["lowest_loss_nats"]) == ("not_reached", None, None)


def test_targets_of_a_model_are_asked_of_its_runs_alone() -> None:
    made = united([one_run({0: 4.8, 10240: 2.2, 40960: 2.0}, model=model) for model in ("a", "b")])
    found = targets(replace(made, targets_by_model={"a": (2.1,), "b": (2.15, 2.05)}))
    assert found.select("model", "target_loss_nats").rows() == [("a", 2.1), ("b", 2.05), ("b", 2.15)]
    assert targets(replace(made, targets_by_model={})).is_empty()


def test_targets_that_are_given_stand_beside_those_read_off_curves() -> None:
    made = one_run({0: 4.8, 10240: 2.2, 40960: 2.0})
    stated = targets(made).filter(pl.col("target_loss_nats") == 2.1).with_columns(run_id=pl.lit("stated"))
    found = targets(replace(made, given=stated))
    assert found.filter(run_id="stated").equals(stated)
    assert found.height == len(LAB.targets) + 1


@pytest.mark.slow
def test_targets_of_ten_thousand_runs_take_seconds() -> None:
    curve = {0: 4.8} | {1024 * number: 2.5 - number / 400 for number in range(1, 200)}
    made = one_run(curve)
    names = pl.DataFrame({"run_id": [f"{number:05d}" for number in range(10_000)]})
    manifest = made.manifest.model_copy(update={"targets_nats": tuple(2.05 + 0.03 * number for number in range(10))})
    runs, rows = (names.join(frame.drop("run_id"), how="cross") for frame in (made.runs, made.evaluations))
    started = time.perf_counter()
    assert targets(Records(manifest, runs, rows)).height == 100_000
    assert time.perf_counter() - started < 5
