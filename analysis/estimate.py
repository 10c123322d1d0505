"""Every estimate that a sweep's records support: the one entry point of the analysis."""

from dataclasses import dataclass

import polars as pl

from analysis.inputs.records import Records
from analysis.quantities.agreement import agreement, what_differs
from analysis.quantities.cells import estimate_cells
from analysis.quantities.critical_batch import critical_batches
from analysis.quantities.equal_budget import equal_budget
from analysis.quantities.frontier import frontier
from analysis.quantities.targets import targets
from analysis.quantities.token_ratio import token_ratios
from analysis.schemas import AGREEMENT, TABLES, table


@dataclass(frozen=True)
class Estimates:
    """The tables of a sweep; columns, units and meanings are in `analysis.schemas.TABLES` under the same names."""

    records: Records
    level: float
    reference_batch_tokens: int | None
    targets: pl.DataFrame
    rates: pl.DataFrame
    cells: pl.DataFrame
    loss_laws: pl.DataFrame
    critical_batches: pl.DataFrame
    fit_curves: pl.DataFrame
    laws: pl.DataFrame
    token_ratios: pl.DataFrame
    ratio_trends: pl.DataFrame
    ratio_decomposition: pl.DataFrame
    rate_rules: pl.DataFrame
    frontier: pl.DataFrame
    dominance: pl.DataFrame
    choices: pl.DataFrame
    cost_model: pl.DataFrame
    equal_budget: pl.DataFrame
    gaps: pl.DataFrame
    iso_loss: pl.DataFrame
    speedups: pl.DataFrame
    tuning: pl.DataFrame
    agreement: pl.DataFrame


def estimate(
    records: Records,
    level: float = 0.9,
    reference_batch_tokens: int | None = None,
    reference: Records | None = None,
) -> Estimates:
    """Make all tables of a sweep; intervals hold with probability `level`.

    `reference_batch_tokens` is that of `overhead_20pct`; by default the smallest batch that all optimizers of the sweep
    share. With `reference`, the records of an earlier run of the sweep, `agreement` compares the two number by number.
    """
    if reference_batch_tokens is None:
        reference_batch_tokens = smallest_shared_batch(records.runs)
    tables = _tables(records, level, reference_batch_tokens)
    compared = table([], AGREEMENT)
    if reference is not None:
        earlier = _tables(reference, level, reference_batch_tokens)
        compared = agreement(tables, earlier, what_differs(records, reference))
    return Estimates(records, level, reference_batch_tokens, **tables, agreement=compared)


def smallest_shared_batch(runs: pl.DataFrame) -> int | None:
    """Return the smallest batch that every optimizer was run at; None when there is none."""
    optimizers = runs["optimizer"].n_unique()
    shared = runs.filter(pl.col("optimizer").n_unique().over("global_batch_tokens") == optimizers)
    smallest = shared["global_batch_tokens"].min()
    return smallest if isinstance(smallest, int) else None


def headline_target(estimates: Estimates) -> float | None:
    """Return the hardest target that all optimizers reached at two batch sizes or more, else the hardest reached."""
    reached = estimates.cells.filter(pl.col("tokens_to_target").is_not_null())
    batches = reached.group_by("target_loss_nats", "optimizer").agg(num=pl.col("global_batch_tokens").n_unique())
    optimizers = batches.filter(pl.col("num") >= 2).group_by("target_loss_nats").len()
    by_all = optimizers.filter(pl.col("len") == estimates.cells["optimizer"].n_unique())
    hardest = (reached if by_all.is_empty() else by_all)["target_loss_nats"].min()
    assert hardest is None or isinstance(hardest, float)
    return hardest


def _tables(records: Records, level: float, reference_batch_tokens: int | None) -> dict[str, pl.DataFrame]:
    to_target = targets(records)
    estimated = estimate_cells(to_target, level)
    batches, curves = critical_batches(estimated, level, reference_batch_tokens)
    ratios, trends = token_ratios(estimated, records.manifest.baseline, level)
    points, costs = frontier(records, estimated.cells, estimated.chosen)
    absent = (
        "loss_laws",
        "laws",
        "ratio_decomposition",
        "rate_rules",
        "dominance",
        "choices",
        "gaps",
        "iso_loss",
        "speedups",
        "tuning",
    )
    return {name: table([], TABLES[name]) for name in absent} | {
        "targets": to_target,
        "rates": estimated.rates,
        "cells": estimated.cells,
        "critical_batches": batches,
        "fit_curves": curves,
        "token_ratios": ratios,
        "ratio_trends": trends,
        "frontier": points,
        "cost_model": costs,
        "equal_budget": equal_budget(records, level),
    }
