"""Token budgets of curves that state none: where their runs end, but for the rounding to whole steps.

A budget of 400M tokens ends after whole steps, so every batch ends a little elsewhere. Ends that differ by less than a
step of the largest batch, or by 1 %, are one budget, the largest of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import polars as pl

from analysis import format as fmt
from analysis.inputs.identity import Identified

#: Ends that differ by a smaller share are one budget.
SAME_SHARE = 0.01


@dataclass(frozen=True)
class NominalBudgets:
    """`by_run` has `run` and its `nominal` budget, for runs that state none; `notes` say what was taken for one."""

    by_run: pl.DataFrame
    notes: list[str]


def nominal_budgets(curves: Identified) -> NominalBudgets:
    """Return the budgets of the runs that state none, by model.

    Assumption: a run that diverged was given the next budget beyond its end at which another run ended.
    """
    unstated = curves.runs.filter(pl.col("token_budget").is_null()).select("run", "model", "global_batch_tokens")
    ends = curves.rows.group_by("run").agg(
        pl.col("tokens_seen").last(), ended=pl.col("val_loss_nats").is_finite().all()
    )
    found = [
        _of_model(runs)
        for _, runs in unstated.join(ends, on="run", maintain_order="left").group_by("model", maintain_order=True)
    ]
    none = curves.runs.select("run", tokens_seen=pl.lit(0), ended=pl.lit(value=True), nominal=pl.lit(0)).clear()
    none = none.cast({"tokens_seen": pl.Int64, "nominal": pl.Int64})
    budgets = pl.concat([none, *(own.select(none.columns) for own in found)])
    return NominalBudgets(budgets.select("run", "nominal"), _notes(budgets.filter("ended")))


def one_budget_each(ends: Sequence[int], largest_batch: int) -> dict[int, int]:
    """Return the budget of every end: from the largest down, those within a step of the largest batch, or 1 %."""
    budgets: dict[int, int] = {}
    budget = 0
    for end in sorted(set(ends), reverse=True):
        if not budgets or budget - end >= max(largest_batch, SAME_SHARE * budget):
            budget = end
        budgets[end] = budget
    return budgets


def _of_model(runs: pl.DataFrame) -> pl.DataFrame:
    ended = runs.filter("ended")
    ends = (ended if ended.height else runs)["tokens_seen"].to_list()
    budgets = one_budget_each(ends, max(runs["global_batch_tokens"]))
    known = pl.DataFrame({"nominal": sorted(set(budgets.values()))}, schema={"nominal": pl.Int64})
    own = pl.col("tokens_seen").replace_strict(budgets, default=None, return_dtype=pl.Int64)
    beyond = runs.sort("tokens_seen").join_asof(
        known.with_columns(beyond="nominal").drop("nominal").set_sorted("beyond"),
        left_on="tokens_seen",
        right_on="beyond",
        strategy="forward",
        coalesce=False,
    )
    return beyond.with_columns(nominal=pl.when("ended").then(own).otherwise(pl.coalesce("beyond", "tokens_seen")))


def _notes(budgets: pl.DataFrame) -> list[str]:
    """Say which budgets were made one."""
    united = budgets.group_by("nominal").agg(pl.col("tokens_seen").n_unique(), num_runs=pl.len())
    united = united.filter(pl.col("tokens_seen") > 1).sort("nominal")
    said = [f"{fmt.tokens(budget)} ({fmt.count(runs, 'run')})" for budget, _, runs in united.iter_rows()]
    if not said:
        return []
    return [f"no token_budget: ends within 1 % or a step of the largest batch are taken for one: {', '.join(said)}"]
