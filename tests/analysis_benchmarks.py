"""Seconds and memory of the analysis: `python -m tests.analysis_benchmarks`.

10,000 runs of 200 evaluations each, ten seeds a setting so that every interval comes of 1,000 resamples, read from a
Parquet table and fitted at ten targets: at most 15 s and 2 GB on two cores. And a small table: at most a second.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import polars as pl

MODELS, BATCHES, RATES, SEEDS, MARKS = 5, 10, 10, 10, 200
TARGETS = [f"{3.0 - 0.05 * step:.2f}" for step in range(10)]
PUBLISHED = Path(__file__).parent.parent / "results" / "reference" / "zhang2024" / "steps_to_target.csv"


def main() -> None:
    words = ["--rename", "batch_size=global_batch_tokens", "--batch-in", "sequences", "--sequence-length", "512"]
    measure("a published table of 45 rows", ["fit", str(PUBLISHED), *words, "--json"], 1, 0.5)
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "curves.parquet"
        many_runs().write_parquet(table)
        targets = [word for target in TARGETS for word in ("--target-loss", target)]
        measure("10,000 runs, ten targets, 1,000 resamples", ["fit", str(table), *targets, "--json"], 15, 2.0)


def many_runs() -> pl.DataFrame:
    """Return curves L = 2 (T / tokens)^0.1, T with a knee in the batch, a best rate, and 10 % seed noise."""
    random = np.random.default_rng(0)
    settings = [range(MODELS), ("adamw", "muon"), 2 ** np.arange(8, 8 + BATCHES), range(RATES), range(SEEDS)]
    model, optimizer, batch, rate, seed = (axis.ravel() for axis in np.meshgrid(*settings, indexing="ij"))
    log_tokens = np.log(2e5 * (1 + model)) + np.log1p(batch / np.where(optimizer == "muon", 6000.0, 3000.0))
    log_tokens += 0.05 * (rate - 4.3) ** 2 + random.normal(0.0, 0.1, len(batch))
    tokens = np.geomspace(1e4, 1e8, MARKS)[None] // batch[:, None] * batch[:, None] + batch[:, None]
    runs = {
        "model": np.char.add("m", model.astype(str)),
        "optimizer": optimizer,
        "global_batch_tokens": batch,
        "peak_lr": np.round(0.001 * 1.5**rate, 6),
        "seed": seed,
    }
    columns = {name: np.repeat(values, MARKS) for name, values in runs.items()}
    losses = 2.0 * (np.exp(log_tokens)[:, None] / tokens) ** 0.1
    frame = pl.DataFrame(columns | {"tokens_seen": tokens.ravel(), "val_loss_nats": losses.ravel()})
    return frame.unique([*runs, "tokens_seen"], keep="first", maintain_order=True)


def measure(name: str, words: list[str], seconds: float, gigabytes: float) -> None:
    command = [str(Path(sys.executable).with_name("critbatch")), *words]
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    took = time.perf_counter() - start
    assert status == 0, command
    cores, peak = (usage.ru_utime + usage.ru_stime) / took, usage.ru_maxrss / 1e6
    print(f"{name}: {took:.1f} s (limit {seconds} s) on {cores:.1f} cores, {peak:.2f} GB (limit {gigabytes} GB)")


if __name__ == "__main__":
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    main()
