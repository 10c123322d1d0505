"""The base of callbacks that act when an optimizer step is complete."""

from typing import Any

import lightning.pytorch as pl

from harness.module import LanguageModel


class StepCallback(pl.Callback):
    """Calls `on_step_end` once an optimizer step; Lightning's own hooks count micro-batches."""

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *outputs_and_batch: Any) -> None:
        del outputs_and_batch
        if not trainer.fit_loop._should_accumulate():
            self.on_step_end(trainer, pl_module)

    def on_step_end(self, trainer: pl.Trainer, module: LanguageModel) -> None:
        """Act after step `trainer.global_step`."""
        raise NotImplementedError
