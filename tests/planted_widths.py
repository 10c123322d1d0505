"""Training that takes no time, of models of many widths: a final loss with its optimum where it was planted.

`train` stands in for `harness.train:train`; the best rate is 2^(LIMIT − ALPHA / width), the best multiplier of the
auxiliary rate 1. `die_after.txt` in the sweep's folder says after how many runs it fails.
"""

import zlib
from pathlib import Path
from typing import Any

import numpy as np

from harness.config import MachineConfig, RunConfig
from harness.record import EVALUATION_COLUMNS, RUN_COLUMNS, RunFolder, append_row, write_json
from tests.fake_training import science

LIMIT, ALPHA = -5.0, 16.0
NOISE = 0.003


def best_rate(width: int) -> float:
    return float(2.0 ** (LIMIT - ALPHA / width))


def loss(run: RunConfig) -> float:
    auxiliary = getattr(run.optimizer, "auxiliary", None)
    off = np.log2(run.optimizer.peak_lr / best_rate(run.model.width))
    beside = np.log2(auxiliary.lr_multiplier) if auxiliary else 0.0
    noise = np.random.default_rng(zlib.crc32(run.run_id.encode())).standard_normal()
    return float(2.0 + 4.0 / run.model.width + 0.02 * off**2 + 0.01 * beside**2 + NOISE * noise)


def train(run: RunConfig, machine: MachineConfig, folder: Path) -> str:
    """Write the record of a run; one at more than 40 times the best rate diverges."""
    del machine
    _die_if_asked(folder.parent.parent)
    files = RunFolder(folder)
    status = "diverged" if run.optimizer.peak_lr > 40 * best_rate(run.model.width) else "finished"
    for step in (0, run.steps // 2, run.steps):
        append_row(files.evaluations, _evaluation(run, step))
    ended = {"status": status, "stop_reason": "budget", "step": run.steps, "tokens_seen": run.realized_tokens}
    known = {"train_seconds": 1.0, "flops_per_token": 1e6, "optimizer_flops_per_step": 0.0, "resumes": 0}
    write_json(files.run, dict.fromkeys(RUN_COLUMNS) | science(run) | known | {"warmup_tokens": 0} | ended)
    return status


def _evaluation(run: RunConfig, step: int) -> dict[str, Any]:
    tokens = step * run.global_batch_tokens
    row: dict[str, Any] = dict.fromkeys(EVALUATION_COLUMNS, None)
    row |= {"run_id": run.run_id, "step": step, "tokens_seen": tokens, "train_flops": tokens * 1e6}
    return row | {"train_seconds": 1e-6 * tokens, "val_loss_nats": loss(run) + 2.0 * (1 - step / run.steps)}


def _die_if_asked(sweep: Path) -> None:
    file = sweep / "die_after.txt"
    if file.exists():
        left = int(file.read_text())
        if left == 0:
            raise ValueError("the power went")
        file.write_text(str(left - 1))
