"""Tokens to a target from final losses: a law L_b(D) = E + A_b D^-β_b over token budgets, inverted at each target.

It serves the protocols in which a loss belongs to the end of a run: `decayed` and `branched_decay`, and tables with one
final loss per run, whatever their protocol.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import polars as pl

from analysis.quantities.cells import Cells, SeriesErrors
from analysis.quantities.final_losses import CELL, SERIES, FinalLosses
from analysis.quantities.law_cells import MIN_BUDGETS, LawSeries, cell_rows, findings_of_batch, interval_columns, invert
from analysis.quantities.run_groups import with_values
from analysis.schemas import CELLS, LOSS_LAWS, RATES, TARGETS, table
from analysis.statistics.loss_law import fit_loss_law
from analysis.verdicts import Finding, verdict_columns

#: Protocols whose curves are no use between their ends.
FULLY_DECAYED = ("decayed", "branched_decay")

#: Targets where none are given, as shares of the way from the lowest loss that every batch came to up to the highest.
_SHARES = (0.25, 0.5, 0.75)


def loss_laws(finals: FinalLosses, targets: pl.DataFrame, level: float) -> tuple[pl.DataFrame, Cells]:
    """Return the table `loss_laws` and the cells with T at every target (model, target_loss_nats).

    Where a model has no target, there are three within what all of its batches reached. A target outside the budgets
    of a batch has no T there; one budget alone has none at all, and that is refused.

    Source: arXiv 2505.13738.
    """
    decayed = (pl.col("single") | pl.col("protocol").is_in(FULLY_DECAYED)).all()
    suitable = finals.runs.group_by(SERIES).agg(decayed=decayed).filter("decayed")
    cells = finals.cells.join(suitable, on=SERIES, how="semi", maintain_order="left")
    laws: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    errors: dict[tuple[Any, ...], SeriesErrors] = {}
    for _, own in cells.group_by(SERIES, maintain_order=True):
        series = _series(own, finals)
        laws += _law_rows(series, level)
        for target in _targets(series.names, cells, targets):
            inverse = invert(series, target)
            rows += cell_rows(series, target, inverse, level)
            if inverse.errors is not None:
                errors[(*series.names.values(), target)] = SeriesErrors(tuple(inverse.log_tokens), inverse.errors)
    no_runs = with_values(table([], TARGETS))  # a law has no run of its own at a target
    estimated = Cells(table([], RATES), table(rows, CELLS), no_runs, no_runs, errors, {}, dict.fromkeys(errors))
    return table(laws, LOSS_LAWS), estimated


def _series(cells: pl.DataFrame, finals: FinalLosses) -> LawSeries:
    """Fit the law to the batches of a series that have several budgets."""
    names = {name: cells[name][0] for name in SERIES}
    runs = finals.chosen.filter(**names)
    fitted = cells.filter(pl.col("final_loss_nats").is_not_null())
    fitted = fitted.filter(pl.col("tokens").n_unique().over("global_batch_tokens") > 1)
    batches = tuple(fitted["global_batch_tokens"].unique().sort())
    if not batches:
        return LawSeries(names, cells, runs, (), None)
    seeds = fitted.join(runs, on=CELL, maintain_order="left").group_by(CELL, maintain_order=True).agg("seed")["seed"]
    noise = finals.noise[tuple(names.values())]
    batch_of = np.searchsorted(batches, fitted["global_batch_tokens"].to_numpy())
    law = fit_loss_law(
        batch_of,
        fitted["tokens"].to_numpy().astype(float),
        fitted["final_loss_nats"].to_numpy(),
        noise.of_means(seeds.to_list(), fitted["global_batch_tokens"].log()) if noise else None,
    )
    if max(np.bincount(batch_of)) < MIN_BUDGETS:
        law = replace(law, covariance=None)
    return LawSeries(names, cells, runs, batches, law)


def _targets(names: Mapping[str, Any], cells: pl.DataFrame, targets: pl.DataFrame) -> list[float]:
    """Return the model's targets, else three that every batch of its model and protocol came to within its budgets."""
    given = targets.filter(model=names["model"])["target_loss_nats"].unique().sort().to_list()
    if given:
        return given
    losses = pl.col("final_loss_nats")
    own = cells.filter(losses.is_not_null(), model=names["model"], protocol=names["protocol"])
    spans = (
        own.filter(pl.col("tokens").n_unique().over("optimizer", "global_batch_tokens") > 1)
        .group_by("optimizer", "global_batch_tokens")
        .agg(low=losses.min(), high=losses.max())
    )
    if spans.is_empty():
        return own["final_loss_nats"].sort().to_list()[:1]
    lows, highs = spans["low"].to_list(), spans["high"].to_list()
    low, high = max(lows), min(highs)
    if low >= high:
        low, high = min(lows), max(highs)
    return sorted({round(low + share * (high - low), 4) for share in _SHARES})


def _law_rows(series: LawSeries, level: float) -> Iterator[dict[str, Any]]:
    nothing = (None, None, None)
    law, batches = series.law, series.batches
    floor = law.floor_nats(level) if law else nothing
    exponents = dict(zip(batches, law.exponents(level), strict=True)) if law else {}
    prefactors = dict(zip(batches, law.log_prefactors(), strict=True)) if law else {}
    for (batch,), cells in series.cells.group_by(["global_batch_tokens"], maintain_order=True):
        findings = findings_of_batch(series, batch)
        if law and batch in batches and floor[0] is None:
            findings.append(Finding("not_identified", "the losses do not bend towards a floor above zero"))
        known = cells.filter(pl.col("final_loss_nats").is_not_null())["tokens"]
        yield {
            **series.names,
            "global_batch_tokens": batch,
            **interval_columns("floor_nats", floor),
            **interval_columns("exponent", exponents.get(batch, nothing)),
            "log_prefactor": prefactors.get(batch),
            "num_budgets": known.n_unique(),
            "min_tokens": known.min(),
            "max_tokens": known.max(),
            "rms_residual_nats": float(np.sqrt(np.mean(law.residuals**2))) if law and batch in batches else None,
            **verdict_columns(findings),
        }
