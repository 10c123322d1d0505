"""Twenty short runs that truly train, for tests that interrupt them at random, and what must hold of them then."""

import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from harness.record import RUN_COLUMNS, RunFolder, read_json, read_rows
from sweeps.launch import run_folder
from sweeps.plan import prepare_runs
from sweeps.spec import SweepSpec
from sweeps.store import State, SweepFolder, state, write_sweep
from tests.sweep_examples import changed
from tests.test_train import science_rows

RUNS = 20
SLOTS = 2

#: What a record says of where and when, and how often: all else must be the twin's.
CIRCUMSTANCES = {"host", "job_id", "started_at", "resumes", "train_seconds", "eval_seconds", "other_seconds"}


def start(path: Path, text: Path, token_budget: int) -> SweepFolder:
    """Start a sweep of AdamW and Muon, two batch sizes and five seeds, with accumulation and averaged weights, that
    saves five times a second.
    """
    base = {
        "corpus": {
            "source": "text", "paths": [str(text / "*.txt")], "tokenizer": "ascii", "validation_share": 0.1,
            "max_epochs": 99,
        },
        "model": {"width": 32, "layers": 2, "heads": 2, "sequence_length": 32},
        "schedule": {"warmup_tokens": 2048},
        "averaging": {"kind": "power_ema"},
        "evaluation": {"tokens": 2048, "first_mark_tokens": 2048},
    }  # fmt: skip
    machine = {"accelerator": "cpu", "threads": 1, "max_micro_batch_tokens": 128, "checkpoint_every_seconds": 0.2}
    grid = {"global_batch_tokens": [256, 512], "seed": [0, 1, 2, 3, 4]}
    spec = SweepSpec.parse(changed(base=base, grid=grid, machine=machine, token_budget=token_budget), source="chaos")
    runs, _ = prepare_runs(spec)
    assert len(runs) == RUNS
    folder = SweepFolder(path)
    write_sweep(spec, runs, folder)
    return folder


class Strikes:
    """Kinds of strikes in an order that is random, but deals each kind as often as any other; and those that hit."""

    def __init__(self, kinds: Sequence[str], seed: int) -> None:
        self.random = random.Random(seed)
        self.hits: Counter[str] = Counter()
        self._kinds = kinds
        self._dealt: list[str] = []

    def strike(self, hit: Callable[[str], bool], whom: str = "") -> None:
        """Strike with the next kind, which stays the next one where `hit` says that it has missed."""
        self._dealt = self._dealt or self.random.sample(self._kinds, len(self._kinds))
        if hit(self._dealt[-1]):
            self.hits[self._dealt.pop() + whom] += 1

    def report(self, folder: SweepFolder) -> str:
        """Say what was survived."""
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.hits.most_common())
        return f"{RUNS} runs survived {self.hits.total()} interruptions ({resumes(folder)} resumes): {kinds}"


def runs_of(folder: SweepFolder) -> list[RunFolder]:
    return [folder.run(run.run_id) for run in folder.read_manifest().runs]


def all_done(folder: SweepFolder) -> bool:
    return all(state(run) == State.FINISHED for run in runs_of(folder))


def resumes(folder: SweepFolder) -> int:
    return sum(read_json(run.run)["resumes"] for run in runs_of(folder))


def checkpoints(folder: SweepFolder) -> dict[RunFolder, int]:
    """Return when each run in the making saved its state last."""
    found = {}
    for run in runs_of(folder):
        with suppress(FileNotFoundError):  # not begun, or finished
            found[run] = run.checkpoint.stat().st_mtime_ns
    return found


def wait_for_progress(folder: SweepFolder, seconds: float = 30.0) -> list[RunFolder]:
    """Return the runs that have saved their state since the call, as soon as there are any; none after `seconds`."""
    before, end = checkpoints(folder), time.monotonic() + seconds
    while time.monotonic() < end:
        if further := [run for run, saved_at in checkpoints(folder).items() if before.get(run) != saved_at]:
            return further
        time.sleep(0.05)
    return []


def assert_each_equals_its_twin(folder: SweepFolder, twin: SweepFolder) -> None:
    """Train the twin undisturbed; compare every curve, and every record but for its circumstances, bit for bit."""
    run_folder(twin, SLOTS)
    for run, undisturbed in zip(runs_of(folder), runs_of(twin), strict=True):
        steps = [row["step"] for row in read_rows(run.evaluations)]
        assert steps == sorted(set(steps)), run
        assert science_rows(run.path) == science_rows(undisturbed.path), run
        assert record(run) == record(undisturbed), run


def record(run: RunFolder) -> dict[str, Any]:
    row = read_json(run.run)
    assert row.keys() == RUN_COLUMNS.keys()
    return {name: value for name, value in row.items() if name not in CIRCUMSTANCES}
