"""Timings of a sweep's steps, as `critbatch time` wrote them."""

from pathlib import Path

import polars as pl

from analysis.schemas import polars_schema
from harness.record import TIMING_COLUMNS, TIMINGS_JSON, read_json


def read_timings(folder: Path) -> pl.DataFrame | None:
    """Return the rows of a sweep's `timings.json`, with TIMING_COLUMNS; None where nothing was timed.

    Raises: ValueError naming the file when it is not whole, or of another version.
    """
    path = folder / TIMINGS_JSON
    if not path.exists():
        return None
    rows = read_json(path).get("rows")
    if (
        not isinstance(rows, list)
        or not rows
        or any(not isinstance(row, dict) or row.keys() != TIMING_COLUMNS.keys() for row in rows)
    ):
        raise ValueError(f"{path}: not the timings of this version; write them again with critbatch time {folder}")
    return pl.DataFrame(rows, schema=polars_schema(TIMING_COLUMNS), orient="row")
