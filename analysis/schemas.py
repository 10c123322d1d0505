"""Every table of the analysis: its columns, their types and units, and what they mean.

A null is explained by the row's `verdict` and `reason`. Columns `x_low` and `x_high` are the ends of an interval at the
level of the analysis; a null end beside a number means that the data bound it on the other side only, or not at all.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import polars as pl

from harness.record import EVALUATION_COLUMNS, RUN_COLUMNS, Column

Columns = Mapping[str, Column]

_TYPE_NAMES = {str: "text", int: "integer", float: "number", bool: "true/false"}
_POLARS = {str: pl.String, int: pl.Int64, float: pl.Float64, bool: pl.Boolean}


def polars_schema(columns: Columns) -> pl.Schema:
    """Return the columns' polars types, in order."""
    return pl.Schema({name: _POLARS[column.type] for name, column in columns.items()})


def table(rows: Iterable[Mapping[str, Any]], columns: Columns) -> pl.DataFrame:
    """Build a frame with exactly `columns` from rows that name all of them, sorted by the leading columns."""
    rows = list(rows)
    for row in rows:
        assert row.keys() == columns.keys(), set(row) ^ set(columns)
    frame = pl.DataFrame(rows, schema=polars_schema(columns), orient="row")
    return frame.sort(frame.columns, nulls_last=True, maintain_order=True)


def _interval(name: str, unit: str, meaning: str) -> dict[str, Column]:
    return {
        name: Column(float, unit, meaning),
        f"{name}_low": Column(float, unit, f"lower end of the interval of {name}"),
        f"{name}_high": Column(float, unit, f"upper end of the interval of {name}"),
    }


_MODEL = {"model": RUN_COLUMNS["model"]}
_OPTIMIZER = {"optimizer": RUN_COLUMNS["optimizer"]}
_BATCH = {"global_batch_tokens": RUN_COLUMNS["global_batch_tokens"]}
_PROTOCOL = {"protocol": RUN_COLUMNS["protocol"]}
_TARGET = {"target_loss_nats": Column(float, "nats/token", "validation loss to be reached")}
_PAIR = {
    "baseline": Column(str, "", "optimizer in the numerator of the ratio"),
    "challenger": Column(str, "", "optimizer in the denominator"),
}
_VERDICT = {
    "verdict": Column(str, "", "ok, or what forbids to read the number as it stands"),
    "reason": Column(str, "", "the verdict in words, with what was assumed; empty when there is nothing to add"),
}
_TO_TARGET = {
    "steps_to_target": Column(float, "steps", "tokens_to_target / global_batch_tokens"),
    "flops_to_target": Column(float, "FLOP", "training FLOPs until the target, optimizer included"),
    "train_seconds_to_target": Column(float, "s", "seconds inside optimizer steps until the target"),
}

RUNS: Columns = RUN_COLUMNS | {"stage": Column(str, "", "grid, or confirm: fresh seeds at a chosen rate")}

EVALUATIONS: Columns = EVALUATION_COLUMNS

TARGETS: Columns = {
    **{name: RUNS[name] for name in ("run_id", "stage", "model", "optimizer", "global_batch_tokens", "peak_lr")},
    **{name: RUNS[name] for name in ("init_seed", "data_seed", "protocol", "warmup_tokens", "num_devices")},
    **_TARGET,
    "status": Column(str, "", "reached, not_reached (censored at tokens_seen), reached_at_first_eval, diverged"),
    "tokens_to_target": Column(float, "tokens", "first crossing of the target, interpolated; null unless reached"),
    "tokens_seen": Column(int, "tokens", "tokens at the run's last evaluation"),
    "lowest_loss_nats": Column(float, "nats/token", "lowest loss that the protocol read; null where none was finite"),
    **_TO_TARGET,
}

RATES: Columns = {
    **_MODEL,
    **_OPTIMIZER,
    **_BATCH,
    **_TARGET,
    **_PROTOCOL,
    "peak_lr": RUNS["peak_lr"],
    "num_runs": Column(int, "", "grid runs at this rate"),
    "num_reached": Column(int, "", "how many of them reached the target after their first evaluation"),
    "num_reached_at_first_eval": Column(int, "", "how many of them were at the target at their first evaluation"),
    "tokens_to_target": Column(float, "tokens", "geometric mean over the runs; null unless num_reached is num_runs"),
    "fitted_tokens": Column(float, "tokens", "the quadratic in log rate, curvature pooled over batches"),
}

CELLS: Columns = {
    **_MODEL,
    **_OPTIMIZER,
    **_BATCH,
    **_TARGET,
    **_PROTOCOL,
    "best_lr": Column(float, "", "chosen learning rate: one that was run"),
    **_interval("optimal_lr", "", "learning rate at the minimum of the quadratic in log rate"),
    "lr_verdict": Column(
        str, "", "ok: bracketed by rates tried; edge_of_grid: outside them; not_identified, single_rate"
    ),
    "lr_reason": Column(str, "", "what the grid leaves open about the chosen rate; empty when nothing"),
    "seeds_from": Column(str, "", "fresh: seeds that took no part in the choice of the rate; grid: those that did"),
    "num_seeds": Column(int, "", "runs at the chosen rate"),
    "num_reached": Column(int, "", "how many of them reached the target"),
    **_interval("tokens_to_target", "tokens", "geometric mean over the runs at the chosen rate"),
    **_TO_TARGET,
    **_VERDICT,
}

