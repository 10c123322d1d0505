"""Ratios that the project promises, measured on this machine: `python -m tests.benchmarks`.

One thread; the two sides alternate, and the median of the pairwise ratios is printed with its quartiles. Absolute
times are for orientation only.
"""

import contextlib
import io
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from harness.batch_plan import plan_batch
from harness.config import CorpusConfig, MachineConfig, RunConfig
from harness.corpus import prepare
from harness.data import MicroBatches
from harness.model import Transformer
from harness.optimizers.combined import CombinedOptimizer, build_optimizer
from harness.optimizers.config import MuonConfig
from harness.record import RunFolder, read_rows
from harness.shards import open_shard
from harness.train import train
from tests.test_optimizers import muon_group, random_weights, set_gradients

MICRO_BATCH_TOKENS = 2048


def main() -> None:
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, one thread; ratio: median [quartiles] of interleaved pairs\n")
    for optimizer in ("adamw", "muon"):
        for batch, limit in ((2048, 1.05), (16_384, 1.02)):
            training_step(optimizer, batch, limit)
    for width, layers, limit, pairs in ((64, 4, 0.55, 40), (128, 4, 0.85, 40), (256, 6, 1.05, 12), (768, 2, 1.05, 7)):
        muon_step(width, layers, limit, pairs)
    start_up()


def training_step(optimizer: str, batch: int, limit: float) -> None:
    """The quickstart's model through the harness against the plainest loop of the same model, data and optimizer."""
    run, steps = quickstart_run(optimizer, batch), 98_304 // batch
    with tempfile.TemporaryDirectory() as scratch:
        folders = iter(range(1000))

        def harness() -> float:
            folder = Path(scratch) / str(next(folders))
            machine = MachineConfig(accelerator="cpu", threads=1, max_micro_batch_tokens=MICRO_BATCH_TOKENS)
            with contextlib.redirect_stdout(io.StringIO()):  # the routing table, which a run's log keeps
                train(run, machine, folder)
            seconds = read_rows(RunFolder(folder).evaluations)[-1]["train_seconds"]
            assert isinstance(seconds, float)
            return seconds

        report(f"training step, {optimizer}, {batch} tokens", harness, lambda: plain_loop(run), limit, 9, steps)


def quickstart_run(optimizer: str, batch: int) -> RunConfig:
    corpus = CorpusConfig(source="python-stdlib", tokenizer="ascii")
    prepared = prepare(corpus)
    known = {"fingerprint": prepared.fingerprint, "vocab_size": prepared.vocab_size}
    return RunConfig.parse(
        {
            "corpus": corpus.model_dump() | known,
            "model": {"preset": "115k", "vocab_size": prepared.vocab_size},
            "optimizer": {"name": optimizer, "peak_lr": 0.01},
            "global_batch_tokens": batch,
            "token_budget": 98_304,
            "evaluation": {"tokens": 2048, "first_mark_tokens": 10**9},
        },
        "benchmark",
    )


def plain_loop(run: RunConfig) -> float:
    """Return the seconds of all steps, without evaluation, averaging, records or checkpoints."""
    plan = plan_batch(run.global_batch_tokens, run.model.sequence_length, 1, MICRO_BATCH_TOKENS)
    data = MicroBatches(open_shard(prepare(run.corpus).folder, "train"), plan, run.steps, run.data_seed)
    network = Transformer(run.model)
    network.initialise(0)
    optimizer = plain_optimizer(network, run)
    start = time.perf_counter()
    for step in range(run.steps):
        for number in range(plan.accumulation):
            tokens = data[step * plan.accumulation + number]
            logits = network(tokens[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()) / plan.accumulation
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return time.perf_counter() - start


def plain_optimizer(network: Transformer, run: RunConfig) -> torch.optim.Optimizer:
    if run.optimizer.name == "adamw":
        return torch.optim.AdamW(network.parameters(), lr=0.01, betas=(0.9, 0.95), fused=True)
    optimizer: CombinedOptimizer = build_optimizer(network, run.model, run.optimizer, run.global_batch_tokens)
    optimizer.set_learning_rate(0.01)
    return optimizer


def muon_step(width: int, layers: int, limit: float, pairs: int) -> None:
    """Muon's step against torch.optim.Muon on the hidden matrices of a model."""
    shapes = [(width, width)] * 4 * layers + [(4 * width, width)] * layers + [(width, 4 * width)] * layers
    ours, theirs = random_weights(shapes), random_weights(shapes)
    set_gradients(ours, 0)
    set_gradients(theirs, 0)
    optimizer = muon_group(ours, MuonConfig(peak_lr=0.02))
    reference = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    name = f"Muon step, d{width} L{layers}, against torch.optim.Muon"
    report(name, lambda: seconds_of(optimizer.step), lambda: seconds_of(reference.step), limit, pairs, 1)


def start_up() -> None:
    """Seconds until the command line answers, as whole processes."""
    for words, limit in ((["--help"], 0.3), (["status"], 1.0)):
        command = [str(Path(sys.executable).with_name("critbatch")), *words]
        with tempfile.TemporaryDirectory() as empty:
            run = partial(subprocess.run, command, cwd=empty, capture_output=True, check=True)
            seconds = [seconds_of(run) for _ in range(7)]
        print(f"critbatch {' '.join(words):<42} {statistics.median(seconds):6.2f} s   (limit {limit} s)")


def seconds_of(act: Callable[[], object]) -> float:
    start = time.perf_counter()
    act()
    return time.perf_counter() - start


def report(
    name: str, ours: Callable[[], float], theirs: Callable[[], float], limit: float, pairs: int, steps: int
) -> None:
    """Print the ratio of ours to theirs; the first pair warms up and is not counted."""
    times = [(ours(), theirs()) for _ in range(pairs + 1)][1:]
    ratios = sorted(a / b for a, b in times)
    low, middle, high = statistics.quantiles(ratios, n=4)
    milliseconds = 1e3 * statistics.median(a for a, _ in times) / steps
    print(f"{name:<52} {middle:6.3f} [{low:.3f}, {high:.3f}]   {milliseconds:9.2f} ms   (limit {limit})", flush=True)


if __name__ == "__main__":
    main()
