"""Optimizer steps and tokens as one clock: the global batch of a run is a step function of the tokens seen.

Steps count from 1: `tokens_after(s)` are the tokens that the first s steps consume, `batch_at(s)` those of step s.
"""

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Annotated, NamedTuple

from pydantic import Field, model_validator

from harness.frozen import Frozen


class BatchStage(Frozen):
    """Steps of `global_batch_tokens` until the run has seen `until_tokens` tokens."""

    until_tokens: Annotated[int, Field(gt=0)]
    global_batch_tokens: Annotated[int, Field(gt=0)]


class BatchWarmup(Frozen):
    """The batches that a run begins with, by tokens seen; after the last stage it takes its own `global_batch_tokens`.

    A stage's learning rate is the run's times (the stage's batch / the run's batch) ** `lr_exponent`: ½ for optimizers
    that divide by the size of the gradient (arXiv 2505.23971), 1 for SGD, 0 for one rate throughout.
    """

    stages: Annotated[tuple[BatchStage, ...], Field(min_length=1)]
    lr_exponent: float = 0.5

    @model_validator(mode="after")
    def _check_stages(self) -> "BatchWarmup":
        begin = 0
        for number, stage in enumerate(self.stages):
            until, batch = stage.until_tokens, stage.global_batch_tokens
            if until <= begin:
                raise ValueError(f"stages.{number}.until_tokens {until} does not come after {begin}; sort the stages")
            if rest := (until - begin) % batch:
                nearest_ends = " and ".join(str(end) for end in (until - rest, until - rest + batch) if end > begin)
                raise ValueError(
                    f"stages.{number}.until_tokens {until} is not the end of a step: steps of {batch} tokens begin at "
                    f"{begin}; take {nearest_ends}"
                )
            begin = until
        return self


class Span(NamedTuple):
    """Consecutive steps of one batch; `first_step` steps and `first_tokens` tokens come before them."""

    first_step: int
    first_tokens: int
    steps: int
    batch_tokens: int


class BatchClock(NamedTuple):
    """The whole steps of a run: those of each stage, (until_tokens, batch_tokens), then of `global_batch_tokens` as far
    as the budget goes.
    """

    global_batch_tokens: int
    token_budget: int
    stages: tuple[tuple[int, int], ...] = ()

    @property
    def steps(self) -> int:
        """Whole optimizer steps in the budget."""
        last = _spans(self)[-1]
        return last.first_step + last.steps

    @property
    def realized_tokens(self) -> int:
        """Tokens that whole steps give; at most the budget."""
        return self.tokens_after(self.steps)

    def tokens_after(self, step: int) -> int:
        """Return the tokens seen after `step` steps; beyond the last step, as if it were repeated."""
        span = self._span_of(step)
        return span.first_tokens + (step - span.first_step) * span.batch_tokens

    def batch_at(self, step: int) -> int:
        """Return the tokens of step `step`."""
        return self._span_of(step).batch_tokens

    def steps_within(self, tokens: int) -> int:
        """Return how many steps are over when `tokens` have been seen."""
        span = max((span for span in _spans(self) if span.first_tokens <= tokens), key=lambda span: span.first_tokens)
        return span.first_step + (tokens - span.first_tokens) // span.batch_tokens

    def steps_reaching(self, tokens: float) -> int:
        """Return the first step after which at least `tokens` have been seen."""
        whole_tokens = math.ceil(tokens)
        step = self.steps_within(whole_tokens)
        return step + (self.tokens_after(step) < whole_tokens)

    def is_step_end(self, tokens: int) -> bool:
        """Tell whether a step of the run ends when `tokens` have been seen."""
        return 0 < tokens <= self.realized_tokens and self.tokens_after(self.steps_within(tokens)) == tokens

    def check_step_end(self, key: str, tokens: int) -> None:
        """Raise ValueError, naming the key, unless a step of the run ends when `tokens` have been seen."""
        if tokens > self.realized_tokens:
            raise ValueError(f"{key} {tokens} is beyond the {self.realized_tokens} tokens of the run")
        if not self.is_step_end(tokens):
            within = self.steps_within(tokens)
            ends = " and ".join(str(self.tokens_after(step)) for step in (within, within + 1) if step)
            batch = self.batch_at(within + 1)
            raise ValueError(f"{key} {tokens} is not the end of a step of {batch} tokens; the nearest are {ends}")

    def spans(self, after: int = 0, until: int | None = None) -> Iterator[Span]:
        """Yield the steps from `after` + 1 to `until`, by default the last, in spans of one batch."""
        for span in _spans(self):
            first, end = max(span.first_step, after), span.first_step + span.steps
            end = end if until is None else min(end, until)
            if first < end:
                yield Span(first, self.tokens_after(first), end - first, span.batch_tokens)

    def _span_of(self, step: int) -> Span:
        *earlier, last = _spans(self)
        return next((span for span in earlier if step <= span.first_step + span.steps), last)


@lru_cache
def _spans(clock: BatchClock) -> tuple[Span, ...]:
    """Return the spans of a run in order; the last may be of no step."""
    found: list[Span] = []
    step = tokens = 0
    for until, batch in (*clock.stages, (clock.token_budget, clock.global_batch_tokens)):
        steps = (until - tokens) // batch
        found.append(Span(step, tokens, steps, batch))
        step, tokens = step + steps, tokens + steps * batch
    return tuple(found)
