"""Tokens, steps, FLOPs and seconds that each run takes to reach each target loss."""

import numpy as np
import polars as pl

from analysis.inputs.protocols import AVERAGED_PROTOCOLS, WITHOUT_CROSSINGS
from analysis.inputs.records import Records
from analysis.schemas import TARGETS

_CELL = ("model", "optimizer", "protocol", "global_batch_tokens")
_INTERPOLATED = ("step", "tokens_seen", "train_flops", "train_seconds", "loss_nats")


def targets(records: Records) -> pl.DataFrame:
    """Match every run's loss curve to every target of its model (`schemas.TARGETS`), and add the rows that are given.

    T is the first crossing: linear in log tokens between the two marks that bracket it, on the running minimum of the
    curve. Steps follow from tokens, at one batch throughout; where it changed, they are interpolated, as FLOPs and
    seconds are, linearly in tokens between the same marks.
    A run that diverged reaches no target, not even one that it had crossed before: its rate could not be used.
    A run already at the target at its first trained mark gives no T: its crossing has no bracket in log tokens.
    Runs that give no crossing at all have no row: those of `WITHOUT_CROSSINGS`, and those evaluated once.
    """
    runs = _runs_with_crossings(records).with_row_index("run")
    curve = _running_minima(records, runs)
    crossed = (
        runs.join(records.losses(), on="model")
        .join(_crossings(curve, records.losses()), on=["run", "target_loss_nats"], how="left")
        .pipe(_with_marks_around, curve)
        .with_columns(status=_status())
        .with_columns(tokens_to_target=pl.when(pl.col("status") == "reached").then(_crossing_tokens()))
        .with_columns(
            steps_to_target=_steps_at_crossing(),
            bound_tokens=_bound(),
            flops_to_target=_at_crossing("train_flops"),
            train_seconds_to_target=_at_crossing("train_seconds"),
        )
        .select(*TARGETS)
    )
    return pl.concat([crossed, records.given.select(crossed.columns)]).sort("run_id", "target_loss_nats")


def curves(records: Records) -> pl.DataFrame:
    """Return the evaluations with `loss_nats`, the loss that the run's protocol reads, beside the run's own columns.

    Evaluations without that loss (it was not a finite number) are left out.
    """
    runs = records.runs.select("run_id", "stage", "model", "optimizer", "global_batch_tokens", "peak_lr", "protocol")
    return (
        records.evaluations.join(runs, on="run_id")
        .with_columns(loss_nats=_loss_of_protocol())
        .filter(pl.col("loss_nats").is_finite())
        .sort("run_id", "tokens_seen")
    )


def _loss_of_protocol() -> pl.Expr:
    averaged = pl.col("protocol").is_in(AVERAGED_PROTOCOLS)
    return pl.when(averaged).then("val_loss_averaged_nats").otherwise("val_loss_nats")


def _runs_with_crossings(records: Records) -> pl.DataFrame:
    """Keep the runs whose curves can cross a target, with the tokens of their last evaluation.

    A run evaluated once has only an end. One that diverged there still counts among the runs of its cell that were
    evaluated along the way: its settings could not be used.
    """
    evaluated = records.evaluations.group_by("run_id").agg(pl.col("tokens_seen").max(), num_evaluations=pl.len())
    followed = pl.col("num_evaluations") > 1
    diverged_at_once = (pl.col("status") == "diverged") & followed.any().over(_CELL)
    return (
        records.runs.drop("tokens_seen", "train_seconds", "train_flops", strict=False)
        .filter(~pl.col("protocol").is_in(WITHOUT_CROSSINGS))
        .join(evaluated, on="run_id")
        .filter(followed | diverged_at_once)
        .sort("run_id")
    )


def _running_minima(records: Records, runs: pl.DataFrame) -> pl.DataFrame:
    """Return the marks with a finite loss, by run and tokens, each with the lowest `loss_nats` of its run so far."""
    losses = ("val_loss_nats", "val_loss_averaged_nats")
    return (
        records.evaluations.select("run_id", *_INTERPOLATED[:-1], *losses)
        .join(runs.select("run_id", "run", "protocol"), on="run_id")
        .with_columns(loss_nats=_loss_of_protocol())
        .filter(pl.col("loss_nats").is_finite())
        .select("run", *_INTERPOLATED)
        .sort("run", "tokens_seen", maintain_order=True)
        .with_columns(pl.col("loss_nats").cum_min().over("run"))
    )


