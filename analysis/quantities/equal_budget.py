"""Loss at equal tokens: every cell at its chosen rate, at the end of its budget and at marks on the way.

Runs that stop at a target stop when they are good, so a mark that only some reached would favour those still running.
A mark inside the warmup of a run compared says how far its rate has risen, nothing of its optimizer: it is left out.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import polars as pl

from analysis.inputs.protocols import WITHOUT_CROSSINGS
from analysis.inputs.records import Records
from analysis.quantities.final_losses import FinalLosses
from analysis.quantities.learning_rates import CELL, choose_rates
from analysis.quantities.targets import curves
from analysis.schemas import EQUAL_BUDGET, table
from analysis.statistics.noise import Noise, pooled, t_quantile

#: Marks are at least this factor apart.
MIN_SPACING = 1.1

_COMPARED = ["model", "protocol"]
_BEST = [*CELL, "tuning", "peak_lr"]
#: What of a run is of use at a mark.
_TOLD = ["run", *_BEST, "stage", "seed", "chosen"]


def equal_budget(records: Records, finals: FinalLosses, level: float) -> pl.DataFrame:
    """Return the table `equal_budget`: final losses at every token budget, each at its own best rate, and marks.

    The marks are those of the largest batch, before the end that all runs compared may share; losses between two
    evaluations are interpolated linearly in log tokens. The rate there is that of `choose_rates`, on fresh seeds where
    there are any. A cell of which one of these diverged has no row, for the survivors would flatter it.
    """
    return table([*_final_rows(finals), *_mark_rows(records, level)], EQUAL_BUDGET)


def _final_rows(finals: FinalLosses) -> Iterator[dict[str, Any]]:
    cells = finals.cells.filter(pl.col("final_loss_nats").is_not_null())
    renamed = {"token_budget": "tokens"} | {
        f"final_loss_nats{end}": f"val_loss_nats{end}" for end in ("", "_low", "_high")
    }
    final = cells.drop("tokens").rename(renamed).with_columns(mark=pl.lit("final"))
    return final.select(*EQUAL_BUDGET).iter_rows(named=True)


def _mark_rows(records: Records, level: float) -> Iterator[dict[str, Any]]:
    curve = curves(records).filter(pl.col("tokens_seen") > 0)
    curve = curve.select("run_id", "tokens_seen", "loss_nats", run=pl.col("run_id").rle_id())
    runs, curve = _runs(records, curve), curve.drop("run_id")
    for key, own in runs.group_by(_COMPARED, maintain_order=True):
        compared = own.filter("chosen")
        marks = _marks(compared, curve)
        told = own.filter(~pl.col("diverged"), pl.col("run").is_not_null()).select(_TOLD)
        at_marks = _losses_at(told, curve, marks)
        noise = {key: pooled(group) for key, group in _repeats(at_marks).group_by("tokens", "optimizer")}
        means = at_marks.filter("chosen").group_by("tokens", *_BEST, maintain_order=True)
        for row in means.agg(pl.mean("loss_nats"), num_runs=pl.len()).iter_rows(named=True):
            interval = _interval(row, noise[row["tokens"], row["optimizer"]], level)
            yield {name: (row | interval)[name] for name in EQUAL_BUDGET}


def _runs(records: Records, curve: pl.DataFrame) -> pl.DataFrame:
    """Return the runs whose marks can be compared: their number `run` in `curve`, first and last mark, and `chosen`.

    Chosen are those that stand for their cells: fresh seeds if a cell has any, else those at its best setting. Runs
    that decay towards several budgets differ at a mark, and some protocols say nothing of it.
    """
    several = (pl.col("protocol") == "mid_schedule") & (pl.col("token_budget").n_unique().over(CELL) > 1)
    confirmed = (pl.col("stage") == "confirm").any().over(CELL)
    is_best = pl.col("peak_lr").eq_missing(pl.col("best_lr")) & (pl.col("tuning") == pl.col("tuning_best"))
    stands = (pl.col("stage") == "confirm") | (~confirmed & is_best.fill_null(value=False))
    tokens = pl.col("tokens_seen")
    ends = curve.group_by("run").agg(pl.col("run_id").first(), first=tokens.min(), last=tokens.max())
    return (
        records.runs.filter(~several, ~pl.col("protocol").is_in(WITHOUT_CROSSINGS))
        .join(ends, on="run_id", how="left")
        .join(choose_rates(records), on=CELL, how="left", suffix="_best")
        .with_columns(
            seed=pl.coalesce(pl.format("{}.{}", "init_seed", "data_seed"), "run_id"),
            diverged=pl.col("status") == "diverged",
            stands=stands,
        )
        .with_columns(chosen=pl.col("stands") & ~(pl.col("stands") & pl.col("diverged")).any().over(CELL))
        .sort("run_id")
    )


def _marks(compared: pl.DataFrame, curve: pl.DataFrame) -> list[int]:
    """Return the largest batch's marks, beyond the warmup of every run, from the last first mark to the first end.

    The end itself is left out where all runs compared end there, by their budgets: their final losses say it. Of marks
    closer than `MIN_SPACING` the later counts.
    """
    if compared["run"].null_count():
        return []
    largest = compared.filter(pl.col("global_batch_tokens") == pl.col("global_batch_tokens").max())
    begin, end = compared["first"].to_list(), compared["last"].to_list()
    tokens = curve.join(largest, on="run", how="semi")["tokens_seen"].unique().sort(descending=True).to_list()
    ended = compared.select(pl.when(pl.col("stop_reason") == "budget").then("last")).to_series().unique().to_list()
    warmup = max(compared["warmup_tokens"].drop_nulls(), default=0)
    marks: list[int] = []
    for mark in tokens:
        inside = max(begin) <= mark <= min(end) and mark > warmup and ended != [mark]
        if inside and (not marks or marks[-1] >= MIN_SPACING * mark):
            marks.append(mark)
    return marks[::-1]


def _losses_at(runs: pl.DataFrame, curve: pl.DataFrame, marks: list[int]) -> pl.DataFrame:
    """Return a row for every run and mark on its way: columns of the run, `tokens`, and `loss_nats` interpolated."""
    known = curve.join(runs, on="run", how="semi").sort("run", "tokens_seen")
    run, seen, loss = (known[name].to_numpy() for name in ("run", "tokens_seen", "loss_nats"))
    if not len(seen) or not marks:
        return runs.clear().with_columns(tokens=pl.lit(0), loss_nats=pl.lit(0.0))
    row = np.repeat(np.arange(runs.height), len(marks))
    wanted, tokens = runs["run"].to_numpy()[row], np.tile(np.array(marks, dtype=np.int64), runs.height)
    span = max(int(seen.max()), *marks) + 1
    place = np.searchsorted(run.astype(np.int64) * span + seen, wanted.astype(np.int64) * span + tokens, side="right")
    before, after = np.maximum(place - 1, 0), np.minimum(place, len(seen) - 1)
    exact = (run[before] == wanted) & (seen[before] == tokens)
    between = (run[before] == wanted) & (run[after] == wanted) & (seen[before] < tokens) & (tokens < seen[after])
    after = np.where(between, after, before)
    width = np.log(seen[after] / seen[before])
    share = np.log(tokens / seen[before]) / np.where(between, width, 1.0)
    values = np.where(exact, loss[before], loss[before] + share * (loss[after] - loss[before]))
    on_its_way = exact | between
    found = pl.DataFrame({"tokens": tokens[on_its_way], "loss_nats": values[on_its_way]})
    return pl.concat([runs.select(pl.all().gather(row[on_its_way])), found], how="horizontal")


def _repeats(runs: pl.DataFrame) -> pl.DataFrame:
    """Return the runs as `statistics.noise.pooled` takes them; a group has one setting and stage."""
    return runs.select(
        "tokens",
        "optimizer",
        group=pl.struct("global_batch_tokens", "tuning", "peak_lr", "stage").rank("dense"),
        cell="global_batch_tokens",
        seed="seed",
        value="loss_nats",
    )


def _interval(row: dict[str, Any], noise: Noise | None, level: float) -> dict[str, Any]:
    mean = row["loss_nats"]
    half = t_quantile(level, noise.dof) * float(np.sqrt(noise.variance / row["num_runs"])) if noise else None
    return {
        "mark": "intermediate",
        "val_loss_nats": mean,
        "val_loss_nats_low": None if half is None else mean - half,
        "val_loss_nats_high": None if half is None else mean + half,
    }
