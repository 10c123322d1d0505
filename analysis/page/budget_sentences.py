"""Sentences about equal token budgets: final losses, the batch at equal loss, tokens for equal loss.

They are about the largest budget that a pair shares. A difference is claimed only where the verdict is `ok` and its
p-value, after Holm's correction, is below 1 - level.
"""

from collections.abc import Sequence

import polars as pl

from analysis import format as fmt
from analysis.estimate import Estimates
from analysis.page.sentences import Row, places


def budget_sentences(estimates: Estimates) -> list[str]:
    """Say for every challenger how it does after the same tokens as the baseline."""
    frames, said = (estimates.gaps, estimates.iso_loss, estimates.speedups), list[str]()
    for name in sorted({name for frame in frames for name in frame["challenger"]}):
        gaps, batches, speedups = (_largest_budget(frame.filter(pl.col("challenger") == name)) for frame in frames)
        said += [_gaps(gaps, estimates.level)] if gaps else []
        said += [_iso_loss(batches)] if batches else []
        said += [_speedup(row) for row in speedups]
    return said


def _largest_budget(frame: pl.DataFrame) -> Sequence[Row]:
    """Return the rows of the largest budget, in the table's order: by batch."""
    return frame.filter(pl.col("token_budget") == pl.col("token_budget").max()).rows(named=True)


def _names(row: Row) -> tuple[str, str]:
    return fmt.optimizer_name(row["challenger"]), fmt.optimizer_name(row["baseline"])


def _gaps(rows: Sequence[Row], level: float) -> str:
    challenger, baseline = _names(rows[0])
    sizes = [row["global_batch_tokens"] for row in rows]
    claims = {
        "lower": f"{challenger}'s loss is lower than {baseline}'s",
        "higher": f"{challenger}'s loss is higher than {baseline}'s",
        "unresolved": f"no difference in loss between {challenger} and {baseline} is resolved",
        "caveat": f"because of a caveat {challenger} and {baseline} are not ranked by loss",
    }
    said = []
    for side, claim in claims.items():
        own = [row for row in rows if _side(row, level) == side]
        amount = f" by {_span(own)} nats/token" if own and side in ("lower", "higher") else ""
        said += [f"{claim}{amount} {places([row['global_batch_tokens'] for row in own], sizes)}"] if own else []
    return f"After {fmt.tokens(rows[0]['token_budget'])} tokens {'; '.join(said)}."


def _side(row: Row, level: float) -> str:
    if row["verdict"] != "ok" or row["gap_nats"] is None:
        return "caveat"
    if row["p_value_holm"] is None or row["p_value_holm"] >= 1 - level:
        return "unresolved"
    return "lower" if row["gap_nats"] > 0 else "higher"


def _span(rows: Sequence[Row]) -> str:
    amounts = sorted(abs(row["gap_nats"]) for row in rows)
    return " to ".join(dict.fromkeys(f"{amount:.3f}" for amount in (amounts[0], amounts[-1])))


def _iso_loss(rows: Sequence[Row]) -> str:
    challenger, baseline = _names(rows[0])
    parts = [f"{_batch_ratio(row)} at {fmt.tokens(row['global_batch_tokens'])}" for row in rows]
    budget = fmt.tokens(rows[0]["token_budget"])
    return f"With {baseline}'s loss after {budget} tokens, {challenger} may use a batch larger by: {', '.join(parts)}."


def _batch_ratio(row: Row) -> str:
    if row["batch_ratio"] is not None:
        caveat = "" if row["verdict"] == "ok" else f" ({fmt.judged(row)})"
        return f"{fmt.estimate(row, 'batch_ratio')} times{caveat}"
    if row["lower_bound"] is not None:
        return f"more than {row['lower_bound']:.3g} times"
    return f"unknown ({fmt.judged(row)})"


def _speedup(row: Row) -> str:
    challenger, baseline = _names(row)
    budget = fmt.tokens(row["token_budget"])
    if row["token_ratio"] is None:
        return f"What {baseline} needs for {challenger}'s loss after {budget} tokens is not told: {fmt.judged(row)}."
    doubt = f"; {fmt.judged(row)}" if row["verdict"] != "ok" or row["explanation"] else ""
    number = f"{fmt.estimate(row, 'token_ratio')} times the tokens{doubt}"
    return f"For {challenger}'s loss after {budget} tokens {baseline} needs, by its loss law, {number}."
