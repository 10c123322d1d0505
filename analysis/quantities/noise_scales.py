"""Gradient noise scales of every setting along its training, and the critical batches that they stand for."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import polars as pl

from analysis import format as fmt
from analysis.inputs.records import Records
from analysis.quantities.chosen_runs import chosen_runs
from analysis.schemas import CRITICAL_BATCHES, NOISE_SCALES, table
from analysis.statistics.noise import MIN_DOF
from analysis.statistics.noise_scale import Moments, noise_scales
from analysis.verdicts import Finding, findings_of, verdict_columns

_PREFIX = "noise_scale_"
_SETTING = ["model", "optimizer", "protocol", "global_batch_tokens", "peak_lr", "tuning"]
_KEY = [*_SETTING, "group", "estimator", "tokens_seen"]
_ESTIMATE = ["noise_scale_tokens", "noise_scale_tokens_low", "noise_scale_tokens_high"]
_CELL = ["model", "optimizer", "protocol", "global_batch_tokens"]
_SERIES = ["model", "optimizer", "protocol", "target_loss_nats"]
#: The estimator that stands for others: the further apart its two batches, the less it errs.
_ESTIMATORS = ("micro_batches", "ranks", "halves")


def noise_scale_table(records: Records, level: float) -> pl.DataFrame:
    """Return the table `noise_scales`: the steps between two marks of all runs of a setting are one sample.

    Source: arXiv 1812.06162, appendix A.1. Assumption: the gradients of different steps are independent, and what the
    weights do to |G|² and tr Σ between two marks counts as noise.
    """
    measured = records.diagnostics.filter(pl.col("quantity").str.starts_with(_PREFIX))
    rows = measured.with_columns(estimator=pl.col("quantity").str.strip_prefix(_PREFIX)).join(
        records.runs.select("run_id", *_SETTING), on="run_id"
    )
    pooled = _pooled(rows)
    moments = Moments(*(pooled[name].cast(pl.Float64).to_numpy() for name in ("num_steps", *_MOMENTS)))
    estimates = dict(zip(_ESTIMATE, map(_column, noise_scales(moments, level)), strict=True))
    few = pl.col("num_steps") <= MIN_DOF
    pooled = pooled.with_columns(**estimates).with_columns(
        pl.when(~few).then(pl.col(name)).alias(name) for name in _ESTIMATE[1:]
    )
    judged = (row | verdict_columns(_findings(row)) for row in pooled.iter_rows(named=True))
    return table(({name: row[name] for name in NOISE_SCALES} for row in judged), NOISE_SCALES)


def best_estimates(scales: pl.DataFrame) -> pl.DataFrame:
    """Return the noise scales of the whole gradient, of each setting and mark that with the best estimator."""
    order = pl.col("estimator").replace_strict(dict(zip(_ESTIMATORS, range(3), strict=True)), return_dtype=pl.Int64)
    whole = scales.filter(pl.col("group") == "all").sort(order, maintain_order=True)
    return whole.unique([*_SETTING, "tokens_seen"], keep="first", maintain_order=True).sort(*_KEY)


def noise_scale_batches(records: Records, cells: pl.DataFrame, scales: pl.DataFrame) -> pl.DataFrame:
    """Return rows of `critical_batches`, definition `noise_scale`: B_simple when a series came to its target.

    Of the cells of a series, that with the fewest tokens to the target counts, at the first mark beyond them.
    """
    runs = chosen_runs(records.runs, cells)
    measured = best_estimates(scales).join(runs, on=_SETTING, how="semi", nulls_equal=True)
    reached = cells.filter(pl.col("tokens_to_target").is_not_null()).select(
        *_CELL, "target_loss_nats", "tokens_to_target"
    )
    beyond = reached.join(measured, on=_CELL).filter(pl.col("tokens_seen") >= pl.col("tokens_to_target"))
    first = beyond.sort("tokens_seen").unique([*_CELL, "target_loss_nats"], keep="first", maintain_order=True)
    cheapest = first.sort("tokens_to_target").unique(_SERIES, keep="first", maintain_order=True)
    return table((_critical_batch(row) for row in cheapest.iter_rows(named=True)), CRITICAL_BATCHES)


_MOMENTS = ("signal", "noise", "signal_variance", "noise_variance", "signal_noise_covariance")


def _pooled(rows: pl.DataFrame) -> pl.DataFrame:
    """Return one sample for the steps of all runs of a setting: their number, means, variances and covariance."""
    number, total = pl.col("num_steps"), pl.col("num_steps").sum()

    def mean(name: str) -> pl.Expr:
        return (number * pl.col(name)).sum() / total

    def covariance(spread: str, first: str, second: str) -> pl.Expr:
        within = ((number - 1) * pl.col(spread).fill_null(0.0)).sum()
        between = (number * pl.col(first) * pl.col(second)).sum() - total * mean(first) * mean(second)
        return pl.when(total > 1).then((within + between) / (total - 1))

    return (
        rows.group_by(_KEY)
        .agg(
            num_steps=total,
            num_runs=pl.len().cast(pl.Int64),
            signal=pl.when(total > 0).then(mean("signal")),
            noise=pl.when(total > 0).then(mean("noise")),
            signal_variance=covariance("signal_variance", "signal", "signal"),
            noise_variance=covariance("noise_variance", "noise", "noise"),
            signal_noise_covariance=covariance("signal_noise_covariance", "signal", "noise"),
            reason=pl.col("reason").drop_nulls().first(),
        )
        .sort(_KEY)
    )


def _column(values: np.ndarray[Any, Any]) -> pl.Series:
    return pl.Series(values, dtype=pl.Float64).fill_nan(None)


def _findings(row: dict[str, Any]) -> Iterator[Finding]:
    if row["signal"] is None:
        yield Finding("refused", row["reason"])
    elif row["noise_scale_tokens"] is None:
        what = "gradient above its noise" if row["signal"] <= 0 else "noise of the gradient"
        yield Finding("not_identified", f"no {what} is visible")
    if row["signal"] is not None and row["num_steps"] <= MIN_DOF:
        yield Finding("few_points", f"no interval: {fmt.count(row['num_steps'], 'step')} since the last mark")
    elif row["signal"] is not None and row["noise_scale_tokens_high"] is None:
        yield Finding("ok", "no upper end: within its error the gradient may be zero")


def _critical_batch(row: dict[str, Any]) -> dict[str, Any]:
    batch, tokens = fmt.tokens(row["global_batch_tokens"]), fmt.tokens(row["tokens_seen"])
    findings = [
        Finding("ok", f"tr Σ / |G|² at a batch of {batch} and {tokens} tokens, not a fit to T(B)"),
        Finding("ok", "of the plain gradient: what an optimizer makes of it, and what came before, are not in it"),
        *findings_of(row["reasons"], row["explanation"]),
    ]
    ends = ("", "_low", "_high")
    estimate = {f"critical_batch_tokens{end}": row[f"noise_scale_tokens{end}"] for end in ends}
    known = {name: row[name] for name in _SERIES} | {"tokens_to_target": row["tokens_to_target"]}
    fixed = {"definition": "noise_scale", "residuals": "", "num_batches": 1}
    return dict.fromkeys(CRITICAL_BATCHES) | known | fixed | estimate | verdict_columns(findings)
