"""An average of the weights, kept beside the raw ones."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from harness.callbacks.step_callback import StepCallback
from harness.module import LanguageModel
from harness.schedule import averaging_weight


class WeightAverage(StepCallback):
    """After each step: average ← k · average + (1 − k) · weights, k by `schedule.averaging_weight`."""

    def __init__(self) -> None:
        self.average: list[Tensor] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:  # noqa: ARG002
        weights = _weights(pl_module)
        restored = self.average or weights
        self.average = [
            values.detach().to(weight.device).clone() for values, weight in zip(restored, weights, strict=True)
        ]

    @torch.no_grad()
    def on_step_end(self, trainer: pl.Trainer, module: LanguageModel) -> None:
        keep = averaging_weight(trainer.global_step, module.run.averaging, module.run.clock)
        torch._foreach_lerp_(self.average, _weights(module), 1.0 - keep)

    @contextmanager
    def swapped_in(self, module: LanguageModel) -> Iterator[None]:
        """Give the network the averaged weights inside the block; the raw ones come back bit for bit."""
        weights = _weights(module)
        raw = [weight.clone() for weight in weights]
        torch._foreach_copy_(weights, self.average)
        try:
            yield
        finally:
            torch._foreach_copy_(weights, raw)

    def state_dict(self) -> dict[str, Any]:
        return {"average": self.average}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.average = state_dict["average"]


def _weights(module: LanguageModel) -> list[Tensor]:
    return [parameter.detach() for parameter in module.network.parameters()]
