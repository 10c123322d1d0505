"""Gaps: final loss of the baseline less that of a challenger at the same batch and budget, each at its best rate."""

from collections.abc import Iterator

import polars as pl
from scipy.special import stdtr

from analysis.quantities.final_losses import FinalLosses, StandardError
from analysis.quantities.final_pairs import PLACE, FinalPair, Row, final_pairs, handed_on, together
from analysis.quantities.multiple_tests import add_holm
from analysis.schemas import GAPS, table
from analysis.statistics.noise import NO_NOISE, t_quantile
from analysis.verdicts import Finding, verdict_columns

#: Tests that Holm's correction takes together: all challengers and batches at one budget.
_FAMILY = ("model", "protocol", "token_budget")


def gaps(finals: FinalLosses, baseline: str, level: float) -> pl.DataFrame:
    """Return the table `gaps`: t intervals and tests against the noise of repeated seeds, pooled over cells.

    Where both sides of a cell ran the same seeds, the noise is that of the differences of runs of one seed. Optimizers
    that share no batch and budget are refused.

    Assumption: differences vary alike at the chosen rates and at rates of the same rank in the two grids.
    """
    rows = [row for pair in final_pairs(finals, baseline) for row in _rows(pair, level)]
    add_holm(rows, _FAMILY)
    return table(rows, GAPS)


def _rows(pair: FinalPair, level: float) -> Iterator[Row]:
    both = pair.baseline.join(pair.challenger, on=PLACE, suffix="_challenger", maintain_order="left")
    if both.is_empty():
        nothing = dict.fromkeys(PLACE) | _estimate(None, None, level) | {"num_pairs": 0}
        apart = Finding("refused", f"{pair.both} share no batch and token budget")
        yield pair.names | nothing | verdict_columns([apart])
    for batch, budget in both.select(PLACE).iter_rows():
        yield _row(pair, batch, budget, level)


def _row(pair: FinalPair, batch: int, budget: int, level: float) -> Row:
    frames = [own.filter(global_batch_tokens=batch, token_budget=budget) for own in (pair.baseline, pair.challenger)]
    findings = [*handed_on(pair.names["baseline"], frames[0]), *handed_on(pair.names["challenger"], frames[1])]
    baseline, challenger = (frame.row(0, named=True) for frame in frames)
    gap, error, num_pairs = None, None, 0
    if baseline["final_loss_nats"] is not None and challenger["final_loss_nats"] is not None:
        gap = baseline["final_loss_nats"] - challenger["final_loss_nats"]
        error, num_pairs = pair.error_of_pairs(batch, budget)
        apart = together(pair.error_of_cell("baseline", baseline), pair.error_of_cell("challenger", challenger))
        error = error or apart
        if error is None:
            findings.append(Finding("few_points", NO_NOISE))
    return {
        **pair.names,
        "global_batch_tokens": batch,
        "token_budget": budget,
        **_estimate(gap, error, level),
        "num_pairs": num_pairs,
        **verdict_columns(findings),
    }


def _estimate(gap: float | None, error: StandardError | None, level: float) -> dict[str, float | None]:
    low, high, p_value = None, None, None
    if gap is not None and error is not None:
        half = t_quantile(level, error.dof) * error.size
        low, high = gap - half, gap + half
        p_value = float(2 * stdtr(error.dof, -abs(gap) / error.size))
    return {"gap_nats": gap, "gap_nats_low": low, "gap_nats_high": high, "p_value": p_value}
