"""The next runs of `critbatch cbs`: a pure function of the runs so far.

First the rates at three batches: the smallest of the sweep, one in the middle and one above it; a fourth batch lies in
between. Then run by run the batch that narrows the interval of B_crit most per token. A batch between two whose rates
are tuned takes the rate interpolated in log B; one outside is tuned as well.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

import numpy as np
import polars as pl

from analysis.quantities.knee_search import Knee, knee_so_far
from analysis.quantities.rate_search import RateState, rate_states, rounded, stop_log_tokens
from harness.config import RunConfig
from sweeps.added import Proposal
from sweeps.tuning.cells import TunedCell, fresh_seeds, relabelled

#: Fewer batches than these do not show whether the curve holds.
MIN_BATCHES = 5

#: The noise is known well enough to stop from these degrees of freedom on.
MIN_DOF = 6

#: A rate that costs more tokens than this share above those of the best one is replaced.
_MAX_EXCESS = 0.01

#: Runs of one optimizer, at most: an interval that stays wide for so long needs other batches or targets, not seeds.
MOST_RUNS = 200

#: Rates keep this part of the grid's step from each other.
_LEAST_DISTANCE = 0.45

#: No batch gets more than this share of the runs that T is estimated from.
_MAX_SHARE = 1 / 3

#: Runs at the middle rate of the first batch, to start with; they tell the noise.
_SEEDS_AT_FIRST = 6

#: Runs that the rate of a batch takes which is larger than all others.
_RATES_BEYOND = 2

_NO_SETTING: dict[str, object] = {}


@dataclass(frozen=True)
class Goal:
    """The interval's upper end over its lower one to be reached, at a level; runs that are trained at once."""

    ratio: float
    level: float
    slots: int = 1
    reserved_seeds: tuple[int, ...] = ()


