"""Learning rate, weight averaging and evaluation marks: pure functions of the optimizer step.

A step of B tokens advances by B tokens, so tokens seen and steps are one clock. Steps count from 1:
`learning_rate_factor(1, …)` is the rate of the first update.
"""

import math

from harness.config import AveragingConfig, EvaluationConfig, RunConfig
from harness.optimizers.config import decay_per_step


def learning_rate_factor(step: int, run: RunConfig) -> float:
    """Return the rate of update `step` (1 … run.steps) over the peak rate.

    Warmup is linear and reaches the peak at its last step. A decay would reach `final_fraction` one step after the
    last: no update is spent at a rate of zero, which would cost runs of few, large steps the most.
    """
    if step < run.warmup_steps:
        return step / run.warmup_steps
    schedule, after_warmup = run.schedule, max(run.steps - run.warmup_steps, 1)
    done = max(step - run.warmup_steps - 1, 0) / after_warmup
    if schedule.kind == "constant":
        return 1.0
    if schedule.kind == "cosine":
        remaining = 0.5 * (1.0 + math.cos(math.pi * done))
    elif schedule.kind == "linear":
        remaining = 1.0 - done
    else:
        decay_steps = min(max(round(schedule.decay_share * run.steps), 1), after_warmup)
        remaining = min((run.steps + 1 - step) / decay_steps, 1.0)
    return schedule.final_fraction + (1.0 - schedule.final_fraction) * remaining


def averaging_weight(step: int, averaging: AveragingConfig, global_batch_tokens: int) -> float:
    """Return the share of the old average that update `step` keeps; 0 at step 1, never above that of a plain mean.

    Source: arXiv 2312.02696, eq. 2 (power profile) for `power_ema`. The cap by the plain mean is ours: without it the
    initial weights stay in an `ema` for many half-lives.
    """
    plain_mean = 1.0 - 1.0 / step
    if averaging.kind == "power_ema":
        return math.pow(plain_mean, power_exponent(averaging.sigma) + 1.0)
    return min(decay_per_step(averaging.decay, global_batch_tokens), plain_mean)


def power_exponent(sigma: float) -> float:
    """Return γ of the profile t^γ whose relative width is `sigma`: σ = √(γ+1) / ((γ+2)·√(γ+3)).

    Source: arXiv 2312.02696, eq. 3. Solved by bisection; σ falls from .289 at γ = 0.
    """
    low, high = 0.0, 1e6
    for _ in range(200):
        middle = 0.5 * (low + high)
        width = math.sqrt(middle + 1.0) / ((middle + 2.0) * math.sqrt(middle + 3.0))
        low, high = (middle, high) if width > sigma else (low, middle)
    return 0.5 * (low + high)


def evaluation_marks(evaluation: EvaluationConfig, global_batch_tokens: int, steps: int) -> list[int]:
    """Return the steps after which a run is evaluated: 0, the first step at or past each token mark, and the last."""
    marks = {0, steps}
    for number in range(64 * evaluation.marks_per_doubling):
        mark_tokens = evaluation.first_mark_tokens * 2.0 ** (number / evaluation.marks_per_doubling)
        step = math.ceil(mark_tokens / global_batch_tokens)
        if step > steps:
            break
        marks.add(step)
    return sorted(marks)
