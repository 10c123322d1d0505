"""Gradient norm and update size of the steps at which a run is evaluated; other steps cost nothing."""

import math
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.optim import Optimizer

from harness.module import LanguageModel
from harness.shapes import parameters


class UpdateProbe(pl.Callback):
    """Measures around the update of each step in `marks`."""

    def __init__(self, marks: set[int]) -> None:
        self._marks = marks
        self._before: list[Tensor] = []
        self._grad_norm: Tensor | None = None

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Optimizer) -> None:  # noqa: ARG002
        if trainer.global_step + 1 in self._marks:
            weights = list(pl_module.network.parameters())
            gradients = [weight.grad for weight in weights if weight.grad is not None]
            self._grad_norm = torch.nn.utils.get_total_norm(gradients)
            self._before = [weight.detach().clone() for weight in weights]

    def take(self, module: LanguageModel) -> dict[str, float | None]:
        """Return `grad_norm`, `update_rms_matrices`, `update_rms_rest` of the last step, null before the first;
        forget them.
        """
        if self._grad_norm is None:
            return {"grad_norm": None, "update_rms_matrices": None, "update_rms_rest": None}
        weights = [weight.detach() for weight in module.network.parameters()]
        torch._foreach_sub_(self._before, weights)  # in place: a model has no room for many copies of itself
        changes = list(zip(self._before, parameters(module.run.model), strict=True))
        values = {
            "grad_norm": float(self._grad_norm),
            "update_rms_matrices": _rms([change for change, parameter in changes if parameter.role == "hidden"]),
            "update_rms_rest": _rms([change for change, parameter in changes if parameter.role != "hidden"]),
        }
        self._before, self._grad_norm = [], None
        return {name: value if math.isfinite(value) else None for name, value in values.items()}


def _rms(tensors: list[Tensor]) -> float:
    squares = torch.stack([tensor.square().sum() for tensor in tensors]).double().sum()
    return math.sqrt(float(squares) / sum(tensor.numel() for tensor in tensors))
