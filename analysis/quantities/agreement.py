"""Does a new run of a sweep agree with a reference, number by number?"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import polars as pl

from analysis.inputs.records import Records
from analysis.inputs.variants import differing_settings
from analysis.schemas import AGREEMENT, table

_PLACE = (
    "model",
    "optimizer",
    "baseline",
    "challenger",
    "global_batch_tokens",
    "target_loss_nats",
    "protocol",
    "definition",
    "branch_tokens",
)

#: Tables and the quantity compared in each; positive ones are compared in logarithms, as their intervals are made.
_QUANTITIES = {
    "cells": "tokens_to_target",
    "critical_batches": "critical_batch_tokens",
    "token_ratios": "token_ratio",
    "ratio_trends": "slope",
}


def agreement(new: Mapping[str, pl.DataFrame], reference: Mapping[str, pl.DataFrame], differs: str) -> pl.DataFrame:
    """Return the table `agreement` over the quantities that both have.

    `differs` says why none can be compared, or is empty.
    Two numbers agree when their difference lies within the root sum of squares of the half widths that face each other.
    At a level of 90 % about one in ten pairs of honest numbers disagrees, by chance, if the seeds are others; on the
    same seeds the two differ by rounding alone, and agreement says no more than that.
    """
    rows = [
        row | _verdict(row, differs)
        for name, quantity in _QUANTITIES.items()
        for row in _pairs(new[name], reference[name], quantity)
    ]
    return table(rows, AGREEMENT)


def what_differs(new: Records, reference: Records) -> str:
    """Say in which way the two sweeps are not of the same kind; empty when they are."""
    for column, meaning in (
        ("corpus_fingerprint", "the corpus differs"),
        ("science_version", "the code's science differs"),
    ):
        ours, theirs = (set(records.runs[column]) for records in (new, reference))
        if ours != theirs:
            return f"{meaning}: {_listed(ours)} here, {_listed(theirs)} in the reference"
    settings = differing_settings(pl.concat([new.runs, reference.runs]))
    return f"the settings differ: {', '.join(settings)}" if settings else ""


def _listed(values: set[Any]) -> str:
    return ", ".join(sorted(map(str, values))) or "none"


def _pairs(new: pl.DataFrame, reference: pl.DataFrame, quantity: str) -> Iterator[dict[str, Any]]:
    place = [name for name in _PLACE if name in new.columns]
    ends = [quantity, f"{quantity}_low", f"{quantity}_high"]
    known = reference.select(*place, *ends)
    both = new.select(*place, *ends).join(known, on=place, suffix="_reference", nulls_equal=True)
    for row in both.sort(place).iter_rows(named=True):
        where = ", ".join(f"{name}={row[name]}" for name in place if row[name] is not None)
        values = zip(("new", "new_low", "new_high"), ends, strict=True)
        others = zip(("reference", "reference_low", "reference_high"), ends, strict=True)
        yield (
            {"quantity": quantity, "where": where}
            | {column: row[end] for column, end in values}
            | {column: row[f"{end}_reference"] for column, end in others}
        )


def _verdict(row: dict[str, Any], differs: str) -> dict[str, Any]:
    if differs:
        return {"agrees": None, "reason": differs}
    if row["new"] is None or row["reference"] is None:
        where = {(True, True): "both", (True, False): "this sweep", (False, True): "the reference"}
        return {"agrees": None, "reason": f"no number in {where[row['new'] is None, row['reference'] is None]}"}
    lower, upper = ("new", "reference") if row["new"] <= row["reference"] else ("reference", "new")
    facing = [row[lower], row[f"{lower}_high"], row[f"{upper}_low"], row[upper]]
    if None in facing:
        return {"agrees": None, "reason": "an interval is missing or open on the side that faces the other number"}
    a, a_high, b_low, b = facing if row["quantity"] == "slope" else np.log(facing)
    return {"agrees": bool(b - a <= np.hypot(a_high - a, b - b_low)), "reason": ""}
