"""What every optimizer is: settings, an update rule, and what that rule costs.

A parameter W is (out, in) as in `nn.Linear`, its gradient G; γ is the learning rate, λ the weight decay.
"""

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal, NamedTuple

from harness.batch_clock import BatchClock
from harness.frozen import Frozen
from harness.optimizers.rates import HalfLife, NonNegative, Positive, decay_per_step
from harness.optimizers.torch_later import Tensor, torch

Role = Literal["embedding", "hidden", "head", "norm"]
Shape = tuple[int, ...]
#: A parameter group: its `params`, `lr`, `weight_decay` and the options of its rule.
Group = dict[str, Any]
#: What a rule keeps of each parameter, by name.
State = Mapping[Tensor, dict[str, Tensor]]

#: Settings that reach a group in another way than as an option of its rule.
_NOT_OPTIONS = {"name", "peak_lr", "weight_decay", "auxiliary", "lr_multiplier"}


class Rule(Frozen):
    """How an algorithm updates the parameters of a group. What is kept and computed is counted for one parameter."""

    @property
    @abstractmethod
    def algorithm(self) -> str:
        """The name under which the rule is registered."""

    @property
    def label(self) -> str:
        """What the routing table says."""
        return self.algorithm

    def options(self, tokens_per_step: int) -> Group:
        """Return what `step` reads from its group, decay rates as factors per step."""
        names = [name for name in type(self).model_fields if name not in _NOT_OPTIONS]
        return {name: _per_step(getattr(self, name), tokens_per_step) for name in names}

    def options_of_step(self, clock: BatchClock, step: int) -> Group:
        """Return the options that follow the batch of a step: decay rates that are half-lives in tokens.

        `steps_ahead` goes with betas that do: how many more steps of this batch than were taken give the tokens seen so
        far. So moments are corrected for their start at zero as the tokens say.
        """
        batch = clock.batch_at(step)
        settings = {name: getattr(self, name) for name in type(self).model_fields if name not in _NOT_OPTIONS}
        found = {name: _per_step(each, batch) for name, each in settings.items() if _has_half_life(each)}
        if "betas" in found:
            found["steps_ahead"] = clock.tokens_after(step - 1) / batch - (step - 1)
        return found

    @abstractmethod
    def state_numbers(self, shape: Shape) -> int:
        """Count the numbers kept between steps for one parameter, without its step counter."""

    def flops(self, shape: Shape) -> float:
        """Count the floating-point operations of the matrix products in one step of one parameter."""
        del shape
        return 0.0

    @staticmethod
    @abstractmethod
    def step(group: Group, state: State) -> None:
        """Update the parameters of a group that have a gradient. Gradients are read, never written."""


class Assignment(NamedTuple):
    """The rule of a parameter, at which multiple of the scheduled rate, with which weight decay."""

    rule: Rule
    lr_multiplier: float
    weight_decay: float


class Optimizer(Rule):
    """What a sweep names: a rule for all parameters, or one for some and another for the rest."""

    source: ClassVar[str]
    experimental: ClassVar[bool] = False

    name: str
    peak_lr: Positive
    weight_decay: NonNegative = 0.1

    @property
    def algorithm(self) -> str:
        return self.name

    def assign(self, role: Role, shape: Shape) -> Assignment:
        """Return the rule of a parameter. Matrices are decayed, vectors are not."""
        del role
        return Assignment(self, 1.0, self.decay_of(shape))

    def decay_of(self, shape: Shape) -> float:
        return self.weight_decay if len(shape) > 1 else 0.0


def with_gradients(group: Group) -> tuple[list[Tensor], list[Tensor]]:
    """Return the parameters of a group that have a gradient, and their gradients."""
    weights = [weight for weight in group["params"] if weight.grad is not None]
    return weights, gradients(weights)


def gradients(weights: Iterable[Tensor]) -> list[Tensor]:
    """Return the gradients of parameters that have one."""
    return [weight.grad for weight in weights if weight.grad is not None]


def kept(name: str, weights: list[Tensor], state: State) -> list[Tensor]:
    """Return what is kept under a name of each parameter: zeros in its form at first."""
    for weight in weights:
        if name not in state[weight]:
            state[weight][name] = weight.new_zeros(weight.shape)
    return [state[weight][name] for weight in weights]


def advanced(weights: list[Tensor], state: State) -> int:
    """Count this step of parameters that are updated together, and return its number, from 1."""
    for weight in weights:
        if "step" not in state[weight]:
            state[weight]["step"] = torch.zeros(())
        state[weight]["step"] += 1
    return int(state[weights[0]]["step"])


def _has_half_life(setting: Any) -> bool:
    return isinstance(setting, HalfLife) or (isinstance(setting, tuple) and any(map(_has_half_life, setting)))


def _per_step(setting: Any, tokens_per_step: int) -> Any:
    if isinstance(setting, tuple):
        return tuple(_per_step(each, tokens_per_step) for each in setting)
    return decay_per_step(setting, tokens_per_step) if isinstance(setting, HalfLife) else setting
