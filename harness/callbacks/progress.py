"""A small file that says how far a run is, for whoever watches."""

import time
from typing import Any

import lightning.pytorch as pl

from harness.callbacks.step_callback import StepCallback
from harness.module import LanguageModel
from harness.record import RunFolder, write_json

EVERY_SECONDS = 1.0


class Progress(StepCallback):
    """Rewrites `progress.json` about once a second; the speed is that since the last time, evaluation included."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._since = time.monotonic()
        self._step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:  # noqa: ARG002
        self._since, self._step = time.monotonic(), trainer.global_step

    def on_step_end(self, trainer: pl.Trainer, module: LanguageModel) -> None:
        elapsed = time.monotonic() - self._since
        if elapsed < EVERY_SECONDS or not trainer.is_global_zero:
            return
        clock, step = module.run.clock, trainer.global_step
        tokens_seen = clock.tokens_after(step)
        content = {
            "step": step,
            "tokens_seen": tokens_seen,
            "tokens_per_second": (tokens_seen - clock.tokens_after(self._step)) / elapsed,
        }
        write_json(self._folder.progress, content, durable=False)
        self._since, self._step = time.monotonic(), step
