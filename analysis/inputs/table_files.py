"""A file of an outside table as a frame: CSV, JSONL or Parquet, with the row of the file that each row came from."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl

from analysis.vocabulary import TABLE_SUFFIXES
from harness.user_files import one_line, reading

#: The row of the file, as a spreadsheet or an editor counts: a header is row 1, and the first line of JSONL is.
ROW = "(row)"


def read_file(path: Path) -> pl.DataFrame:
    """Read a table as it is, blank rows left out, with its rows numbered in `ROW`; of a CSV, every value is text.

    Raises: ValueError naming the file, and the row where there is one, for what is no table of the kind that its name
    says, for an empty file, for one without rows and for two columns of one name.
    """
    readers = dict(zip(TABLE_SUFFIXES, (_read_csv, _read_jsonl, _read_jsonl, _read_parquet), strict=True))
    read = readers.get(path.suffix.lower())
    if read is None:
        raise ValueError(f"{path}: expected a table whose name ends in {', '.join(TABLE_SUFFIXES)}")
    with reading(path):
        if path.stat().st_size == 0:
            raise ValueError(f"{path}: the file is empty")
        frame = read(path)
    frame = frame.filter(~pl.all_horizontal(pl.exclude(ROW).is_null()))
    if frame.is_empty():
        raise ValueError(f"{path}: no rows below the names of the columns")
    return frame


def _read_csv(path: Path) -> pl.DataFrame:
    names = _header(path)
    try:
        frame = pl.read_csv(path, infer_schema=False)
    except pl.exceptions.PolarsError as error:
        raise ValueError(_whats_wrong(path, len(names)) or f"{path}: not a CSV file ({one_line(error)})") from None
    frame.columns = names
    return frame.with_row_index(ROW, offset=2)


def _header(path: Path) -> list[str]:
    """Return the names of the columns; one without a name is called by its place."""
    row = next(_rows(path), (1, []))[1]
    names = [name.strip() or f"(column {number})" for number, name in enumerate(row, start=1)]
    if not any(name.strip() for name in row):
        raise ValueError(f"{path}, row 1: no names of columns")
    if len(names) == 1 and any(mark in names[0] for mark in ";\t"):
        raise ValueError(f"{path}, row 1: columns must be separated by commas")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{path}, row 1: two columns are called {twice[0]!r}")
    return names


def _whats_wrong(path: Path, num_columns: int) -> str:
    """Find the row with more values than there are columns."""
    for number, row in _rows(path):
        if len(row) > num_columns:
            return f"{path}, row {number}: {len(row)} values for {num_columns} columns"
    return ""


def _rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield from enumerate(csv.reader(file), start=1)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: not a CSV file in UTF-8 ({one_line(error)})") from None


def _read_jsonl(path: Path) -> pl.DataFrame:
    """Read objects, a line each; what the fast parser refuses, or rows that it skips, are read line by line."""
    content = path.read_bytes()
    num_lines = content.count(b"\n") + (not content.endswith(b"\n"))
    try:
        frame = pl.read_ndjson(content, infer_schema_length=None)
        if frame.height == num_lines:
            return frame.with_row_index(ROW, offset=1)
    except (pl.exceptions.PolarsError, ValueError):
        pass
    rows = [_json_row(line, f"{path}, row {number}") | {ROW: number} for number, line in _lines(content)]
    if not rows:
        raise ValueError(f"{path}: no rows")
    return pl.DataFrame(rows, infer_schema_length=None, strict=False).with_columns(pl.col(ROW).cast(pl.UInt32))


def _lines(content: bytes) -> Iterator[tuple[int, bytes]]:
    return ((number, line) for number, line in enumerate(content.split(b"\n"), start=1) if line.strip())


def _json_row(line: bytes, place: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{place}: not a JSON object ({one_line(error)})") from None
    if not isinstance(row, dict):
        raise ValueError(f"{place}: expected an object with a value for each column, found {type(row).__name__}")
    return row


def _read_parquet(path: Path) -> pl.DataFrame:
    try:
        return pl.read_parquet(path).with_row_index(ROW, offset=2)
    except pl.exceptions.PolarsError as error:
        raise ValueError(f"{path}: not a whole Parquet file ({one_line(error)})") from None
