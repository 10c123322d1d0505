"""The exact split of a global batch: devices × accumulation × micro-batch. It refuses what does not divide; it never
rounds.
"""

from dataclasses import dataclass


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
