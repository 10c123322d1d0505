"""LAMB: AdamW's direction, its length taken from the weights of its layer.

m, v as in AdamW; U = m̂/(√v̂ + ε) + λW; W ← W − γ·(‖W‖/‖U‖)·U. The ratio is one for vectors and at a zero norm.

Source: arXiv 1904.00962, algorithm 2, with φ the identity. Gradients are not clipped here.
"""

import math
from typing import ClassVar, Literal

from harness.optimizers.rates import DecayRate, NonNegative, Positive
from harness.optimizers.rule import Group, Optimizer, Shape, State, advanced, kept, with_gradients
from harness.optimizers.torch_later import Tensor, torch


class LambConfig(Optimizer):
    """LAMB on every parameter. Source: arXiv 1904.00962."""

    source: ClassVar[str] = "arXiv 1904.00962"

    name: Literal["lamb"] = "lamb"
    betas: tuple[DecayRate, DecayRate] = (0.9, 0.999)
    eps: Positive = 1e-6
    weight_decay: NonNegative = 0.01

    def state_numbers(self, shape: Shape) -> int:
        return 2 * math.prod(shape)

    @staticmethod
    def step(group: Group, state: State) -> None:
        weights, gradients = with_gradients(group)
        if not weights:
            return
        (beta1, beta2), step = group["betas"], advanced(weights, state) + group.get("steps_ahead", 0)
        means, squares = kept("exp_avg", weights, state), kept("exp_avg_sq", weights, state)
        torch._foreach_lerp_(means, gradients, 1.0 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, gradients, gradients, 1.0 - beta2)
        for weight, mean, square in zip(weights, means, squares, strict=True):
            denominator = (square / (1.0 - beta2**step)).sqrt_().add_(group["eps"])
            update = (mean / (1.0 - beta1**step)).div_(denominator).add_(weight, alpha=group["weight_decay"])
            weight.sub_(update.mul_(_trust_ratio(weight, update)), alpha=group["lr"])


def _trust_ratio(weight: Tensor, update: Tensor) -> Tensor | float:
    """Return ‖W‖/‖U‖ of a matrix, one where either is zero, and of a vector."""
    if weight.ndim < 2:
        return 1.0
    ratio: Tensor = torch.linalg.vector_norm(weight) / torch.linalg.vector_norm(update)
    return ratio.where((ratio > 0) & ratio.isfinite(), 1.0)
