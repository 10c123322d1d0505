"""`critbatch cbs`: the cheapest route to a critical batch size with an interval of a stated width."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from analysis.quantities.knee_search import LEAST_BATCHES
from harness.config import RunConfig
from harness.frozen import nearest
from sweeps.added import Proposal
from sweeps.launch import pool_of, stage_runs, train_stage
from sweeps.pool import TRAIN
from sweeps.spec import SweepSpec
from sweeps.store import SweepFolder, is_missing, write_sweep
from sweeps.tuning.cells import TunedCell, by_cell, tuned_cells
from sweeps.tuning.knee import MIN_BATCHES, Goal, KneeBench, propose_for_knee
from sweeps.tuning.rounds import run_rounds
from sweeps.tuning.tune import check_protocols, spent_tokens, targets_in, targets_of_none

#: Runs are added until the interval of the first level is narrow enough; the one of the second is reported. Were both
#: the same, the interval would cover 84 to 86 % under its own stopping rule (simulated: tests/test_cbs.py).
STOP_LEVEL, REPORTED_LEVEL = 0.93, 0.9

Series = tuple[str, str]


@dataclass(frozen=True)
class KneeOutcome:
    """B_crit of one model and optimizer with its interval, and what it took.

    verdict: ok, or why the interval is wider than asked for: budget_tokens ran out; not_reached: no four batches have
    a T; not_identified: the batches of the sweep do not bracket B_crit, or too many runs have been in vain.
    full_grid_tokens: of all batches and rates of the sweep, on as many seeds as know B_crit as well by the linearised
    model; full_grid names them.
    """

    context: str
    optimizer: str
    value: float | None
    low: float | None
    high: float | None
    verdict: str
    runs: int
    tokens: int
    full_grid_tokens: int | None
    full_grid: str

    @property
    def in_words(self) -> str:
        """Say it in one sentence."""
        name = f"{self.context}, {self.optimizer}"
        spent = f"{self.runs:,} runs, {self.tokens:,} tokens"
        if self.value is None or self.low is None or self.high is None:
            return f"{name}: no critical batch size ({self.verdict}); {spent}"
        interval = f"90 % interval {self.low:,.0f} to {self.high:,.0f}, ratio {self.high / self.low:.3g}"
        found = f"{name}: critical batch {self.value:,.0f} tokens, {interval} ({self.verdict}); {spent}"
        if not self.full_grid_tokens:
            return found
        share = self.tokens / self.full_grid_tokens
        return f"{found}, {share:.0%} of the {self.full_grid_tokens:,} of the full grid ({self.full_grid})"


def series_cells(runs: Sequence[RunConfig], optimizers: Sequence[str]) -> dict[Series, list[TunedCell]]:
    """Return the cells of each model and optimizer asked for (all by default), by batch.

    Raises: ValueError for an optimizer that the sweep has not, too few batches, or curves that give no tokens.
    """
    check_protocols(runs)
    cells = tuned_cells(runs)
    names = {cell.optimizer for cell in cells}
    for name in optimizers:
        if name not in names:
            raise ValueError(f"--optimizer {name}: the sweep does not run it; {nearest(name, names)}")
    found: dict[Series, list[TunedCell]] = {}
    for cell in sorted(cells, key=lambda cell: cell.batch):
        if not optimizers or cell.optimizer in optimizers:
            found.setdefault((cell.context, cell.optimizer), []).append(cell)
    for (_, optimizer), own in found.items():
        if len(own) < LEAST_BATCHES:
            batches = ", ".join(f"{cell.batch:,}" for cell in own)
            raise ValueError(
                f"the sweep has {len(own)} batches of {optimizer} ({batches}); a critical batch takes {LEAST_BATCHES} "
                f"to choose from, better {MIN_BATCHES} or more: add some to grid.global_batch_tokens"
            )
    return found


def write_finished(spec: SweepSpec, runs: Sequence[RunConfig], folder: SweepFolder) -> None:
    """List the runs of the sweep that are finished, and those that rounds have added."""
    write_sweep(spec, [run for run in runs if not is_missing(folder.run(run.run_id))], folder, like=runs)


def cbs(
    folder: SweepFolder,
    series: Mapping[Series, Sequence[TunedCell]],
    goal: Goal,
    budget_tokens: int | None,
    slots: int,
    train: str = TRAIN,
) -> list[KneeOutcome]:
    """Train, propose and train again until every interval is narrow enough or the budget is spent."""
    with pool_of(folder, slots, train=train) as pool:
        run_rounds(
            folder,
            "cbs",
            (),
            propose=lambda: next_runs(folder, series, goal, budget_tokens),
            train=lambda: train_stage(folder, "grid", pool),
        )
    return [_outcome(key, read_knee(folder, cells, goal), folder) for key, cells in series.items()]


def next_runs(
    folder: SweepFolder, series: Mapping[Series, Sequence[TunedCell]], goal: Goal, budget_tokens: int | None
) -> list[Proposal]:
    """Return what the next round adds.

    Raises: ValueError when the budget does not even allow the first round.
    """
    listed = stage_runs(folder, "grid") if folder.manifest.exists() else []
    spent = sum(spent_tokens(folder, listed).values())
    proposals: list[Proposal] = []
    for cells in series.values():
        more = propose_for_knee(read_knee(folder, cells, goal))
        tokens = spent + sum(each.run.realized_tokens for each in [*proposals, *more])
        if budget_tokens is None or tokens <= budget_tokens:
            proposals += more
        elif any(each.why.startswith("start") for each in more):
            raise ValueError(
                f"--budget-tokens {budget_tokens:,}: to start with it takes up to {tokens:,}, {spent:,} of which are "
                f"spent; raise it, or lower token_budget"
            )
    return proposals


def read_knee(folder: SweepFolder, cells: Sequence[TunedCell], goal: Goal) -> KneeBench:
    """Read what is known of one series, at the hardest target of the sweep."""
    if not folder.manifest.exists():
        return KneeBench(cells, [[] for _ in cells], targets_of_none(), goal)
    listed = by_cell(cells, stage_runs(folder, "grid"))
    return KneeBench(cells, listed, targets_in(folder.path, min(folder.read_spec().targets_nats)), goal)


def _outcome(key: Series, bench: KneeBench, folder: SweepFolder) -> KneeOutcome:
    runs = [run for own in bench.runs for run in own]
    knee = replace(bench, goal=replace(bench.goal, level=REPORTED_LEVEL)).knee
    estimate = knee.estimate if knee else None
    full_grid, tokens = _full_grid(bench) if knee and knee.ratio else ("", None)
    return KneeOutcome(
        context=key[0],
        optimizer=key[1],
        value=estimate.value if estimate else None,
        low=estimate.low if estimate else None,
        high=estimate.high if estimate else None,
        verdict=_verdict(bench),
        runs=len(runs),
        tokens=sum(spent_tokens(folder, runs).values()),
        full_grid_tokens=tokens,
        full_grid=full_grid,
    )


def _verdict(bench: KneeBench) -> str:
    if bench.knee is None:
        return "not_reached"
    if bench.is_narrow:
        return "ok"
    return "budget_tokens" if propose_for_knee(bench) else "not_identified"


def _full_grid(bench: KneeBench) -> tuple[str, int]:
    """Return the full grid that would know B_crit as well, in words, and its tokens."""
    assert bench.knee is not None
    seeds = bench.knee.seeds_of_full_grid([cell.batch for cell in bench.cells])
    rates = max(len(cell.rates) for cell in bench.cells)
    costs = (len(cell.rates) * bench.cost_tokens(place) for place, cell in enumerate(bench.cells))
    return f"{len(bench.cells)} batches, {rates} rates, {seeds} seeds", round(seeds * sum(costs))
