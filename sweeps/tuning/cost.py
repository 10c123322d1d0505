"""What tuning cost, cell by cell, against the full grid that would give the same answer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import polars as pl

from analysis.quantities.rate_search import RateState
from harness.config import RunConfig
from sweeps.tuning.cells import TunedCell, label
from sweeps.tuning.proposals import Bench, Limits, Standing, standings


@dataclass(frozen=True)
class Outcome:
    """A tuned cell: its setting, the best rate with its interval, and what was spent.

    verdict: ok, or what keeps the optimum from being known: trials and budget_tokens ran out, not_reached, diverged.
    full_grid_tokens: of the rates between the lowest and the highest tried, at the finest spacing tried, on as many
    seeds as any rate had, for every value of the axes.
    """

    context: str
    optimizer: str
    global_batch_tokens: int
    setting: str
    optimum: float | None
    low: float | None
    high: float | None
    verdict: str
    trials: int
    tokens: int
    full_grid_tokens: int


def outcomes(bench: Bench, limits: Limits) -> list[Outcome]:
    """Return what came out for each cell."""
    spent = dict(bench.targets.select("run_id", "tokens_seen").iter_rows())
    rows = zip(bench.cells, bench.runs, standings(bench, limits), strict=True)
    return [
        Outcome(
            context=cell.context,
            optimizer=cell.optimizer,
            global_batch_tokens=cell.batch,
            setting=label(standing.setting),
            optimum=standing.state.optimum if standing.state else None,
            low=standing.state.low if standing.state else None,
            high=standing.state.high if standing.state else None,
            verdict=_verdict(standing, runs, bench.targets, limits),
            trials=len(runs),
            tokens=sum(spent.get(run.run_id, 0) for run in runs),
            full_grid_tokens=full_grid_tokens(cell, runs, standing.state, bench.axes),
        )
        for cell, runs, standing in rows
    ]


def full_grid_tokens(
    cell: TunedCell, runs: Sequence[RunConfig], state: RateState | None, axes: Mapping[str, Sequence[object]]
) -> int:
    """Return the tokens of the grid over all that was tried.

    A run of it takes its budget, or less where the sweep stops runs at the target: T by the fitted parabola.
    """
    rates = np.array(sorted({run.optimizer.peak_lr for run in runs}))
    setting = cell.setting(cell.template, list(axes))
    combinations = prod(len({*map(str, axes[key]), str(value)}) for key, value in setting.items())
    per_rate: dict[tuple[float, str], int] = {}
    for run in runs:
        place = (run.optimizer.peak_lr, label(cell.setting(run, list(axes))))
        per_rate[place] = per_rate.get(place, 0) + 1
    steps = round(np.log(rates[-1] / rates[0]) / np.log(rates[1:] / rates[:-1]).min()) if len(rates) > 1 else 0
    grid = np.geomspace(rates[0], rates[-1], steps + 1)
    return round(combinations * max(per_rate.values()) * sum(_tokens(cell, state, rate) for rate in grid.tolist()))


def in_words(found: Sequence[Outcome]) -> list[str]:
    """Return the sums: trials and tokens of each optimizer, and what was saved."""
    lines = []
    for optimizer in dict.fromkeys(each.optimizer for each in found):
        own = [each for each in found if each.optimizer == optimizer]
        lines.append(f"{optimizer}: {_sum(own, 'trials'):,} trials, {_sum(own, 'tokens'):,} tokens")
    spent, full = _sum(found, "tokens"), _sum(found, "full_grid_tokens")
    share = f" ({1 - spent / full:.0%} saved)" if 0 < spent < full else ""
    return [*lines, f"In all {spent:,} tokens, {full:,} for the full grid over the same rates and seeds{share}."]


def is_settled(found: Sequence[Outcome]) -> bool:
    return all(each.verdict == "ok" for each in found)


def _verdict(standing: Standing, runs: Sequence[RunConfig], targets: pl.DataFrame, limits: Limits) -> str:
    state = standing.state
    if state is None or not state.usable:
        own = targets.filter(pl.col("run_id").is_in([run.run_id for run in runs]))["status"]
        return str(own.mode().sort()[0]) if len(own) and "reached" not in own else "not_reached"
    if not standing.wanted:
        return "ok" if state.is_settled else "not_identified"
    return "trials" if len(runs) >= limits.trials else "budget_tokens"


def _tokens(cell: TunedCell, state: RateState | None, rate: float) -> float:
    budget, fitted = cell.template.realized_tokens, state.log_tokens_at(rate) if state else None
    stops = cell.template.stop_at_loss_nats is not None
    return min(budget, float(np.exp(min(fitted, np.log(budget))))) if stops and fitted is not None else budget


def _sum(found: Sequence[Outcome], name: str) -> int:
    return sum(getattr(each, name) for each in found)
