"""The one optimizer that Lightning sees: each parameter group names the algorithm that updates it.

One optimizer is one step: with two, Lightning counts each one's steps and a run stops at half its tokens.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from harness.batch_clock import BatchClock
from harness.config import ModelConfig
from harness.optimizers.config import OPTIMIZERS
from harness.optimizers.rule import Assignment, Group, Optimizer, Rule, State
from harness.optimizers.sharing import Sharing
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

    `costs` are the FLOPs of each matrix whose update multiplies matrices; processes can share these out.
    `rules` are those of the groups, for runs whose batch changes.
    """

    def __init__(
        self, groups: Iterable[Group], costs: Mapping[Tensor, float] | None = None, rules: Sequence[Rule] = ()
    ) -> None:
        super().__init__(groups, defaults={})
        self._rules = rules
        self._costs = dict(costs or {})
        self._sharing: Sharing | None = None

    def share_out(self, rank: int, num_processes: int) -> None:
        """Have this process update its part of the matrices, and keep the state of that part alone."""
        assert not self.state, "what the state of a matrix holds is decided before there is any"
        self._sharing = Sharing(self._costs, rank, num_processes)

    def matrix_groups(self) -> list[Group]:
        """Return the groups, with those of their parameters alone that processes can share out."""
        groups = [group | {"params": [w for w in group["params"] if w in self._costs]} for group in self.param_groups]
        return [group for group in groups if group["params"]]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._sharing:
            self._sharing.step(self.param_groups, self._update)
        else:
            for group in self.param_groups:
                self._update(group)
        return loss

    def _update(self, group: Group) -> None:
        STEPS[group["algorithm"]](group, self.state)

    def whole_state_dict(self) -> dict[str, Any]:
        """Return, on the first process, what one process alone would have as its `state_dict`; every process of a run
        that shares out its matrices must ask for it.
        """
        whole = self.state_dict()
        if self._sharing:
            numbers = {parameter: number for number, parameter in enumerate(self._parameters())}
            collected = self._sharing.collect(self.state)
            whole["state"] |= {numbers[weight]: kept for weight, kept in collected}
        return whole

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a whole checkpoint, or of it what this process keeps; options that came after it was made stay as they
        are.
        """
        saved = state_dict["param_groups"]
        groups = [own | loaded for own, loaded in zip(self.state_dict()["param_groups"], saved, strict=False)]
        state = state_dict["state"]
        if self._sharing:
            kept = {number for number, weight in enumerate(self._parameters()) if self._sharing.keeps(weight)}
            state = {number: each for number, each in state.items() if number in kept}
        super().load_state_dict(state_dict | {"state": state, "param_groups": groups + saved[len(groups) :]})

    def _parameters(self) -> Iterable[Tensor]:
        """Return the parameters in the order in which `state_dict` numbers them."""
        return chain.from_iterable(group["params"] for group in self.param_groups)

    def set_learning_rate(self, learning_rate: float) -> None:
        for group in self.param_groups:
            group["lr"] = learning_rate * group["lr_multiplier"]

    def follow_batch(self, clock: BatchClock, step: int) -> None:
        """Have decay rates that are half-lives in tokens follow the batch of the step that comes."""
        for group, rule in zip(self.param_groups, self._rules, strict=True):
            group.update(rule.options_of_step(clock, step))


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
    rules: list[Rule] = []
    costs: dict[Tensor, float] = {}
    for parameter, assignment in assignments:
        settings = _settings(assignment, tokens_per_step)
        if settings not in alike:
            alike.append(settings)
            members.append([])
            rules.append(assignment.rule)
        members[alike.index(settings)].append(tensors[parameter.name])
        if flops := assignment.rule.flops(parameter.shape):
            costs[tensors[parameter.name]] = flops
    assert sum(map(len, members)) == len(tensors)
    groups = ({"params": each} | settings for each, settings in zip(members, alike, strict=True))
    return CombinedOptimizer(groups, costs, rules)


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
