"""Training that takes no time and meets its target where it was planted: T(batch, rate, seed) of a laboratory.

`train` stands in for `harness.train:train`; `targets_of` gives what the analysis would read off its records.
"""

import json
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from analysis.schemas import TARGETS, table
from harness.config import MachineConfig, RunConfig
from harness.record import EVALUATION_COLUMNS, RUN_COLUMNS, RunFolder, append_row, write_json
from tests.fake_training import science
from tests.synthetic import Planted

#: The loss at which the planted T holds; losses fall as a power of the tokens through it.
TARGET_NATS = 2.0
EXPONENT = 0.1


@dataclass(frozen=True)
class Plant:
    """T of every optimizer, with noise of log T of which `shared` belongs to the seed.

    decays: the best weight decay, and what log T rises by with the square of the log of its ratio; `wall`: rates above
    this multiple of the best one diverge.
    """

    optimizers: Mapping[str, Planted] = field(
        default_factory=lambda: {"adamw": Planted(180_000.0, 2_000.0), "muon": Planted(120_000.0, 3_000.0)}
    )
    noise: float = 0.05
    shared: float = 0.5
    draw: int = 0
    best_decay: float = 0.1
    decay_curvature: float = 0.0
    wall: float = 1e9

    def log_tokens(self, run: RunConfig) -> float:
        planted, batch = self.optimizers[run.optimizer.name], run.global_batch_tokens
        off = np.log(run.optimizer.peak_lr / planted.optimum(batch))
        decay = np.log(run.optimizer.weight_decay / self.best_decay) if self.decay_curvature else 0.0
        return float(
            planted.log_tokens(batch) + planted.curvature * off**2 + self.decay_curvature * decay**2 + self._error(run)
        )

    def diverges(self, run: RunConfig) -> bool:
        return run.optimizer.peak_lr > self.wall * self.optimizers[run.optimizer.name].optimum(run.global_batch_tokens)

    def _error(self, run: RunConfig) -> float:
        own = f"{run.optimizer.peak_lr:.6g} {run.optimizer.weight_decay} {run.init_seed}"
        names = (f"{run.init_seed}", f"{run.optimizer.name} {run.global_batch_tokens} {own}")
        parts = [np.random.default_rng([self.draw, zlib.crc32(name.encode())]).standard_normal() for name in names]
        return float(self.noise * (np.sqrt(self.shared) * parts[0] + np.sqrt(1 - self.shared) * parts[1]))


#: What `train` has planted.
PLANT = Plant()


def targets_of(plant: Plant, runs: Iterable[RunConfig]) -> pl.DataFrame:
    """Return the rows of the table `targets` at the planted loss."""
    return table([_target_row(plant, run) for run in runs], TARGETS)


def spent_tokens(plant: Plant, runs: Iterable[RunConfig]) -> int:
    """Return what the runs consume: to the first whole step past the target, or all of their budget."""
    return sum(_last_step(plant, run) * run.global_batch_tokens for run in runs)


def train(run: RunConfig, machine: MachineConfig, folder: Path) -> str:
    """Write the record of a run of `PLANT`; die after as many runs as `die_after.txt` in the sweep's folder says."""
    del machine
    _die_if_asked(folder.parent.parent)
    files, status = RunFolder(folder), "diverged" if PLANT.diverges(run) else "finished"
    last = _last_step(PLANT, run)
    for step in sorted({0, last, *(int(last * share) for share in (0.25, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98))}):
        append_row(files.evaluations, _evaluation(run, step))
    ended = {"status": status, "stop_reason": "budget", "step": last, "tokens_seen": last * run.global_batch_tokens}
    known = {"train_seconds": 1.0, "flops_per_token": 1e6, "optimizer_flops_per_step": 0.0, "weight_decay": 0.1}
    known |= {"warmup_tokens": run.warmup_effective_tokens, "sequence_length": 64, "resumes": 0}
    write_json(files.run, dict.fromkeys(RUN_COLUMNS) | science(run) | known | ended)
    return status


def _die_if_asked(sweep: Path) -> None:
    file = sweep / "die_after.txt"
    if file.exists():
        left = int(file.read_text())
        if left == 0:
            raise ValueError("the power went")
        file.write_text(str(left - 1))


def _evaluation(run: RunConfig, step: int) -> dict[str, Any]:
    tokens = step * run.global_batch_tokens
    loss = TARGET_NATS * (np.exp(PLANT.log_tokens(run)) / tokens) ** EXPONENT if step else 4.85
    row: dict[str, Any] = dict.fromkeys(EVALUATION_COLUMNS, None)
    row |= {"run_id": run.run_id, "step": step, "tokens_seen": tokens, "train_flops": tokens * 1e6}
    return row | {"train_seconds": 1e-6 * tokens, "val_loss_nats": loss, "val_loss_averaged_nats": loss}


def _last_step(plant: Plant, run: RunConfig) -> int:
    reached = int(np.ceil(np.exp(plant.log_tokens(run)) / run.global_batch_tokens))
    return min(reached, run.steps) if run.stop_at_loss_nats else run.steps


def _target_row(plant: Plant, run: RunConfig) -> dict[str, Any]:
    tokens, seen = np.exp(plant.log_tokens(run)), _last_step(plant, run) * run.global_batch_tokens
    status = "diverged" if plant.diverges(run) else "reached" if tokens <= seen else "not_reached"
    known = tokens if status == "reached" else None
    row: dict[str, Any] = dict.fromkeys(TARGETS, None)
    row |= {"run_id": run.run_id, "stage": "grid", "model": run.model_name, "optimizer": run.optimizer.name}
    row |= {"global_batch_tokens": run.global_batch_tokens, "peak_lr": run.optimizer.peak_lr, "tuning": ""}
    row |= {"init_seed": run.init_seed, "data_seed": run.data_seed, "protocol": run.protocol}
    row |= {"warmup_tokens": run.warmup_effective_tokens, "num_devices": 1, "target_loss_nats": TARGET_NATS}
    row |= {"status": status, "tokens_to_target": known, "tokens_seen": seen}
    row |= {"bound_tokens": float(seen) if status == "not_reached" else None}
    row |= {"lowest_loss_nats": TARGET_NATS * (tokens / seen) ** EXPONENT}
    row |= {"steps_to_target": known and known / run.global_batch_tokens, "flops_to_target": known and known * 1e6}
    return row | {"train_seconds_to_target": known and known * 1e-6}


def dump(plant: Plant) -> str:
    """Return the plant in words, for messages."""
    return json.dumps({name: vars(own) for name, own in plant.optimizers.items()}, default=str)
