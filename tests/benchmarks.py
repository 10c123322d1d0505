"""Ratios that the project promises, measured on this machine: `python -m tests.benchmarks`.

One thread; the two sides alternate, and the median of the pairwise ratios is printed with its quartiles. Absolute
times are for orientation only.
"""

import contextlib
import io
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
import yaml

import harness.train
from harness.batch_plan import plan_run
from harness.callbacks.step_callback import StepCallback
from harness.config import CorpusConfig, MachineConfig, RunConfig
from harness.corpus import prepare
from harness.data import MicroBatches
from harness.model import Transformer
from harness.module import LanguageModel
from harness.optimizers.combined import CombinedOptimizer, build_optimizer
from harness.optimizers.config import OPTIMIZERS
from harness.shards import open_shard
from harness.train import train
from sweeps.clusters.arrays import Submission
from sweeps.clusters.packing import MOST_LIMITS
from sweeps.clusters.profile import ClusterProfile
from sweeps.clusters.submission import submit
from sweeps.speed import Speed
from sweeps.store import SweepFolder, write_sweep
from tests.many_runs import finish_all, interrupt_all, many_runs, queue_all
from tests.slurm_stand_in import StandIn
from tests.test_optimizers import muon_group, random_weights, set_gradients

MICRO_BATCH_TOKENS = 2048
#: What adds something to Muon's step.
RELATIVES = ("muon_plus", "normuon", "orscale", "orscale_lm", "mona")
#: The promises of seconds that did not hold: they decide the exit status.
BROKEN: list[str] = []
WARM_UP_STEPS, TIMED_STEPS = 3, 100


def main() -> None:
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, one thread; ratio: median [quartiles] of interleaved pairs\n")
    for optimizer in ("adamw", "muon"):
        for batch, limit in ((2048, 1.05), (16_384, 1.02)):
            training_step(optimizer, batch, limit)
    for width, layers, gram_limit, pairs in ((64, 4, 0.5, 40), (128, 4, 0.65, 40), (256, 6, 0.8, 12)):
        optimizer_steps(width, layers, gram_limit, pairs)
    start_up()
    plan_of_many_runs()
    write_sweep_of_many_runs()
    status_of_many_runs()
    submission_of_many_runs()
    if BROKEN:
        sys.exit(f"\nlonger than promised: {'; '.join(BROKEN)}")


def training_step(optimizer: str, batch: int, limit: float) -> None:
    """The quickstart's model through the harness against the plainest loop of the same model, data and optimizer.

    After each step of the harness comes one of the plain loop, so that both meet the same weather.
    """
    run = quickstart_run(optimizer, batch)
    interleaved = Interleaved(plain_steps(run))

    def with_plain_steps(*arguments: Any) -> pl.Trainer:
        *others, callbacks = arguments
        return build_trainer(*others, [*callbacks, interleaved])

    build_trainer = harness.train._trainer
    machine = MachineConfig(accelerator="cpu", threads=1, max_micro_batch_tokens=MICRO_BATCH_TOKENS)
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch("harness.train._trainer", with_plain_steps),
        contextlib.redirect_stdout(io.StringIO()),  # the routing table, which a run's log keeps
    ):
        train(run, machine, Path(folder))
    report(f"training step, {optimizer}, {batch} tokens", interleaved.times[WARM_UP_STEPS:], limit)


class Interleaved(StepCallback):
    """Times each step of the harness from its batch to the end of its callbacks, then a step of the plain loop."""

    def __init__(self, plain: Iterator[None]) -> None:
        self.times: list[tuple[float, float]] = []
        self._plain = plain
        self._since = 0.0

    def on_train_start(self, *_: Any) -> None:
        self._since = time.perf_counter()

    def on_step_end(self, trainer: pl.Trainer, module: LanguageModel) -> None:  # noqa: ARG002
        harness_seconds = time.perf_counter() - self._since
        self.times.append((harness_seconds, seconds_of(lambda: next(self._plain))))
        self._since = time.perf_counter()


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
            "token_budget": (WARM_UP_STEPS + TIMED_STEPS) * batch,
            "evaluation": {"tokens": 2048, "first_mark_tokens": 10**9},
        },
        "benchmark",
    )


