"""Speedup at a token budget: the tokens with which the baseline comes to the challenger's loss, over the challenger's.

Both sides are at their best batch and rate. The baseline's tokens are read off its loss law over budgets.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import polars as pl

from analysis import format as fmt
from analysis.quantities.final_losses import FinalLosses, StandardError
from analysis.quantities.final_pairs import PLACE, FinalPair, Row, final_pairs, handed_on, together
from analysis.schemas import SPEEDUPS, table
from analysis.statistics.law_curves import Array
from analysis.statistics.loss_law import Bounded, LossLaw, fit_loss_law
from analysis.statistics.noise import t_quantile
from analysis.verdicts import Finding, verdict_columns


def speedups(finals: FinalLosses, baseline: str, level: float) -> pl.DataFrame:
    """Return the table `speedups`: a row per challenger and token budget.

    A loss beyond the baseline's budgets bounds the ratio on one side; the law is not extrapolated. With one budget of
    the baseline there is no law, and all is refused.

    Assumption: the two sides' errors are independent; that the best batch was picked for its loss is not corrected.
    """
    return table((row for pair in final_pairs(finals, baseline) for row in _rows(pair, level)), SPEEDUPS)


@dataclass(frozen=True)
class _Baseline:
    """The baseline at its best batch of every budget, of those with several: cells, and the law if there are any."""

    cells: pl.DataFrame
    law: LossLaw | None


def _rows(pair: FinalPair, level: float) -> Iterator[Row]:
    baseline = _baseline(pair)
    for row in _best_batches(pair.challenger).iter_rows(named=True):
        findings = handed_on(pair.names["baseline"], baseline.cells)
        findings += handed_on(pair.names["challenger"], pair.challenger.filter(**{name: row[name] for name in PLACE}))
        ratio: Bounded = (None, None, None)
        if baseline.law is None:
            findings.append(_no_law(pair))
        else:
            ratio, more = _ratio(baseline.law, row, pair.error_of_cell("challenger", row), level)
            findings += more
        estimate = dict(zip(("token_ratio", "token_ratio_low", "token_ratio_high"), ratio, strict=True))
        yield pair.names | {"token_budget": row["token_budget"]} | estimate | verdict_columns(findings)


def _best_batches(cells: pl.DataFrame) -> pl.DataFrame:
    """Return the cell of lowest loss at every budget."""
    known = cells.filter(pl.col("final_loss_nats").is_not_null())
    lowest_first = known.sort("token_budget", "final_loss_nats", "global_batch_tokens")
    return lowest_first.unique("token_budget", keep="first", maintain_order=True)


def _baseline(pair: FinalPair) -> _Baseline:
    several = (
        pl.col("tokens").filter(pl.col("final_loss_nats").is_not_null()).n_unique().over("global_batch_tokens") > 1
    )
    cells = _best_batches(pair.baseline.filter(several))
    if cells["tokens"].n_unique() < 2:
        return _Baseline(cells, None)
    noise, seeds = pair.noise("baseline"), pair.seeds["baseline"]
    own_seeds = [seeds[place] for place in cells.select(PLACE).iter_rows()]
    errors = noise.of_means(own_seeds, cells["global_batch_tokens"].log()) if noise else None
    one_law = np.zeros(cells.height, dtype=np.intp)
    tokens, losses = cells["tokens"].to_numpy().astype(float), cells["final_loss_nats"].to_numpy()
    return _Baseline(cells, fit_loss_law(one_law, tokens, losses, errors))


def _no_law(pair: FinalPair) -> Finding:
    name = fmt.optimizer_name(pair.names["baseline"])
    budgets = pair.baseline.filter(pl.col("final_loss_nats").is_not_null())["token_budget"].unique().to_list()
    if not budgets:
        return Finding("diverged", f"{name} has no final loss")
    if len(budgets) == 1:
        return Finding("refused", f"one token budget of {name}, {fmt.tokens(budgets[0])}: a loss law takes several")
    return Finding("refused", f"no batch of {name} ran at several token budgets: a loss law takes them")


def _ratio(law: LossLaw, challenger: Row, own: StandardError | None, level: float) -> tuple[Bounded, list[Finding]]:
    """Return the ratio with its interval; neither a value nor an end lies beyond the baseline's budgets."""
    if not law.falls[0]:
        return (None, None, None), [
            Finding("not_identified", "the baseline's loss does not fall all the way to the largest budget")
        ]
    loss, log_own = challenger["final_loss_nats"], float(np.log(challenger["tokens"]))
    least, most = float(law.min_log_tokens[0]), float(law.max_log_tokens[0])
    near = np.clip(law.log_tokens(loss), least, most)
    steepness = -float(law.slopes_at(near)[0])
    centre = float(near[0] + (law.losses_at(near)[0] - loss) / steepness)  # a tangent beyond the budgets
    findings, low, high = [], None, None
    error = together(_error_of_law(law, near), own and StandardError(own.size / steepness, own.dof))
    if error is None:
        findings.append(
            Finding("few_points", "no interval: too few budgets, or too few repeated runs to tell the noise")
        )
    else:
        half = t_quantile(level, error.dof) * error.size
        low = None if centre - half < least else float(np.exp(min(centre - half, most) - log_own))
        high = None if centre + half > most else float(np.exp(max(centre + half, least) - log_own))
    if centre > most:
        bound = f"beyond the baseline's largest budget: the ratio is above {np.exp(most - log_own):.2f}"
        return (None, low, high), [Finding("censored", bound), *findings]
    if centre < least:
        bound = f"below the baseline's smallest budget: the ratio is below {np.exp(least - log_own):.2f}"
        return (None, low, high), [Finding("not_identified", bound), *findings]
    return (float(np.exp(centre - log_own)), low, high), findings


def _error_of_law(law: LossLaw, log_tokens: Array) -> StandardError | None:
    errors = law.errors_at(log_tokens, np.array([0]))
    return None if errors is None else StandardError(float(np.sqrt(errors.covariance[0, 0])), errors.dof)
