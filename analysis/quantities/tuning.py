"""What tuning cost: runs, settings and tokens spent on each optimizer of a model."""

import polars as pl

from analysis.inputs.records import Records
from analysis.schemas import TUNING

_SETTING = ("global_batch_tokens", "token_budget", "tuning", "peak_lr")


def tuning(records: Records) -> pl.DataFrame:
    """Return the table `tuning`; all runs count, those that diverged or stopped early too, up to where they are, and
    branches from where they start.

    A total to which one run gives no number is null.
    """
    spent = records.evaluations.group_by("run_id").agg(pl.col("tokens_seen", "train_flops", "train_seconds").max())
    own_tokens = pl.max_horizontal(pl.col("tokens_seen") - pl.col("branch_tokens").fill_null(0), 0)
    runs = (
        records.runs.drop("tokens_seen", "train_seconds").join(spent, on="run_id").with_columns(tokens_seen=own_tokens)
    )
    return (
        runs.group_by("model", "optimizer")
        .agg(
            num_runs=pl.len().cast(pl.Int64),
            num_settings=pl.struct(_SETTING).n_unique().cast(pl.Int64),
            num_batches=pl.col("global_batch_tokens").n_unique().cast(pl.Int64),
            tokens=pl.col("tokens_seen").sum(),
            grid_tokens=pl.col("tokens_seen").filter(pl.col("stage") == "grid").sum(),
            train_flops=_total("train_flops"),
            train_seconds=_total("train_seconds"),
        )
        .select(*TUNING)
        .sort("model", "optimizer")
    )


def _total(name: str) -> pl.Expr:
    return pl.when(pl.col(name).is_not_null().all()).then(pl.col(name).sum())
