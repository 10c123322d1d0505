"""Lion: the sign of a momentum, every weight by the same step.

C = β1·M + (1−β1)·G; W ← (1−γλ)W − γ·sign(C); M ← β2·M + (1−β2)·G.

Source: arXiv 2302.06675, algorithm 2.
"""

import math
from typing import ClassVar, Literal

from harness.optimizers.rates import DecayRate, NonNegative
from harness.optimizers.rule import Group, Optimizer, Shape, State, kept, with_gradients
from harness.optimizers.torch_later import torch


class LionConfig(Optimizer):
    """Lion on every parameter. Source: arXiv 2302.06675.

    Its rates are 3 to 10 times smaller than AdamW's and its decay as many times larger (section 5): hence the default.
    """

    source: ClassVar[str] = "arXiv 2302.06675"

    name: Literal["lion"] = "lion"
    betas: tuple[DecayRate, DecayRate] = (0.9, 0.99)
    weight_decay: NonNegative = 1.0

    def state_numbers(self, shape: Shape) -> int:
        return math.prod(shape)

    @staticmethod
    def step(group: Group, state: State) -> None:
        weights, gradients = with_gradients(group)
        if not weights:
            return
        (beta1, beta2), momenta = group["betas"], kept("momentum", weights, state)
        signs = torch._foreach_lerp(momenta, gradients, 1.0 - beta1)
        torch._foreach_sign_(signs)
        torch._foreach_mul_(weights, 1.0 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(weights, signs, alpha=-group["lr"])
        torch._foreach_lerp_(momenta, gradients, 1.0 - beta2)
