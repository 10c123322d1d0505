"""What a branch waits for: the state that its trunk keeps where the branch starts. Imports no torch.

A branch can be trained as soon as that state is there, while the trunk goes on. Where it will never be there, the
reason is said; where the trunk diverged before, the branch has diverged with it.
"""

from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from harness.config import Branch, RunConfig
from harness.record import RunFolder, append_row, read_json, read_rows, write_json
from sweeps.run_files import settings_of
from sweeps.store import State, SweepFolder, claim, failure_reason, is_missing, read_run, result_record, state

#: How a branch has ended whose trunk diverged before the branch started.
TRUNK_DIVERGED = "trunk_diverged"


@dataclass(frozen=True)
class Hold:
    """Why a branch cannot start; `is_final` where waiting alone will not change that."""

    words: str
    is_final: bool = False
    has_diverged: bool = False


def waits_for(run: RunConfig, folder: SweepFolder) -> str | None:
    """Say what keeps a run from starting, in words; None for one that can start, or has."""
    hold = hold_of(folder.run(run.run_id), run.branch)
    return hold.words if hold else None


def trunk_of(run: RunFolder, branch: Branch) -> RunFolder:
    return RunFolder(run.path.parent / branch.parent)


def branch_of(run: RunFolder) -> Branch | None:
    """Return where a run branches off; a configuration that cannot be read is not one of a branch."""
    try:
        return settings_of(run).branch
    except (OSError, ValueError):
        return None


def hold_of(run: RunFolder, branch: Branch | None) -> Hold | None:
    """Return what keeps a run from starting; one that has a checkpoint of its own, or its result, needs no trunk."""
    if branch is None or run.checkpoint.exists() or not is_missing(run):
        return None
    trunk, at_tokens = trunk_of(run, branch), branch.at_tokens
    seen = _diverged_at(trunk)
    if seen is not None and seen <= at_tokens:
        words = f"its trunk {branch.parent} diverged at {seen:,} tokens, before {at_tokens:,}"
        return Hold(words, is_final=True, has_diverged=True)
    return None if trunk.kept(at_tokens).exists() else _without_state(trunk, branch)


def _without_state(trunk: RunFolder, branch: Branch) -> Hold | None:
    """Return why the state of a trunk that a branch starts from is not there."""
    tokens = f"{branch.at_tokens:,} tokens"
    if not trunk.config.exists():
        return Hold(f"its trunk {branch.parent} is gone; critbatch run plans it again", is_final=True)
    now = state(trunk)
    if now == State.FAILED:
        return Hold(f"its trunk {branch.parent} failed: {failure_reason(trunk)}", is_final=True)
    if now not in (State.FINISHED, State.DIVERGED):
        return Hold(f"waits for its trunk {branch.parent} to come to {tokens}")
    if trunk.kept(branch.at_tokens).exists():  # it has kept it and ended between the two looks
        return None
    return Hold(
        f"its trunk {branch.parent} {now} without keeping its state at {tokens}, or that was removed; move "
        f"{trunk.path} away and start again: the trunk is trained anew, to the same numbers",
        is_final=True,
    )


def _diverged_at(trunk: RunFolder) -> int | None:
    """Return the tokens after which a trunk diverged; null where it has not."""
    with suppress(ValueError):
        record = result_record(trunk)
        if record and record["status"] == State.DIVERGED:
            return int(record["tokens_seen"])
    return None


def waiting(runs: Iterable[RunFolder]) -> dict[RunFolder, Branch]:
    """Return those of the runs that are branches and cannot start yet."""
    branches = ((run, branch_of(run)) for run in runs)
    return {run: branch for run, branch in branches if branch and hold_of(run, branch)}


def lacking_trunks(branches: Mapping[RunFolder, Branch], given: Collection[RunFolder]) -> list[RunFolder]:
    """Return the trunks of branches that have no result and are not among the runs `given`."""
    trunks = dict.fromkeys(trunk_of(run, branch) for run, branch in branches.items())
    known = set(given)
    return [trunk for trunk in trunks if trunk not in known and trunk.config.exists() and is_missing(trunk)]


def needed_states(missing: Iterable[RunFolder]) -> list[Path]:
    """Return the states that branches without a result start from, whether they are there or not."""
    branches = ((run, branch_of(run)) for run in missing)
    return [trunk_of(run, branch).kept(branch.at_tokens) for run, branch in branches if branch]


def diverge_with_trunk(run: RunFolder, branch: Branch) -> None:
    """Record that a branch has diverged with its trunk: its losses are the trunk's, and it has taken nothing itself.

    So no rate is chosen for the seeds that survived it.
    """
    trunk, config = trunk_of(run, branch), read_run(run)
    with claim(run) as held:
        if held is None or not is_missing(run):
            return
        run.failure.unlink(missing_ok=True)
        run.evaluations.unlink(missing_ok=True)
        seconds = dict.fromkeys(("train_seconds", "eval_seconds", "other_seconds"), 0.0)
        nothing = seconds | {"train_flops": 0.0, "train_cpu_seconds": None}
        for row in read_rows(trunk.evaluations):
            append_row(run.evaluations, row | nothing | {"run_id": config.run_id})
        of_branch = {
            "run_id": config.run_id,
            "global_batch_tokens": config.global_batch_tokens,
            "token_budget": config.token_budget,
            "realized_tokens": config.realized_tokens,
            "peak_lr": config.optimizer.peak_lr,
            "schedule": config.schedule.kind,
            "protocol": config.protocol,
            "stop_reason": TRUNK_DIVERGED,
            "parent_run_id": branch.parent,
            "branch_tokens": branch.at_tokens,
            "config_json": config.model_dump_json(),
        }
        write_json(run.run, read_json(trunk.run) | seconds | of_branch)
