"""Frames as tables for people: estimates merged with their intervals, units in the header, constant keys left out."""

from dataclasses import dataclass

import polars as pl

from analysis import format as fmt
from analysis.schemas import Columns

MAX_ROWS = 300
_SUPERSCRIPTS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class HtmlTable:
    """A table's name and words beside it, its header, its rows as text, the notes that its verdicts refer to.

    `omitted` rows are in the CSV file alone.
    """

    name: str
    words: str
    header: list[str]
    rows: list[list[str]]
    notes: list[str]
    omitted: int


def html_table(
    name: str,
    words: str,
    frame: pl.DataFrame,
    columns: Columns,
    constant: tuple[str, ...] = ("model", "protocol"),
    exact: bool = False,
) -> HtmlTable:
    """Write a frame's values as text; `constant` columns are left out while they hold a single value.

    `exact` writes integers in full. The reason of a verdict stands below the table, once for all rows that share it.
    """
    shown = _with_verdict_early(
        [name for name in frame.columns if not _is_end(name, frame) and not _is_dull(name, frame, constant)], frame
    )
    header = [_heading(column, columns[column].unit) for column in shown]
    frame, omitted = frame.head(MAX_ROWS), max(0, frame.height - MAX_ROWS)
    reasons = (
        [reason for reason in frame["explanation"].unique(maintain_order=True) if reason] if "verdict" in shown else []
    )
    marks = {reason: str(number).translate(_SUPERSCRIPTS) for number, reason in enumerate(reasons, start=1)}
    rows = [[_cell(row, column, marks, exact) for column in shown] for row in frame.iter_rows(named=True)]
    return HtmlTable(name, words, header, rows, [f"{mark} {reason}" for reason, mark in marks.items()], omitted)


def _with_verdict_early(columns: list[str], frame: pl.DataFrame) -> list[str]:
    """Put the verdict, which refers to its reason, before the first estimate: no number is read without it."""
    if "verdict" not in columns:
        return columns
    others = [name for name in columns if name not in ("verdict", "reasons", "explanation")]
    estimates = (place for place, name in enumerate(others) if f"{name}_low" in frame.columns)
    place = next(estimates, len(others))  # columns that are null throughout are left out: there may be no estimate
    return [*others[:place], "verdict", *others[place:]]


def _cell(row: dict[str, object], column: str, marks: dict[str, str], exact: bool) -> str:
    if column == "verdict":
        return fmt.verdict(str(row["verdict"])) + marks.get(str(row["explanation"]), "")
    if exact and type(row[column]) is int:
        return str(row[column])
    return fmt.estimate(row, column) if row[column] is not None or f"{column}_low" in row else fmt.MISSING


def _is_end(column: str, frame: pl.DataFrame) -> bool:
    """Say whether the column is an end of another column's interval."""
    return any(column.endswith(end) and column.removesuffix(end) in frame.columns for end in ("_low", "_high"))


def _is_dull(column: str, frame: pl.DataFrame, constant: tuple[str, ...]) -> bool:
    if column in constant:
        return frame[column].n_unique() <= 1
    return set(frame[column].unique()) <= {None, ""}


def _heading(column: str, unit: str) -> str:
    """Write a column's name with its unit, unless the name or the values say it: seconds are written as 38 s or 2 h."""
    words = column.split("_")
    said = not unit or unit.partition("/")[0] in words or unit in ("s", "FLOP")
    return " ".join(words) if said else f"{' '.join(words)} ({unit})"
