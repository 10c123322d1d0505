"""Evaluation at the token marks: one row of the record each, and the decision whether the run goes on."""

import math
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from harness.batch_plan import RunPlan
from harness.callbacks.averaging import WeightAverage
from harness.callbacks.clocks import Clocks
from harness.callbacks.probe import UpdateProbe
from harness.callbacks.step_callback import StepCallback
from harness.flops import train_flops
from harness.module import LanguageModel
from harness.record import RunFolder, Value, append_row, read_rows, trim_rows

#: A run has diverged when, after warmup, its validation loss is above its start at every mark while the tokens seen
#: grow by this factor. In tokens, so that large batches, whose marks lie few steps apart, are judged alike. This
#: decides results: raise SCIENCE_VERSION with it.
DIVERGED_AFTER_GROWTH = 2.0


class Evaluation(StepCallback):
    """Evaluates raw and averaged weights on the same sequences at each mark and appends the row.

    The first row is that of the untrained model; of a branch, that of the state which it starts from.

    `stop_reason` is null until the run is over: budget, target, non_finite_loss or loss_above_start.
    """

    def __init__(
        self,
        folder: RunFolder,
        marks: list[int],
        plan: RunPlan,
        batches: list[Tensor],
        clocks: Clocks,
        probe: UpdateProbe,
        average: WeightAverage | None,
    ) -> None:
        self.stop_reason: str | None = None
        self._folder, self._marks, self._plan, self._batches = folder, set(marks), plan, batches
        self._clocks, self._probe, self._average = clocks, probe, average
        self._first_mark = self._last_mark = min(marks)
        self._initial_loss = math.inf
        self._above_start_since: int | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.is_global_zero:
            self._take_up_rows(trainer.global_step)
        else:
            pl_module.train_loss_sum.zero_()  # a checkpoint has the sum over all processes: the first has it
        if trainer.global_step == self._first_mark:
            self._last_mark = self._first_mark
            self._evaluate(trainer, pl_module)

    def on_step_end(self, trainer: pl.Trainer, module: LanguageModel) -> None:
        if trainer.global_step in self._marks:
            self._evaluate(trainer, module)

    def _take_up_rows(self, step: int) -> None:
        """Drop the rows that will be made again. Raises: ValueError when one is missing that will not be."""
        resumed = step > self._first_mark
        trim_rows(self._folder.evaluations, last_step=step if resumed else -1)
        found = [row["step"] for row in read_rows(self._folder.evaluations)]
        expected = [mark for mark in sorted(self._marks) if mark <= step] if resumed else []
        if found != expected:
            raise ValueError(
                f"{self._folder.evaluations}: has the rows of steps {found}, but the checkpoint was made after those "
                f"of {expected}; remove {self._folder.checkpoint.name} to train from the start"
            )

    def _evaluate(self, trainer: pl.Trainer, module: LanguageModel) -> None:
        step, run = trainer.global_step, module.run
        with self._clocks.use("eval"):
            measured = self._probe.take(module)
            raw_loss = self._loss(trainer, module)
            averaged_loss = self._averaged_loss(trainer, module)
            train_loss = self._train_loss(trainer, module)
        row: dict[str, Value] = {
            "run_id": run.run_id,
            "step": step,
            "tokens_seen": run.clock.tokens_after(step),
            "train_flops": train_flops(run, step),
            "train_seconds": self._clocks.seconds["train"],
            "train_cpu_seconds": None if module.device.type == "cuda" else self._clocks.train_cpu_seconds,
            "eval_seconds": self._clocks.seconds["eval"],
            "other_seconds": self._clocks.seconds["other"],
            "learning_rate": module.learning_rate(step) if step else None,
            "train_loss_nats": _finite(train_loss),
            "val_loss_nats": _finite(raw_loss),
            "val_loss_averaged_nats": _finite(averaged_loss),
            **measured,
        }
        if trainer.is_global_zero:
            with self._clocks.use("other"):
                append_row(self._folder.evaluations, row)
        self._decide(trainer, module, raw_loss, averaged_loss, train_loss)

    def _decide(
        self, trainer: pl.Trainer, module: LanguageModel, raw: float, averaged: float | None, train: float | None
    ) -> None:
        run, step, tokens_after = module.run, trainer.global_step, module.run.clock.tokens_after
        if run.branch and step == self._first_mark:
            return  # trained from token 0, the run may have no mark here
        if step == 0:
            self._initial_loss = raw
        above = step > run.warmup_steps and raw > self._initial_loss
        self._above_start_since = (self._above_start_since or step) if above else None
        watched = raw if averaged is None else averaged
        if not all(math.isfinite(loss) for loss in (raw, averaged, train) if loss is not None):
            self.stop_reason = "non_finite_loss"
        elif self._above_start_since is not None and tokens_after(step) >= DIVERGED_AFTER_GROWTH * tokens_after(
            self._above_start_since
        ):
            self.stop_reason = "loss_above_start"
        elif step == run.steps:
            self.stop_reason = "budget"
        elif run.stop_at_loss_nats is not None and watched <= run.stop_at_loss_nats:
            self.stop_reason = "target"
        trainer.should_stop = self.stop_reason is not None

    @torch.no_grad()
    def _loss(self, trainer: pl.Trainer, module: LanguageModel) -> float:
        """Return the mean validation loss per token; each rank takes every world_size-th batch."""
        mine = range(trainer.global_rank, len(self._batches), trainer.world_size)
        with trainer.strategy.precision_plugin.val_step_context():
            losses = [
                module.loss(batch.to(module.device)).double() * len(batch) for batch in (self._batches[i] for i in mine)
            ]
        total = torch.stack(losses).sum() if losses else torch.zeros((), dtype=torch.float64, device=module.device)
        return float(trainer.strategy.reduce(total, reduce_op="sum")) / sum(len(batch) for batch in self._batches)

    def _averaged_loss(self, trainer: pl.Trainer, module: LanguageModel) -> float | None:
        if self._average is None:
            return None
        with self._average.swapped_in(module):
            return self._loss(trainer, module)

    def _train_loss(self, trainer: pl.Trainer, module: LanguageModel) -> float | None:
        """Return the mean loss of the tokens since the last mark, and start the next sum."""
        clock = module.run.clock
        tokens = clock.tokens_after(trainer.global_step) - clock.tokens_after(self._last_mark)
        self._last_mark = trainer.global_step
        if not tokens:
            return None
        weights = tokens / self._plan.final.micro_batch_tokens
        mean = float(trainer.strategy.reduce(module.train_loss_sum, reduce_op="sum")) / weights
        module.train_loss_sum.zero_()
        return mean

    def state_dict(self) -> dict[str, Any]:
        return {
            "last_mark": self._last_mark,
            "initial_loss": self._initial_loss,
            "above_start_since": self._above_start_since,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._last_mark = state_dict["last_mark"]
        self._initial_loss = state_dict["initial_loss"]
        self._above_start_since = state_dict["above_start_since"]


def _finite(loss: float | None) -> float | None:
    return loss if loss is not None and math.isfinite(loss) else None
