"""The runs that stand for their cells: those at the learning rate and settings chosen there."""

import polars as pl

#: What has one choice, whatever the target.
_CELL = ["model", "optimizer", "protocol", "global_batch_tokens"]
_SETTING = ["peak_lr", "tuning"]


def chosen_runs(runs: pl.DataFrame, cells: pl.DataFrame) -> pl.DataFrame:
    """Return the runs at the setting that table `cells` chose for the hardest target of their cell.

    Where none was chosen, as without a target that was reached, those of the only setting that was run.
    """
    rates = cells.filter(pl.col("best_lr").is_not_null()).rename({"best_lr": "peak_lr"})
    chosen = rates.sort("target_loss_nats").unique(_CELL, keep="first").select(*_CELL, *_SETTING)
    settings = runs.select(*_CELL, *_SETTING).unique()
    single = settings.filter(pl.len().over(_CELL) == 1).join(chosen, on=_CELL, how="anti")
    both = pl.concat([chosen, single])
    return runs.join(both, on=[*_CELL, *_SETTING], how="semi", maintain_order="left", nulls_equal=True)