def plain_steps(run: RunConfig) -> Iterator[None]:
    """Train a step at a time, without evaluation, averaging, records or checkpoints."""
    run_plan = plan_run(run.clock, run.model.sequence_length, 1, MICRO_BATCH_TOKENS)
    plan = run_plan.final
    data = MicroBatches(open_shard(prepare(run.corpus).folder, "train"), run_plan, run.data_seed)
    network = Transformer(run.model)
    network.initialise(0)
    optimizer = plain_optimizer(network, run)
    for step in range(run.steps):
        for number in range(plan.accumulation):
            tokens = data[step * plan.accumulation + number]
            logits = network(tokens[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()) / plan.accumulation
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield


def plain_optimizer(network: Transformer, run: RunConfig) -> torch.optim.Optimizer:
    if run.optimizer.name == "adamw":
        return torch.optim.AdamW(network.parameters(), lr=0.01, betas=(0.9, 0.95), fused=True)
    optimizer: CombinedOptimizer = build_optimizer(network, run.model, run.optimizer, run.global_batch_tokens)
    optimizer.set_learning_rate(0.01)
    return optimizer


def optimizer_steps(width: int, layers: int, gram_limit: float, pairs: int) -> None:
    """Muon's step, in both forms of Newton–Schulz, against torch.optim.Muon; each relative's against Muon's.

    On the hidden matrices of a model, all in turn and each round in another order, in seconds of the processor: they do
    not count who else is on it.
    """
    shapes = [(width, width)] * 4 * layers + [(4 * width, width)] * layers + [(width, 4 * width)] * layers
    theirs = random_weights(shapes)
    set_gradients(theirs, 0)
    steps = {
        "torch.optim.Muon": torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw").step
    }
    settings = {"muon": {}, "muon, gram": {"newton_schulz_form": "gram"}, **{name: {} for name in RELATIVES}}
    for name, extra in settings.items():
        weights = random_weights(shapes)
        set_gradients(weights, 0)
        config = OPTIMIZERS[name.partition(",")[0]].model_validate({"peak_lr": 0.02, **extra})
        steps[name] = muon_group(weights, config).step
    rounds = [
        {name: processor_seconds_of(steps[name]) for name in random.Random(number).sample(sorted(steps), len(steps))}
        for number in range(pairs + 1)
    ][1:]
    limits = {"muon": ("torch.optim.Muon", 1.05), "muon, gram": ("torch.optim.Muon", gram_limit)}
    for name in settings:
        other, limit = limits.get(name, ("muon", 1.2))
        times = [(seconds[name], seconds[other]) for seconds in rounds]
        report(f"d{width} L{layers} step of {name}, against {other}", times, limit)


def start_up() -> None:
    """Seconds until the command line answers, as whole processes."""
    for words, limit in ((["--help"], 0.3), (["status"], 1.0)):
        command = [str(Path(sys.executable).with_name("critbatch")), *words]
        with tempfile.TemporaryDirectory() as empty:
            run = partial(subprocess.run, command, cwd=empty, capture_output=True, check=True)
            seconds = [seconds_of(run) for _ in range(7)]
        print(f"critbatch {' '.join(words):<42} {statistics.median(seconds):6.2f} s   (limit {limit} s)")


def plan_of_many_runs() -> None:
    """Seconds to plan 10,000 runs, as a whole process."""
    base = {"corpus": {"source": "python-stdlib", "tokenizer": "ascii"}, "model": {"sequence_length": 64}}
    grid = {"global_batch_tokens": [256, 1024], "model.preset": ["115k", "5m"], "seed": list(range(500))}
    rates = {"learning_rate": [0.01, 0.02, 0.04, 0.08, 0.16]}
    sweep = {"name": "many", "base": base, "grid": grid, "optimizers": {"muon": rates}, "token_budget": 65_536}
    with tempfile.TemporaryDirectory() as empty:
        file = Path(empty) / "many.yaml"
        file.write_text(yaml.safe_dump(sweep | {"targets_nats": [2.0]}))
        command = [str(Path(sys.executable).with_name("critbatch")), "plan", str(file)]
        seconds = [child_seconds(command, empty) for _ in range(3)]
    hold("critbatch plan of 10,000 runs", seconds, 5.0)


def write_sweep_of_many_runs() -> None:
    """Seconds to write the folder of a sweep of 1,000 runs, and to find it as it should be."""
    spec, runs = many_runs(1000)
    with tempfile.TemporaryDirectory() as place:
        for name in ("first", "repeated"):
            seconds = seconds_of(partial(write_sweep, spec, runs, SweepFolder(Path(place))))
            print(f"{f'write_sweep of 1,000 runs, {name}':<52} {seconds:6.2f} s   (limit 2 s)")


def status_of_many_runs() -> None:
    """Seconds to say where 10,000 runs stand, in each state; ended ones have 200 evaluations. As whole processes."""
    spec, runs = many_runs(10_000)
    with tempfile.TemporaryDirectory() as place, mock.patch("os.fsync"):
        folder = SweepFolder(Path(place))
        write_sweep(spec, runs, folder)
        time_status(folder, "planned")
        finish_all(runs, folder)
        time_status(folder, "finished")
        interrupt_all(runs, folder)
        time_status(folder, "interrupted")
        queue_all(runs, folder)
        time_status(folder, "requeued")


def time_status(folder: SweepFolder, state: str) -> None:
    command = [str(Path(sys.executable).with_name("critbatch")), "status", str(folder.path)]
    hold(f"critbatch status of 10,000 {state} runs", [child_seconds(command) for _ in range(5)], 2.0)


def submission_of_many_runs() -> None:
    """Calls of sbatch and seconds to submit 1,000 runs, where a stand-in takes no time."""
    spec, runs = many_runs(1000)
    with tempfile.TemporaryDirectory() as place, pytest.MonkeyPatch.context() as patch:
        stand_in, folder = StandIn(Path(place) / "bin", patch), SweepFolder(Path(place) / "many")
        write_sweep(spec, runs, folder)
        asked = Submission(folder, spec, ClusterProfile(name="stand-in"), runs, Speed(None, "not measured"))
        seconds = processor_seconds_of(lambda: submit(asked))
        calls = len(stand_in.calls("sbatch"))
    hold(f"submit 1,000 runs, in {calls} sbatch", [seconds], 10.0 if calls <= MOST_LIMITS else 0.0)


def hold(name: str, seconds: list[float], limit: float) -> None:
    """Print the least of some processor times, which do not count who else is on the machine; remember one too long."""
    print(f"{name:<52} {min(seconds):6.2f} s   (limit {limit:g} s of the processor)", flush=True)
    if min(seconds) > limit:
        BROKEN.append(name)


def child_seconds(command: list[str], folder: str | None = None) -> float:
    """Return the processor time of a command."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, cwd=folder, capture_output=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def seconds_of(act: Callable[[], object]) -> float:
    start = time.perf_counter()
    act()
    return time.perf_counter() - start


def processor_seconds_of(act: Callable[[], object]) -> float:
    start = time.thread_time()
    act()
    return time.thread_time() - start


def report(name: str, times: list[tuple[float, float]], limit: float) -> None:
    """Print the ratio of ours to theirs over pairs of seconds."""
    low, middle, high = statistics.quantiles((ours / theirs for ours, theirs in times), n=4)
    milliseconds = 1e3 * statistics.median(ours for ours, _ in times)
    print(f"{name:<52} {middle:6.3f} [{low:.3f}, {high:.3f}]   {milliseconds:9.2f} ms   (limit {limit})", flush=True)


if __name__ == "__main__":
    main()