CRITICAL_BATCHES: Columns = {
    **_MODEL,
    **_OPTIMIZER,
    **_TARGET,
    **_PROTOCOL,
    "definition": Column(str, "", "emin_over_smin or overhead_20pct"),
    **_interval("critical_batch_tokens", "tokens", "critical batch size by the row's definition"),
    **_interval("t_min_tokens", "tokens", "tokens to the target at vanishing batch"),
    **_interval("s_min_steps", "steps", "steps to the target at infinite batch"),
    "num_batches": Column(int, "", "batch sizes in the fit"),
    "lack_of_fit_p": Column(float, "", "p-value of the misfit against the replicate variance"),
    "rms_residual": Column(float, "", "root mean square of the residuals of log T"),
    **_VERDICT,
}

FIT_CURVES: Columns = {
    **_MODEL,
    **_OPTIMIZER,
    **_TARGET,
    **_PROTOCOL,
    **_BATCH,
    **_interval("tokens_to_target", "tokens", "fitted T_min (1 + B / B_crit)"),
    **_interval("steps_to_target", "steps", "fitted tokens_to_target / global_batch_tokens"),
}

TOKEN_RATIOS: Columns = {
    **_MODEL,
    **_PAIR,
    **_TARGET,
    **_PROTOCOL,
    **_BATCH,
    **_interval("token_ratio", "", "tokens of the baseline over tokens of the challenger, each at its best rate"),
    "num_pairs": Column(int, "", "pairs of runs with the same seeds; 0: unpaired"),
    **_VERDICT,
}

RATIO_TRENDS: Columns = {
    **_MODEL,
    **_PAIR,
    **_TARGET,
    **_PROTOCOL,
    **_interval("slope", "", "d log token_ratio / d log global_batch_tokens"),
    **_VERDICT,
}

FRONTIER: Columns = {
    **_MODEL,
    **_OPTIMIZER,
    **_TARGET,
    **_PROTOCOL,
    **_BATCH,
    "num_devices": Column(int, "", "devices"),
    "kind": Column(str, "", "measured: the runs' own seconds; projected: by the cost model"),
    "train_seconds": Column(float, "s", "time to the target inside optimizer steps"),
    "device_seconds": Column(float, "s", "train_seconds × num_devices"),
    "train_flops": Column(float, "FLOP", "training FLOPs to the target"),
    "on_frontier": Column(
        bool, "", "no other point of its kind, optimizer and target is as fast and costs fewer device_seconds"
    ),
    "on_flops_frontier": Column(bool, "", "the same with train_flops as the cost"),
    **_VERDICT,
}

COST_MODEL: Columns = {
    "name": Column(str, "", "constant of the cost model, with model and optimizer where it depends on them"),
    "value": Column(float, "", "its value in the row's unit"),
    "unit": Column(str, "", "unit of value"),
    "source": Column(str, "", "fitted to which runs, or assumed"),
}

EQUAL_BUDGET: Columns = {
    **_MODEL,
    **_OPTIMIZER,
    **_BATCH,
    **_PROTOCOL,
    "tokens": Column(int, "tokens", "training tokens that every run compared has seen"),
    "mark": Column(str, "", "final: the end of every run compared; intermediate: on the way of some"),
    **_interval("val_loss_nats", "nats/token", "mean over the runs at the chosen rate, interpolated in log tokens"),
    "num_runs": Column(int, "", "runs at the chosen rate"),
    "peak_lr": RUNS["peak_lr"],
}

AGREEMENT: Columns = {
    "quantity": Column(str, "", "column that is compared"),
    "where": Column(str, "", "the row it stands in: model, optimizer, batch, target"),
    "reference": Column(float, "", "number of the reference, in the unit of the quantity"),
    "reference_low": Column(float, "", "lower end of its interval"),
    "reference_high": Column(float, "", "upper end of its interval"),
    "new": Column(float, "", "number of this sweep"),
    "new_low": Column(float, "", "lower end of its interval"),
    "new_high": Column(float, "", "upper end of its interval"),
    "agrees": Column(bool, "", "difference within the combined interval; null where that cannot be said"),
    "reason": Column(str, "", "why it cannot be said"),
}

#: All tables of an `Estimates`, by the names of its fields.
TABLES: dict[str, Columns] = {
    "targets": TARGETS,
    "rates": RATES,
    "cells": CELLS,
    "critical_batches": CRITICAL_BATCHES,
    "fit_curves": FIT_CURVES,
    "token_ratios": TOKEN_RATIOS,
    "ratio_trends": RATIO_TRENDS,
    "frontier": FRONTIER,
    "cost_model": COST_MODEL,
    "equal_budget": EQUAL_BUDGET,
    "agreement": AGREEMENT,
}


def data_dictionary() -> str:
    """Return every table with its columns, types, units and meanings, in Markdown: the body of results/README.md."""
    tables = {"runs": RUNS, "evaluations": EVALUATIONS} | TABLES
    return "\n\n".join(f"### {name}\n\n{_markdown(columns)}" for name, columns in tables.items())


def _markdown(columns: Columns) -> str:
    head = "| column | type | unit | meaning |\n| --- | --- | --- | --- |\n"
    return head + "\n".join(
        f"| `{name}` | {_TYPE_NAMES[column.type]} | {column.unit} | {column.meaning} |"
        for name, column in columns.items()
    )
