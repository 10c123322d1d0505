"""Three clocks, of which one runs at any time: optimizer steps, evaluation, everything else.

Beside the first runs the processor's own: where it falls behind, others used the machine and the seconds say little.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import lightning.pytorch as pl
import torch

Clock = Literal["train", "eval", "other"]


class Clocks(pl.Callback):
    """Seconds by clock, over all starts of a run. `other` is start-up, compilation and checkpoints."""

    def __init__(self, started: float, compiled: bool) -> None:
        """Start the clock `other` at `started` (time.perf_counter). A compiled run's first step counts as
        compilation.
        """
        self.seconds: dict[Clock, float] = {"train": 0.0, "eval": 0.0, "other": 0.0}
        self.train_cpu_seconds = 0.0
        self._running: Clock = "other"
        self._since, self._cpu_since = started, time.process_time()
        self._compiling = compiled

    @contextmanager
    def use(self, clock: Clock) -> Iterator[None]:
        """Let `clock` run inside the block; before the first step of a compiled run, `other`, as it compiles."""
        before = self._running
        self.switch("other" if self._compiling else clock)
        try:
            yield
        finally:
            self.switch(before)

    def switch(self, clock: Clock) -> None:
        """Let `clock` run from now on, once the device has done what it was given."""
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.synchronize()
        now, cpu_now = time.perf_counter(), time.process_time()
        self.seconds[self._running] += now - self._since
        if self._running == "train":
            self.train_cpu_seconds += cpu_now - self._cpu_since
        self._running, self._since, self._cpu_since = clock, now, cpu_now

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:  # noqa: ARG002
        self.switch("other" if self._compiling else "train")

    def on_train_batch_end(self, *_: Any) -> None:
        if self._compiling:
            self._compiling = False
            self.switch("train")

    def on_train_end(self, *_: Any) -> None:
        self.switch("other")

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": {**self.seconds}, "train_cpu_seconds": self.train_cpu_seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for clock in self.seconds:
            self.seconds[clock] += state_dict["seconds"][clock]
        self.train_cpu_seconds += state_dict["train_cpu_seconds"]
