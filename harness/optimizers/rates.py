"""Numbers that optimizers are set by.

A decay rate (momentum, a beta) is either a number per step or a half-life in tokens, so that a sweep
over batch sizes can hold either one fixed.
"""

import math
from typing import Annotated

from pydantic import Field

from harness.frozen import Frozen

UnitInterval = Annotated[float, Field(ge=0.0, lt=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
NonNegative = Annotated[float, Field(ge=0.0)]


class HalfLife(Frozen):
    """Decay by one half every `half_life_tokens`, never below `floor` per step.

    Source: arXiv 2507.07101, β(B') = β(B)^(B'/B). The floor is ours: the rule alone gives β2 = .31 at 16M tokens.
    """

    half_life_tokens: Positive
    floor: UnitInterval = 0.0


DecayRate = UnitInterval | HalfLife


def decay_per_step(rate: float | HalfLife, tokens_per_step: int) -> float:
    """Return the factor by which an average shrinks in one optimizer step."""
    if isinstance(rate, HalfLife):
        return max(rate.floor, math.exp2(-tokens_per_step / rate.half_life_tokens))
    return rate