@dataclass(frozen=True)
class KneeBench:
    """One optimizer at all batches of a sweep, the runs of each cell, and their rows of the table `targets`."""

    cells: Sequence[TunedCell]
    runs: Sequence[Sequence[RunConfig]]
    targets: pl.DataFrame
    goal: Goal

    @cached_property
    def knee(self) -> Knee | None:
        return knee_so_far(self._own_targets, self.goal.level)

    @cached_property
    def states(self) -> list[RateState | None]:
        """What is known of the rates of each cell."""
        factors = {cell.key(_NO_SETTING): cell.factor for cell in self.cells}
        found = rate_states(self._own_targets, factors, self.goal.level)
        return [found.get(cell.key(_NO_SETTING)) for cell in self.cells]

    @property
    def anchors(self) -> list[int]:
        """Places of the cells at which rates are tuned: three to start with, and those beyond them that are needed."""
        middle, last = len(self.cells) // 2, len(self.cells) - 1
        start = {0, middle, min(middle + max(len(self.cells) // 4, 1), last)}
        beyond = {place for place, own in enumerate(self.runs) if own and place > max(start)}
        return sorted(start | beyond | set(self.unbracketed))

    @property
    def is_narrow(self) -> bool:
        """Whether the interval is as narrow as asked for, and sure enough to stop."""
        knee = self.knee
        if knee is None or knee.series.errors is None or len(knee.runs) < self.least_batches:
            return False
        return self._reaches_goal and knee.series.errors.contrast_dof >= MIN_DOF and not self.unbracketed

    @property
    def is_at_its_end(self) -> bool:
        """Whether so many runs did not do that more would hardly."""
        return sum(map(len, self.runs)) >= MOST_RUNS

    @property
    def _reaches_goal(self) -> bool:
        return self.knee is not None and self.knee.ratio is not None and self.knee.ratio <= self.goal.ratio

    @property
    def unbracketed(self) -> list[int]:
        """Place of the next larger cell, if those so far do not bracket B_crit, or its interval once it is narrow."""
        knee = self.knee
        if knee is None:
            return []
        largest, high = max(knee.runs), knee.estimate.high
        is_beyond = knee.fit.log_b_crit > np.log(largest) or (
            self._reaches_goal and high is not None and high > largest
        )
        return [place for place, cell in enumerate(self.cells) if cell.batch > largest][:1] if is_beyond else []

    @property
    def least_batches(self) -> int:
        return min(MIN_BATCHES, len(self.cells))

    @property
    def _own_targets(self) -> pl.DataFrame:
        return relabelled(self.targets, self.cells, self.runs)

    def rate_at(self, place: int) -> float:
        """Return the rate of a cell: the one that its T is estimated at, else between those of the anchors."""
        state, batch = self.states[place], self.cells[place].batch
        if self.knee is not None and batch in self.knee.rates:
            return self.knee.rates[batch]
        if state is not None and state.best is not None:
            return state.best
        known = [(self.cells[each].batch, state.optimum or state.best) for each, state in self._tuned()]
        batches, rates = zip(*known, strict=True)
        return rounded(float(np.exp(np.interp(np.log(batch), np.log(batches), np.log(rates)))))

    def _tuned(self) -> list[tuple[int, RateState]]:
        states = ((place, self.states[place]) for place in self.anchors)
        return [(place, state) for place, state in states if state is not None and state.best is not None]

    def free_seeds(self, place: int, rate: float) -> Iterator[tuple[int, int]]:
        """Yield the seeds that a cell's rate has not had, the grid's first: batches that share seeds compare best."""
        cell = self.cells[place]
        used = [(run.init_seed, run.data_seed) for run in self.runs[place] if run.optimizer.peak_lr == rate]
        yield from (pair for pair in cell.seeds if pair not in used)
        yield from fresh_seeds([*used, *cell.seeds], self.goal.reserved_seeds)

    def budget_tokens(self, place: int) -> int:
        """Return the tokens by which a run should long be at the target; the sweep's budget where nothing is known."""
        cell, knee, stop = self.cells[place], self.knee, None
        if knee is not None:
            stop = stop_log_tokens(knee.log_tokens(cell.batch), 1, float(np.log(cell.batch)), knee.noise)
        return cell.budget_until(stop) or cell.template.token_budget

    def cost_tokens(self, place: int) -> float:
        """Return what a run is expected to take; with those that its rate takes, where nothing tells that."""
        cell, knee, budget = self.cells[place], self.knee, self.budget_tokens(place)
        runs = 1 if self.runs[place] or place < max(self.anchors) else _RATES_BEYOND
        if knee is None or cell.template.stop_at_loss_nats is None:
            return runs * budget
        return runs * min(float(np.exp(knee.log_tokens(cell.batch))), budget)


def propose_for_knee(bench: KneeBench) -> list[Proposal]:
    """Return the runs of the next round; none when the interval is narrow enough, or nothing can make it so."""
    start = [] if bench.is_narrow else list(_start(bench))
    first = start or list(_better_rates(bench)) or list(_fourth_batch(bench))
    if first or bench.is_narrow or bench.knee is None or bench.is_at_its_end:
        return first
    return list(_informative(bench, bench.knee))


def _start(bench: KneeBench) -> Iterator[Proposal]:
    """Yield what each anchor lacks: three of the grid's rates at the first two, two at the others, since all share one
    curvature; and at the first one, where it is cheapest, the seeds that tell the noise.
    """
    for number, place in enumerate(bench.anchors):
        yield from _rates_of_anchor(bench, place, above=number < 2)


def _rates_of_anchor(bench: KneeBench, place: int, above: bool) -> Iterator[Proposal]:
    """Yield the middle rate of the grid and the one below it, and the one above it too if that is wanted."""
    cell, middle = bench.cells[place], len(bench.cells[place].rates) // 2
    for rate in cell.rates[max(middle - 1, 0) : middle + 1 + above]:
        num = _SEEDS_AT_FIRST if (place, rate) == (0, cell.rates[middle]) else 1
        done = sum(run.optimizer.peak_lr == rate for run in bench.runs[place])
        for seeds in islice(bench.free_seeds(place, rate), max(num - done, 0)):
            why = "start: rates to interpolate between, and the noise"
            yield Proposal(cell.run(rate, seeds, _NO_SETTING, bench.budget_tokens(place)), why)


def _better_rates(bench: KneeBench) -> Iterator[Proposal]:
    """Yield a run at the best rate of each anchor where that lies off those tried: beyond an edge, or between."""
    for place in bench.anchors:
        cell, state = bench.cells[place], bench.states[place]
        rate = None if state is None or len(cell.rates) < 2 else better_rate(state, cell.factor)
        if rate is not None:
            seeds = next(bench.free_seeds(place, rate))
            yield Proposal(cell.run(rate, seeds, _NO_SETTING), f"rate: better than {bench.rate_at(place):.3g}")


def _fourth_batch(bench: KneeBench) -> Iterator[Proposal]:
    """Yield a run between the first two anchors: a curve of three parameters goes through any three points."""
    place = max(bench.anchors[1] // 2, 1)
    known = (bench.states[each] for each in bench.anchors)
    if not bench.runs[place] and any(state is not None and state.best is not None for state in known):
        cell, rate = bench.cells[place], bench.rate_at(place)
        yield Proposal(cell.run(rate, next(bench.free_seeds(place, rate)), _NO_SETTING), "start: a fourth batch")


def better_rate(state: RateState, factor: float) -> float | None:
    """Return a rate that takes clearly fewer tokens than the best one tried, by the parabola; None if there is none.

    Beyond the rates tried it is one factor away at most. It keeps half a factor from each, lest noise be chased.
    """
    if state.best is None:
        return None
    first, last = state.tried[0], state.tried[-1]
    if state.optimum is None or state.curvature is None or state.low is None:
        at_edge = {first: first / factor, last: last * factor}
        return rounded(at_edge[state.best]) if state.best in at_edge and len(state.tried) > 2 else None
    if state.curvature * np.log(state.best / state.optimum) ** 2 <= _MAX_EXCESS:
        return None
    rate = rounded(float(np.clip(state.optimum, first / factor, last * factor)))
    distance = np.abs(np.log(np.array(state.tried) / rate)).min()
    return rate if distance >= _LEAST_DISTANCE * np.log(factor) else None


def _informative(bench: KneeBench, knee: Knee) -> Iterator[Proposal]:
    """Yield as many runs as are trained at once, at the batches that narrow the interval most per token."""
    places = {cell.batch: place for place, cell in enumerate(bench.cells)}
    unused = [batch for batch in places if not bench.runs[places[batch]]]
    is_spread = len(knee.runs) >= bench.least_batches or not unused
    candidates = list(places) if is_spread else unused
    num = sum(knee.runs.values()) + bench.goal.slots
    most = max(int(np.ceil(_MAX_SHARE * num)), 2) if is_spread else 1
    costs = [bench.cost_tokens(places[batch]) for batch in candidates]
    chosen = knee.best_batches(candidates, costs, most, bench.goal.slots)
    interval = "no end yet" if knee.ratio is None else f"a ratio of {knee.ratio:.3g}"
    for batch in sorted(set(chosen)):
        cell, rate = bench.cells[places[batch]], bench.rate_at(places[batch])
        if places[batch] > max(bench.anchors):
            yield from _rates_of_anchor(bench, places[batch], above=False)
            continue
        for seeds in islice(bench.free_seeds(places[batch], rate), chosen.count(batch)):
            why = f"knee: narrows the interval most per token, which has {interval} so far"
            yield Proposal(cell.run(rate, seeds, _NO_SETTING, bench.budget_tokens(places[batch])), why)
