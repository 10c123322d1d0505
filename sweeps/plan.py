"""What a sweep would do, before anything is queued: pure arithmetic on its runs, and the refusal of what cannot run."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product

from harness.config import CorpusConfig, RunConfig
from sweeps.grid import expand
from sweeps.mistakes import Mistakes
from sweeps.printing import counted
from sweeps.spec import SweepSpec
from sweeps.speed import Speed
from sweeps.work import Work, work_of

CheckBudget = Callable[[RunConfig], None]


@dataclass(frozen=True)
class PlanRow:
    """A cell of the plan: equal work, several learning rates and seeds."""

    work: Work
    peak_lrs: tuple[float, ...]
    grid_runs: int
    confirm_runs: int

    @property
    def runs(self) -> int:
        return self.grid_runs + self.confirm_runs

    @property
    def flops(self) -> float:
        return self.runs * self.work.flops


@dataclass(frozen=True)
class Plan:
    """A sweep's rows, and the totals that follow from them. Early stops are not foreseen: hours are at most.

    `speed` is that of the device that is planned for, `other_speeds` are for comparison. Hours are those of slots: of
    runs, one after the other. A run takes `devices` devices.
    """

    sweep: str
    corpora: tuple[str, ...]
    rows: tuple[PlanRow, ...]
    slots: int
    devices: int
    speed: Speed
    other_speeds: tuple[Speed, ...] = ()

    @property
    def runs(self) -> int:
        return sum(row.runs for row in self.rows)

    @property
    def runs_in_words(self) -> str:
        """`16 runs, then 4 confirmations`: the second stage is chosen after the first."""
        grid, confirm = (sum(getattr(row, stage) for row in self.rows) for stage in ("grid_runs", "confirm_runs"))
        return counted(grid, "run") + (f", then {counted(confirm, 'confirmation')}" if confirm else "")

    @property
    def flops(self) -> float:
        return sum(row.flops for row in self.rows)

    @property
    def tokens(self) -> int:
        return sum(row.runs * row.work.trained_tokens for row in self.rows)

    @property
    def branches(self) -> "tuple[PlanRow, ...]":
        return tuple(row for row in self.rows if row.work.branch_tokens)

    @property
    def tokens_without_branching(self) -> int | None:
        """Tokens if every branch were trained by itself from token 0, and no trunk; null where there are none."""
        return sum(row.runs * row.work.realized_tokens for row in self.branches) or None

    def slot_hours(self, rows: "Sequence[PlanRow] | None" = None, speed: Speed | None = None) -> float | None:
        """Return the hours of all runs of `rows`, by default of all; null unless the speed of each is known."""
        rows, speed = self.rows if rows is None else rows, speed or self.speed
        seconds = [(row.runs, speed.seconds(row.work)) for row in rows]
        if any(of_one is None for _, of_one in seconds):
            return None
        return sum(runs * of_one for runs, of_one in seconds if of_one is not None) / 3600

    def hours(self, speed: Speed | None = None) -> float | None:
        """Return the hours until the last of the slots is done, if they share the work evenly."""
        hours = self.slot_hours(speed=speed)
        return None if hours is None else hours / self.slots

    def device_hours(self, speed: Speed | None = None) -> float | None:
        """Return the hours that are paid for: of every device of every run."""
        hours = self.slot_hours(speed=speed)
        return None if hours is None else hours * self.devices


def prepare_runs(spec: SweepSpec) -> tuple[list[RunConfig], CheckBudget]:
    """Return the runs of the grid stage, their corpora prepared, and the check of a run against its corpus."""
    from harness.corpus import Corpus, check_budget, prepare

    corpora: dict[str, Corpus] = {}

    def prepare_once(config: CorpusConfig) -> Corpus:
        corpus = prepare(config)
        return corpora.setdefault(corpus.fingerprint, corpus)

    runs = expand(spec, prepare_once)
    return runs, lambda run: check_budget(corpora[str(run.corpus.fingerprint)], run)


def make_plan(
    spec: SweepSpec,
    runs: Sequence[RunConfig],
    check_budget: CheckBudget,
    slots: int,
    speed: Speed,
    other_speeds: Sequence[Speed] = (),
) -> Plan:
    """Plan the grid stage and the confirmation. Raises: ValueError, one line for each thing that cannot run."""
    mistakes = Mistakes()
    cells: dict[Work, list[list[RunConfig]]] = {}
    for alike in _alike(runs):
        errors = list(_errors(alike[0], (partial(work_of, machine=spec.machine), check_budget)))
        for error, run in product(errors, alike):
            mistakes.add(error, run.run_id)
        if not errors:
            cells.setdefault(work_of(alike[0], spec.machine), []).append(alike)
    mistakes.raise_any(of=len(runs))
    rows = tuple(_row(spec, work, members) for work, members in cells.items())
    corpora = tuple(dict.fromkeys(map(_corpus_in_words, runs)))
    return Plan(spec.name, corpora, rows, slots, spec.machine.devices, speed, tuple(other_speeds))


def _errors(run: RunConfig, checks: Iterable[Callable[[RunConfig], object]]) -> Iterator[ValueError]:
    for check in checks:
        try:
            check(run)
        except ValueError as error:
            yield error


def check_hours(plan: Plan, budget_hours: float) -> None:
    """Raise ValueError when the plan takes more device hours than the budget has, or nobody knows how many."""
    hours = plan.device_hours()
    if hours is None:
        raise ValueError(f"{plan.sweep}: its hours are not known ({plan.speed.in_words}), --budget-hours asks for them")
    if hours > budget_hours:
        raise ValueError(
            f"{plan.sweep}: {plan.runs_in_words} take up to {hours:.4g} device hours ({plan.speed.in_words}), "
            f"--budget-hours is {budget_hours:g}; raise it, or lower token_budget or the number of rates and seeds"
        )


def _alike(runs: Sequence[RunConfig]) -> list[list[RunConfig]]:
    """Return the runs that differ in learning rate and seeds alone together; so do the trunks of branches."""
    found: dict[RunConfig, list[RunConfig]] = {}
    for run in runs:
        optimizer = run.optimizer.model_copy(update={"peak_lr": 1.0})
        branch = run.branch and run.branch.model_copy(update={"parent": ""})
        key = run.model_copy(update={"optimizer": optimizer, "branch": branch, "init_seed": 0, "data_seed": 0})
        found.setdefault(key, []).append(run)
    return list(found.values())


def _row(spec: SweepSpec, work: Work, members: list[list[RunConfig]]) -> PlanRow:
    rates = [{run.optimizer.peak_lr for run in alike} for alike in members]
    confirmed = 0
    if spec.confirm:
        confirmed = len(spec.confirm.seeds) * sum(min(spec.confirm.top, len(each)) for each in rates)
    return PlanRow(work, tuple(sorted(set().union(*rates))), sum(map(len, members)), confirmed)


def _corpus_in_words(run: RunConfig) -> str:
    corpus = run.corpus
    cut = "" if corpus.source == "bin" else f", tokenizer {corpus.tokenizer}"  # token files were cut into tokens before
    return f"Corpus: {corpus.source}{cut}, a vocabulary of {corpus.vocab_size:,} tokens."
