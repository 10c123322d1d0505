"""AdamW, by PyTorch's fused kernel.

m ← β1·m + (1−β1)·G; v ← β2·v + (1−β2)·G²; W ← (1−γλ)W − γ·m̂/(√v̂ + ε), with m̂ and v̂ corrected for their start at zero.

Source: arXiv 1711.05101, algorithm 2.
"""

import math
from importlib import import_module
from typing import Annotated, ClassVar, Literal

from harness.frozen import ADDED_LATER
from harness.optimizers.rates import DecayRate, Positive
from harness.optimizers.rule import (
    Assignment,
    Group,
    Optimizer,
    Role,
    Rule,
    Shape,
    State,
    kept,
    with_gradients,
)
from harness.optimizers.torch_later import Tensor, torch


class AdamWRule(Rule):
    """The rule by itself; two moments of each parameter are kept."""

    betas: tuple[DecayRate, DecayRate] = (0.9, 0.95)
    eps: Positive = 1e-8

    @property
    def algorithm(self) -> str:
        return "adamw"

    def options(self, tokens_per_step: int) -> Group:
        # "fused" tells Optimizer.load_state_dict to keep the step counters as they are on the device
        return super().options(tokens_per_step) | {"fused": True}

    def state_numbers(self, shape: Shape) -> int:
        return 2 * math.prod(shape)

    @staticmethod
    def step(group: Group, state: State) -> None:
        weights, gradients = with_gradients(group)
        if not weights:
            return
        steps = [_step(weight, state[weight]) for weight in weights]
        if ahead := group.get("steps_ahead"):
            torch._foreach_add_(steps, 1)
            steps = list(torch._foreach_add(steps, ahead - 1))  # the kernel corrects by these, and adds one
        import_module("torch.optim.adamw").adamw(
            weights,
            gradients,
            kept("exp_avg", weights, state),
            kept("exp_avg_sq", weights, state),
            [],
            steps,
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


class AuxiliaryConfig(AdamWRule):
    """AdamW for what another rule leaves out: embeddings, head, norms.

    `lr_multiplier` is relative to the optimizer's own rate; betas as in arXiv 2505.02222.
    """

    lr_multiplier: Positive = 1.0
    betas: tuple[DecayRate, DecayRate] = (0.95, 0.95)


class AdamWConfig(Optimizer, AdamWRule):
    """AdamW on every parameter. Source: arXiv 1711.05101.

    With `auxiliary`, on the hidden matrices alone, and what they leave out goes by that: the control that has Muon's
    groups and differs from Muon in the rule of the matrices only.
    """

    source: ClassVar[str] = "arXiv 1711.05101"

    name: Literal["adamw"] = "adamw"
    auxiliary: Annotated[AuxiliaryConfig | None, ADDED_LATER] = None

    def assign(self, role: Role, shape: Shape) -> Assignment:
        if self.auxiliary is None or role == "hidden":
            return super().assign(role, shape)
        return Assignment(self.auxiliary, self.auxiliary.lr_multiplier, self.decay_of(shape))


def _step(weight: Tensor, state: dict[str, Tensor]) -> Tensor:
    if "step" not in state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=weight.device)
    return state["step"]
