"""Gradient accumulation by the plan of the run: each step takes the micro-batches of its own batch."""

from typing import Any

import lightning.pytorch as pl

from harness.batch_plan import RunPlan


class Accumulation(pl.Callback):
    """Tells Lightning of each micro-batch where in its step it stands; must be the first of the callbacks.

    Lightning asks whether the micro-batches since the start of training are a multiple of `accumulate_grad_batches`,
    which is right only while the batch stays the same. It divides the loss of a micro-batch by that number.
    """

    def __init__(self, plan: RunPlan) -> None:
        self._plan = plan

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:  # noqa: ARG002
        loop: Any = trainer.fit_loop.epoch_loop
        make_zero_grad = loop.automatic_optimization._make_zero_grad_fn
        loop._accumulated_batches_reached = lambda: self._is_step_boundary(loop.batch_progress.current.ready)
        loop.automatic_optimization._make_zero_grad_fn = lambda index, optimizer: make_zero_grad(
            self._plan.at(index).number, optimizer
        )

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:  # noqa: ARG002
        """Count the micro-batches as this run does: a branch may take others than its parent did."""
        done = self._plan.micro_batches_before(checkpoint["global_step"] + 1)
        # Lightning saves before it has counted the last one as completed
        counts = {"ready": done, "started": done, "processed": done, "completed": done - 1}
        progress = {"total": counts, "current": {**counts}, "is_last_batch": False}
        checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"] = progress

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:  # noqa: ARG002
        split = self._plan.at(batch_idx).split
        trainer.accumulate_grad_batches = split.accumulation
        pl_module.train_loss_weight = split.micro_batch_tokens / self._plan.final.micro_batch_tokens

    def _is_step_boundary(self, micro_batches: int) -> bool:
        return micro_batches == 0 or self._plan.at(micro_batches - 1).ends_step
