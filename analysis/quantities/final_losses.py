"""Loss at the end of a token budget: each cell of batch and budget at its best learning rate, chosen by loss.

A run counts when it ended by its budget, whatever its protocol; one that diverged has an infinite loss, so that its
setting cannot be chosen. Where some runs of a cell stopped before, there is no final loss: the best stop first.
Where a schedule decays to its own end, the last loss is that of a fully decayed run: a run recorded as `mid_schedule`
counts as `decayed` here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import polars as pl

from analysis import format as fmt
from analysis.inputs.protocols import AVERAGED_PROTOCOLS
from analysis.inputs.records import Records
from analysis.quantities.cell_verdicts import MIN_WARMUPS_TO_TARGET
from analysis.quantities.learning_rates import RateCurves, fit_rates, rate_verdict
from analysis.quantities.run_groups import SEED_NAME, complete_groups
from analysis.schemas import FINAL_LOSSES, table
from analysis.statistics.noise import NO_NOISE, Noise, pooled, t_quantile
from analysis.statistics.resampling import Candidates, normal_draws
from analysis.verdicts import Finding, verdict_columns

Key = tuple[Any, ...]

#: Runs that share their noise and the curvature of their quadratics in log rate.
SERIES = ("model", "optimizer", "protocol")
CELL = (*SERIES, "global_batch_tokens", "token_budget")
SETTING = (*CELL, "tuning", "peak_lr")
#: Runs that are alike but for their seeds.
GROUP = (*SETTING, "stage")

#: A smaller correction for the luck of the choice goes without saying.
MIN_LUCK_NATS = 5e-4

#: Fresh seeds at another setting than the best of the grid stand for their cell if it is better by no more than this.
MAX_EXCESS_NATS = 0.01

#: Branches of one checkpoint have no budget of their own.
_WITHOUT_BUDGET = ("branched_batch",)


@dataclass(frozen=True)
class FinalLosses:
    """Table `FINAL_LOSSES`, a row per cell; all runs with a final loss, those chosen for a cell; noise by series.

    `runs` and `chosen` are rows of `final_runs`.
    """

    cells: pl.DataFrame
    runs: pl.DataFrame
    chosen: pl.DataFrame
    noise: Mapping[Key, Noise | None]


def final_losses(records: Records, level: float) -> FinalLosses:
    """Choose the setting of each cell and estimate the mean final loss there.

    The choice is by quadratics in log rate whose curvature the cells of a series share. A cell whose best
    setting has fresh seeds is estimated from those alone; any other is corrected for the luck of the chosen.
    """
    runs = final_runs(records)
    noise = {key: _noise(runs, key) for key, _ in runs.group_by(SERIES, maintain_order=True)}
    settings = pl.concat(
        [_settings(series, noise[key], level) for key, series in runs.group_by(SERIES, maintain_order=True)]
        or [_settings(runs, None, level)]
    )
    best = _best(settings)
    chosen = runs.join(best.select(GROUP), on=GROUP, how="semi", nulls_equal=True)
    rows = [_row(row, noise[tuple(row[name] for name in SERIES)], level) for row in best.iter_rows(named=True)]
    return FinalLosses(table(rows, FINAL_LOSSES), runs, chosen, noise)


def final_runs(records: Records) -> pl.DataFrame:
    """Return a row per run that ended by its budget or diverged: its setting, `seed`, `tokens` seen and `loss_nats`.

    FLOPs and seconds are those of `own_tokens`: of a branch, the tokens after the state that it starts from.
    `loss_nats` is the loss that the run's protocol reads; null for a run that diverged. `single` says that the run has
    one trained evaluation and so no curve. A run that ended inside its warmup tells how far its rate had risen, nothing
    of its optimizer, and is left out.
    """
    averaged = pl.col("protocol").is_in(AVERAGED_PROTOCOLS)
    loss = pl.when(averaged).then("val_loss_averaged_nats").otherwise("val_loss_nats")
    run, columns = pl.col("run_id"), ("train_flops", "train_seconds", "val_loss_nats", "val_loss_averaged_nats")
    last = (
        records.evaluations.filter(pl.col("tokens_seen") > 0)
        .sort("run_id", "tokens_seen")
        .select("run_id", *columns, tokens="tokens_seen", single=(run != run.shift()).fill_null(value=True))
        .filter((run != run.shift(-1)).fill_null(value=True))
    )
    diverged, ended = pl.col("status") == "diverged", pl.col("stop_reason").eq_missing("budget")
    stopped_early = (pl.col("status") == "finished") & ~ended
    some_stopped = stopped_early.any().over("model", "optimizer", "global_batch_tokens", "token_budget", "stage")
    return (
        records.runs.filter(~pl.col("protocol").is_in(_WITHOUT_BUDGET), ~some_stopped)
        .filter(diverged | ended)
        .drop("train_seconds")
        .join(last, on="run_id", how="left")
        .filter(diverged | (pl.col("tokens") > pl.col("warmup_tokens").fill_null(0)))
        .with_columns(
            loss_nats=pl.when(~diverged & loss.is_finite()).then(loss),
            own_tokens=pl.col("tokens") - pl.col("branch_tokens").fill_null(0),
        )
        .select(
            "run_id", "stage", "model", "optimizer", "global_batch_tokens", "tuning", "peak_lr",
            "tokens", "own_tokens", "loss_nats", "train_flops", "train_seconds", "warmup_tokens", "single",
            protocol=pl.col("protocol").replace("mid_schedule", "decayed"),
            token_budget=pl.coalesce("token_budget", "realized_tokens", "tokens"),
            seed=SEED_NAME,
        )
        .sort(*SETTING, "run_id")
    )  # fmt: skip


class StandardError(NamedTuple):
    """A standard error, and the degrees of freedom to which it is known."""

    size: float
    dof: float


def error_of_mean(noise: Noise, batch: int, num_runs: int) -> StandardError:
    """Return the error of the mean loss of so many runs at a batch."""
    variance = noise.variance * float(noise.scale_at(np.log(batch))) / num_runs
    return StandardError(float(np.sqrt(variance)), float(noise.dof_at(np.log(batch))))


def _noise(runs: pl.DataFrame, key: Key) -> Noise | None:
    """Pool the noise within an optimizer, or over all of them where one alone has too few repeated runs."""
    names = dict(zip(SERIES, key, strict=True))
    own = pooled(_repeated(runs.filter(**names)))
    names.pop("optimizer")
    return own or pooled(_repeated(runs.filter(**names)))


def _repeated(runs: pl.DataFrame) -> pl.DataFrame:
    """Return group, cell, seed and value = loss, as `noise.pooled` takes them."""
    return complete_groups(runs, "loss_nats", GROUP).select(
        group=pl.struct(GROUP).rank("dense"),
        cell=pl.struct(CELL).rank("dense"),
        seed="seed",
        value="loss_nats",
        log_batch=pl.col("global_batch_tokens").log(),
    )


def _settings(runs: pl.DataFrame, noise: Noise | None, level: float) -> pl.DataFrame:
    """Return a row per setting and stage of a series: its mean loss, the fitted one, and what the rates tried prove.

    `luck_nats` is what the choice among the settings of the grid makes the mean of the best too low by.
    """
    ended = pl.col("loss_nats").is_not_null()
    means = runs.group_by(GROUP, maintain_order=True).agg(
        num_runs=pl.len().cast(pl.Int64),
        num_ended=ended.sum().cast(pl.Int64),
        loss_nats=pl.when(ended.all()).then(pl.col("loss_nats").mean()),
        tokens=pl.col("tokens").max(),
        warmup_tokens=pl.col("warmup_tokens").max(),
    )
    means = means.with_columns(curve=pl.format("{} {}", "token_budget", "tuning"))
    grid = means.filter(pl.col("stage") == "grid")
    fitted = _quadratics(grid, noise, level)
    points = means.select("global_batch_tokens", "peak_lr", "curve").iter_rows()
    values = [fitted.log_tokens(*point) if fitted else None for point in points]
    means = means.with_columns(fitted_nats=pl.Series(values, dtype=pl.Float64))
    return means.join(_lr_verdicts(means, fitted), on=["global_batch_tokens", "curve"], maintain_order="left").join(
        _luck(means.filter(pl.col("stage") == "grid"), fitted, noise), on=CELL, how="left", maintain_order="left"
    )


def _luck(grid: pl.DataFrame, fitted: RateCurves | None, noise: Noise | None) -> pl.DataFrame:
    """Return what the choice makes the loss of each cell too low by, on average over draws of the noise.

    The choice is repeated in every draw, the truth being the fit. What a seed adds at all rates cannot sway it.
    """
    cells = grid.select(CELL).unique(maintain_order=True)
    if noise is None or grid.is_empty():
        return cells.with_columns(luck_nats=pl.lit(0.0))
    variance = (noise.variance - noise.same_cell) * noise.scale_at(grid["global_batch_tokens"].log().to_numpy())
    draws = normal_draws(grid.height)
    errors = np.sqrt(variance / grid["num_runs"].to_numpy()) * (draws - draws.mean(axis=0))  # no luck without a choice
    truth = grid.select(pl.coalesce("fitted_nats", "loss_nats", pl.lit(np.inf))).to_series().to_numpy()
    values = truth + errors
    if fitted is not None:
        values[:, fitted.points] = fitted.quadratics.fitted(values[:, fitted.points])
    cell = grid.select(pl.struct(CELL).rle_id()).to_series().to_numpy().astype(int)
    chosen = Candidates(cell, grid["loss_nats"].is_not_null().to_numpy()).lowest(values)
    return cells.with_columns(luck_nats=-np.take_along_axis(errors, chosen, axis=1).mean(axis=0))


def _lr_verdicts(means: pl.DataFrame, fitted: RateCurves | None) -> pl.DataFrame:
    """Return a row per batch and curve: whether the rates tried bracket the best."""
    tried = pl.col("peak_lr").drop_nulls().unique()
    rates = means.group_by("global_batch_tokens", "curve", maintain_order=True).agg(tried)
    verdicts = [_lr_verdict(fitted, *row) for row in rates.iter_rows()]
    return rates.select("global_batch_tokens", "curve", lr_verdict=pl.Series(verdicts, dtype=pl.String))


def _quadratics(grid: pl.DataFrame, noise: Noise | None, level: float) -> RateCurves | None:
    """Fit the loss against log rate: a curve for every batch, budget and tuning, with one curvature."""
    names = {"tuning": "curve", "log_tokens": "loss_nats"}  # the curves are the same, of another quantity
    return fit_rates(grid.select("global_batch_tokens", "peak_lr", "num_runs", **names), noise, level)


def _lr_verdict(fitted: RateCurves | None, batch: int, curve: str, rates: list[float]) -> str:
    if not rates:
        return "not_identified"  # the table states no rate
    return rate_verdict(fitted.optimum(batch, curve) if fitted else (None, None, None), rates)


def _best(settings: pl.DataFrame) -> pl.DataFrame:
    """Return the setting that stands for each cell, by its fresh seeds where it has any: the grid's fewest divergences
    decide, then its loss.

    Fresh seeds may have run at a setting chosen for another quantity, as tokens to a target: they stand for the cell
    only where the grid does not know a clearly better one.
    """
    fresh = pl.col("stage") == "confirm"
    lost = 1 - pl.col("num_ended") / pl.col("num_runs")
    of_grid, lost_in_grid = (each.filter(~fresh).first().over(SETTING) for each in (pl.col("loss_nats"), lost))
    bonus = pl.when(fresh.any().over(SETTING)).then(MAX_EXCESS_NATS).otherwise(0.0)
    loss = pl.coalesce("fitted_nats", of_grid, "loss_nats") - bonus
    ordered = settings.sort(*CELL, pl.coalesce(lost_in_grid, lost), loss, "tuning", "peak_lr", ~fresh)
    return ordered.unique(CELL, keep="first", maintain_order=True)


def _row(best: dict[str, Any], noise: Noise | None, level: float) -> dict[str, Any]:
    mean, low, high = best["loss_nats"], None, None
    if mean is not None and best["stage"] == "grid":
        mean += best["luck_nats"]
    if mean is not None and noise is not None:
        error = error_of_mean(noise, best["global_batch_tokens"], best["num_runs"])
        half = t_quantile(level, error.dof) * error.size
        low, high = mean - half, mean + half
    named = (*CELL, "tokens", "peak_lr", "tuning", "lr_verdict", "num_runs")
    return {
        **{name: best[name] for name in named},
        "seeds_from": "fresh" if best["stage"] == "confirm" else "grid",
        "final_loss_nats": mean,
        "final_loss_nats_low": low,
        "final_loss_nats_high": high,
        **verdict_columns(_findings(best, noise)),
    }


def _findings(best: dict[str, Any], noise: Noise | None) -> list[Finding]:
    if best["loss_nats"] is None:
        lost = best["num_runs"] - best["num_ended"]
        return [Finding("diverged", f"{lost} of {fmt.count(best['num_runs'], 'run')} at the chosen rate diverged")]
    words = {
        "edge_of_grid": Finding("edge_of_grid", "the best learning rate lies outside those tried: a lower loss is due"),
        "single_rate": Finding("single_rate", "only one learning rate was tried"),
    }
    found = [words[best["lr_verdict"]]] if best["lr_verdict"] in words else []
    if best["peak_lr"] is None:
        found.append(Finding("ok", "learning rate not stated"))
    if best["tokens"] < MIN_WARMUPS_TO_TARGET * (best["warmup_tokens"] or 0):
        share = best["warmup_tokens"] / best["tokens"]
        found.append(Finding("warmup_confounded", f"the warmup took {share:.0%} of the budget"))
    if best["stage"] == "grid" and best["luck_nats"] > MIN_LUCK_NATS:
        words_of_luck = f"no fresh seeds: raised by {best['luck_nats']:.4f} nats for the luck of the chosen rate"
        found.append(Finding("ok", words_of_luck))
    return found if noise else [*found, Finding("few_points", NO_NOISE)]
