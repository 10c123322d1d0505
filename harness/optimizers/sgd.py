"""Stochastic gradient descent with heavy-ball or Nesterov momentum.

G ← G + λW; B ← μB + G; W ← W − γB, or W − γ(G + μB) with Nesterov. The decay is coupled, as in torch.optim.SGD, which
this equals bit for bit.
"""

import math
from typing import ClassVar, Literal

from harness.optimizers.rates import DecayRate, NonNegative
from harness.optimizers.rule import Group, Optimizer, Shape, State, kept, with_gradients
from harness.optimizers.torch_later import torch


class SGDConfig(Optimizer):
    """SGD with momentum on every parameter. Source: torch.optim.SGD."""

    source: ClassVar[str] = "torch.optim.SGD"

    name: Literal["sgd"] = "sgd"
    momentum: DecayRate = 0.9
    nesterov: bool = False
    weight_decay: NonNegative = 0.0

    def state_numbers(self, shape: Shape) -> int:
        return math.prod(shape)

    @staticmethod
    def step(group: Group, state: State) -> None:
        weights, gradients = with_gradients(group)
        if not weights:
            return
        if group["weight_decay"]:
            gradients = [*torch._foreach_add(gradients, weights, alpha=group["weight_decay"])]
        momenta = kept("momentum", weights, state)
        torch._foreach_mul_(momenta, group["momentum"])
        torch._foreach_add_(momenta, gradients)
        updates = torch._foreach_add(gradients, momenta, alpha=group["momentum"]) if group["nesterov"] else momenta
        torch._foreach_add_(weights, updates, alpha=-group["lr"])
