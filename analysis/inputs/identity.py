"""Which rows of outside tables are one run, and which of their further columns are settings that were tuned.

A run is told apart by `run_id` or, without it, by all its settings. A further column is a setting if it has one value
along a run and its values come back in other runs, two runs a value on average: what changes along a curve was
measured, and what no two runs share is a label or a result.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import polars as pl

from analysis.inputs.table_files import ROW
from analysis.inputs.tables import Table
from analysis.schemas import Columns, polars_schema

#: The table of each row, by its place among those read.
TABLE = "(table)"

#: Settings of a run among our columns, and how the name of a run marks each.
_SETTINGS = {
    "model": "",
    "optimizer": "",
    "global_batch_tokens": "b",
    "peak_lr": "lr",
    "seed": "s",
    "token_budget": "d",
    "warmup_tokens": "w",
    "num_devices": "n",
    "protocol": "",
}
#: Known of a run, and one value a model.
_KNOWN = ("num_params_nonembedding",)
_CELL = ("model", "optimizer", "protocol", "global_batch_tokens")

#: What trackers and data frames write beside the settings; so they do under names with a leading underscore.
_NO_SETTINGS = {
    *("name", "id", "index", "unnamed: 0", "group", "project", "sweep", "url", "user", "notes", "tags"),
    *("state", "status", "created", "date", "runtime", "host", "hostname", "device", "gpu", "commit"),
}


@dataclass(frozen=True)
class Identified:
    """Rows by `run` and mark; a row per run with `run_id`, its settings and `tuning`; further columns that are none."""

    rows: pl.DataFrame
    runs: pl.DataFrame
    ignored: tuple[str, ...]


def identify(tables: Sequence[Table], columns: Columns, mark: str) -> Identified:
    """Tell the runs of tables apart, all of the same `columns`; a run has one row a `mark`, which is one of them.

    Raises: ValueError with file and row for a run that is there twice at a mark, or with two values of a setting.
    """
    schema = polars_schema(columns)
    none = pl.DataFrame(schema={name: schema[name] for name in (*_CELL, mark)} | {ROW: pl.UInt32, TABLE: pl.UInt32})
    frame = pl.concat([none, *(_prepared(number, table) for number, table in enumerate(tables))], how="diagonal")
    others = sorted({name for table in tables for name in table.others})
    settings = [name for name in _SETTINGS if name in frame.columns]
    known = [name for name in _KNOWN if name in frame.columns]
    keys = ["run_id"] if "run_id" in frame.columns else settings
    if keys == ["run_id"]:
        _check_names(frame, [*settings, *known], tables)
    candidates = [name for name in others if name in frame.columns and _may_be_setting(name)]
    axes = _axes(frame, keys, candidates, mark)
    if keys == settings:
        keys = settings + [name for name in axes if frame[name].n_unique() > 1]
    frame = frame.join(_numbered(frame, keys), on=keys, nulls_equal=True).sort("run", mark, TABLE, ROW)
    if keys != ["run_id"]:
        _refuse_mixed(frame, [name for name in candidates if name not in axes], tables)
    _refuse_repeated(frame, mark, tables)
    runs = frame.group_by("run", maintain_order=True).agg(
        pl.col(dict.fromkeys((*keys, *settings, *known, *axes))).first()
    )
    runs = runs.with_columns(tuning=_tuning(runs, axes))
    if "run_id" not in keys:
        runs = runs.with_columns(run_id=_name(keys))
    ignored = tuple(name for name in others if name not in axes)
    return Identified(_with_missing(frame, schema), _with_missing(runs.drop(axes, strict=False), schema), ignored)


def _prepared(number: int, table: Table) -> pl.DataFrame:
    """Drop the columns without values, name model and protocol, and make the further columns text, as CSV has them."""
    size = pl.format("N={}", "num_params_nonembedding")
    frame = table.frame.with_columns(
        pl.coalesce("model", size, pl.lit("unnamed")).alias("model"),
        pl.col("protocol").fill_null("unstated"),
        *(_text(table.frame[name]) for name in table.others),
        pl.lit(number, pl.UInt32).alias(TABLE),
    )
    return frame.select(column for column in frame if column.null_count() < len(column))


def _with_missing(frame: pl.DataFrame, schema: pl.Schema) -> pl.DataFrame:
    missing = {name: kind for name, kind in schema.items() if name not in frame.columns}
    return frame.with_columns(pl.lit(None, kind).alias(name) for name, kind in missing.items())


def _text(values: pl.Series) -> pl.Series:
    texts = values.cast(pl.String)
    return texts.str.strip_suffix(".0") if values.dtype.is_float() else texts


def _may_be_setting(name: str) -> bool:
    """Say whether a further column may hold a setting; a seed by another name must be renamed to count as one."""
    plain = name.lower()
    return not plain.startswith(("_", "(")) and plain not in _NO_SETTINGS and "seed" not in plain


def _check_names(frame: pl.DataFrame, settings: Sequence[str], tables: Sequence[Table]) -> None:
    """Refuse rows without a `run_id`, and runs that have two values of a setting."""
    for row in frame.filter(pl.col("run_id").is_null()).head(1).iter_rows(named=True):
        raise ValueError(f"{_place(row, tables)}, column 'run_id': no value, while other rows have one")
    settled = pl.col(settings).eq_missing(pl.col(settings).first()).all()
    runs = frame.group_by("run_id").agg(settled)
    for name in settings:
        several = runs.filter(~pl.col(name))
        if several.height:
            run = frame.filter(pl.col("run_id") == several["run_id"].min())
            first = run.row(0, named=True)
            other = run.filter(pl.col(name).ne_missing(first[name])).row(0, named=True)
            raise ValueError(
                f"{_place(other, tables)}, column {name!r}: {other[name]}, but {first[name]} in row {first[ROW]} of "
                f"the same run, {first['run_id']}; a setting has one value a run"
            )


def _axes(frame: pl.DataFrame, keys: Sequence[str], candidates: Sequence[str], mark: str) -> list[str]:
    """Return the candidates that are settings.

    Where runs are not named, rows alike in `keys` are as many runs as share a mark. A column then has at most so many
    values among them, and one that tells such runs apart, each at several marks, is a setting though none come back.
    """
    if not candidates:
        return []
    marks = frame.group_by(*keys, mark).agg(num_runs=pl.len())
    groups = marks.group_by(keys).agg(pl.col("num_runs").max())
    values = frame.group_by(keys).agg(pl.len().alias(ROW), pl.col(candidates).n_unique())
    values = values.join(groups, on=keys, nulls_equal=True)
    mixed = frame.join(groups.filter(pl.col("num_runs") > 1), on=keys, how="semi", nulls_equal=True)
    at_mark = mixed.group_by(*keys, mark).agg(pl.col(candidates).n_unique())
    num_runs = values["num_runs"].sum()
    axes = []
    for name in candidates:
        is_constant = (values[name] <= values["num_runs"]).all()
        tells_apart = (at_mark[name] > 1).any() and (values[name] < values[ROW]).all()
        if is_constant and (tells_apart or 2 * frame[name].n_unique() <= num_runs):
            axes.append(name)
    return axes


def _numbered(frame: pl.DataFrame, keys: Sequence[str]) -> pl.DataFrame:
    """Return the keys of every run with its number; runs are numbered in the order of their keys."""
    return frame.select(keys).unique().sort(keys).with_row_index("run")


def _refuse_repeated(frame: pl.DataFrame, mark: str, tables: Sequence[Table]) -> None:
    """Refuse two rows of one run at one mark; the frame is sorted by run and mark."""
    repeated = pl.all_horizontal(pl.col("run", mark) == pl.col("run", mark).shift())
    for later in frame.with_row_index("(place)").filter(repeated).head(1).iter_rows(named=True):
        earlier = frame.row(later["(place)"] - 1, named=True)
        column = "token_budget" if tables[later[TABLE]].kind == "finals" else mark
        raise ValueError(
            f"{_place(later, tables)}, column {column!r}: the same run at {later[mark]} as {_place(earlier, tables)}; "
            f"drop one, or tell repeated runs apart by a column seed or run_id"
        )


def _refuse_mixed(frame: pl.DataFrame, columns: Sequence[str], tables: Sequence[Table]) -> None:
    """Refuse a column of few values that go back and forth along a run: it may tell runs apart that share no mark.

    What is counted along a run, as epochs are, changes no more often than it has values; what is measured has many.
    """
    same_run = pl.col("run") == pl.col("run").shift()
    for name in columns:
        change = frame.select(
            (same_run & pl.col(name).ne_missing(pl.col(name).shift())).fill_null(value=False)
        ).to_series()
        new_values = (frame.group_by("run").agg(pl.col(name).n_unique() - 1))[name].sum()
        if 0 < 2 * new_values < change.sum() and 2 * new_values < frame.height:
            row = frame.row(int(change.arg_true()[0]), named=True)
            raise ValueError(
                f"{_place(row, tables)}, column {name!r}: goes back and forth along what would be one run; "
                f"name the runs in a column run_id, or drop this one if it is no setting"
            )


def _place(row: dict[str, object], tables: Sequence[Table]) -> str:
    number = row[TABLE]
    assert isinstance(number, int)
    return f"{tables[number].path}, row {row[ROW]}"


def _tuning(runs: pl.DataFrame, axes: Sequence[str]) -> pl.Expr:
    """Return `name=value` of the settings that take several values within a cell."""
    varied = [name for name in sorted(axes) if (runs.group_by(_CELL).agg(pl.col(name).n_unique())[name] > 1).any()]
    if not varied:
        return pl.lit("")
    return pl.concat_str((pl.lit(f"{name}=") + pl.col(name) for name in varied), separator=", ", ignore_nulls=True)


def _name(keys: Sequence[str]) -> pl.Expr:
    parts = [pl.lit(_SETTINGS.get(name, f"{name}=")) + pl.col(name).cast(pl.String) for name in keys]
    return pl.concat_str(parts, separator="-", ignore_nulls=True)
