"""The exact split of a global batch: devices × accumulation × micro-batch. It refuses what does not divide; it never
rounds.
"""

from dataclasses import dataclass
from typing import NamedTuple

from harness.batch_clock import BatchClock, Span


@dataclass(frozen=True)
class BatchPlan:
    """One optimizer step: every device runs `accumulation` micro-batches of `micro_batch_sequences` sequences."""

    global_batch_tokens: int
    sequence_length: int
    devices: int
    micro_batch_sequences: int
    accumulation: int

    def __post_init__(self) -> None:
        parts = self.devices * self.accumulation * self.micro_batch_sequences * self.sequence_length
        assert parts == self.global_batch_tokens, (parts, self.global_batch_tokens)

    @property
    def micro_batch_tokens(self) -> int:
        return self.micro_batch_sequences * self.sequence_length


class MicroBatch(NamedTuple):
    """One device's `number`-th micro-batch (from 0) of step `step` (from 1), which is split as `split` says; the stream
    has given `first_sequence` sequences before the step.
    """

    step: int
    number: int
    split: BatchPlan
    first_sequence: int

    @property
    def begins_step(self) -> bool:
        return self.number == 0

    @property
    def ends_step(self) -> bool:
        return self.number == self.split.accumulation - 1


class RunPlan(NamedTuple):
    """The splits of all steps of a run, for each span of one batch; a device's micro-batches are counted from 0."""

    spans: tuple[tuple[Span, BatchPlan], ...]

    @property
    def final(self) -> BatchPlan:
        """The split of the run's last steps."""
        return self.spans[-1][1]

    @property
    def micro_batch_tokens(self) -> int:
        """The largest micro-batch: with it as the limit, the splits are the same."""
        return max(split.micro_batch_tokens for _, split in self.spans)

    @property
    def micro_batches(self) -> int:
        """How many micro-batches a device runs."""
        return sum(span.steps * split.accumulation for span, split in self.spans)

    def micro_batches_before(self, step: int) -> int:
        """Return how many micro-batches a device runs in the steps before `step`."""
        before = [min(max(step - 1 - span.first_step, 0), span.steps) for span, _ in self.spans]
        return sum(steps * split.accumulation for steps, (_, split) in zip(before, self.spans, strict=True))

    def at(self, index: int) -> MicroBatch:
        """Return the micro-batch number `index` of a device."""
        rest = index
        for span, split in self.spans:
            steps, number = divmod(rest, split.accumulation)
            if steps < span.steps:
                first_token = span.first_tokens + steps * span.batch_tokens
                return MicroBatch(span.first_step + steps + 1, number, split, first_token // split.sequence_length)
            rest -= span.steps * split.accumulation
        raise IndexError(f"micro-batch {index} of {self.micro_batches}")


def plan_run(clock: BatchClock, sequence_length: int, devices: int, max_micro_batch_tokens: int) -> RunPlan:
    """Split every batch of a run as `plan_batch` does. Raises: ValueError, as it does."""
    return RunPlan(
        tuple(
            (span, plan_batch(span.batch_tokens, sequence_length, devices, max_micro_batch_tokens))
            for span in clock.spans()
        )
    )


def plan_batch(global_batch_tokens: int, sequence_length: int, devices: int, max_micro_batch_tokens: int) -> BatchPlan:
    """Split the batch; the micro-batch is the largest exact divisor at or below `max_micro_batch_tokens`.

    Raises: ValueError when the batch is no whole number of sequences, does not divide over the devices, or when one
    sequence is longer than the largest micro-batch allowed.
    """
    sequences, rest = divmod(global_batch_tokens, sequence_length)
    if rest:
        raise ValueError(
            f"global batch of {global_batch_tokens} tokens is not a whole number of sequences "
            f"of {sequence_length} tokens"
        )
    if sequences % devices:
        raise ValueError(
            f"global batch of {sequences} sequences ({global_batch_tokens} tokens) does not divide "
            f"over {devices} devices; use a divisor of {sequences} as the number of devices"
        )
    if sequence_length > max_micro_batch_tokens:
        raise ValueError(
            f"one sequence of {sequence_length} tokens is longer than max_micro_batch_tokens {max_micro_batch_tokens}; "
            f"raise it to at least {sequence_length}"
        )
    per_device = sequences // devices
    micro = _largest_divisor(per_device, at_most=max_micro_batch_tokens // sequence_length)
    return BatchPlan(global_batch_tokens, sequence_length, devices, micro, per_device // micro)


def _largest_divisor(number: int, at_most: int) -> int:
    return next(divisor for divisor in range(min(number, at_most), 0, -1) if number % divisor == 0)
