"""What one micro-batch and one optimizer step cost, timed with nothing beside them.

The run's own Trainer does whole steps of one micro-batch: what the clock `train` of a run counts is counted here, the
reading of the data and Lightning's part included. A step is cut in two where its gradient is complete: before it,
reading, forward and backward (once a micro-batch); after it, clipping, update and averaging (once a step).
"""

import time
from typing import Any, NamedTuple, cast

import lightning.pytorch as pl
import numpy as np
import torch
from torch.optim import Optimizer

from harness.batch_plan import plan_run
from harness.callbacks.averaging import WeightAverage
from harness.config import MachineConfig, RunConfig
from harness.corpus import Corpus
from harness.data import TokenStream
from harness.optimizers.combined import STEPS, CombinedOptimizer
from harness.provenance import device_name, uses_gpu
from harness.record import TIMING_COLUMNS, Value
from harness.train import build

#: Steps that are not timed: first touches of memory, compilation, the optimizer's state.
WARMUP_STEPS = 10


class Reading(NamedTuple):
    """Seconds of the wall clock, and of the processor over all threads of this process."""

    wall: float
    processor: float


class Stopwatch(pl.Callback):
    """Reads the clocks when a step's gradient is complete and when the step is; must be the last of the callbacks."""

    def __init__(self) -> None:
        self.gradients: list[Reading] = []
        self.steps: list[Reading] = []

    def on_train_start(self, *_: Any) -> None:
        self.steps.append(read_clocks())

    def on_before_optimizer_step(self, *_: Any) -> None:
        self.gradients.append(read_clocks())

    def on_train_batch_end(self, *_: Any) -> None:
        self.steps.append(read_clocks())


def read_clocks() -> Reading:
    """Read both clocks once the device has done what it was given."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
    return Reading(time.perf_counter(), time.process_time())


def time_step(
    run: RunConfig, machine: MachineConfig, corpus: Corpus, micro_batch_tokens: int, repeats: int
) -> dict[str, Value]:
    """Time `repeats` steps of one micro-batch of `run` on one device; return a row of TIMING_COLUMNS.

    Assumption: nothing else runs on the machine; on a processor, `cpu_share` shows what does.
    """
    torch.set_num_threads(machine.threads or torch.get_num_threads())
    tokens = micro_batch_tokens * (WARMUP_STEPS + repeats)
    alone = {"batch_warmup": None, "branch": None, "keep_at_tokens": ()}
    one_micro_batch = {"global_batch_tokens": micro_batch_tokens, "token_budget": tokens}
    run_of_steps = run.model_copy(update=alone | one_micro_batch)
    plan = plan_run(run_of_steps.clock, run.model.sequence_length, 1, max_micro_batch_tokens=micro_batch_tokens)
    stopwatch, averaging = Stopwatch(), [] if run.averaging.kind == "none" else [WeightAverage()]
    one_device = machine.model_copy(update={"devices": 1})
    module, trainer = build(run_of_steps, one_device, plan, [*averaging, stopwatch])
    trainer.fit(module, datamodule=TokenStream(corpus, run_of_steps, plan))
    described: dict[str, Value] = {
        "run_id": run.run_id,
        "model": run.model_name,
        "optimizer": run.optimizer.name,
        "device": device_name(machine),
        "threads": torch.get_num_threads(),
        "precision": run.precision,
        "micro_batch_tokens": micro_batch_tokens,
        "matrix_seconds": _matrix_seconds(trainer.optimizers[0], repeats),
    }
    row = {**described, **_summary(stopwatch, uses_gpu(machine))}
    return {name: row[name] for name in TIMING_COLUMNS}


def _summary(stopwatch: Stopwatch, on_gpu: bool) -> dict[str, Value]:
    """Return medians over the steps after the warm-up."""
    gradients = np.array(stopwatch.gradients[WARMUP_STEPS:])
    ends = np.array(stopwatch.steps[WARMUP_STEPS:])  # the first is where the first of the steps begins
    (walls, gradient_walls), seconds = (ends[:, 0], gradients[:, 0]), np.diff(ends, axis=0)
    lower, middle, upper = np.quantile(seconds[:, 0], [0.25, 0.5, 0.75])
    share = seconds[:, 1].sum() / seconds[:, 0].sum() / torch.get_num_threads()
    return {
        "micro_batch_seconds": float(np.median(gradient_walls - walls[:-1])),
        "optimizer_seconds": float(np.median(walls[1:] - gradient_walls)),
        "repeats": len(seconds),
        "spread": float((upper - lower) / middle),
        "cpu_share": None if on_gpu else float(share),
    }


def _matrix_seconds(optimizer: Optimizer, repeats: int) -> float:
    """Return the median seconds of the updates that several devices share out, here all on one; the last step's
    gradient is still there.
    """
    groups = cast(CombinedOptimizer, optimizer).matrix_groups()
    if not groups:
        return 0.0
    readings = [read_clocks()]
    for _ in range(repeats):
        for group in groups:
            STEPS[group["algorithm"]](group, optimizer.state)
        readings.append(read_clocks())
    return float(np.median(np.diff([reading.wall for reading in readings])))
