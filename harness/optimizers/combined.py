"""The one optimizer that Lightning sees: each parameter group names the algorithm that updates it.

One optimizer is one step: with two, Lightning counts each one's steps and a run stops at half its tokens.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from harness.config import ModelConfig
from harness.optimizers.config import OPTIMIZERS
from harness.optimizers.rule import Assignment, Group, Optimizer, State
from harness.shapes import Parameter, parameters

Step = Callable[[Group, State], None]
STEPS: dict[str, Step] = {name: torch.no_grad()(optimizer.step) for name, optimizer in OPTIMIZERS.items()}


class Route(NamedTuple):
    """Which algorithm updates a parameter, at which multiple of the scheduled rate, with which weight decay."""

    parameter: Parameter
    algorithm: str
    lr_multiplier: float
    weight_decay: float


class CombinedOptimizer(torch.optim.Optimizer):
    """Groups carry `algorithm`, `lr_multiplier` and the options of their algorithm; the module sets `lr` before each
    step.
    """

    def __init__(self, groups: Iterable[Group]) -> None:
        super().__init__(groups, defaults={})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            STEPS[group["algorithm"]](group, self.state)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint; options that came after it was made stay as they are."""
        saved = state_dict["param_groups"]
        groups = [own | loaded for own, loaded in zip(self.state_dict()["param_groups"], saved, strict=False)]
        super().load_state_dict(state_dict | {"param_groups": groups + saved[len(groups) :]})

    def set_learning_rate(self, learning_rate: float) -> None:
        for group in self.param_groups:
            group["lr"] = learning_rate * group["lr_multiplier"]


def route(model: ModelConfig, optimizer: Optimizer) -> list[Route]:
    """Say how every parameter is updated, for people and records."""
    assignments = _assignments(model, optimizer)
    return [Route(parameter, rule.label, multiplier, decay) for parameter, (rule, multiplier, decay) in assignments]


def build_optimizer(
    network: nn.Module, model: ModelConfig, optimizer: Optimizer, tokens_per_step: int
) -> CombinedOptimizer:
    """Build the optimizer of a network; every parameter is in exactly one group."""
    tensors = dict(network.named_parameters())
    assignments = _assignments(model, optimizer)
    assert [parameter.name for parameter, _ in assignments] == list(tensors), (
        "the routing table does not list the network's parameters"
    )
    alike: list[Group] = []
    members: list[list[Tensor]] = []
    for parameter, assignment in assignments:
        settings = _settings(assignment, tokens_per_step)
        if settings not in alike:
            alike.append(settings)
            members.append([])
        members[alike.index(settings)].append(tensors[parameter.name])
    assert sum(map(len, members)) == len(tensors)
    return CombinedOptimizer({"params": each} | settings for each, settings in zip(members, alike, strict=True))


def _assignments(model: ModelConfig, optimizer: Optimizer) -> list[tuple[Parameter, Assignment]]:
    scaled, width = model.parametrization.scaled, model.width
    return [
        (parameter, scaled(optimizer.assign(parameter.role, parameter.shape), parameter.role, width))
        for parameter in parameters(model)
    ]


def _settings(assignment: Assignment, tokens_per_step: int) -> Group:
    """Return what the parameters that are updated alike have in common."""
    rule, lr_multiplier, weight_decay = assignment
    settings = {"algorithm": rule.algorithm, "lr": 0.0, "lr_multiplier": lr_multiplier, "weight_decay": weight_decay}
    return settings | rule.options(tokens_per_step)
