"""Learning rate, weight averaging and evaluation marks: pure functions of the optimizer step.

Steps and tokens are one clock (`harness.batch_clock`): each function is one of the tokens seen, so that runs of
different batches are alike, and it is written in quotients of whole numbers, so that it does not round otherwise for
another batch. Steps count from 1: `learning_rate_factor(1, …)` is the rate of the first update.
"""

import math

from harness.batch_clock import BatchClock
from harness.config import AveragingConfig, EvaluationConfig, RunConfig
from harness.optimizers.config import decay_per_step


def learning_rate_factor(step: int, run: RunConfig) -> float:
    """Return the rate of update `step` (1 … run.steps) over the peak rate: what the schedule says, times what the batch
    of the step does (`BatchWarmup`).
    """
    factor = _schedule_factor(step, run)
    if run.batch_warmup is None:
        return factor
    return factor * math.pow(run.clock.batch_at(step) / run.global_batch_tokens, run.batch_warmup.lr_exponent)


def _schedule_factor(step: int, run: RunConfig) -> float:
    """Return what the schedule says of update `step`.

    Warmup is linear and reaches the peak at its last step. A decay would reach `final_fraction` one step after the
    last: no update is spent at a rate of zero, which would cost runs of few, large steps the most.
    """
    clock, schedule, warmup_tokens = run.clock, run.schedule, run.warmup_effective_tokens
    if step < run.warmup_steps:
        return clock.tokens_after(step) / warmup_tokens
    if schedule.kind == "constant":
        return 1.0
    tokens_before, tokens = clock.tokens_after(step - 1), run.realized_tokens
    done = max(tokens_before - warmup_tokens, 0) / max(tokens - warmup_tokens, run.global_batch_tokens)
    if schedule.kind == "cosine":
        remaining = 0.5 * (1.0 + math.cos(math.pi * done))
    elif schedule.kind == "linear":
        remaining = 1.0 - done
    else:
        remaining = min((tokens - tokens_before) / run.decay_tokens, 1.0)
    return schedule.final_fraction + (1.0 - schedule.final_fraction) * remaining


def averaging_weight(step: int, averaging: AveragingConfig, clock: BatchClock) -> float:
    """Return the share of the old average that update `step` keeps; 0 at step 1, never above that of a plain mean over
    the tokens.

    Source: arXiv 2312.02696, eq. 2 (power profile) for `power_ema`. The cap by the plain mean is ours: without it the
    initial weights stay in an `ema` for many half-lives.
    """
    batch = clock.batch_at(step)
    plain_mean = 1.0 - batch / clock.tokens_after(step)
    if averaging.kind == "power_ema":
        return math.pow(plain_mean, power_exponent(averaging.sigma) + 1.0)
    return min(decay_per_step(averaging.decay, batch), plain_mean)


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


def evaluation_marks(evaluation: EvaluationConfig, clock: BatchClock, first_step: int = 0) -> list[int]:
    """Return the steps after which a run is evaluated: `first_step`, the first step at or past each token mark after
    it, and the last.
    """
    marks = {first_step, clock.steps}
    for number in range(64 * evaluation.marks_per_doubling):
        mark_tokens = evaluation.first_mark_tokens * 2.0 ** (number / evaluation.marks_per_doubling)
        step = clock.steps_reaching(mark_tokens)
        if step > clock.steps:
            break
        if step > first_step:
            marks.add(step)
    return sorted(marks)
