"""Tokens, steps, FLOPs and seconds that each run takes to reach each target loss."""

import polars as pl

from analysis.inputs.records import Records
from analysis.schemas import TARGETS

#: Protocols that read the loss of the averaged weights; all others read that of the raw ones.
AVERAGED_PROTOCOLS = ("constant_ema",)


def targets(records: Records) -> pl.DataFrame:
    """Match every run's loss curve to every target of the sweep (`schemas.TARGETS`).

    T is the first crossing: linear in log tokens between the two marks that bracket it, on the running minimum of the
    curve. Steps follow from tokens; FLOPs and seconds are interpolated linearly in tokens between the same marks.
    A run that diverged reaches no target, not even one that it had crossed before: its rate could not be used.
    A run already at the target at its first trained mark gives no T: its crossing has no bracket in log tokens.
    """
    losses = pl.DataFrame({"target_loss_nats": sorted(set(records.manifest.targets_nats))}, {"target_loss_nats": float})
    curve = curves(records)
    seen = records.evaluations.group_by("run_id").agg(pl.col("tokens_seen").max())
    lowest = curve.group_by("run_id").agg(lowest_loss_nats=pl.col("loss_nats").min())
    reached = pl.col("status") == "reached"
    return (
        records.runs.drop("tokens_seen", "train_seconds")
        .join(seen, on="run_id")
        .join(lowest, on="run_id", how="left")
        .join(losses, how="cross")
        .join(_crossings(curve, losses), on=["run_id", "target_loss_nats"], how="left")
        .with_columns(status=_status())
        .with_columns(tokens_to_target=pl.when(reached).then("crossing_tokens"))
        .with_columns(
            steps_to_target=pl.col("tokens_to_target") / pl.col("global_batch_tokens"),
            bound_tokens=_bound(),
            flops_to_target=_at_crossing("train_flops"),
            train_seconds_to_target=_at_crossing("train_seconds"),
        )
        .select(*TARGETS)
        .sort("run_id", "target_loss_nats")
    )


def curves(records: Records) -> pl.DataFrame:
    """Return the evaluations with `loss_nats`, the loss that the run's protocol reads, beside the run's own columns.

    Evaluations without that loss (it was not a finite number) are left out.
    """
    averaged = pl.col("protocol").is_in(AVERAGED_PROTOCOLS)
    runs = records.runs.select("run_id", "stage", "model", "optimizer", "global_batch_tokens", "peak_lr", "protocol")
    return (
        records.evaluations.join(runs, on="run_id")
        .with_columns(loss_nats=pl.when(averaged).then("val_loss_averaged_nats").otherwise("val_loss_nats"))
        .filter(pl.col("loss_nats").is_finite())
        .sort("run_id", "tokens_seen")
    )


def _crossings(curve: pl.DataFrame, losses: pl.DataFrame) -> pl.DataFrame:
    """Return the first mark at or below each target, the mark before it, and the tokens where they are crossed."""
    after_and_before = [
        column
        for name in ("tokens_seen", "train_flops", "train_seconds", "loss_nats")
        for column in (pl.col(name).alias(f"{name}_after"), pl.col(name).shift().over("run_id").alias(f"{name}_before"))
    ]
    drop = pl.col("loss_nats_before") - pl.col("loss_nats_after")
    share = (pl.col("loss_nats_before") - pl.col("target_loss_nats")) / drop
    ratio = pl.col("tokens_seen_after") / pl.col("tokens_seen_before")
    return (
        curve.with_columns(pl.col("loss_nats").cum_min().over("run_id"))
        .select("run_id", *after_and_before)
        .join(losses, how="cross")
        .filter(pl.col("loss_nats_after") <= pl.col("target_loss_nats"))
        .sort("run_id", "target_loss_nats", "tokens_seen_after")
        .unique(["run_id", "target_loss_nats"], keep="first", maintain_order=True)
        .with_columns(crossing_tokens=pl.col("tokens_seen_before") * ratio.pow(share))
    )


def _status() -> pl.Expr:
    return (
        pl.when(pl.col("status") == "diverged")
        .then(pl.lit("diverged"))
        .when(pl.col("tokens_seen_after").is_null())
        .then(pl.lit("not_reached"))
        .when(pl.col("tokens_seen_before").fill_null(0) == 0)
        .then(pl.lit("reached_at_first_eval"))
        .otherwise(pl.lit("reached"))
    )


def _bound() -> pl.Expr:
    """Return what a run without a crossing says of T: above its last mark, or below its first one."""
    bounds = {"not_reached": "tokens_seen", "reached_at_first_eval": "tokens_seen_after"}
    return pl.coalesce(pl.when(pl.col("status") == status).then(pl.col(name)) for status, name in bounds.items()).cast(
        pl.Float64
    )


def _at_crossing(name: str) -> pl.Expr:
    """Interpolate `name` linearly in tokens between the marks around the crossing."""
    before, after = pl.col(f"{name}_before"), pl.col(f"{name}_after")
    share = (pl.col("tokens_to_target") - pl.col("tokens_seen_before")) / (
        pl.col("tokens_seen_after") - pl.col("tokens_seen_before")
    )
    return before + share * (after - before)
