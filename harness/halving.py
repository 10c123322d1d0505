"""What a run does when memory runs out: it starts anew with half its micro-batch, which changes no number beyond the
order of a sum; never with another global batch. Imports no torch.
"""

from collections.abc import Mapping

from harness.batch_clock import BatchClock
from harness.batch_plan import RunPlan, plan_run
from harness.config import MachineConfig, RunConfig
from harness.failures import TooLargeError
from harness.record import RunFolder, Value, read_json, write_json


class StartAnew(Exception):  # noqa: N818 - nothing has gone wrong that is not put right
    """Memory ran out on one of several devices: every process has to start anew, with half the micro-batch."""


def micro_batch_halvings(files: RunFolder) -> int:
    """Return how often the run started anew with half its micro-batch."""
    return (read_json(files.run).get("micro_batch_halvings") or 0) if files.run.exists() else 0


def within_memory(machine: MachineConfig, files: RunFolder) -> MachineConfig:
    """Return the machine with the micro-batch that the run was left with when memory had run out."""
    if not micro_batch_halvings(files):
        return machine
    limit = min(machine.max_micro_batch_tokens, read_json(files.run)["micro_batch_tokens"])
    return machine.model_copy(update={"max_micro_batch_tokens": limit})


def start_smaller(files: RunFolder, row: Mapping[str, Value]) -> str:
    """Let a run that ran out of memory, and was started with `row`, start anew with half its micro-batch; say so.

    Raises: TooLargeError with advice, once there is a checkpoint, or for a micro-batch of one sequence.
    """
    if files.checkpoint.exists():
        raise TooLargeError(
            f"out of memory with micro-batches of {row['micro_batch_tokens']} tokens, and there is a checkpoint, with "
            f"which they cannot change; go on with more memory, or set machine.max_micro_batch_tokens to "
            f"{halved_plan(row).micro_batch_tokens} and remove {files.checkpoint} to train from the start"
        )
    smaller = halved_plan(row)
    split = {"micro_batch_tokens": smaller.micro_batch_tokens, "accumulation": smaller.final.accumulation}
    halvings = int(row["micro_batch_halvings"] or 0) + 1
    write_json(files.run, {**row, **split, "micro_batch_halvings": halvings})
    return (
        f"Out of memory with micro-batches of {row['micro_batch_tokens']} tokens; starting anew with "
        f"{smaller.micro_batch_tokens} and an accumulation of {smaller.final.accumulation}: the global batch stays."
    )


def halved_plan(row: Mapping[str, Value]) -> RunPlan:
    """Split the batches of a run of RUN_COLUMNS with at most half its micro-batch.

    Raises: TooLargeError when that is one sequence already.
    """
    batch, sequence, devices, micro_batch = (
        int(row[name] or 0) for name in ("global_batch_tokens", "sequence_length", "num_devices", "micro_batch_tokens")
    )
    if micro_batch == sequence:
        raise TooLargeError(
            f"out of memory with a micro-batch of one sequence of {sequence} tokens; take a device with more memory, "
            f"a smaller model or a shorter model.sequence_length"
        )
    config = row.get("config_json")
    clock = RunConfig.model_validate_json(str(config)).clock if config else BatchClock(batch, batch)
    return plan_run(clock, sequence, devices, micro_batch // 2)
