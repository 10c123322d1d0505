"""Learning rates, averaging weights and marks, against tables that a reader checks by eye."""

from typing import Any

import numpy as np
import pytest

from harness.batch_clock import BatchClock
from harness.config import AveragingConfig, EvaluationConfig, RunConfig
from harness.schedule import averaging_weight, evaluation_marks, learning_rate_factor, power_exponent


def run_of_ten_steps(**schedule: Any) -> RunConfig:
    given = {
        "corpus": {"source": "python-stdlib"},
        "model": {"width": 8, "layers": 1, "heads": 1, "sequence_length": 10},
        "optimizer": {"name": "adamw", "peak_lr": 1.0},
        "global_batch_tokens": 10,
        "token_budget": 100,
        "schedule": schedule,
    }
    return RunConfig.parse(given, "test")


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ({"kind": "constant", "warmup_tokens": 40}, [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1]),
        ({"kind": "constant", "warmup_tokens": 5, "warmup_min_steps": 2}, [0.5, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
        ({"kind": "linear", "warmup_tokens": 20}, [0.5, 1, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]),
        (
            {"kind": "linear", "warmup_tokens": 20, "final_fraction": 0.2},
            [0.5, 1, 1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3],
        ),
        (
            {"kind": "cosine", "warmup_tokens": 20},
            [0.5, 1, 1, 0.96194, 0.853553, 0.691342, 0.5, 0.308658, 0.146447, 0.03806],
        ),
        (
            {"kind": "wsd", "warmup_tokens": 20, "decay_share": 0.4, "final_fraction": 0.2},
            [0.5, 1, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4],
        ),
    ],
)
def test_learning_rate_factor_follows_the_table(schedule: dict[str, Any], expected: list[float]) -> None:
    run = run_of_ten_steps(**schedule)
    assert [learning_rate_factor(step, run) for step in range(1, 11)] == pytest.approx(expected, abs=1e-6)


def test_learning_rate_factor_depends_on_tokens_not_on_steps() -> None:
    """A step of twice the batch takes the rate of the two small ones: the second's in warmup, the first's in decay."""
    small = run_of_ten_steps(kind="cosine", warmup_tokens=40)
    large = small.model_copy(update={"global_batch_tokens": 20})
    expected = [learning_rate_factor(step, small) for step in (2, 4, 5, 7, 9)]
    assert [learning_rate_factor(step, large) for step in range(1, 6)] == pytest.approx(expected)


@pytest.mark.parametrize("kind", ["linear", "cosine", "wsd"])
def test_learning_rate_factor_spends_no_update_at_zero(kind: str) -> None:
    run = run_of_ten_steps(kind=kind, warmup_tokens=20)
    assert all(learning_rate_factor(step, run) > 0 for step in range(1, 11))


@pytest.mark.parametrize("sigma", [0.05, 0.1, 0.2])
def test_power_ema_has_the_relative_width_it_is_named_by(sigma: float) -> None:
    """The weights that 4,000 steps get in the average have standard deviation σ · t. Source: arXiv 2312.02696."""
    steps = 4000
    averaging = AveragingConfig(kind="power_ema", sigma=sigma)
    keep = np.array([averaging_weight(step, averaging, BatchClock(1, steps)) for step in range(1, steps + 1)])
    later = np.append(np.cumprod(keep[::-1])[::-1][1:], 1.0)
    share = (1.0 - keep) * later
    position = np.arange(1, steps + 1) / steps
    mean = np.sum(share * position)
    assert np.sum(share) == pytest.approx(1.0)
    assert np.sqrt(np.sum(share * (position - mean) ** 2)) == pytest.approx(sigma, rel=0.01)


def test_power_exponent_of_edm2_is_reproduced() -> None:
    """σ = .05 and .10 give γ = 16.97 and 6.94. Source: arXiv 2312.02696, section 3.1."""
    assert power_exponent(0.05) == pytest.approx(16.97, abs=0.01)
    assert power_exponent(0.10) == pytest.approx(6.94, abs=0.01)


def test_ema_half_life_is_in_tokens() -> None:
    averaging = AveragingConfig.parse({"kind": "ema", "decay": {"half_life_tokens": 1000}}, "test")
    assert averaging_weight(10_000, averaging, BatchClock(1000, 1000)) == pytest.approx(0.5)
    assert averaging_weight(10_000, averaging, BatchClock(500, 500)) ** 2 == pytest.approx(0.5)


@pytest.mark.parametrize("kind", ["ema", "power_ema"])
def test_averaging_starts_from_the_first_weights_not_from_the_initial_ones(kind: str) -> None:
    averaging = AveragingConfig.parse({"kind": kind}, "test")
    assert averaging_weight(1, averaging, BatchClock(64, 640)) == 0.0
    assert averaging_weight(2, averaging, BatchClock(64, 640)) <= 0.5


def test_evaluation_marks_are_the_same_tokens_for_every_batch() -> None:
    evaluation = EvaluationConfig(first_mark_tokens=1000, marks_per_doubling=2)
    marks_tokens = {
        batch: [step * batch for step in evaluation_marks(evaluation, BatchClock(batch, 8000))] for batch in (10, 500)
    }
    assert marks_tokens[10] == [0, 1000, 1420, 2000, 2830, 4000, 5660, 8000]
    assert marks_tokens[500] == [0, 1000, 1500, 2000, 3000, 4000, 6000, 8000]
