"""The one optimizer that Lightning sees: each parameter group names the algorithm that updates it.

One optimizer is one step: with two, Lightning counts each one's steps and a run stops at half its tokens.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from harness.config import ModelConfig
from harness.optimizers.adamw import adamw_step
from harness.optimizers.config import AdamWConfig, MuonConfig, OptimizerConfig, decay_per_step
from harness.optimizers.muon import muon_step
from harness.shapes import Parameter, Role, parameters

Step = Callable[[dict[str, Any], dict[Tensor, Any]], None]
STEPS: dict[str, Step] = {"adamw": adamw_step, "muon": muon_step}


class Route(NamedTuple):
    """Which algorithm updates a parameter, at which multiple of the scheduled rate, with which weight decay."""

    parameter: Parameter
    algorithm: str
    lr_multiplier: float
    weight_decay: float


class CombinedOptimizer(Optimizer):
    """Groups carry `algorithm`, `lr_multiplier` and the options of their algorithm; the module sets `lr` before each
    step.
    """

    def __init__(self, groups: Iterable[dict[str, Any]]) -> None:
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

    def set_learning_rate(self, learning_rate: float) -> None:
        for group in self.param_groups:
            group["lr"] = learning_rate * group["lr_multiplier"]


def route(model: ModelConfig, optimizer: OptimizerConfig) -> list[Route]:
    """Assign every parameter to an algorithm; matrices are decayed, norms are not."""
    return [_route_one(parameter, optimizer) for parameter in parameters(model)]


def build_optimizer(
    network: nn.Module, model: ModelConfig, optimizer: OptimizerConfig, tokens_per_step: int
) -> CombinedOptimizer:
    """Build the optimizer of a network; every parameter is in exactly one group."""
    tensors = dict(network.named_parameters())
    routes = route(model, optimizer)
    assert [r.parameter.name for r in routes] == list(tensors), (
        "the routing table does not list the network's parameters"
    )
    members: dict[tuple[str, float, float], list[Tensor]] = {}
    for parameter, algorithm, multiplier, weight_decay in routes:
        members.setdefault((algorithm, multiplier, weight_decay), []).append(tensors[parameter.name])
    groups: list[dict[str, Any]] = [
        {
            "params": weights,
            "algorithm": algorithm,
            "lr": 0.0,
            "lr_multiplier": multiplier,
            "weight_decay": weight_decay,
        }
        | _options(algorithm, optimizer, tokens_per_step)
        for (algorithm, multiplier, weight_decay), weights in members.items()
    ]
    assert sum(len(group["params"]) for group in groups) == len(tensors)
    return CombinedOptimizer(groups)


def _route_one(parameter: Parameter, optimizer: OptimizerConfig) -> Route:
    weight_decay = optimizer.weight_decay if len(parameter.shape) > 1 else 0.0
    hidden: Role = "hidden"
    if isinstance(optimizer, MuonConfig) and parameter.role != hidden:
        return Route(parameter, "adamw", optimizer.auxiliary.lr_multiplier, weight_decay)
    return Route(parameter, optimizer.name, 1.0, weight_decay)


def _options(algorithm: str, optimizer: OptimizerConfig, tokens_per_step: int) -> dict[str, Any]:
    if algorithm == "muon":
        assert isinstance(optimizer, MuonConfig)
        return {
            "momentum": decay_per_step(optimizer.momentum, tokens_per_step),
            "nesterov": optimizer.nesterov,
            "scale": optimizer.scale,
            "newton_schulz": optimizer.newton_schulz,
            "newton_schulz_dtype": optimizer.newton_schulz_dtype,
        }
    adam = optimizer if isinstance(optimizer, AdamWConfig) else optimizer.auxiliary
    betas = tuple(decay_per_step(beta, tokens_per_step) for beta in adam.betas)
    # "fused" tells Optimizer.load_state_dict to keep the step counters as they are on the device
    return {"betas": betas, "eps": adam.eps, "fused": True}
