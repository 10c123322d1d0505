"""What a branch takes over from its parent: the state that it starts from, and the checks that it is the state of the
very run that the branch describes. Imports no torch.
"""

import math
from pathlib import Path
from typing import Any

from harness.config import RunConfig
from harness.frozen import dotted
from harness.identity import NOT_SCIENCE, NOT_SCIENCE_OF_RUN
from harness.record import RunFolder, read_json
from harness.schedule import learning_rate_factor

#: Callbacks whose state is the run's own; that of all others (clocks, measurements) is the work of one process.
_OF_THE_RUN = ("WeightAverage", "Evaluation")

#: Settings by which runs may differ that are alike so far; batches and rates are compared step by step, and what is
#: measured on the way changes nothing.
_LATER = {
    "token_budget", "schedule", "global_batch_tokens", "batch_warmup", "branch", "stop_at_loss_nats", "diagnostics",
    "evaluation",
}  # fmt: skip

#: Rates that are the same but for the rounding of k ** exponent.
_SAME_RATE = 1e-9


class ParentNotReadyError(ValueError):
    """The parent has not come to the branch yet."""


def kept_state(run: RunConfig, files: RunFolder) -> Path:
    """Return the state that a branch starts from: in the folder of its parent, beside its own.

    Raises: ParentNotReadyError while the parent is on its way there; ValueError where it is another run before the
    branch, or has ended without leaving the state.
    """
    assert run.branch is not None
    parent, tokens = RunFolder(files.path.parent / run.branch.parent), run.branch.at_tokens
    if not parent.config.exists():
        raise ParentNotReadyError(f"{run.run_id}: its parent {parent.path} is not there; run it first")
    config = RunConfig.parse(read_json(parent.config), str(parent.config))
    if config.run_id != run.branch.parent:
        raise ValueError(f"{parent.config} is the configuration of {config.run_id}, not of {run.branch.parent}")
    if differs := difference_before(run, config):
        raise ValueError(
            f"{run.run_id}: its parent {config.run_id} is not the same run up to {tokens} tokens: {differs}; plan the "
            f"branch from its parent's configuration"
        )
    record = read_json(parent.run) if parent.run.exists() else {}
    seen, kept = record.get("tokens_seen") or 0, parent.kept(tokens)
    if record.get("status") == "diverged" and seen <= tokens:
        raise ValueError(f"{run.run_id}: its parent {config.run_id} diverged at {seen} tokens, before {tokens}")
    if kept.exists():
        return kept
    if record.get("status") in ("finished", "diverged"):
        why = f"stopped at {seen} tokens" if seen < tokens else f"has finished, and {kept} is not there"
        raise ValueError(
            f"{run.run_id}: its parent {config.run_id} {why}; list {tokens} under its keep_at_tokens and move its "
            f"folder away to train it again"
        )
    raise ParentNotReadyError(f"{run.run_id}: its parent {config.run_id} has not kept its state at {tokens} tokens yet")


def difference_before(run: RunConfig, parent: RunConfig) -> str | None:
    """Return the first setting in which a branch is not its parent before the two part, with both values; null where
    they are alike.
    """
    assert run.branch is not None
    ours, theirs = (_settings(each) for each in (run, parent))
    for name in ours | theirs:
        if ours.get(name) != theirs.get(name):
            return f"{name} is {ours.get(name)} here, {theirs.get(name)} there"
    if run.stop_at_loss_nats not in (None, parent.stop_at_loss_nats):
        return f"stop_at_loss_nats is {run.stop_at_loss_nats} here, {parent.stop_at_loss_nats} there"
    for step in range(1, run.first_step + 1):
        batches = run.clock.batch_at(step), parent.clock.batch_at(step)
        if batches[0] != batches[1]:
            return f"global_batch_tokens of step {step} is {batches[0]} here, {batches[1]} there"
        rates = [each.optimizer.peak_lr * learning_rate_factor(step, each) for each in (run, parent)]
        if not math.isclose(*rates, rel_tol=_SAME_RATE):
            return f"the learning rate of step {step} is {rates[0]:.6g} here, {rates[1]:.6g} there"
    return None


def begin_branch(checkpoint: dict[str, Any]) -> None:
    """Make a parent's checkpoint the first one of a branch, whose own work begins there."""
    checkpoint["callbacks"] = {name: state for name, state in checkpoint["callbacks"].items() if name in _OF_THE_RUN}
    checkpoint["state_dict"]["train_loss_sum"].zero_()


def _settings(run: RunConfig) -> dict[str, Any]:
    """Return what must be alike of a branch and its parent, by dotted key."""
    science = run.model_dump(mode="json", exclude={**NOT_SCIENCE, **dict.fromkeys(NOT_SCIENCE_OF_RUN | _LATER, True)})
    return {name: value for name, value in dotted(science) if name != "optimizer.peak_lr"}
