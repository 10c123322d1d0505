"""Loss at equal tokens: every cell at its chosen rate, at marks that every run compared has reached.

Runs that stop at a target stop when they are good, so a mark that only some reached would favour those still running.
A mark inside the warmup of a run compared says how far its rate has risen, nothing of its optimizer: it is left out.
"""

from typing import Any

import numpy as np
import polars as pl

from analysis.inputs.records import Records
from analysis.quantities.learning_rates import CELL, choose_rates
from analysis.quantities.targets import curves
from analysis.schemas import EQUAL_BUDGET, table
from analysis.statistics.noise import Noise, pooled, t_quantile

_COMPARED = ["model", "protocol"]


def equal_budget(records: Records, level: float) -> pl.DataFrame:
    """Return the table `equal_budget`; losses between two evaluations are interpolated linearly in log tokens.

    The marks are those of the largest batch. The rate is that of `choose_rates`, on fresh seeds where there are any; a
    cell of which one of these diverged has no row, for the survivors would flatter it.
    """
    curve = curves(records).filter(pl.col("tokens_seen") > 0).join(_settings(records), on="run_id")
    chosen = _chosen(records, curve)
    rows = []
    for key, own in chosen.group_by(_COMPARED, maintain_order=True):
        names = dict(zip(_COMPARED, key, strict=True))
        final = _final_tokens(records, own)
        for tokens in _marks(own):
            at_mark = _losses_at(curve.filter(**names, diverged=False), tokens)
            noise = {name: pooled(_groups(group)) for (name,), group in at_mark.group_by(["optimizer"])}
            mark = {"tokens": tokens, "mark": "final" if final == {tokens} else "intermediate"}
            at_mark = at_mark.join(own.select("run_id").unique(), on="run_id", how="semi")
            for cell, runs in at_mark.group_by([*CELL, "peak_lr"], maintain_order=True):
                place = dict(zip((*CELL, "peak_lr"), cell, strict=True))
                rows.append(place | mark | _mean(runs, noise[place["optimizer"]], level))
    return table(({name: row[name] for name in EQUAL_BUDGET} for row in rows), EQUAL_BUDGET)


def _settings(records: Records) -> pl.DataFrame:
    return records.runs.select(
        "run_id",
        "warmup_tokens",
        seed=pl.format("{}.{}", "init_seed", "data_seed"),
        diverged=pl.col("status") == "diverged",
    )


def _chosen(records: Records, curve: pl.DataFrame) -> pl.DataFrame:
    """Keep the curves that stand for their cells: fresh seeds if a cell has any, else those at its best rate."""
    confirmed = (pl.col("stage") == "confirm").any().over(CELL)
    return (
        curve.join(choose_rates(records), on=CELL, how="left")
        .filter((pl.col("stage") == "confirm") | (~confirmed & (pl.col("peak_lr") == pl.col("best_lr"))))
        .filter(~pl.col("diverged").any().over(CELL))
    )


def _final_tokens(records: Records, chosen: pl.DataFrame) -> set[int | None]:
    """Return where the runs compared ended; a run that stopped early, or still runs, ended nowhere."""
    runs = records.runs.join(chosen, on="run_id", how="semi")
    ended = pl.when(pl.col("stop_reason") == "budget").then("tokens_seen")
    return set(runs.select(ended).to_series())


def _marks(chosen: pl.DataFrame) -> list[int]:
    """Return the largest batch's marks beyond the warmup of every run, from its first mark to its end."""
    ends = chosen.group_by("run_id").agg(first=pl.col("tokens_seen").min(), last=pl.col("tokens_seen").max())
    largest = chosen.filter(pl.col("global_batch_tokens") == pl.col("global_batch_tokens").max())
    within = pl.col("tokens_seen").is_between(ends["first"].max(), ends["last"].min())
    warm = pl.col("tokens_seen") > chosen["warmup_tokens"].max()
    return largest.filter(within, warm)["tokens_seen"].unique().sort().to_list()


def _losses_at(curve: pl.DataFrame, tokens: int) -> pl.DataFrame:
    """Return a row for every run that saw this many tokens, with its loss_nats there."""
    after = pl.col("tokens_seen", "loss_nats").shift(-1).over("run_id").name.suffix("_after")
    share = (tokens / pl.col("tokens_seen")).log() / (pl.col("tokens_seen_after") / pl.col("tokens_seen")).log()
    rise = pl.when(pl.col("tokens_seen") < tokens).then(share * (pl.col("loss_nats_after") - pl.col("loss_nats")))
    return (
        curve.sort("run_id", "tokens_seen")
        .with_columns(after)
        .filter(
            (pl.col("tokens_seen") == tokens)
            | ((pl.col("tokens_seen") < tokens) & (tokens < pl.col("tokens_seen_after")))
        )
        .select("run_id", "stage", "peak_lr", *CELL, "seed", loss_nats=pl.col("loss_nats") + rise.fill_null(0.0))
        .sort(*CELL, "run_id")
    )


def _groups(runs: pl.DataFrame) -> pl.DataFrame:
    return runs.select(
        group=pl.format("{} {} {}", "global_batch_tokens", "peak_lr", "stage"),
        cell="global_batch_tokens",
        seed="seed",
        value="loss_nats",
    )


def _mean(runs: pl.DataFrame, noise: Noise | None, level: float) -> dict[str, Any]:
    mean = float(np.mean(runs["loss_nats"].to_numpy()))
    half = t_quantile(level, noise.dof) * np.sqrt(noise.variance / runs.height) if noise else None
    return {
        "val_loss_nats": mean,
        "val_loss_nats_low": None if half is None else float(mean - half),
        "val_loss_nats_high": None if half is None else float(mean + half),
        "num_runs": runs.height,
    }
