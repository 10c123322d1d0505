"""The next runs of `critbatch tune`: a pure function of the runs so far.

Every cell says what it wants: rates beyond an edge, between two rates, or more seeds; then values of the further axes,
one axis after the other. All optimizers get the same number of trials at a batch: those that want fewer get more seeds
of their best rates.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from typing import Any

import numpy as np
import polars as pl

from analysis.quantities.rate_search import RateState, Wanted, rate_states, wanted_rates
from harness.config import RunConfig
from sweeps.added import Proposal
from sweeps.tuning.cells import Setting, TunedCell, fresh_seeds, label, relabelled

#: Seeds beyond the grid's that a choice between two values of an axis may take.
_MORE_SEEDS_OF_AN_AXIS = 2


@dataclass(frozen=True)
class Limits:
    """Trials of a cell at most, tokens of all runs at most, seeds that are reserved for the confirmation."""

    trials: int
    budget_tokens: int | None = None
    reserved_seeds: tuple[int, ...] = ()
    level: float = 0.9


@dataclass(frozen=True)
class Bench:
    """All that proposals are made from: cells, their runs (each with a result), and what these gave.

    targets: rows of the table `targets` at the loss that is tuned for. axes: values to try, by dotted key.
    """

    cells: Sequence[TunedCell]
    runs: Sequence[Sequence[RunConfig]]
    targets: pl.DataFrame
    axes: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    level: float = 0.9

    def states(self) -> dict[tuple[Any, ...], RateState]:
        """Return what is known of every cell at every setting of the axes that was tried."""
        factors = {
            cell.key(cell.setting(run, self.axes)): cell.factor
            for cell, own in zip(self.cells, self.runs, strict=True)
            for run in own
        }
        return rate_states(relabelled(self.targets, self.cells, self.runs, tuple(self.axes)), factors, self.level)


@dataclass(frozen=True)
class Standing:
    """Where a cell stands: the setting of its axes so far, its rates there, and the runs that it wants."""

    setting: Setting
    state: RateState | None
    wanted: tuple[Proposal, ...]


def standings(bench: Bench, limits: Limits) -> list[Standing]:
    """Return where each cell stands."""
    states = bench.states()
    return [
        _Cell(cell, own, bench, states, limits).standing() for cell, own in zip(bench.cells, bench.runs, strict=True)
    ]


def propose(bench: Bench, limits: Limits, spent_tokens: int = 0) -> list[Proposal]:
    """Return the runs of the next round; none when every cell is settled and has as many trials as the others of its
    batch, or nothing more may be spent. What it takes to make the trials equal is kept back from the budget.
    """
    states = bench.states()
    cells = [_Cell(cell, own, bench, states, limits) for cell, own in zip(bench.cells, bench.runs, strict=True)]
    groups = [_Group([cells[place] for place in places]) for places in _by_batch(bench.cells).values()]
    proposals: list[Proposal] = []
    tokens = spent_tokens + sum(group.tokens_to_equal([]) for group in groups)
    for group in groups:
        for more in (group.wanted(), group.equalizing()):
            with_more = tokens - group.tokens_to_equal([]) + group.tokens_to_equal(more) + _tokens(more)
            if more and (limits.budget_tokens is None or with_more <= limits.budget_tokens):
                proposals += more
                tokens = with_more
                break
    return proposals


@dataclass(frozen=True)
class _Group:
    """The cells of one batch, which are to have equally many trials in the end."""

    cells: Sequence["_Cell"]

    def wanted(self) -> list[Proposal]:
        return [each for cell in self.cells for each in cell.wanted()]

    def equalizing(self) -> list[Proposal]:
        """Return what makes the trials equal."""
        most = max(len(cell.runs) for cell in self.cells)
        return [each for cell in self.cells for each in cell.more_seeds(most - len(cell.runs))]

    def tokens_to_equal(self, more: Sequence[Proposal]) -> int:
        """Return the tokens, at most, that make the trials equal once `more` runs are done."""
        names: list[str] = [each.run.optimizer.name for each in more]
        trials = [len(cell.runs) + names.count(cell.cell.optimizer) for cell in self.cells]
        lacking = zip(self.cells, trials, strict=True)
        return sum((max(trials) - own) * cell.cell.template.realized_tokens for cell, own in lacking)


@dataclass(frozen=True)
class _Cell:
    """One cell with all that its proposals depend on."""

    cell: TunedCell
    runs: Sequence[RunConfig]
    bench: Bench
    states: Mapping[tuple[Any, ...], RateState]
    limits: Limits

    def standing(self) -> Standing:
        """Settle the rate, then take one axis after the other and settle the rate again."""
        setting: Setting = self.cell.setting(self.cell.template, self.bench.axes)
        state, wanted = self._rates(setting)
        for key in setting:
            if wanted or state is None or not state.usable:
                break
            wanted = self._axis(setting, key, state)
            if not wanted:
                setting = self._best_of_axis(setting, key, state)
                state, wanted = self._rates(setting)
        return Standing(setting, state, tuple(wanted))

    def wanted(self) -> list[Proposal]:
        """Return the runs that the cell wants and may have."""
        return list(self.standing().wanted[: self.limits.trials - len(self.runs)])

    def more_seeds(self, num: int) -> Iterator[Proposal]:
        """Yield `num` runs on fresh seeds, at the best rates in turn."""
        if num == 0:
            return
        standing = self.standing()
        rates = (standing.state.nearest() if standing.state else ()) or self.cell.rates
        setting, reserved = standing.setting, self.limits.reserved_seeds
        seeds = {rate: fresh_seeds(self._seeds_at(setting, rate), reserved) for rate in rates}
        for rate in islice(cycle(rates), num):
            yield Proposal(self.cell.run(rate, next(seeds[rate]), setting), "equal: as many trials for every optimizer")

    def _rates(self, setting: Setting) -> tuple[RateState | None, list[Proposal]]:
        state = self.states.get(self.cell.key(setting))
        wanted = wanted_rates(state, self.cell.factor) if state else None
        if state is None or wanted is None:
            return state, []
        return state, list(self._runs(setting, state, wanted))

    def _runs(self, setting: Setting, state: RateState, wanted: Wanted) -> Iterator[Proposal]:
        why = f"{wanted.why}: {wanted.words}"
        if wanted.why == "seeds":
            for rate in wanted.rates:
                seeds = next(fresh_seeds(self._seeds_at(setting, rate), self.limits.reserved_seeds))
                yield Proposal(self.cell.run(rate, seeds, setting), why)
            return
        for rate in wanted.rates:
            for seeds in self.cell.seeds:
                yield Proposal(self.cell.run(rate, seeds, setting, self.cell.budget_until(state.stop_log_tokens)), why)

    def _axis(self, setting: Setting, key: str, state: RateState) -> list[Proposal]:
        """Return the runs that a choice between the values of an axis lacks, at one rate."""
        rate = self._rate_of_axis(setting, key, state)
        settings = self._settings(setting, key)
        missing = [
            Proposal(
                self.cell.run(rate, seeds, own, self.cell.budget_until(state.stop_log_tokens)), f"axis: {label(own)}"
            )
            for own in settings
            for seeds in self.cell.seeds
            if seeds not in self._seeds_at(own, rate)
        ]
        return missing or self._seeds_of_axis(settings, rate, state)

    def _seeds_of_axis(self, settings: Sequence[Setting], rate: float, state: RateState) -> list[Proposal]:
        """Return another seed for each of the two best values, while they differ by less than the noise."""
        best, second = (*sorted(settings, key=lambda own: self._rank(own, rate)), None)[:2]
        if best is None or second is None or state.deviation is None:
            return []
        shared = self._shared_seeds([best, second], rate)
        gap = self._rank(second, rate)[1] - self._rank(best, rate)[1]
        noise = state.deviation * np.sqrt(2 / max(len(shared), 1))
        if gap >= noise or len(shared) >= len(self.cell.seeds) + _MORE_SEEDS_OF_AN_AXIS:
            return []
        used = {pair for own in (best, second) for pair in self._seeds_at(own, rate)}
        lacking = [
            (own, pair) for own in (best, second) for pair in sorted(used) if pair not in self._seeds_at(own, rate)
        ]
        if not lacking:
            fresh = next(fresh_seeds(used, self.limits.reserved_seeds))
            lacking = [(best, fresh), (second, fresh)]
        why = f"seeds: {label(best)} and {label(second)} differ by less than the noise"
        return [Proposal(self.cell.run(rate, pair, own), why) for own, pair in lacking]

    def _best_of_axis(self, setting: Setting, key: str, state: RateState) -> Setting:
        rate = self._rate_of_axis(setting, key, state)
        return min(self._settings(setting, key), key=lambda own: self._rank(own, rate))

    def _settings(self, setting: Setting, key: str) -> list[Setting]:
        """Return the setting itself, then the same with the other values of one axis."""
        others = [value for value in self.bench.axes[key] if value != setting[key]]
        return [setting, *({**setting, key: value} for value in others)]

    def _rate_of_axis(self, setting: Setting, key: str, state: RateState) -> float:
        """Return the rate at which the values of an axis are compared: where they were, else the best one tried."""
        centre = state.optimum or state.best
        assert centre is not None
        rates = sorted(state.usable, key=lambda rate: abs(np.log(rate / centre)))
        others = self._settings(setting, key)[1:]
        compared = [rate for rate in rates if any(self._seeds_at(own, rate) for own in others)]
        return (compared or rates)[0]

    def _rank(self, setting: Setting, rate: float) -> tuple[float, float]:
        """Return the share of runs that fell short, and the mean log T of the others."""
        runs = [run.run_id for run in self._at(setting, rate)]
        own = self.bench.targets.filter(pl.col("run_id").is_in(runs))
        reached = own["tokens_to_target"].drop_nulls().log()
        mean = reached.mean()
        return 1 - len(reached) / max(len(own), 1), float(mean) if isinstance(mean, float) else np.inf

    def _shared_seeds(self, settings: Sequence[Setting], rate: float) -> set[tuple[int, int]]:
        first, *others = (set(self._seeds_at(own, rate)) for own in settings)
        return first.intersection(*others)

    def _at(self, setting: Setting, rate: float) -> list[RunConfig]:
        return [
            run
            for run in self.runs
            if run.optimizer.peak_lr == rate and self.cell.setting(run, self.bench.axes) == dict(setting)
        ]

    def _seeds_at(self, setting: Setting, rate: float) -> list[tuple[int, int]]:
        return [(run.init_seed, run.data_seed) for run in self._at(setting, rate)]


def _by_batch(cells: Sequence[TunedCell]) -> dict[tuple[str, int], list[int]]:
    places: dict[tuple[str, int], list[int]] = {}
    for place, cell in enumerate(cells):
        places.setdefault((cell.context, cell.batch), []).append(place)
    return places


def _tokens(proposals: Sequence[Proposal]) -> int:
    return sum(each.run.realized_tokens for each in proposals)