def _crossings(curve: pl.DataFrame, losses: pl.DataFrame) -> pl.DataFrame:
    """Return, for each run with marks and each target, the places in `curve` of the first mark at or below the target
    and of the mark before it, null where there is none; and where the run's curve ends.

    A running minimum only falls, so the number of marks above a target is the place of the crossing in the run.
    """
    runs = (
        curve.with_row_index("first")
        .group_by("run", maintain_order=True)
        .agg(
            pl.col("first").first(),
            num_marks=pl.len(),
            last_mark_tokens=pl.col("tokens_seen").last(),
            lowest_loss_nats=pl.col("loss_nats").last(),
        )
    )
    lowest, starts = curve["loss_nats"].to_numpy(), runs["first"].to_numpy()
    after, before = pl.col("first") + pl.col("num_above"), pl.col("first") + pl.col("num_above") - 1
    by_target = [
        runs.with_columns(
            target_loss_nats=pl.lit(loss, pl.Float64),
            num_above=pl.Series(np.add.reduceat(lowest > loss, starts, dtype=np.int64), dtype=pl.UInt32),
        )
        for loss in losses["target_loss_nats"].unique()
    ]
    empty = runs.clear().with_columns(target_loss_nats=pl.lit(0.0), num_above=pl.lit(0, pl.UInt32))
    return pl.concat([empty, *by_target]).with_columns(
        after=pl.when(pl.col("num_above") < pl.col("num_marks")).then(after),
        before=pl.when(pl.col("num_above") > 0).then(before),
    )


def _with_marks_around(pairs: pl.DataFrame, curve: pl.DataFrame) -> pl.DataFrame:
    """Add `x_before` and `x_after`, the columns of the curve at the marks around each crossing."""
    return pairs.with_columns(
        curve[name].gather(pairs[end]).alias(f"{name}_{end}") for end in ("before", "after") for name in _INTERPOLATED
    )


def _crossing_tokens() -> pl.Expr:
    drop = pl.col("loss_nats_before") - pl.col("loss_nats_after")
    share = (pl.col("loss_nats_before") - pl.col("target_loss_nats")) / drop
    return pl.col("tokens_seen_before") * (pl.col("tokens_seen_after") / pl.col("tokens_seen_before")).pow(share)


def _status() -> pl.Expr:
    return (
        pl.when(pl.col("status") == "diverged")
        .then(pl.lit("diverged"))
        .when(pl.col("after").is_null())
        .then(pl.lit("not_reached"))
        .when(pl.col("tokens_seen_before").fill_null(0) == 0)
        .then(pl.lit("reached_at_first_eval"))
        .otherwise(pl.lit("reached"))
    )


def _bound() -> pl.Expr:
    """Return what a run without a crossing says of T: above its last trained mark, or below its first one."""
    bounds = {"not_reached": "last_mark_tokens", "reached_at_first_eval": "tokens_seen_after"}
    bound = pl.coalesce(pl.when(pl.col("status") == status).then(pl.col(name)) for status, name in bounds.items())
    return pl.when(bound > 0).then(bound.cast(pl.Float64))


def _steps_at_crossing() -> pl.Expr:
    batch = pl.col("global_batch_tokens")
    of_one_batch = (pl.col("step_after") * batch - pl.col("tokens_seen_after")).abs() < batch
    return pl.when(of_one_batch).then(pl.col("tokens_to_target") / batch).otherwise(_at_crossing("step"))


def _at_crossing(name: str) -> pl.Expr:
    """Interpolate `name` linearly in tokens between the marks around the crossing."""
    before, after = pl.col(f"{name}_before"), pl.col(f"{name}_after")
    share = (pl.col("tokens_to_target") - pl.col("tokens_seen_before")) / (
        pl.col("tokens_seen_after") - pl.col("tokens_seen_before")
    )
    return before + share * (after - before)
