"""MONA: Muon on a gradient that is pushed along its own change.

A ← β·A + (1−β)(G − G_previous); G̃ = G + αA with α = −1/(2(1−β)); then Muon on G̃.
With that α, A = (1−β)(G − E) and G̃ = (G + E)/2, where E is the average of the gradients before this one,
E ← βE + (1−β)G: one buffer does for both A and G_previous.

Source: arXiv 2605.26842, second-hand: Nesterov, scale and decay are Muon's here, unverified.
"""

import math
from typing import ClassVar, Literal

from harness.optimizers.orthogonal import OrthogonalOptimizer, orthogonal_step
from harness.optimizers.rates import DecayRate
from harness.optimizers.rule import Group, Shape, State, gradients, kept
from harness.optimizers.torch_later import Tensor, torch


class MonaConfig(OrthogonalOptimizer):
    """MONA on the hidden matrices, AdamW on the rest. Experimental: its source was not read at first hand (arXiv
    2605.26842).
    """

    source: ClassVar[str] = "arXiv 2605.26842, second-hand"
    experimental: ClassVar[bool] = True

    name: Literal["mona"] = "mona"
    slow_beta: DecayRate = 0.99

    def state_numbers(self, shape: Shape) -> int:
        return 2 * math.prod(shape)

    @staticmethod
    def step(group: Group, state: State) -> None:
        orthogonal_step(group, state, pushed=_pushed)


def _pushed(weights: list[Tensor], state: State, group: Group) -> list[Tensor]:
    now, averages = gradients(weights), kept("slow_gradient", weights, state)
    pushed = torch._foreach_lerp(now, averages, 0.5)
    torch._foreach_lerp_(averages, now, 1.0 - group["slow_beta"])
    return [*pushed]
