"""What a sweep would do, before anything is queued: pure arithmetic on its runs, and the refusal of what cannot run."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from harness.batch_plan import plan_batch
from harness.config import CorpusConfig, MachineConfig, RunConfig
from harness.flops import (
    count_parameters,
    forward_backward_flops_per_token,
    optimizer_flops_per_step,
    optimizer_state_bytes,
)
from harness.schedule import evaluation_marks
from sweeps.grid import expand
from sweeps.mistakes import Mistakes
from sweeps.printing import counted, narrow_table
from sweeps.spec import SweepSpec

if TYPE_CHECKING:
    from rich.console import RenderableType

CheckBudget = Callable[[RunConfig], None]


@dataclass(frozen=True)
class Work:
    """What one run does; runs that differ in learning rate or seed alone do the same work."""

    model: str
    optimizer: str
    global_batch_tokens: int
    realized_tokens: int
    steps: int
    warmup_tokens: int
    micro_batch_tokens: int
    accumulation: int
    num_params: int
    optimizer_state_bytes: int
    train_flops: float
    evaluation_flops: float

    @property
    def flops(self) -> float:
        return self.train_flops + self.evaluation_flops

    @property
    def warmup_share(self) -> float:
        return self.warmup_tokens / self.realized_tokens

    @property
    def evaluation_share(self) -> float:
        """Evaluation's part of all FLOPs of the run."""
        return self.evaluation_flops / self.flops


@dataclass(frozen=True)
class Speed:
    """Sustained FLOP/s of one run at a time on one slot and where the number is from; none is a reason, not a zero."""

    flops_per_second: float | None
    source: str


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
    """A sweep's rows, and the totals that follow from them. Early stops are not foreseen: hours are at most."""

    sweep: str
    corpora: tuple[str, ...]
    rows: tuple[PlanRow, ...]
    slots: int
    speed: Speed

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

    def hours(self, flops: float, slots: int = 1) -> float | None:
        speed = self.speed.flops_per_second
        return flops / speed / slots / 3600 if speed else None


def prepare_runs(spec: SweepSpec) -> tuple[list[RunConfig], CheckBudget]:
    """Return the runs of the grid stage, their corpora prepared, and the check of a run against its corpus."""
    from harness.corpus import Corpus, check_budget, prepare

    corpora: dict[str, Corpus] = {}

    def prepare_once(config: CorpusConfig) -> Corpus:
        corpus = prepare(config)
        return corpora.setdefault(corpus.fingerprint, corpus)

    runs = expand(spec, prepare_once)
    return runs, lambda run: check_budget(corpora[str(run.corpus.fingerprint)], run)


def work_of(run: RunConfig, machine: MachineConfig) -> Work:
    """Return the work of one run. Raises: ValueError when its batch cannot be split over the machine exactly."""
    split = plan_batch(
        run.global_batch_tokens, run.model.sequence_length, machine.devices, machine.max_micro_batch_tokens
    )
    flops_per_token = forward_backward_flops_per_token(run.model)
    evaluations = len(evaluation_marks(run.evaluation, run.global_batch_tokens, run.steps))
    weights_evaluated = 1 if run.averaging.kind == "none" else 2
    return Work(
        model=run.model_name,
        optimizer=run.optimizer.name,
        global_batch_tokens=run.global_batch_tokens,
        realized_tokens=run.realized_tokens,
        steps=run.steps,
        warmup_tokens=run.warmup_effective_tokens,
        micro_batch_tokens=split.micro_batch_tokens,
        accumulation=split.accumulation,
        num_params=count_parameters(run.model),
        optimizer_state_bytes=optimizer_state_bytes(run.model, run.optimizer),
        train_flops=run.realized_tokens * flops_per_token
        + run.steps * optimizer_flops_per_step(run.model, run.optimizer),
        # The forward pass is a third of forward and backward.
        evaluation_flops=evaluations * weights_evaluated * run.evaluation.tokens * flops_per_token / 3,
    )


def make_plan(spec: SweepSpec, runs: Sequence[RunConfig], check_budget: CheckBudget, slots: int, speed: Speed) -> Plan:
    """Plan the grid stage and the confirmation. Raises: ValueError, one line for each thing that cannot run."""
    mistakes = Mistakes()
    cells: dict[Work, list[RunConfig]] = {}
    for run in runs:
        for check in (lambda run: cells.setdefault(work_of(run, spec.machine), []).append(run), check_budget):
            try:
                check(run)
            except ValueError as error:
                mistakes.add(error, run.run_id)
    mistakes.raise_any(of=len(runs))
    rows = tuple(_row(spec, work, members) for work, members in cells.items())
    return Plan(spec.name, tuple(dict.fromkeys(map(_corpus_in_words, runs))), rows, slots, speed)


