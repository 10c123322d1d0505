"""The global batch is split exactly or refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.batch_plan import plan_batch


@pytest.mark.parametrize(
    ("batch", "sequence", "devices", "limit", "micro_sequences", "accumulation"),
    [
        (256, 64, 1, 2048, 4, 1),
        (16384, 64, 1, 2048, 32, 8),
        (16384, 64, 2, 2048, 32, 4),
        (16384, 64, 1, 3000, 32, 8),  # 46 sequences fit, 32 is the largest divisor of 256
        (448, 64, 1, 256, 1, 7),  # 7 sequences: only 1 divides and fits
    ],
)
def test_plan_batch_takes_the_largest_exact_divisor(
    batch: int, sequence: int, devices: int, limit: int, micro_sequences: int, accumulation: int
) -> None:
    plan = plan_batch(batch, sequence, devices, limit)
    assert (plan.micro_batch_sequences, plan.accumulation) == (micro_sequences, accumulation)


@given(
    sequences=st.integers(1, 500),
    sequence_length=st.sampled_from([1, 64, 1024]),
    devices=st.integers(1, 8),
    limit_sequences=st.integers(1, 600),
)
def test_plan_batch_never_changes_the_batch(
    sequences: int, sequence_length: int, devices: int, limit_sequences: int
) -> None:
    batch, limit = sequences * sequence_length, limit_sequences * sequence_length
    if sequences % devices:
        with pytest.raises(ValueError, match=f"does not divide over {devices} devices"):
            plan_batch(batch, sequence_length, devices, limit)
        return
    plan = plan_batch(batch, sequence_length, devices, limit)
    assert plan.devices * plan.accumulation * plan.micro_batch_tokens == batch
    assert plan.micro_batch_tokens <= limit
    larger = range(plan.micro_batch_sequences + 1, limit_sequences + 1)
    assert not any((sequences // devices) % micro == 0 for micro in larger if micro <= sequences // devices)


def test_plan_batch_refuses_part_of_a_sequence() -> None:
    with pytest.raises(ValueError, match="1000 tokens is not a whole number of sequences of 64"):
        plan_batch(1000, 64, 1, 2048)


def test_plan_batch_refuses_a_sequence_above_the_micro_batch_limit() -> None:
    with pytest.raises(ValueError, match="4096 tokens is longer than max_micro_batch_tokens 2048"):
        plan_batch(8192, 4096, 1, 2048)
