"""What `critbatch fit`, `compare` and `frontier` print for people: notes, narrow tables, every caveat, every refusal.

Verbs print the hardest target that all optimizers reached, per model; --json has all of them. What is refused stands in
no table, but at the end, with its reason.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import polars as pl

from analysis import format as fmt
from analysis import refusals
from analysis.estimate import Estimates, headline_target
from analysis.page.caveats import caveats_of
from analysis.page.parts import Part, parts
from analysis.refusals import Refusal

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
_BRANCHED = {
    "optimizer": "optimizer",
    "tokens of training": "branch_tokens",
    "critical batch (tokens)": "critical_batch_tokens",
}
_RATIOS = {"baseline / challenger": "pair", "batch": "global_batch_tokens", "token ratio": "token_ratio"}
_TRENDS = {
    "baseline / challenger": "pair",
    "d log ratio / d log batch": "slope",
    "largest fall of log ratio": "largest_drop",
    "from batch": "drop_from_tokens",
    "to batch": "drop_to_tokens",
}
_RULES = {
    "baseline / challenger": "pair",
    "rule of rates": "rule",
    "batch": "global_batch_tokens",
    "token ratio": "token_ratio",
}
_LOSS_LAWS = {
    "optimizer": "optimizer",
    "batch": "global_batch_tokens",
    "floor E (nats)": "floor_nats",
    "exponent β": "exponent",
    "budgets": "num_budgets",
}
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


#: What `fit` prints at the target, and what it prints of no target.
_AT_TARGET: dict[str, Columns] = {
    "cells": _TOKENS,
    "critical_batches": _CRITICAL,
    "token_ratios": _RATIOS,
    "ratio_trends": _TRENDS,
    "ratio_decomposition": _PARTS,
    "rate_rules": _RULES,
}
_OF_NO_TARGET: dict[str, Columns] = {"loss_laws": _LOSS_LAWS, "branches": _BRANCHED}
_AT_BUDGETS: dict[str, Columns] = {
    "final_losses": _FINALS,
    "gaps": _GAPS,
    "iso_loss": _ISO_LOSS,
    "speedups": _SPEEDUPS,
}
_IN_TIME: dict[str, Columns] = {"frontier": _POINTS, "dominance": _DOMINANCE, "choices": _CHOICES}

#: Columns whose values are of several kinds, all with as many decimals.
_DECIMALS: Mapping[str, str] = {
    "value": "{:z.2f}",
    "slope": "{:z.2f}",
    "largest_drop": "{:z.2f}",
    "lower_bound": "{:.2f}",
    "exponent": "{:z.3f}",
}


def fit_lines(estimates: Estimates) -> Iterator["Table | str"]:
    """Yield what was read how, tokens to the target, critical batches, ratios and laws, caveats and refusals."""
    yield from _notes(estimates)
    for part in parts(estimates):
        own = part.estimates
        target = headline_target(own)
        frames = {name: getattr(own, name) for name in _AT_TARGET}
        branched = own.critical_batches.filter(definition="branched")
        if target is None and (branched["verdict"] != "refused").any():
            yield f"{_name(part)}, {own.level:.0%} intervals"
            frames = {"cells": own.cells, "branches": branched}
        elif target is None:
            yield f"{_name(part)}: no target was reached by a whole cell"
            frames = {"cells": own.cells}
        else:
            frames = {name: frame.filter(target_loss_nats=target) for name, frame in frames.items()}
            yield f"{_name(part)}, to {fmt.loss(target)} nats per token, {own.level:.0%} intervals"
        frames["loss_laws"] = own.loss_laws
        yield from _tables(_with_numbers(frames, target), _AT_TARGET | _OF_NO_TARGET)
        yield from _caveats(frames)
    yield from _laws(estimates.laws)
    yield from _refusals(refusals.of_fit(estimates))


def compare_lines(estimates: Estimates) -> Iterator["Table | str"]:
    """Yield final losses, gaps, iso-loss batches, speedups and what tuning cost, caveats and refusals."""
    yield from _notes(estimates)
    for part in parts(estimates):
        own = part.estimates
        frames = {name: getattr(own, name) for name in (*_AT_BUDGETS, "tuning")}
        yield f"{_name(part)}, at equal token budgets, {own.level:.0%} intervals"
        yield from _tables(frames, _AT_BUDGETS | {"tuning": _TUNING})
        yield from _caveats({name: frames[name] for name in _AT_BUDGETS})
    yield from _refusals(refusals.of_compare(estimates))


def frontier_lines(estimates: Estimates) -> Iterator["Table | str"]:
    """Yield the points of the frontiers, who dominates whom, the best choices, the cost model, caveats, refusals."""
    yield from _notes(estimates)
    for part in parts(estimates):
        own = part.estimates
        target = headline_target(own)
        yield _name(part) + ("" if target is None else f", to {fmt.loss(target)} nats per token")
        at_target = pl.col("target_loss_nats").eq_missing(pl.lit(target, pl.Float64))
        frames = {name: getattr(own, name).filter(at_target) for name in _IN_TIME}
        points = frames["frontier"].filter(pl.col("on_frontier") | pl.col("on_flops_frontier"))
        yield from _tables(frames | {"frontier": points}, _IN_TIME)
        yield from _caveats(frames)
    for row in estimates.cost_model.iter_rows(named=True):
        value = "" if row["value"] is None else f"{fmt.number(row['value'])} {row['unit']} "
        yield f"{row['name']}: {value}({row['source']})"
    yield from _refusals(refusals.of_frontier(estimates))


def _name(part: Part) -> str:
    return part.label or part.model


def _notes(estimates: Estimates) -> Iterator[str]:
    return (f"note: {note}" for note in estimates.records.notes)


def _with_numbers(frames: Mapping[str, pl.DataFrame], target: float | None) -> dict[str, pl.DataFrame]:
    """Leave out rules of rates that give no ratio, and without a target the cells: the caveats say why."""
    known = {name: frame for name, frame in frames.items() if target is not None or name != "cells"}
    rules = {"rate_rules": known["rate_rules"].drop_nulls("token_ratio")} if "rate_rules" in known else {}
    return known | rules


def _tables(frames: Mapping[str, pl.DataFrame], columns_of: Mapping[str, Columns]) -> Iterator["Table"]:
    for name, columns in columns_of.items():
        if name in frames:
            yield from _table(frames[name], columns)


def _table(frame: pl.DataFrame, columns: Columns) -> Iterator["Table"]:
    from rich import box
    from rich.table import Table

    judged = "verdict" in frame.columns
    frame = frame.filter(pl.col("verdict") != "refused") if judged else frame
    if frame.is_empty():
        return
    grid = Table(*columns, *(["verdict"] if judged else []), box=box.SIMPLE_HEAD, padding=(0, 1), show_edge=False)
    writers = {name: _writer(frame, name) for name in columns.values() if name != "pair"}
    for row in frame.iter_rows(named=True):
        written = [_cell(row, name, writers.get(name)) for name in columns.values()]
        grid.add_row(*written, *([row["verdict"]] if judged else []))
    yield grid


def _writer(frame: pl.DataFrame, name: str) -> Callable[[Any], str]:
    """Return how all values of a column are written: in binary units only where all of them can be."""
    if name in _DECIMALS:
        return _DECIMALS[name].format
    write = fmt.column_writer(name)
    if write is not fmt.tokens:
        return write
    ends = [end for end in (name, f"{name}_low", f"{name}_high") if end in frame.columns]
    values = pl.concat([frame[end].cast(pl.Float64) for end in ends]).drop_nulls()
    return write if all(map(fmt.is_binary, values)) else fmt.decimal_tokens


def _cell(row: Row, name: str, write: Callable[[Any], str] | None) -> str:
    if write is None:
        return f"{fmt.optimizer_name(row['baseline'])} / {fmt.optimizer_name(row['challenger'])}"
    if f"{name}_low" in row and "question" not in row:  # choices stay narrow
        return fmt.estimate(row, name, write)
    return fmt.MISSING if row[name] is None else write(row[name])


def _laws(frame: pl.DataFrame) -> Iterator["Table | str"]:
    """Yield the laws that have an interval, with their caveats, and in a line how many have none."""
    bounded = pl.col("exponent_low").is_not_null()
    known, others = frame.filter(bounded), frame.filter(~bounded, pl.col("verdict") != "refused")
    yield from _table(known, _LAWS)
    yield from _caveats({"laws": known})
    if others.height:
        number = others.select(pl.exclude("term", "^exponent.*$")).unique().height
        yield f"{fmt.count(number, 'law')} without an interval: --json has {'it' if number == 1 else 'them'}"


def _caveats(tables: Mapping[str, pl.DataFrame]) -> Iterator[str]:
    """Yield every caveat once, with what it is about first; what is refused is said at the end."""
    for caveat in caveats_of(tables):
        if caveat.verdict != "refused":
            place, *others = caveat.places
            more = f"; and {fmt.count(len(others), 'table')} more" if others else ""
            name = "reservation" if caveat.verdict == "ok" else caveat.verdict
            yield f"  {name}: {caveat.explanation} ({place}{more})"


def _refusals(refused: Iterable[Refusal]) -> Iterator[str]:
    """Yield every reason once, with all that it forbids."""
    by_reason: dict[str, list[str]] = {}
    for what, reason in refused:
        by_reason.setdefault(reason, []).append(what)
    return (f"refused {fmt.listed(whats)}: {reason}" for reason, whats in by_reason.items())