def measured_speed(run_rows: Iterable[Mapping[str, Any]]) -> Speed:
    """Return FLOP/s over all finished runs: their FLOPs in optimizer steps over their seconds in optimizer steps."""
    finished = [row for row in run_rows if row["status"] == "finished" and row["train_seconds"]]
    if not finished:
        return Speed(None, "no finished run of this sweep to measure it on; state it with --flops-per-second")
    flops = sum(r["flops_per_token"] * r["tokens_seen"] + r["optimizer_flops_per_step"] * r["step"] for r in finished)
    seconds = sum(row["train_seconds"] for row in finished)
    return Speed(flops / seconds, f"measured on {counted(len(finished), 'finished run')} of this sweep")


def as_json(plan: Plan) -> dict[str, Any]:
    """Return the plan as plain values; what is not known is null, with `flops_per_second_source` as its reason."""
    return {
        "sweep": plan.sweep,
        "slots": plan.slots,
        "runs": plan.runs,
        "flops": plan.flops,
        "hours": plan.hours(plan.flops, plan.slots),
        "flops_per_second": plan.speed.flops_per_second,
        "flops_per_second_source": plan.speed.source,
        "cells": [
            asdict(row.work)
            | {
                "warmup_share": row.work.warmup_share,
                "evaluation_share": row.work.evaluation_share,
                "peak_lrs": row.peak_lrs,
                "grid_runs": row.grid_runs,
                "confirm_runs": row.confirm_runs,
                "flops": row.flops,
                "slot_hours": plan.hours(row.flops),
            }
            for row in plan.rows
        ],
    }


def as_table(plan: Plan) -> "RenderableType":
    """Return the plan for a person, at most 80 columns wide; `as_json` has more."""
    from rich.console import Group

    table = narrow_table()
    table.add_column("optimizer", no_wrap=True)
    for heading in ("batch\ntokens", "runs"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("learning rates", justify="right")
    for heading in ("steps", "tokens\na run"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("warmup\ntokens", justify="right")
    for heading in ("micro-b.\n× accum.", "slot\nhours"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in plan.rows:
        table.add_row(*_cells(plan, row))
    title = f"{plan.sweep}: {plan.runs_in_words}"
    return Group(title, *plan.corpora, *_models(plan), "", table, "", *_summary(plan))


def _row(spec: SweepSpec, work: Work, runs: list[RunConfig]) -> PlanRow:
    rates = sorted({run.optimizer.peak_lr for run in runs})
    settings = {run.model_copy(update={"init_seed": 0, "data_seed": 0}).run_id for run in runs}
    confirmed = (
        len(spec.confirm.seeds) * min(spec.confirm.top, len(rates)) * (len(settings) // len(rates))
        if spec.confirm
        else 0
    )
    return PlanRow(work, tuple(rates), len(runs), confirmed)


def _corpus_in_words(run: RunConfig) -> str:
    corpus = run.corpus
    return f"Corpus: {corpus.source}, tokenizer {corpus.tokenizer} of {corpus.vocab_size:,} tokens."


def _models(plan: Plan) -> list[str]:
    models = {row.work.model: row.work.num_params for row in plan.rows}
    return [f"Model: {model}, {num_params:,} parameters." for model, num_params in models.items()]


def _cells(plan: Plan, row: PlanRow) -> list[str]:
    work, hours = row.work, plan.hours(row.flops)
    several_models = len(_models(plan)) > 1
    return [
        f"{work.optimizer}\n({work.model})" if several_models else work.optimizer,
        f"{work.global_batch_tokens:,}",
        f"{row.grid_runs}" + (f" + {row.confirm_runs}" if row.confirm_runs else ""),
        ", ".join(f"{rate:g}" for rate in row.peak_lrs),
        f"{work.steps:,}",
        f"{work.realized_tokens:,}",
        f"{work.warmup_tokens:,} ({work.warmup_share:.0%})",
        f"{work.micro_batch_tokens:,} × {work.accumulation}",
        "–" if hours is None else f"{hours:.2f}",
    ]


def _summary(plan: Plan) -> list[str]:
    states = {row.work.optimizer: row.work.optimizer_state_bytes / 2**20 for row in plan.rows}
    memory = ", ".join(f"{optimizer} {mebibytes:.1f} MiB" for optimizer, mebibytes in states.items())
    evaluation = sum(row.runs * row.work.evaluation_flops for row in plan.rows) / plan.flops
    flops = f"{plan.flops:.2e} FLOP in all, {evaluation:.0%} of them in evaluations."
    return [f"Optimizer state: {memory}.", f"{flops} {_hours_in_words(plan)}"]


def _hours_in_words(plan: Plan) -> str:
    hours = plan.hours(plan.flops, plan.slots)
    if hours is None:
        return f"Hours: not known, {plan.speed.source}."
    return (
        f"At most {hours:.2f} hours on {counted(plan.slots, 'slot')} "
        f"at {plan.speed.flops_per_second:.2e} FLOP/s a slot ({plan.speed.source})."
    )
