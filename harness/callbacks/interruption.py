"""Checkpoints at step boundaries, by the clock and when a signal asks; the one owner of signals."""

import os
import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from harness.callbacks.clocks import Clocks
from harness.callbacks.step_callback import StepCallback
from harness.module import LanguageModel

SIGNALS = (signal.SIGTERM, signal.SIGUSR2)


class Interrupted(BaseException):
    """A signal ended the run after its checkpoint was complete; running it again goes on from there."""


class Checkpoints(StepCallback):
    """Saves every `every_seconds`, and once more when a signal came, then raises `Interrupted`.

    A checkpoint in the middle of an accumulated batch would resume silently wrong, so this is the only place that
    saves.
    """

    def __init__(self, path: Path, every_seconds: float, clocks: Clocks) -> None:
        self._path = path
        self._every_seconds = every_seconds
        self._clocks = clocks
        self._signalled = False
        self._saved_at = time.monotonic()
        self._handlers: dict[signal.Signals, Any] = {}
        self._processors: Any = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:  # noqa: ARG002
        if trainer.world_size > 1:
            # the processors agree among themselves: over the GPUs, every step would wait for its result
            self._processors = torch.distributed.new_group(backend="gloo")
        # after Lightning has put its own handlers in, which lose the run
        self._handlers = {number: signal.signal(number, self._remember) for number in SIGNALS}

    def teardown(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:  # noqa: ARG002
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def on_step_end(self, trainer: pl.Trainer, module: LanguageModel) -> None:
        interrupted, due = self._agree(trainer)
        finished = trainer.should_stop or trainer.global_step == module.run.steps
        if finished or not (interrupted or due):
            return
        with self._clocks.use("other"):
            module.train_loss_sum = trainer.strategy.reduce(module.train_loss_sum, reduce_op="mean")
            trainer.save_checkpoint(self._path)
        self._saved_at = time.monotonic()
        if interrupted:
            raise Interrupted(f"stopped by a signal after step {trainer.global_step}; the checkpoint is complete")

    def _agree(self, trainer: pl.Trainer) -> tuple[bool, bool]:
        """Return whether to stop and whether to save, the same on every rank."""
        wants = torch.tensor([self._signalled, time.monotonic() - self._saved_at >= self._every_seconds])
        if trainer.world_size > 1:
            wants = wants.to(torch.int32)
            torch.distributed.all_reduce(wants, torch.distributed.ReduceOp.MAX, group=self._processors)
        return bool(wants[0]), bool(wants[1])

    def _remember(self, _number: int, _frame: FrameType | None) -> None:
        self._signalled = True


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes under a temporary name in the same folder, synchronises, renames: a checkpoint that has its name is
    whole.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        assert storage_options is None
        temporary = Path(f"{path}.{os.getpid()}")
        try:
            with temporary.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
