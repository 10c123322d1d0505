"""Tests that belong to one question: p-values that hold for all of them together."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from analysis.statistics.multiplicity import holm


def add_holm(rows: Sequence[dict[str, Any]], family: Sequence[str]) -> None:
    """Set `p_value_holm` of every row: its `p_value` after Holm's correction over the rows with equal `family`.

    Rows without a p-value count for nothing and get none.
    """
    families: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        row["p_value_holm"] = None
        if row["p_value"] is not None:
            families.setdefault(tuple(row[name] for name in family), []).append(row)
    for own in families.values():
        for row, adjusted in zip(own, holm(np.array([row["p_value"] for row in own])), strict=True):
            row["p_value_holm"] = float(adjusted)
