"""The batch that the challenger may use at the baseline's loss and tokens, over the baseline's batch.

At a fixed budget the loss rises with the batch from the best batch on; where it passes the baseline's loss is the
largest batch that the challenger may use. Nothing is read beyond the batches that were run.
"""

from collections.abc import Iterator

import numpy as np
import polars as pl
from numpy.typing import NDArray

from analysis import format as fmt
from analysis.quantities.final_losses import FinalLosses
from analysis.quantities.final_pairs import PLACE, FinalPair, Row, final_pairs, handed_on, together
from analysis.schemas import ISO_LOSS, table
from analysis.statistics.monotone import where_reached
from analysis.statistics.noise import NO_NOISE, t_quantile
from analysis.verdicts import Finding, verdict_columns

Array = NDArray[np.float64]

_ESTIMATE = ("batch_ratio", "batch_ratio_low", "batch_ratio_high", "lower_bound")


def iso_loss(finals: FinalLosses, baseline: str, level: float) -> pl.DataFrame:
    """Return the table `iso_loss`: a row per batch and budget of the baseline at which the challenger has final losses.

    The interval has the batches whose loss is within the t interval of a difference from the baseline's. Where the
    challenger does better even at its largest batch, the ratio is `censored` at `lower_bound`; where it does worse at
    all of them, there is none.

    Assumption: runs of the same seed at different batches are independent, which makes the interval wide; it has no
    part for the interpolation between batches. Of a challenger with one batch at a budget nothing can be said: refused.
    """
    return table((row for pair in final_pairs(finals, baseline) for row in _rows(pair, level)), ISO_LOSS)


def largest_batch(log_batch: Array, losses: Array, loss: float) -> float:
    """Return the largest log batch whose loss is at most `loss`; -inf if there is none, inf if it is beyond the last.

    `log_batch` [n] ascends. From their minimum on, `losses` [n] are replaced by their running maximum and interpolated
    by a monotone cubic in log batch: straight lines would be up to a sixth off between batches four times apart.
    """
    best = int(np.argmin(losses))
    place, rising = log_batch[best:], np.maximum.accumulate(losses[best:])
    if loss < rising[0]:
        return -np.inf
    return np.inf if loss > rising[-1] else where_reached(place, rising, loss)


def _rows(pair: FinalPair, level: float) -> Iterator[Row]:
    known = pair.challenger.filter(pl.col("final_loss_nats").is_not_null()).sort("global_batch_tokens")
    for row in pair.baseline.iter_rows(named=True):
        others = known.filter(token_budget=row["token_budget"])
        if others.height == 1:
            yield _refused(pair, row, others["global_batch_tokens"][0])
        elif others.height:
            yield _row(pair, row, others, level)


def _refused(pair: FinalPair, baseline: Row, batch: int) -> Row:
    names = f"{fmt.optimizer_name(pair.names['challenger'])} after {fmt.tokens(baseline['token_budget'])} tokens"
    one = Finding("refused", f"one batch of {names}, {fmt.tokens(batch)}: a batch of equal loss takes several")
    place = {name: baseline[name] for name in PLACE}
    return pair.names | place | dict.fromkeys(_ESTIMATE) | verdict_columns([one])


def _row(pair: FinalPair, baseline: Row, others: pl.DataFrame, level: float) -> Row:
    place = {name: baseline[name] for name in PLACE}
    findings = handed_on(pair.names["baseline"], pair.baseline.filter(**place))
    findings += handed_on(pair.names["challenger"], others)
    value, low, high, bound = None, None, None, None
    if baseline["final_loss_nats"] is not None:
        of_others = [pair.error_of_cell("challenger", row) for row in others.iter_rows(named=True)]
        error = together(pair.error_of_cell("baseline", baseline), max(filter(None, of_others), default=None))
        half = None if error is None else t_quantile(level, error.dof) * error.size
        here, least, most = _log_ratios(baseline, others, half)
        largest = float(np.log(others["global_batch_tokens"][-1] / baseline["global_batch_tokens"]))
        findings += _unbracketed(here, others)
        value, high = _exp(here), _exp(most)
        low = None if half is None else _exp(min(least, largest))
        bound = _exp(largest) if here == np.inf else None
        if half is None and value is not None:
            findings.append(Finding("few_points", NO_NOISE))
    estimate = dict(zip(_ESTIMATE, (value, low, high, bound), strict=True))
    return pair.names | place | estimate | verdict_columns(findings)


def _log_ratios(baseline: Row, others: pl.DataFrame, half: float | None) -> tuple[float, float, float]:
    """Return log B'/B with the ends of its interval; infinite where it is not among the challenger's batches."""
    log_batch = others["global_batch_tokens"].log().to_numpy() - np.log(baseline["global_batch_tokens"])
    losses, loss = others["final_loss_nats"].to_numpy(), baseline["final_loss_nats"]
    ends = (loss, loss, np.inf) if half is None else (loss, loss - half, loss + half)
    here, least, most = (largest_batch(log_batch, losses, end) for end in ends)
    return here, least, most


def _unbracketed(log_ratio: float, others: pl.DataFrame) -> list[Finding]:
    batches = [fmt.tokens(batch) for batch in others["global_batch_tokens"]]
    if log_ratio == np.inf:
        return [Finding("censored", f"still at a lower loss than the baseline at its largest batch, {batches[-1]}")]
    if log_ratio == -np.inf:
        return [Finding("not_identified", f"at a higher loss than the baseline at every batch from {batches[0]} on")]
    return []


def _exp(log_ratio: float) -> float | None:
    return float(np.exp(log_ratio)) if np.isfinite(log_ratio) else None
