"""Records from outside tables: what is unknown of a run is null."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import polars as pl

from analysis import format as fmt
from analysis.inputs.chosen_targets import choose_targets
from analysis.inputs.identity import Identified, identify
from analysis.inputs.nominal_budgets import NominalBudgets, nominal_budgets
from analysis.inputs.protocols import AVERAGED_PROTOCOLS
from analysis.inputs.records import Records
from analysis.inputs.table_schemas import CURVES_TABLE, TARGETS_TABLE, alike
from analysis.inputs.tables import Table, TableOptions, read_tables
from analysis.schemas import EVALUATIONS, RUNS, TARGETS, Columns, polars_schema
from harness.frozen import nearest
from harness.record import PlannedRun, SweepManifest

_DEFAULT_BASELINE = "adamw"

#: Losses closer than this are one target, in nats: they are written with fewer digits.
_SAME_LOSS = 1e-6


def from_tables(
    paths: Sequence[Path],
    options: TableOptions | None = None,
    baseline: str | None = None,
    targets: Sequence[float] = (),
) -> Records:
    """Read outside tables of any kinds as the records of one sweep.

    `baseline` is adamw by default, or else the first optimizer by name. `targets`, in nats per token, are the losses
    that curves are to reach; without any they are chosen (`choose_targets`). A table of targets brings its own, of
    which `targets` keeps those named.
    Assumption: a curve without `token_budget` ends where its run was planned to end (`nominal_budgets`).

    Raises: ValueError, one line with file, row and column for what a table has wrong; for an unknown baseline; and for
    target losses that no row of a table of targets has.
    """
    options = options or TableOptions()
    tables = read_tables(paths, options)
    curves = identify([_as_curve(table) for table in tables if table.kind != "targets"], CURVES_TABLE, "tokens_seen")
    budgets = nominal_budgets(curves)
    stated = identify([table for table in tables if table.kind == "targets"], TARGETS_TABLE, "target_loss_nats")
    given = _given(stated, targets)
    by_model = dict.fromkeys(curves.runs["model"], tuple(targets)) if targets else choose_targets(curves.rows)
    runs = _united(_runs_of_curves(curves, budgets, options), _runs_of_targets(stated, options))
    losses = {*given["target_loss_nats"], *(loss for losses in by_model.values() for loss in losses)}
    manifest = SweepManifest(
        name=", ".join(path.stem for path in paths),
        baseline=_baseline(runs, baseline),
        targets_nats=tuple(sorted(losses)),
        runs=tuple(PlannedRun(run_id=run_id) for run_id in runs["run_id"]),
    )
    notes = [
        *_left_out(tables),
        *_ignored({*curves.ignored, *stated.ignored}),
        *_unnamed(tables),
        *budgets.notes,
        *([] if targets else _chosen(by_model, tables)),
    ]
    return Records(manifest, runs, _evaluations(curves), given, by_model, tuple(notes), outside=True)


def _as_curve(table: Table) -> Table:
    """Return finals as curves of one mark, at the end."""
    if table.kind == "curves":
        return table
    frame = table.frame.with_columns(tokens_seen="token_budget", val_loss_nats="final_loss_nats")
    return replace(table, frame=frame.drop("final_loss_nats"))


def _runs_of_curves(curves: Identified, budgets: NominalBudgets, options: TableOptions) -> pl.DataFrame:
    """Return the runs in the columns of `schemas.RUNS`; one with a loss that is not finite diverged."""
    ends = curves.rows.group_by("run").agg(
        pl.col("tokens_seen", "train_seconds").last(), diverged=(~pl.col("val_loss_nats").is_finite()).any()
    )
    batch, budget = pl.col("global_batch_tokens"), pl.col("token_budget")
    at_end = pl.when(pl.col("nominal").is_not_null() | (pl.col("tokens_seen") > budget - batch)).then(pl.lit("budget"))
    runs = (
        curves.runs.drop("tokens_seen", "train_seconds")
        .join(ends, on="run")
        .join(budgets.by_run, on="run", how="left")
        .with_columns(token_budget=pl.coalesce(budget, "nominal"))
        .with_columns(
            realized_tokens=budget // batch * batch,
            step=_step(),
            stop_reason=pl.when("diverged").then(pl.lit("non_finite_loss")).otherwise(at_end),
        )
    )
    return _as_runs(runs, options)


def _runs_of_targets(stated: Identified, options: TableOptions) -> pl.DataFrame:
    """Return the runs of tables of targets, of which neither end nor seconds are known."""
    ends = stated.rows.group_by("run").agg(diverged=(pl.col("status") == "diverged").any())
    return _as_runs(stated.runs.drop("train_seconds").join(ends, on="run"), options)


def _as_runs(runs: pl.DataFrame, options: TableOptions) -> pl.DataFrame:
    runs = runs.with_columns(
        status=pl.when("diverged").then(pl.lit("diverged")).otherwise(pl.lit("finished")),
        stage=pl.lit("grid"),
        init_seed="seed",
        data_seed="seed",
        sequence_length=pl.lit(options.sequence_length, pl.Int64),
    )
    return _filled(runs, RUNS)


def _united(of_curves: pl.DataFrame, of_targets: pl.DataFrame) -> pl.DataFrame:
    """Return all runs by name. Raises: ValueError for one of both kinds, and for a model of two sizes."""
    runs = pl.concat([of_curves, of_targets]).sort("run_id")
    if runs["run_id"].is_duplicated().any():
        run = runs.filter(pl.col("run_id").is_duplicated())["run_id"][0]
        raise ValueError(f"run {run} is in a table of targets and in one of curves or finals: leave one out")
    sizes = runs.group_by("model").agg(pl.col("num_params_nonembedding").unique().drop_nulls().sort())
    for model, several in sizes.filter(pl.col("num_params_nonembedding").list.len() > 1).sort("model").iter_rows():
        raise ValueError(f"model {model} has {fmt.listed([str(size) for size in several])} num_params_nonembedding")
    return runs


def _evaluations(curves: Identified) -> pl.DataFrame:
    """Return the rows in the columns of `schemas.EVALUATIONS`: the loss is that which the run's protocol reads."""
    loss = pl.when(pl.col("val_loss_nats").is_finite()).then("val_loss_nats")
    averaged = pl.col("protocol").is_in(AVERAGED_PROTOCOLS)
    rows = curves.rows.drop("run_id").join(curves.runs.select("run", "run_id"), on="run", maintain_order="left")
    return _filled(
        rows.with_columns(
            step=_step(),
            val_loss_nats=pl.when(~averaged).then(loss),
            val_loss_averaged_nats=pl.when(averaged).then(loss),
        ),
        EVALUATIONS,
    )


