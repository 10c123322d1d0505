"""Seconds of the optimizer's step where two processes share its matrices out, against both updating all of them:
`python -m tests.sharing_benchmarks`.

One thread each; steps of both kinds in turn, in another order each round. By the wall, and by the processor's clock
over the threads of a process: that counts neither waiting nor who else is on the machine.
"""

import os
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import distributed
from torch.multiprocessing.spawn import spawn

from harness.optimizers.combined import CombinedOptimizer
from harness.optimizers.config import OPTIMIZERS
from tests.test_optimizers import random_weights, set_gradients

PROCESSES, WARM_UP_STEPS = 2, 3
#: Widths and layers, with as many rounds.
MODELS = ((64, 4, 60), (128, 4, 40), (256, 6, 15))
NAMES = ("muon", "normuon", "soap")


class Seconds(NamedTuple):
    wall: float
    processor: float


def main() -> None:
    print(f"torch {torch.__version__}; step of each of {PROCESSES} processes that share, against one that does all")
    for width, layers, rounds in MODELS:
        for name in NAMES:
            with tempfile.TemporaryDirectory() as folder:
                spawn(measure, (Path(folder), name, width, layers, rounds), nprocs=PROCESSES)


def measure(rank: int, folder: Path, name: str, width: int, layers: int, rounds: int) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=PROCESSES)
    alone, shared = (hidden_optimizer(name, width, layers) for _ in range(2))
    shared.share_out(rank, PROCESSES)
    times: dict[str, list[Seconds]] = {"alone": [], "shared": []}
    for number in range(WARM_UP_STEPS + rounds):
        for kind in random.Random(number).sample(sorted(times), 2):
            times[kind].append(seconds_of(shared if kind == "shared" else alone))
    kept = [bytes_kept(optimizer) for optimizer in (shared, alone)]
    distributed.barrier()
    if rank == 0:
        said = ", ".join(ratio(times, clock) for clock in Seconds._fields)
        milliseconds = 1e3 * statistics.median(each.wall for each in times["shared"][WARM_UP_STEPS:])
        print(f"d{width} L{layers} {name:<8} {said}; {milliseconds:.2f} ms; state {kept[0] / kept[1]:.2f}", flush=True)
    distributed.barrier()  # none leaves while another still works
    distributed.destroy_process_group()


def hidden_optimizer(name: str, width: int, layers: int) -> CombinedOptimizer:
    shapes = [(width, width)] * 4 * layers + [(4 * width, width)] * layers + [(width, 4 * width)] * layers
    weights = random_weights(shapes)
    set_gradients(weights, 0)
    rule, multiplier, decay = OPTIMIZERS[name].model_validate({"peak_lr": 0.02}).assign("hidden", shapes[0])
    settings = {"algorithm": rule.algorithm, "lr": 0.02 * multiplier, "weight_decay": decay} | rule.options(1)
    return CombinedOptimizer([{"params": weights} | settings], {w: rule.flops(tuple(w.shape)) for w in weights})


def seconds_of(optimizer: CombinedOptimizer) -> Seconds:
    """Time a step until all processes have done theirs."""
    distributed.barrier()
    wall, processor = time.perf_counter(), time.process_time()
    optimizer.step()
    processor = time.process_time() - processor
    distributed.barrier()
    return Seconds(time.perf_counter() - wall, processor)


def ratio(times: dict[str, Sequence[Seconds]], clock: str) -> str:
    pairs = zip(times["shared"][WARM_UP_STEPS:], times["alone"][WARM_UP_STEPS:], strict=True)
    low, middle, high = statistics.quantiles((getattr(ours, clock) / getattr(all_, clock) for ours, all_ in pairs), n=4)
    return f"{clock} {middle:.3f} [{low:.3f}, {high:.3f}]"


def bytes_kept(optimizer: CombinedOptimizer) -> int:
    return sum(each.numel() * each.element_size() for kept in optimizer.state.values() for each in kept.values())


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    main()
