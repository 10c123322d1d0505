"""LARS: heavy-ball momentum, the rate of each layer taken from its norms.

r = η‖W‖/(‖G‖ + λ‖W‖ + ε); B ← μB + r(G + λW); W ← W − γB. Vectors go without r and λ. So does a matrix of zero norm
without r: it would never move.

Source: arXiv 1708.03888, algorithm 1.
"""

import math
from typing import ClassVar, Literal

from harness.optimizers.rates import DecayRate, NonNegative, Positive
from harness.optimizers.rule import Group, Optimizer, Shape, State, kept, with_gradients
from harness.optimizers.torch_later import Tensor, torch


class LarsConfig(Optimizer):
    """LARS on every parameter. Source: arXiv 1708.03888; decay and momentum as in its experiments."""

    source: ClassVar[str] = "arXiv 1708.03888"

    name: Literal["lars"] = "lars"
    momentum: DecayRate = 0.9
    weight_decay: NonNegative = 0.0005
    trust_coefficient: Positive = 0.001
    eps: Positive = 1e-8

    def state_numbers(self, shape: Shape) -> int:
        return math.prod(shape)

    @staticmethod
    def step(group: Group, state: State) -> None:
        weights, gradients = with_gradients(group)
        if not weights:
            return
        momenta = kept("momentum", weights, state)
        torch._foreach_mul_(momenta, group["momentum"])
        for weight, gradient, momentum in zip(weights, gradients, momenta, strict=True):
            decayed = gradient.add(weight, alpha=group["weight_decay"])
            momentum.add_(decayed.mul_(_local_rate(weight, gradient, group)))
        torch._foreach_add_(weights, momenta, alpha=-group["lr"])


def _local_rate(weight: Tensor, gradient: Tensor, group: Group) -> Tensor | float:
    if weight.ndim < 2:
        return 1.0
    norm = torch.linalg.vector_norm(weight)
    denominator = torch.linalg.vector_norm(gradient).add(norm, alpha=group["weight_decay"]).add(group["eps"])
    rate: Tensor = group["trust_coefficient"] * norm / denominator
    return rate.where(norm > 0, 1.0)
