"""What `critbatch fit`, `compare` and `frontier` print for people: narrow tables, then every caveat in words.

Verbs print the hardest target that all optimizers reached, per model; --json has all of them.
"""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import polars as pl

from analysis import format as fmt
from analysis.estimate import Estimates, headline_target
from analysis.page.caveats import caveats_of
from analysis.page.parts import Part, parts

if TYPE_CHECKING:
    from rich.table import Table

Row = Mapping[str, Any]

#: Columns of each table: heading, and the column written (with its interval if it has one).
Columns = Mapping[str, str]

_TOKENS = {
    "optimizer": "optimizer",
    "batch": "global_batch_tokens",
    "tokens to target": "tokens_to_target",
    "runs": "num_seeds",
}
_CRITICAL = {"optimizer": "optimizer", "definition": "definition", "critical batch (tokens)": "critical_batch_tokens"}
_RATIOS = {"baseline / challenger": "pair", "batch": "global_batch_tokens", "token ratio": "token_ratio"}
_PARTS = {"baseline / challenger": "pair", "part of the ratio": "quantity", "value": "value"}
_LAWS = {
    "optimizer": "optimizer",
    "definition": "definition",
    "by": "term",
    "exponent": "exponent",
    "prefactor": "prefactor",
}
_FINALS = {
    "optimizer": "optimizer",
    "batch": "global_batch_tokens",
    "tokens": "token_budget",
    "final loss": "final_loss_nats",
    "runs": "num_runs",
}
_GAPS = {
    "baseline / challenger": "pair",
    "batch": "global_batch_tokens",
    "tokens": "token_budget",
    "gap (nats)": "gap_nats",
    "p (Holm)": "p_value_holm",
}
_ISO_LOSS = {
    "baseline / challenger": "pair",
    "batch": "global_batch_tokens",
    "tokens": "token_budget",
    "batch ratio": "batch_ratio",
    "at least": "lower_bound",
}
_SPEEDUPS = {"baseline / challenger": "pair", "tokens": "token_budget", "token ratio": "token_ratio"}
_TUNING = {"optimizer": "optimizer", "runs": "num_runs", "settings": "num_settings", "tokens spent": "tokens"}
_POINTS = {
    "optimizer": "optimizer",
    "kind": "kind",
    "batch": "global_batch_tokens",
    "devices": "num_devices",
    "time": "train_seconds",
    "device time": "device_seconds",
}
_DOMINANCE = {
    "baseline / challenger": "pair",
    "kind": "kind",
    "cost": "cost",
    "share of the time axis": "share",
    "cost ratio": "cost_ratio",
}
_CHOICES = {
    "question": "question",
    "kind": "kind",
    "limit (s)": "limit",
    "optimizer": "optimizer",
    "batch": "global_batch_tokens",
    "devices": "num_devices",
    "time": "train_seconds",
    "device time": "device_seconds",
}


def fit_lines(estimates: Estimates) -> Iterator["Table | str"]:
    """Yield tokens to the target, critical batches, ratios and laws, then the caveats."""
    for part in parts(estimates):
        own = part.estimates
        target = headline_target(own)
        if target is None:
            yield f"{_name(part)}: no target was reached by a whole cell"
            yield from _caveats({"cells": own.cells})
            continue
        names = ("cells", "critical_batches", "token_ratios", "ratio_decomposition")
        at_target = {name: getattr(own, name).filter(target_loss_nats=target) for name in names}
        yield f"[bold]{_name(part)}[/bold], to {fmt.loss(target)} nats per token, {own.level:.0%} intervals"
        for frame, columns in zip(at_target.values(), (_TOKENS, _CRITICAL, _RATIOS, _PARTS), strict=True):
            yield from _table(frame, columns)
        yield from _caveats(at_target)
    yield from _table(estimates.laws, _LAWS)
    yield from _caveats({"laws": estimates.laws})


def compare_lines(estimates: Estimates) -> Iterator["Table | str"]:
    """Yield final losses, gaps, iso-loss batches, speedups and what tuning cost, then the caveats."""
    columns_of = {"final_losses": _FINALS, "gaps": _GAPS, "iso_loss": _ISO_LOSS, "speedups": _SPEEDUPS}
    for part in parts(estimates):
        own = part.estimates
        yield f"[bold]{_name(part)}[/bold], at equal token budgets, {own.level:.0%} intervals"
        for name, columns in [*columns_of.items(), ("tuning", _TUNING)]:
            yield from _table(getattr(own, name), columns)
        yield from _caveats({name: getattr(own, name) for name in columns_of})


def frontier_lines(estimates: Estimates) -> Iterator["Table | str"]:
    """Yield the points of the frontiers, who dominates whom, the best choices and the cost model, then the caveats."""
    for part in parts(estimates):
        own = part.estimates
        target = headline_target(own)
        names = ("frontier", "dominance", "choices")
        at_target = {name: getattr(own, name).filter(target_loss_nats=target) for name in names}
        points = at_target["frontier"].filter(pl.col("on_frontier") | pl.col("on_flops_frontier"))
        yield f"[bold]{_name(part)}[/bold]" + ("" if target is None else f", to {fmt.loss(target)} nats per token")
        shown = (at_target | {"frontier": points}).values()
        for frame, columns in zip(shown, (_POINTS, _DOMINANCE, _CHOICES), strict=True):
            yield from _table(frame, columns)
        yield from _caveats(at_target)
    for row in estimates.cost_model.iter_rows(named=True):
        value = "unknown" if row["value"] is None else fmt.number(row["value"])
        yield f"{row['name']}: {value} {row['unit']} ({row['source']})"


def _name(part: Part) -> str:
    return part.label or part.model


def _table(frame: pl.DataFrame, columns: Columns) -> Iterator["Table"]:
    from rich import box
    from rich.table import Table

    if frame.is_empty():
        return
    judged = "verdict" in frame.columns
    grid = Table(*columns, *(["verdict"] if judged else []), box=box.SIMPLE_HEAD, padding=(0, 1), show_edge=False)
    for row in frame.iter_rows(named=True):
        written = [_cell(row, name) for name in columns.values()]
        grid.add_row(*written, *([row["verdict"]] if judged else []))
    yield grid


def _cell(row: Row, name: str) -> str:
    if name == "pair":
        return f"{fmt.optimizer_name(row['baseline'])} / {fmt.optimizer_name(row['challenger'])}"
    if f"{name}_low" in row and "question" not in row:  # choices stay narrow
        return fmt.estimate(row, name)
    return fmt.MISSING if row[name] is None else fmt.column_writer(name)(row[name])


def _caveats(tables: Mapping[str, pl.DataFrame]) -> Iterator[str]:
    """Yield every caveat once, with what it is about."""
    for caveat in caveats_of(tables):
        yield f"  {caveat.verdict}: {caveat.explanation} ({caveat.where})"
