"""Any class in the manner of torch.optim, by its import path."""

import functools
import math
from collections.abc import Callable, MutableMapping
from importlib import import_module
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, model_validator

from harness.frozen import Frozen
from harness.optimizers.adamw import AuxiliaryConfig
from harness.optimizers.rates import NonNegative
from harness.optimizers.rule import Assignment, Group, Optimizer, Role, Shape, State
from harness.optimizers.torch_later import Tensor, torch


class Arguments(Frozen):
    """Keyword arguments, whatever the class has."""

    model_config = ConfigDict(extra="allow")

    @model_validator(mode="after")
    def _check_keys(self) -> "Arguments":
        for key, instead in {"lr": "peak_lr", "weight_decay": "optimizer.weight_decay"}.items():
            if key in (self.model_extra or {}):
                raise ValueError(f"{key} is not given here; {instead} is")
        return self


class CustomConfig(Optimizer):
    """A class from another library, on all parameters or on the hidden matrices, with AdamW on the rest.

    The class is called as `Class(parameters, lr=…, weight_decay=…, **arguments)`, without `weight_decay` where that is
    0. What it keeps in `state` and in its groups is checkpointed; what it keeps in itself is not. `state_numbers_each`
    is what it keeps for each weight: for estimates of memory only.
    Whether it writes into gradients is its own affair.
    """

    source: ClassVar[str] = "its own"

    name: Literal["custom"] = "custom"
    path: Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$", examples=["pytorch_optimizer:Prodigy"])]
    arguments: Arguments = Arguments()
    parameters: Literal["all", "hidden"] = "all"
    weight_decay: NonNegative = 0.0
    auxiliary: AuxiliaryConfig = AuxiliaryConfig()
    state_numbers_each: NonNegative = 2.0

    def options(self, tokens_per_step: int) -> Group:
        """Return what makes it. Raises: ValueError when that cannot be made: before the first step, not in it."""
        del tokens_per_step
        group = {"path": self.path, "arguments": self.arguments.model_dump()}
        _make(group | {"params": [torch.nn.Parameter(torch.ones(1))], "lr": self.peak_lr, "weight_decay": 0.0})
        return group

    def assign(self, role: Role, shape: Shape) -> Assignment:
        if self.parameters == "all" or role == "hidden":
            return super().assign(role, shape)
        return Assignment(self.auxiliary, self.auxiliary.lr_multiplier, self.decay_of(shape))

    def state_numbers(self, shape: Shape) -> int:
        return math.ceil(self.state_numbers_each * math.prod(shape))

    @staticmethod
    def step(group: Group, state: State) -> None:
        made = _made()
        first = group["params"][0]
        if first not in made:
            made[first] = _make(group)
        _step(made[first], group, state)


def _step(optimizer: Any, group: Group, state: State) -> None:
    """Let it work on our group and state, where checkpoints look; then take them away: it keeps nothing alive."""
    for key, value in optimizer.defaults.items():
        group.setdefault(key, value)
    optimizer.param_groups, optimizer.state = [group], state
    optimizer.step()
    optimizer.param_groups, optimizer.state = [], {}


def _make(group: Group) -> Any:
    decay = {"weight_decay": group["weight_decay"]} if group["weight_decay"] else {}
    make = _load(group["path"])
    try:
        return make(group["params"], lr=group["lr"], **decay, **group["arguments"])
    except TypeError as error:
        raise ValueError(f"optimizer.path {group['path']}: {error}") from error


def _load(path: str) -> Callable[..., Any]:
    module, _, name = path.partition(":")
    try:
        found: Callable[..., Any] = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"optimizer.path {path}: {error}; give module:Class of what is installed") from error
    return found


@functools.cache
def _made() -> MutableMapping[Tensor, Any]:
    """What was made for a group, by its first parameter."""
    weak = import_module("torch.utils.weak")
    made: MutableMapping[Tensor, Any] = weak.WeakTensorKeyDictionary()
    return made