def _given(stated: Identified, targets: Sequence[float]) -> pl.DataFrame:
    """Return the rows of tables of targets in the columns of `schemas.TARGETS`, those of `targets` if any are named."""
    rows = stated.rows.drop("run_id").join(stated.runs.select("run", "run_id", "tuning"), on="run")
    if targets and rows.height:
        named = pl.any_horizontal((pl.col("target_loss_nats") - loss).abs() < _SAME_LOSS for loss in targets)
        there = rows["target_loss_nats"].unique().sort()
        rows = rows.filter(named)
        if rows.is_empty():
            of = "targets" if len(there) > 1 else "target"
            raise ValueError(
                f"no run has a target loss of {_losses(targets)} nats: the table has the {of} {_losses(there)}"
            )
    reached, short = pl.col("status") == "reached", pl.col("status") == "not_reached"
    tokens = pl.col("tokens_to_target")
    rows = rows.with_columns(
        stage=pl.lit("grid"),
        init_seed="seed",
        data_seed="seed",
        tokens_to_target=pl.when(reached).then(tokens),
        tokens_seen=pl.when(short).then(tokens),
        bound_tokens=pl.when(short).then(tokens),
        steps_to_target=pl.when(reached).then(tokens / pl.col("global_batch_tokens")),
        train_seconds_to_target=pl.when(reached).then("train_seconds"),
    )
    return _filled(rows, TARGETS)


def _filled(frame: pl.DataFrame, columns: Columns) -> pl.DataFrame:
    """Return exactly `columns`, null where the frame has none."""
    schema = polars_schema(columns)
    missing = [pl.lit(None).alias(name) for name in schema if name not in frame.columns]
    return frame.with_columns(missing).select(pl.col(name).cast(kind) for name, kind in schema.items())


def _step() -> pl.Expr:
    return (pl.col("tokens_seen") / pl.col("global_batch_tokens")).round()


def _baseline(runs: pl.DataFrame, baseline: str | None) -> str:
    names: list[str] = runs["optimizer"].unique().sort().to_list()
    if baseline is None:
        return next((name for name in names if name.lower() == _DEFAULT_BASELINE), names[0])
    if baseline not in names:
        raise ValueError(f"--baseline {baseline}: no run of that optimizer; {nearest(baseline, names)}")
    return baseline


def _left_out(tables: Iterable[Table]) -> list[str]:
    return [
        f"{table.path}: {fmt.count(table.num_left_out, 'run')} without a final loss left out"
        for table in tables
        if table.num_left_out
    ]


def _ignored(names: Iterable[str]) -> list[str]:
    listed = ", ".join(sorted(names))
    return [f"columns ignored, since they change along a run or no two runs share their values: {listed}"] * bool(
        listed
    )


def _unnamed(tables: Iterable[Table]) -> list[str]:
    """Return a note for every further column by whose name many know one of ours that its table lacks."""
    return [
        f"{table.path}: column {theirs} looks like {ours}: --rename {theirs}={ours}"
        for table in tables
        for ours, theirs in alike(table.others, _lacking(table))
    ]


def _lacking(table: Table) -> list[str]:
    return [column.name for column in table.frame if column.null_count() == len(column)]


def _chosen(by_model: Mapping[str, Sequence[float]], tables: Iterable[Table]) -> list[str]:
    chosen = "; ".join(f"{model}: {_losses(losses)}" for model, losses in by_model.items() if losses)
    if chosen:
        return [f"target losses in nats, chosen from the curves: {chosen}"]
    if any(table.kind == "curves" for table in tables):
        return ["no target loss could be chosen: no curve that counts falls from one evaluation to another"]
    return []


def _losses(losses: Iterable[float]) -> str:
    return ", ".join(fmt.loss(loss) for loss in losses)
