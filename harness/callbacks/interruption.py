"""Checkpoints at step boundaries, by the clock and when a signal asks; the one owner of signals."""

import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from harness.callbacks.clocks import Clocks
from harness.callbacks.step_callback import StepCallback
from harness.module import LanguageModel

SIGNALS = (signal.SIGTERM, signal.SIGUSR2)

#: `auto`: the shortest interval between two checkpoints, and its least multiple of the seconds that one takes.
SHORTEST_SECONDS, LEAST_MULTIPLE = 60.0, 20.0


class Interrupted(BaseException):
    """A signal ended the run after its checkpoint was complete; running it again goes on from there."""


class Checkpoints(StepCallback):
    """Saves every `every_seconds` (`auto`: as `interval` says), and once more when a signal came, then raises
    `Interrupted`.

    After the steps of `kept` it saves under that name too, for branches. A checkpoint in the middle of an accumulated
    batch would resume silently wrong, so this is the only place that saves.
    """

    def __init__(
        self, path: Path, every_seconds: float | Literal["auto"], clocks: Clocks, kept: Mapping[int, Path]
    ) -> None:
        self._path = path
        self._kept = kept
        self._every_seconds = every_seconds
        self._clocks = clocks
        self._signalled = False
        self._resumed_step = 0
        self._saved_at = time.monotonic()
        self._save_seconds = 0.0
        self._handlers: dict[signal.Signals, Any] = {}
        self._processors: Any = None

    @property
    def interval(self) -> float:
        """Seconds from the end of a checkpoint to the next one."""
        if self._every_seconds == "auto":
            return max(SHORTEST_SECONDS, LEAST_MULTIPLE * self._save_seconds)
        return self._every_seconds

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:  # noqa: ARG002
        self._handlers = {number: signal.signal(number, self._remember) for number in SIGNALS}

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:  # noqa: ARG002
        self._resumed_step = checkpoint["global_step"]

    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:  # noqa: ARG002
        if trainer.world_size > 1:
            # the processors agree among themselves: over the GPUs, every step would wait for its result
            self._processors = torch.distributed.new_group(backend="gloo")
            self._check_resumption(trainer.world_size)

    def teardown(self, *_: Any, **__: Any) -> None:
        self._give_signals_back()

    def on_exception(self, *_: Any) -> None:
        self._give_signals_back()

    def _give_signals_back(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def on_step_end(self, trainer: pl.Trainer, module: LanguageModel) -> None:
        if trainer.global_step in self._kept:
            self._save(trainer, module, self._kept[trainer.global_step])
        interrupted, due = self._agree(trainer)
        finished = trainer.should_stop or trainer.global_step == module.run.steps
        if finished or not (interrupted or due):
            return
        began = time.monotonic()
        self._save(trainer, module, self._path)
        self._saved_at = time.monotonic()
        self._save_seconds = self._saved_at - began
        if interrupted:
            raise Interrupted(f"stopped by a signal after step {trainer.global_step}; the checkpoint is complete")

    def _save(self, trainer: pl.Trainer, module: LanguageModel, path: Path) -> None:
        with self._clocks.use("other"):
            trainer.strategy.reduce(module.train_loss_sum, reduce_op="sum")  # in place
            trainer.save_checkpoint(path)
            if not trainer.is_global_zero:
                module.train_loss_sum.zero_()

    def _check_resumption(self, world_size: int) -> None:
        """Raise ValueError unless all processes go on from the same step: a folder that several nodes share may show
        them different files for a while.
        """
        steps = [0] * world_size
        torch.distributed.all_gather_object(steps, self._resumed_step, group=self._processors)
        if len(set(steps)) > 1:
            raise ValueError(
                f"the processes of this run found checkpoints of different steps {steps} in {self._path.parent}; see "
                f"that it is one folder on all nodes, then start the run again"
            )

    def _agree(self, trainer: pl.Trainer) -> tuple[bool, bool]:
        """Return whether to stop and whether to save, the same on every rank."""
        wants = torch.tensor([self._signalled, time.monotonic() - self._saved_at >= self.interval])
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
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # disk full: PyTorch says that it lost count of the bytes
                raise error.__context__ from None
            raise
        finally:
            temporary.unlink(missing_ok=True)
