"""Every estimate that records support: the one entry point of the analysis."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

import polars as pl

from analysis.inputs.records import Records
from analysis.quantities.agreement import agreement, what_differs
from analysis.quantities.branching import branched_batches
from analysis.quantities.cells import Cells, estimate_cells
from analysis.quantities.choices import choices
from analysis.quantities.cost_model import CostOptions
from analysis.quantities.critical_batch import critical_batches
from analysis.quantities.curve_fits import FitsBySeries, curve_fits
from analysis.quantities.dominance import dominance
from analysis.quantities.equal_budget import equal_budget
from analysis.quantities.final_losses import FinalLosses, final_losses
from analysis.quantities.frontier import frontier
from analysis.quantities.gaps import gaps
from analysis.quantities.iso_loss import iso_loss
from analysis.quantities.laws import laws
from analysis.quantities.loss_laws import loss_laws
from analysis.quantities.noise_scales import noise_scale_batches, noise_scale_table
from analysis.quantities.pairs import Pair, pairs
from analysis.quantities.rate_rules import rate_rules
from analysis.quantities.ratio_decomposition import ratio_decomposition
from analysis.quantities.sharpness import sharpness, sharpness_ratios
from analysis.quantities.speedup import speedups
from analysis.quantities.targets import targets
from analysis.quantities.token_ratio import token_ratios
from analysis.quantities.tuning import tuning
from analysis.schemas import AGREEMENT, TABLES, table

Tables = dict[str, pl.DataFrame]

#: What may be asked of records: T(B) and what follows from it, what that takes in time, losses at equal token budgets,
#: what was measured of gradients and updates.
QUESTIONS = ("tokens", "time", "budgets", "diagnostics")


@dataclass(frozen=True)
class EstimateOptions:
    """What an estimate is made with beside the records.

    level: of the intervals. reference_batch_tokens: of `overhead_20pct`. definitions: of the critical batch, None for
    all that T(B) can give. residuals and loss: what least squares compares. costs: what is assumed of other machines.
    budgets (device-seconds) and deadlines (seconds): limits asked about, beside round ones. The tables of other
    `questions` than those asked stay empty.
    """

    level: float = 0.9
    reference_batch_tokens: int | None = None
    definitions: Sequence[str] | None = None
    residuals: str = "log"
    loss: str = "squares"
    costs: CostOptions = field(default_factory=CostOptions)
    budgets: Sequence[float] = ()
    deadlines: Sequence[float] = ()
    questions: Sequence[str] = QUESTIONS


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
    final_losses: pl.DataFrame
    gaps: pl.DataFrame
    iso_loss: pl.DataFrame
    speedups: pl.DataFrame
    tuning: pl.DataFrame
    noise_scales: pl.DataFrame
    sharpness: pl.DataFrame
    sharpness_ratios: pl.DataFrame
    agreement: pl.DataFrame


def estimate(
    records: Records,
    options: EstimateOptions | None = None,
    reference: Records | None = None,
    timings: pl.DataFrame | None = None,
) -> Estimates:
    """Make all tables of a sweep, or of outside tables.

    Without a reference batch in the options, that of a sweep is the smallest batch that all its optimizers share;
    outside tables have none. With `reference`, the records of an earlier run of the sweep, `agreement` compares the
    two number by number. `timings` are those of `critbatch time`.
    """
    options = options or EstimateOptions()
    if options.reference_batch_tokens is None and not records.outside:
        options = dataclasses.replace(options, reference_batch_tokens=smallest_shared_batch(records.runs))
    tables = _tables(records, options, timings)
    compared = table([], AGREEMENT)
    if reference is not None:
        compared = agreement(tables, _tables(reference, options, None), what_differs(records, reference))
    return Estimates(records, options.level, options.reference_batch_tokens, **tables, agreement=compared)


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


def _tables(records: Records, options: EstimateOptions, timings: pl.DataFrame | None) -> Tables:
    level = options.level
    to_target = targets(records)
    finals = final_losses(records, level)
    fitted, from_laws = loss_laws(finals, records.losses(), level)
    cells = estimate_cells(to_target, level).joined_with(from_laws)
    compared = pairs(cells, records.manifest.baseline)
    tables = {name: table([], columns) for name, columns in TABLES.items() if name != "agreement"}
    tables |= {"targets": to_target, "rates": cells.rates, "cells": cells.cells, "loss_laws": fitted}
    if "tokens" in options.questions:
        tables |= _of_tokens(records, cells, compared, options)
    if "time" in options.questions:
        tables |= _of_time(records, cells, compared, options, timings)
    if "budgets" in options.questions:
        tables |= _of_budgets(records, finals, level)
    if "diagnostics" in options.questions:
        tables |= _of_diagnostics(records, cells.cells, level)
    return tables


def _of_tokens(records: Records, cells: Cells, compared: Sequence[Pair], options: EstimateOptions) -> Tables:
    level = options.level
    fits = curve_fits(cells, level)
    batches, curves = _critical_batches(records, cells, fits, options)
    ratios, trends = token_ratios(compared, level)
    sizes = records.runs.select("model", "num_params_nonembedding")
    return {
        "critical_batches": batches,
        "fit_curves": curves,
        "laws": laws(batches, sizes, level, batches=cells.cells["global_batch_tokens"]),
        "token_ratios": ratios,
        "ratio_trends": trends,
        "ratio_decomposition": ratio_decomposition(compared, fits, level),
        "rate_rules": rate_rules(compared, level),
    }


def _critical_batches(
    records: Records, cells: Cells, fits: FitsBySeries, options: EstimateOptions
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Return critical batches and their curves: of T(B), and of branches and gradient noise where there are any."""
    others = {
        "branched": branched_batches(records, options.level),
        "noise_scale": noise_scale_batches(records, cells.cells, noise_scale_table(records, options.level)),
    }
    present = {name: rows for name, rows in others.items() if rows.height}
    definitions, compared = options.definitions, (options.residuals, options.loss)
    if definitions is not None:
        present = {name: rows for name, rows in present.items() if name in definitions}
        definitions = [name for name in definitions if name not in present]
    if compared != ("log", "squares"):
        fits = curve_fits(cells, options.level, *compared)
    batches, curves = critical_batches(fits, options.reference_batch_tokens, definitions)
    return pl.concat([batches, *present.values()]).sort(batches.columns, nulls_last=True), curves


def _of_time(
    records: Records, cells: Cells, compared: Sequence[Pair], options: EstimateOptions, timings: pl.DataFrame | None
) -> Tables:
    points, costs = frontier(records, cells, options.level, options.costs, timings)
    return {
        "frontier": points,
        "cost_model": costs,
        "dominance": dominance(points, compared, options.level),
        "choices": choices(points, options.budgets, options.deadlines),
    }


def _of_budgets(records: Records, finals: FinalLosses, level: float) -> Tables:
    baseline = records.manifest.baseline
    return {
        "equal_budget": equal_budget(records, finals, level),
        "final_losses": finals.cells,
        "gaps": gaps(finals, baseline, level),
        "iso_loss": iso_loss(finals, baseline, level),
        "speedups": speedups(finals, baseline, level),
        "tuning": tuning(records),
    }


def _of_diagnostics(records: Records, cells: pl.DataFrame, level: float) -> Tables:
    measured = sharpness(records)
    return {
        "noise_scales": noise_scale_table(records, level),
        "sharpness": measured,
        "sharpness_ratios": sharpness_ratios(records, measured, cells, level),
    }
