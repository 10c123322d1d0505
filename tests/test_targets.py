"""Tokens to a target: interpolation, status, protocol."""

from dataclasses import replace

import numpy as np
import polars as pl
import pytest

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
