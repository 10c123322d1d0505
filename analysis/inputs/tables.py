"""An outside table, checked value by value and converted to our units: tokens and nats per token.

What is wrong is one line with the file, the row as a spreadsheet counts (the header is row 1) and the column.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import polars as pl

from analysis.inputs.protocols import PROTOCOLS
from analysis.inputs.table_files import ROW, read_file
from analysis.inputs.table_schemas import (
    BATCHES,
    LOSSES,
    MAY_BE_ZERO,
    MAY_DIVERGE,
    OTHER_UNITS,
    REQUIRED,
    STATUSES,
    TABLE_SCHEMAS,
    TO_TARGET,
    TOKENS,
    Kind,
    recognise,
)
from analysis.schemas import polars_schema
from harness.frozen import nearest
from harness.user_files import one_line

#: What programs write for a value that is not there.
_BLANKS = ("", "NA", "N/A", "null", "None")

#: Whole numbers beyond this are not exact.
_LARGEST_WHOLE = 2**53

_NATS_PER_BIT = math.log(2)


@dataclass(frozen=True)
class TableOptions:
    """In which units tables give their numbers, and what they call our columns.

    batch_in: unit of `global_batch_tokens`.
    tokens_in: unit of all other numbers of training tokens: seen, budget, warmup, to target.
    loss_in: unit of all losses, per token.
    renames: our name by theirs.

    Raises: ValueError for a unit that is unknown or lacks the sequence length, and for a rename to no column of ours.
    """

    sequence_length: int | None = None
    batch_in: Literal["tokens", "sequences"] = "tokens"
    tokens_in: Literal["tokens", "sequences", "steps"] = "tokens"
    loss_in: Literal["nats", "bits"] = "nats"
    renames: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        units = (
            ("--batch-in", self.batch_in, ("tokens", "sequences")),
            ("--tokens-in", self.tokens_in, ("tokens", "sequences", "steps")),
            ("--loss-in", self.loss_in, ("nats", "bits")),
        )
        for option, unit, known in units:
            if unit not in known:
                raise ValueError(f"{option} {unit}: {nearest(unit, known)}")
            if unit == "sequences" and self.sequence_length is None:
                raise ValueError(f"{option} sequences needs --sequence-length, the tokens of a sequence")
        if self.sequence_length is not None and self.sequence_length < 1:
            raise ValueError(f"--sequence-length {self.sequence_length}: expected a number above zero")
        ours = {name for columns in TABLE_SCHEMAS.values() for name in columns}
        for theirs, name in self.renames.items():
            if name not in ours:
                raise ValueError(f"--rename {theirs}={name}: {name!r} is no column of ours; {nearest(name, ours)}")


@dataclass(frozen=True)
class Table:
    """A checked table in our units.

    frame: the columns of its kind, null where the file has none; `ROW`; and `others`, as they are in the file.
    A loss of NaN or infinity says that the run diverged. `tokens_to_target` and `status` are filled in every row.
    num_left_out: finals without a loss, which are not in the frame.
    """

    path: Path
    kind: Kind
    frame: pl.DataFrame
    others: tuple[str, ...]
    num_left_out: int = 0


@dataclass(frozen=True)
class _Source:
    """Where values come from, for what is said of them."""

    path: Path
    theirs: Mapping[str, str]

    def error(self, row: int, name: str, words: str) -> ValueError:
        column = f"{self.theirs[name]!r} ({name})" if name in self.theirs else repr(name)
        return ValueError(f"{self.path}, row {row}, column {column}: {one_line(words)}")


def read_tables(paths: Sequence[Path], options: TableOptions) -> list[Table]:
    """Read, check and convert tables. Raises: ValueError, one line with the file, the row and the column."""
    files = [(path, read_file(path)) for path in paths]
    columns = {name for _, frame in files for name in frame.columns if name != ROW}
    for theirs, ours in options.renames.items():
        if theirs not in columns:
            raise ValueError(f"{paths[0]}: no column {theirs!r} to rename to {ours!r}; {nearest(theirs, columns)}")
    return [_table(path, frame, options) for path, frame in files]


def _table(path: Path, frame: pl.DataFrame, options: TableOptions) -> Table:
    frame, source = _renamed(path, frame, options.renames)
    names = [name for name in frame.columns if name != ROW]
    try:
        kind = recognise(names)
        _refuse_other_units(names)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    columns = polars_schema(TABLE_SCHEMAS[kind])
    frame = frame.with_columns(_values(frame, name, columns[name], source) for name in columns if name in names)
    frame = frame.with_columns(pl.lit(None, dtype).alias(name) for name, dtype in columns.items() if name not in names)
    num_rows = frame.height
    frame = _with_results(frame, kind, source)
    num_left_out = num_rows - frame.height if kind == "finals" else 0
    for name in REQUIRED[kind]:
        if (empty := frame.filter(pl.col(name).is_null())).height:
            raise source.error(empty[ROW][0], name, "no value")
    if kind == "targets":
        frame = _with_tokens_to_target(_in_our_units(frame, options), source)
    else:
        frame = _in_our_units(frame, options)
    for name, wrong, words in _contradictions(kind, options):
        if (rows := frame.filter(wrong)).height:
            raise source.error(rows[ROW][0], name, words.format(**rows.row(0, named=True)))
    others = tuple(name for name in names if name not in columns and not frame.schema[name].is_nested())
    return Table(path, kind, frame.select(*columns, ROW, *others), others, num_left_out)


def _renamed(path: Path, frame: pl.DataFrame, renames: Mapping[str, str]) -> tuple[pl.DataFrame, _Source]:
    used = {theirs: ours for theirs, ours in renames.items() if theirs in frame.columns and theirs != ours}
    ours = [used.get(name, name) for name in frame.columns]
    for theirs, name in used.items():
        if ours.count(name) > 1:
            raise ValueError(f"{path}: --rename {theirs}={name}, but there is another column {name!r}; drop one")
    return frame.rename(used), _Source(path, {name: theirs for theirs, name in used.items()})


def _refuse_other_units(names: Sequence[str]) -> None:
    for name, others in OTHER_UNITS.items():
        for other in others:
            if name in names and other in names:
                raise ValueError(f"columns {name!r} and {other!r} give one quantity in two units: drop one of them")


def _values(frame: pl.DataFrame, name: str, kind: pl.DataType, source: _Source) -> pl.Series:
    """Return a column of ours with its values parsed and within their range."""
    series = frame[name]
    if series.dtype.is_nested() or series.dtype == pl.Boolean:
        row = frame.filter(pl.col(name).is_not_null())[ROW][0]
        raise source.error(row, name, f"expected {'text' if kind == pl.String else 'a number'}, not {series.dtype}")
    if kind == pl.String:
        return _texts(frame.select(ROW, name), source)
    numbers = _numbers(frame.select(ROW, name), source)
    _check_range(frame.select(ROW, numbers), kind, source)
    return numbers.cast(kind)


def _texts(frame: pl.DataFrame, source: _Source) -> pl.Series:
    _, name = frame.columns
    texts = frame[name].cast(pl.String).str.strip_chars()
    texts = texts.set(texts.is_in(_BLANKS), None)
    for column, known in (("protocol", tuple(PROTOCOLS)), ("status", STATUSES)):
        if name == column and (wrong := frame.filter(~texts.is_in(known))).height:
            text = str(wrong[name][0])
            raise source.error(wrong[ROW][0], name, f"{text!r} is unknown; {nearest(text, known)}")
    return texts


def _numbers(frame: pl.DataFrame, source: _Source) -> pl.Series:
    """Return the numbers, null for blanks; only what the parser leaves behind is looked at again."""
    _, name = frame.columns
    given = frame[name]
    if not (given.dtype in (pl.String, pl.Null) or given.dtype.is_numeric()):
        given = given.cast(pl.String)
    numbers = given.cast(pl.Float64, strict=False)
    failed = given.is_not_null() & numbers.is_null()
    if not failed.any():
        return numbers
    texts = given.filter(failed).str.strip_chars()
    again = texts.set(texts.is_in(_BLANKS), None).cast(pl.Float64, strict=False)
    wrong = again.is_null() & ~texts.is_in(_BLANKS)
    if wrong.any():
        row = frame.filter(failed).filter(wrong)
        raise source.error(row[ROW][0], name, f"{row[name][0]!r} is no number")
    return numbers.scatter(failed.arg_true(), again)


def _check_range(frame: pl.DataFrame, kind: pl.DataType, source: _Source) -> None:
    _, name = frame.columns
    value = pl.col(name)
    checks = {
        "is not a finite number": pl.lit(name not in MAY_DIVERGE) & ~value.is_finite(),
        "is not a whole number": pl.lit(kind == pl.Int64) & ((value % 1 != 0) | (value.abs() > _LARGEST_WHOLE)),
        "is below zero": pl.lit(name in MAY_BE_ZERO) & (value < 0),
        "is not above zero": pl.lit(name not in (*MAY_BE_ZERO, "seed")) & value.is_finite() & (value <= 0),
    }
    for words, wrong in checks.items():
        if (rows := frame.filter(wrong)).height:
            raise source.error(rows[ROW][0], name, f"{rows[name][0]:.15g} {words}")


def _with_results(frame: pl.DataFrame, kind: Kind, source: _Source) -> pl.DataFrame:
    """Keep the rows that have a result: other rows of a curve were logged between evaluations."""
    if kind == "targets":
        return frame
    loss = "val_loss_nats" if kind == "curves" else "final_loss_nats"
    kept = frame.filter(pl.col(loss).is_not_null())
    if kept.is_empty():
        raise source.error(frame[ROW][0], loss, "no value, in this row and all others")
    return kept


def _in_our_units(frame: pl.DataFrame, options: TableOptions) -> pl.DataFrame:
    lengths = {"tokens": pl.lit(1), "sequences": pl.lit(options.sequence_length), "steps": pl.col(*BATCHES)}
    nats = _NATS_PER_BIT if options.loss_in == "bits" else 1.0
    frame = frame.with_columns(pl.col(*BATCHES) * lengths[options.batch_in])
    tokens = [pl.col(name) * lengths[options.tokens_in] for name in TOKENS if name in frame.columns]
    return frame.with_columns(*tokens, *(pl.col(name) * nats for name in LOSSES if name in frame.columns))


def _with_tokens_to_target(frame: pl.DataFrame, source: _Source) -> pl.DataFrame:
    """Fill `tokens_to_target` from the steps, and `status`; all but diverged runs must have the one."""
    from_steps, tokens = pl.col("steps_to_target") * pl.col("global_batch_tokens"), pl.col("tokens_to_target")
    differ = (from_steps - tokens).abs() > pl.max_horizontal("global_batch_tokens", 0.01 * tokens)
    if (rows := frame.filter(differ)).height:
        row = rows.row(0, named=True)
        words = "{steps_to_target:.15g} steps of {global_batch_tokens} tokens are not {tokens_to_target:.15g} tokens"
        raise source.error(row[ROW], "steps_to_target", words.format(**row))
    frame = frame.with_columns(tokens_to_target=pl.coalesce(tokens, from_steps))
    if (rows := frame.filter(tokens.is_null() & pl.col("status").eq_missing("diverged").not_())).height:
        name = next((name for name in TO_TARGET if frame[name].is_not_null().any()), TO_TARGET[0])
        words = "no value; of a run that fell short write where it ended, with status not_reached"
        raise source.error(rows[ROW][0], name, words)
    return frame.with_columns(pl.col("status").fill_null("reached"))


def _contradictions(kind: Kind, options: TableOptions) -> Iterator[tuple[str, pl.Expr, str]]:
    """Yield column, condition and words of numbers that cannot all be true: mostly, a unit is not what was said."""
    batch, ask = pl.col("global_batch_tokens"), "; in another unit? (--tokens-in, --batch-in)"
    if options.sequence_length is not None:
        words = f"a batch of {{global_batch_tokens}} tokens is less than a sequence of {options.sequence_length}"
        yield "global_batch_tokens", batch < options.sequence_length, f"{words}; in sequences? (--batch-in sequences)"
    for name in TOKENS:
        if name in TABLE_SCHEMAS[kind] and name != "warmup_tokens":
            short = (pl.col(name) > 0) & (pl.col(name) < batch)
            yield name, short, f"{{{name}}} tokens are less than a batch of {{global_batch_tokens}}{ask}"
    if kind == "curves":
        beyond = pl.col("tokens_seen") > 2 * pl.col("token_budget")
        yield "tokens_seen", beyond, f"{{tokens_seen}} tokens are more than twice token_budget, {{token_budget}}{ask}"
