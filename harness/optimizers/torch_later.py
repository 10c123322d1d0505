"""torch, loaded when it is first used.

A file of an optimizer holds its settings beside its update rule; verbs that only read settings must not wait for torch.
Type checkers read `torch_later.pyi` instead, in which both names are the real ones.
"""

from importlib import import_module
from typing import Any

Tensor = Any


class _TorchLater:
    def __getattr__(self, name: str) -> Any:
        value = getattr(import_module("torch"), name)
        setattr(self, name, value)  # looked up once
        return value


torch = _TorchLater()
