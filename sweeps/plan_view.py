"""A plan as JSON, and as a table for a person."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from sweeps.plan import Plan, PlanRow
from sweeps.printing import counted, narrow_table
from sweeps.speed import Speed

if TYPE_CHECKING:
    from rich.console import RenderableType


def as_json(plan: Plan) -> dict[str, Any]:
    """Return the plan as plain values; what is not known is null, with `flops_per_second_source` as its reason."""
    return {
        "sweep": plan.sweep,
        "slots": plan.slots,
        "runs": plan.runs,
        "flops": plan.flops,
        "tokens": plan.tokens,
        "tokens_without_branching": plan.tokens_without_branching,
        "devices_a_run": plan.devices,
        **_hours(plan, plan.speed),
        "other_devices": [_hours(plan, speed) for speed in plan.other_speeds],
        "cells": [
            asdict(row.work)
            | {
                "trained_tokens": row.work.trained_tokens,
                "warmup_share": row.work.warmup_share,
                "evaluation_share": row.work.evaluation_share,
                "device_memory_total_bytes": row.work.device_memory_bytes.total,
                "peak_lrs": row.peak_lrs,
                "grid_runs": row.grid_runs,
                "confirm_runs": row.confirm_runs,
                "flops": row.flops,
                "slot_hours": plan.slot_hours([row]),
            }
            for row in plan.rows
        ],
    }


def _hours(plan: Plan, speed: Speed) -> dict[str, Any]:
    return {
        "device": speed.device,
        "hours": plan.hours(speed),
        "device_hours": plan.device_hours(speed),
        "flops_per_second": speed.flops_per_second,
        "flops_per_second_source": speed.source,
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


def _models(plan: Plan) -> list[str]:
    models = {row.work.model: row.work.num_params for row in plan.rows}
    return [f"Model: {model}, {num_params:,} parameters." for model, num_params in models.items()]


def _cells(plan: Plan, row: PlanRow) -> list[str]:
    work, hours = row.work, plan.slot_hours([row])
    several_models = len(_models(plan)) > 1
    return [
        f"{work.optimizer}\n({work.model})" if several_models else work.optimizer,
        f"{work.global_batch_tokens:,}",
        f"{row.grid_runs}" + (f" + {row.confirm_runs}" if row.confirm_runs else ""),
        ", ".join(f"{rate:g}" for rate in row.peak_lrs),
        f"{work.steps:,}",
        f"{work.trained_tokens:,}" + (f"\nfrom {work.branch_tokens:,}" if work.branch_tokens else ""),
        f"{work.warmup_tokens:,} ({work.warmup_share:.0%})",
        f"{work.micro_batch_tokens:,} × {work.accumulation}",
        "–" if hours is None else f"{hours:.2f}",
    ]


def _summary(plan: Plan) -> list[str]:
    works = [row.work for row in plan.rows]
    largest: dict[str, int] = {}
    for work in works:
        largest[work.optimizer] = max(work.device_memory_bytes.total, largest.get(work.optimizer, 0))
    memory = ", ".join(f"{name} {_mebibytes(count)}" for name, count in largest.items())
    checkpoint = max(work.checkpoint_bytes for work in works)
    unfinished = sum(row.runs * row.work.checkpoint_bytes for row in plan.rows)
    evaluation = sum(row.runs * row.work.evaluation_flops for row in plan.rows) / plan.flops
    flops = f"{plan.flops:.2e} FLOP in all, {evaluation:.0%} of them in evaluations."
    return [
        *_branches_in_words(plan),
        f"Memory of a run on each device: about {memory}, beside what the libraries take.",
        f"Disk: a checkpoint of up to {_mebibytes(checkpoint)} for each run begun and not ended; "
        f"{_mebibytes(unfinished)} if that were all.",
        f"{flops} {_hours_in_words(plan, plan.speed)}",
        *(_hours_in_words(plan, speed) for speed in plan.other_speeds),
    ]


def _branches_in_words(plan: Plan) -> list[str]:
    """Say what branching saves, and what its states take on the disk; nothing of a sweep without branches."""
    alone = plan.tokens_without_branching
    if alone is None:
        return []
    trunks = [row for row in plan.rows if row.work.kept_states]
    states = sum(row.runs * row.work.kept_states for row in trunks)
    size = sum(row.runs * row.work.kept_states * row.work.checkpoint_bytes for row in trunks)
    number, trunks_in_words = sum(row.runs for row in plan.branches), counted(sum(row.runs for row in trunks), "trunk")
    return [
        f"{number:,} branch{'' if number == 1 else 'es'} from {trunks_in_words}: {plan.tokens:,} tokens in all, "
        f"{plan.tokens / alone:.0%} of the {alone:,} that the branches would take by themselves.",
        f"Disk: {counted(states, 'state')} that branches start from, {_mebibytes(size)}, until critbatch clean.",
    ]


def _mebibytes(count: float) -> str:
    return f"{count / 2**20:,.1f} MiB"


def _hours_in_words(plan: Plan, speed: Speed) -> str:
    hours, device_hours = plan.hours(speed), plan.device_hours(speed)
    if hours is None:
        return f"Hours: not known, {speed.in_words}."
    devices = f", {device_hours:.2f} device hours" if plan.devices > 1 else ""
    return f"At most {hours:.2f} hours on {counted(plan.slots, 'slot')}{devices} ({speed.in_words})."
