"""Every table of the analysis: its columns, their types and units, and what they mean.

A null is explained by the row's `verdict`, `reasons` and `explanation`. Columns `x_low` and `x_high` are the ends of an
interval at the level of the analysis; a null end beside a number means that the data bound it on the other side only,
or not at all.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import polars as pl

from harness.record import DIAGNOSTIC_COLUMNS, EVALUATION_COLUMNS, RUN_COLUMNS, Column

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
    "verdict": Column(str, "", "ok, or the gravest of what forbids to read the number as it stands"),
    "reasons": Column(str, "", "all findings by name, joined by `, `, the gravest first; `ok` names a reservation"),
    "explanation": Column(str, "", "the words of each finding in the same order, joined by `; `"),
}
_TO_TARGET = {
    "steps_to_target": Column(float, "steps", "tokens_to_target / global_batch_tokens, or those taken if that changed"),
    "flops_to_target": Column(float, "FLOP", "training FLOPs until the target, optimizer included"),
    "train_seconds_to_target": Column(float, "s", "seconds inside optimizer steps until the target"),
}

_TUNING = {"tuning": Column(str, "", "further settings that were tuned beside the rate, `name=value`; empty when none")}

RUNS: Columns = RUN_COLUMNS | {"stage": Column(str, "", "grid, or confirm: fresh seeds at a chosen rate")} | _TUNING

EVALUATIONS: Columns = EVALUATION_COLUMNS

DIAGNOSTICS: Columns = DIAGNOSTIC_COLUMNS

TARGETS: Columns = {
    **{name: RUNS[name] for name in ("run_id", "stage", "model", "optimizer", "global_batch_tokens", "peak_lr")},
    **_TUNING,
    **{name: RUNS[name] for name in ("init_seed", "data_seed", "protocol", "warmup_tokens", "num_devices")},
    **_TARGET,
    "status": Column(str, "", "reached, not_reached (censored at tokens_seen), reached_at_first_eval, diverged"),
    "tokens_to_target": Column(float, "tokens", "first crossing of the target, interpolated; null unless reached"),
    "tokens_seen": Column(int, "tokens", "tokens at the run's last evaluation"),
    "bound_tokens": Column(
        float,
        "tokens",
        "what is known of T without a crossing: it is above (not_reached) or below (at_first_eval) this",
    ),
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
    **_TUNING,
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
    **_TUNING,
    **_interval("optimal_lr", "", "learning rate at the minimum of the quadratic in log rate"),
    "lr_verdict": Column(
        str, "", "ok: bracketed by rates tried; edge_of_grid: outside them; not_identified, single_rate"
    ),
    "lr_reason": Column(str, "", "what the grid leaves open about the chosen rate; empty when nothing"),
    "seeds_from": Column(str, "", "fresh: seeds that took no part in the choice of the rate; grid: those that did"),
    "num_seeds": Column(int, "", "runs at the chosen rate; all runs where none could be chosen"),
    "num_reached": Column(int, "", "how many of them reached the target"),
    "num_censored": Column(int, "", "how many of them give a bound of T alone"),
    "num_diverged": Column(int, "", "how many of them diverged"),
    **_interval(
        "tokens_to_target",
        "tokens",
        "geometric mean over the runs at the chosen setting, bounds by likelihood, less the luck of the choice; "
        "without one, the runs' bounds give an end",
    ),
    **_TO_TARGET,
    **_VERDICT,
}

CRITICAL_BATCHES: Columns = {
    **_MODEL,
    **_OPTIMIZER,
    **_TARGET,
    **_PROTOCOL,
    "definition": Column(str, "", "one of the definitions below"),
    "branch_tokens": Column(int, "tokens", "of `branched`: tokens of training at which the branches start; else null"),
    "residuals": Column(str, "", "what least squares compares: log (log T), raw_tokens, raw_steps; with the loss"),
    **_interval("critical_batch_tokens", "tokens", "critical batch size by the row's definition"),
    "tokens_to_target": Column(float, "tokens", "T at the critical batch, log T interpolated between the batches"),
    **_interval(
        "t_min_tokens", "tokens", "tokens to the target at vanishing batch; the least, where T falls before it rises"
    ),
    **_interval("s_min_steps", "steps", "steps to the target at infinite batch"),
    **_interval(
        "exponent", "", "α of T = T_min (1 + (B / B_crit)^α); taken as 1 in emin_over_smin unless replicates refute it"
    ),
    **_interval("tail_slope", "", "d log S / d log B beyond the kink; -1 before it"),
    "num_batches": Column(int, "", "batch sizes in the fit"),
    "lack_of_fit_p": Column(float, "", "p-value of the misfit against the replicate variance"),
    "rms_residual": Column(float, "", "root mean square of the residuals of log T"),
    "aicc": Column(float, "", "Akaike's criterion, corrected; null with fewer batches than parameters + 3"),
    **_VERDICT,
}

FIT_CURVES: Columns = {
    **_MODEL,
    **_OPTIMIZER,
    **_TARGET,
    **_PROTOCOL,
    **_BATCH,
    **_interval("tokens_to_target", "tokens", "the curve that gives emin_over_smin: T_min (1 + (B / B_crit)^α)"),
    **_interval("steps_to_target", "steps", "fitted tokens_to_target / global_batch_tokens"),
}

LOSS_LAWS: Columns = {
    **_MODEL,
    **_OPTIMIZER,
    **_PROTOCOL,
    **_BATCH,
    **_interval("floor_nats", "nats/token", "E of L(D) = E + A D^-β, shared by the batches of an optimizer"),
    **_interval("exponent", "", "β of the same law"),
    "log_prefactor": Column(float, "", "log A of the same law, D in tokens"),
    "num_budgets": Column(int, "", "token budgets in the fit of this batch"),
    "min_tokens": Column(float, "tokens", "smallest budget: the law is not used below"),
    "max_tokens": Column(float, "tokens", "largest budget: the law is not used beyond"),
    "rms_residual_nats": Column(float, "nats/token", "root mean square of the residuals"),
    **_VERDICT,
}

LAWS: Columns = {
    "of": Column(str, "", "what the power law is of: critical_batch_tokens"),
    "definition": Column(str, "", "definition of the critical batch"),
    "model": Column(str, "", "the model within which the law holds; null: it goes across models"),
    **_OPTIMIZER,
    **_PROTOCOL,
    "target_loss_nats": Column(float, "nats/token", "the loss at which it holds; null: it goes across losses"),
    "by": Column(
        str, "", "variables of the law, joined by a comma: num_params_nonembedding, tokens_to_target, target_loss_nats"
    ),
    "term": Column(str, "", "the variable of this row"),
    **_interval("exponent", "", "exponent of the term"),
    **_interval("prefactor", "", "factor of the law in tokens and the units of its variables"),
    "num_points": Column(int, "", "critical batches in the fit"),
    **_VERDICT,
}

TOKEN_RATIOS: Columns = {
    **_MODEL,
    **_PAIR,
    **_TARGET,
    **_PROTOCOL,
    **_BATCH,
    **_interval("token_ratio", "", "tokens of the baseline over tokens of the challenger, each at its best rate"),
    **_interval("tokens_saved", "tokens", "tokens of the baseline less those of the challenger"),
    "p_value": Column(float, "", "two-sided test of a ratio of 1 against the noise of repeated seeds"),
    "p_value_holm": Column(float, "", "the same after Holm's correction over the challengers and batches at a target"),
    "num_pairs": Column(int, "", "pairs of runs with the same seeds; 0: unpaired"),
    **_VERDICT,
}

RATIO_TRENDS: Columns = {
    **_MODEL,
    **_PAIR,
    **_TARGET,
    **_PROTOCOL,
    **_interval("slope", "", "d log token_ratio / d log global_batch_tokens"),
    **_interval("largest_drop", "", "largest fall of log R to a larger batch, over all pairs at once; below 0: a rise"),
    "drop_from_tokens": Column(int, "tokens", "batch where that fall begins"),
    "drop_to_tokens": Column(int, "tokens", "batch where it ends"),
    **_VERDICT,
}

RATIO_DECOMPOSITION: Columns = {
    **_MODEL,
    **_PAIR,
    **_TARGET,
    **_PROTOCOL,
    "quantity": Column(
        str,
        "",
        "ratio_small_batch (R_0), ratio_large_batch (R_∞), critical_batch_ratio (at equal loss: R_∞ / R_0 at α = 1), "
        "critical_batch_ratio_equal_tokens (at the loss that the challenger reaches with the baseline's T_min), "
        "exponent (α of both), "
        "tail_slope_baseline, tail_slope_challenger, tail_slope_difference (of log S beyond the kink)",
    ),
    **_interval("value", "", "the quantity"),
    **_VERDICT,
}

RATE_RULES: Columns = {
    **_MODEL,
    **_PAIR,
    **_TARGET,
    **_PROTOCOL,
    "rule": Column(
        str, "", "tuned: each batch at its best rate; square_root: the best rate of one batch, times √B; fixed"
    ),
    **_BATCH,
    **_interval("token_ratio", "", "the token ratio under the rule, read off the fitted quadratics in log rate"),
    **_VERDICT,
}

_DEVICE = {"device": Column(str, "", "kind of device, never mixed with another; unstated where a table does not say")}
_POINTS = {"kind": Column(str, "", "measured or projected points")} | _DEVICE

FRONTIER: Columns = {
    **_MODEL,
    **_OPTIMIZER,
    **_TARGET,
    **_PROTOCOL,
    **_BATCH,
    "num_devices": Column(int, "", "devices; null where a table does not say"),
    "kind": Column(str, "", "measured: the runs' own seconds; projected: by the cost model"),
    **_DEVICE,
    **_interval("train_seconds", "s", "time to the target inside optimizer steps"),
    **_interval("device_seconds", "s", "train_seconds × num_devices"),
    "train_flops": Column(float, "FLOP", "training FLOPs to the target"),
    "model_error": Column(float, "", "cost model over measured seconds of the same point, less 1; null if projected"),
    "on_frontier": Column(
        bool,
        "",
        "no other point of its kind, device, optimizer and target is as fast and costs fewer device_seconds; null "
        "where these are",
    ),
    "on_flops_frontier": Column(bool, "", "the same with train_flops as the cost"),
    **_VERDICT,
}

DOMINANCE: Columns = {
    **_MODEL,
    **_PAIR,
    **_TARGET,
    **_PROTOCOL,
    **_POINTS,
    "cost": Column(str, "", "device_seconds or train_flops"),
    **_interval("share", "", "share of the time axis, in log seconds, where the challenger's frontier costs less"),
    **_interval("cost_ratio", "", "cost of the baseline over the challenger's at the same deadline, geometric mean"),
    "from_seconds": Column(float, "s", "shortest deadline that both frontiers meet"),
    "to_seconds": Column(float, "s", "longest deadline that distinguishes points of either frontier"),
    **_VERDICT,
}

CHOICES: Columns = {
    **_MODEL,
    **_TARGET,
    **_PROTOCOL,
    **_POINTS,
    "question": Column(str, "", "fastest: within a budget of device-seconds; cheapest: within a deadline in seconds"),
    "limit": Column(float, "s", "the budget or the deadline"),
    **_OPTIMIZER,
    **_BATCH,
    "num_devices": Column(int, "", "devices"),
    **_interval("train_seconds", "s", "time of the best point within the limit; null where no point is within it"),
    **_interval("device_seconds", "s", "its device-seconds"),
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
    "tokens": Column(int, "tokens", "the budget, or at a mark the tokens that every run compared has seen"),
    "mark": Column(str, "", "final: the end of a token budget; intermediate: on the way of some runs compared"),
    **_interval("val_loss_nats", "nats/token", "mean over the runs at the chosen rate, interpolated in log tokens"),
    "num_runs": Column(int, "", "runs at the chosen rate"),
    "peak_lr": RUNS["peak_lr"],
    **_TUNING,
}

_BUDGET = {"token_budget": Column(int, "tokens", "tokens that every run compared was given")}

FINAL_LOSSES: Columns = {
    **_MODEL,
    **_OPTIMIZER,
    **_PROTOCOL,
    **_BATCH,
    **_BUDGET,
    "tokens": Column(int, "tokens", "what whole steps of the budget gave"),
    "peak_lr": RUNS["peak_lr"],
    **_TUNING,
    "lr_verdict": CELLS["lr_verdict"],
    "seeds_from": Column(str, "", "fresh: seeds that took no part in the choice of the rate; grid: those that did"),
    "num_runs": Column(int, "", "runs at the chosen rate"),
    **_interval("final_loss_nats", "nats/token", "mean loss at the end of the budget at the chosen rate"),
    **_VERDICT,
}

GAPS: Columns = {
    **_MODEL,
    **_PAIR,
    **_PROTOCOL,
    **_BATCH,
    **_BUDGET,
    **_interval("gap_nats", "nats/token", "final loss of the baseline less that of the challenger"),
    "p_value": Column(float, "", "two-sided t test of no gap against the noise of repeated seeds"),
    "p_value_holm": Column(float, "", "the same after Holm's correction over the challengers and batches of a budget"),
    "num_pairs": Column(int, "", "pairs of runs with the same seeds; 0: unpaired"),
    **_VERDICT,
}

ISO_LOSS: Columns = {
    **_MODEL,
    **_PAIR,
    **_PROTOCOL,
    **_BATCH,
    **_BUDGET,
    **_interval("batch_ratio", "", "batch at which the challenger has the baseline's loss, over the baseline's batch"),
    "lower_bound": Column(float, "", "ratio known to be exceeded, where the largest batch still does better"),
    **_VERDICT,
}

SPEEDUPS: Columns = {
    **_MODEL,
    **_PAIR,
    **_PROTOCOL,
    **_BUDGET,
    **_interval(
        "token_ratio", "", "tokens of the baseline's loss law for the challenger's loss, over the challenger's"
    ),
    **_VERDICT,
}

TUNING: Columns = {
    **_MODEL,
    **_OPTIMIZER,
    "num_runs": Column(int, "", "runs"),
    "num_settings": Column(int, "", "learning rates and further settings tried, over all batches"),
    "num_batches": Column(int, "", "batch sizes"),
    "tokens": Column(int, "tokens", "training tokens of all runs"),
    "grid_tokens": Column(int, "tokens", "training tokens of the runs that chose"),
    "train_flops": Column(float, "FLOP", "training FLOPs of all runs"),
    "train_seconds": Column(float, "s", "training seconds of all runs"),
}

_GROUP = {"group": DIAGNOSTIC_COLUMNS["group"]}

NOISE_SCALES: Columns = {
    **_MODEL,
    **_OPTIMIZER,
    **_PROTOCOL,
    **_BATCH,
    "peak_lr": RUNS["peak_lr"],
    **_TUNING,
    **_GROUP,
    "estimator": Column(str, "", "what the whole batch is compared with: its micro_batches, ranks or halves"),
    "tokens_seen": Column(int, "tokens", "the last tokens of the steps that are averaged"),
    **_interval("noise_scale_tokens", "tokens", "B_simple = tr Σ / |G|², each averaged over steps and seeds"),
    "signal": Column(float, "", "|G|², of the gradient without noise"),
    "noise": Column(float, "tokens", "tr Σ, the variance of the gradient of one token"),
    "num_steps": Column(int, "steps", "steps that are averaged, over all runs"),
    "num_runs": Column(int, "", "runs that differ in their seeds alone"),
    **_VERDICT,
}

SHARPNESS: Columns = {
    "run_id": RUNS["run_id"],
    **_MODEL,
    **_OPTIMIZER,
    **_PROTOCOL,
    **_BATCH,
    "peak_lr": RUNS["peak_lr"],
    **_TUNING,
    "tokens_seen": EVALUATIONS["tokens_seen"],
    "val_loss_nats": EVALUATIONS["val_loss_nats"],
    "sharpness": Column(float, "", "⟨Z, HZ⟩ / |Z|² of the step's update Z, H the Hessian where it was taken"),
    "within_layers": Column(float, "", "the part of it from within layers: the sum of ⟨Z_l, H_ll Z_l⟩ / |Z|²"),
    "cross_layers": Column(float, "", "the rest: what layers do to each other"),
    "within_share": Column(float, "", "within_layers / sharpness; null where that is not above zero"),
    **_VERDICT,
}

SHARPNESS_RATIOS: Columns = {
    **_MODEL,
    **_PAIR,
    **_PROTOCOL,
    **_BATCH,
    "val_loss_nats": Column(float, "nats/token", "validation loss of the raw weights at which both are compared"),
    **_interval("sharpness_ratio", "", "sharpness of the baseline over that of the challenger, geometric means"),
    "baseline_sharpness": Column(float, "", "the first, at the chosen learning rate"),
    "challenger_sharpness": Column(float, "", "the second, at the chosen learning rate"),
    "num_runs": Column(int, "", "runs of both"),
    **_VERDICT,
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
    "loss_laws": LOSS_LAWS,
    "critical_batches": CRITICAL_BATCHES,
    "fit_curves": FIT_CURVES,
    "laws": LAWS,
    "token_ratios": TOKEN_RATIOS,
    "ratio_trends": RATIO_TRENDS,
    "ratio_decomposition": RATIO_DECOMPOSITION,
    "rate_rules": RATE_RULES,
    "frontier": FRONTIER,
    "dominance": DOMINANCE,
    "choices": CHOICES,
    "cost_model": COST_MODEL,
    "equal_budget": EQUAL_BUDGET,
    "final_losses": FINAL_LOSSES,
    "gaps": GAPS,
    "iso_loss": ISO_LOSS,
    "speedups": SPEEDUPS,
    "tuning": TUNING,
    "noise_scales": NOISE_SCALES,
    "sharpness": SHARPNESS,
    "sharpness_ratios": SHARPNESS_RATIOS,
    "agreement": AGREEMENT,
}


def data_dictionary() -> str:
    """Return every table with its columns, types, units and meanings, in Markdown: the body of results/README.md."""
    tables = {"runs": RUNS, "evaluations": EVALUATIONS, "diagnostics": DIAGNOSTICS} | TABLES
    return "\n\n".join(f"### {name}\n\n{_markdown(columns)}" for name, columns in tables.items())


def _markdown(columns: Columns) -> str:
    head = "| column | type | unit | meaning |\n| --- | --- | --- | --- |\n"
    return head + "\n".join(
        f"| `{name}` | {_TYPE_NAMES[column.type]} | {column.unit} | {column.meaning} |"
        for name, column in columns.items()
    )
