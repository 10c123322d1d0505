"""Twenty runs whose workers and pools are stopped and killed at random: nothing is lost, nothing is done twice."""

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.record import RunFolder, read_json, read_rows
from sweeps.launch import run_folder
from sweeps.plan import prepare_runs
from sweeps.spec import SweepSpec
from sweeps.store import SweepFolder, state, write_sweep
from tests.sweep_examples import changed
from tests.test_train import science_rows

CHAOS_SECONDS = 150.0
SIGNALS = (signal.SIGTERM, signal.SIGKILL, signal.SIGUSR2)
SLOTS = 2

_POOL = """
import sys
from pathlib import Path
from sweeps.launch import run_folder
from sweeps.store import SweepFolder
if __name__ == "__main__":
    run_folder(SweepFolder(Path(sys.argv[1])), slots=int(sys.argv[2]))
"""


def sweep(text: Path) -> SweepSpec:
    """Twenty runs of some seconds, with accumulation and averaged weights, that save five times a second."""
    base = {
        "corpus": {"source": "text", "paths": [str(text / "*.txt")], "tokenizer": "ascii", "validation_share": 0.1},
        "model": {"width": 32, "layers": 2, "heads": 2, "sequence_length": 32},
        "schedule": {"warmup_tokens": 2048},
        "averaging": {"kind": "power_ema"},
        "evaluation": {"tokens": 2048, "first_mark_tokens": 2048},
    }
    machine = {"accelerator": "cpu", "max_micro_batch_tokens": 128, "checkpoint_every_seconds": 0.2}
    grid = {"global_batch_tokens": [256, 512], "seed": [0, 1, 2, 3, 4]}
    return SweepSpec.parse(changed(base=base, grid=grid, machine=machine, token_budget=49_152), source="chaos")


def runs_of(folder: SweepFolder) -> list[RunFolder]:
    return [folder.run(run.run_id) for run in folder.read_manifest().runs]


class Chaos:
    """Pools on one folder, one at a time, and a hand that strikes them and their workers."""

    def __init__(self, folder: SweepFolder, seed: int) -> None:
        self._folder = folder
        self._random = random.Random(seed)
        self._script = folder.path / "pool.py"
        self._script.write_text(_POOL)
        self._sessions: list[int] = []
        self.strikes: Counter[str] = Counter()

    def rage(self, seconds: float) -> None:
        """Strike for so long, each time after some run has come further; start the pool anew when it is gone."""
        end = time.monotonic() + seconds
        pool = self._start()
        while time.monotonic() < end and not self._all_done():
            self._wait_for_a_checkpoint()
            time.sleep(self._random.uniform(0.0, 1.5))
            if pool.poll() is not None:
                pool = self._start()
            elif self._random.random() < 0.2:
                self._strike(pool.pid, "pool")
            elif workers := list(self._workers()):
                training = [each for each in workers if "train.bin" in _read(each, "maps")]
                any_or_training = training if training and self._random.random() < 0.8 else workers
                self._strike(self._random.choice(any_or_training), "worker")

    def stop(self) -> None:
        """End what is left; a worker whose pool was killed trains its run to the end by itself."""
        for session in self._sessions:
            for process in _processes(session):
                _send(process, signal.SIGKILL)

    def _start(self) -> "subprocess.Popen[bytes]":
        command = [sys.executable, str(self._script), str(self._folder.path), str(SLOTS)]
        root = str(Path(__file__).parent.parent)
        pool = subprocess.Popen(
            command, start_new_session=True, env=os.environ | {"PYTHONPATH": root}, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self._sessions.append(pool.pid)
        return pool

    def _strike(self, process: int, who: str) -> None:
        number = SIGNALS[self.strikes.total() % len(SIGNALS)]
        if _send(process, number):
            self.strikes[f"{number.name} to a {who}"] += 1

    def _workers(self) -> Iterator[int]:
        """Yield the workers of all pools: also those whose pool has been killed."""
        for session in self._sessions:
            yield from (each for each in _processes(session) if "spawn_main" in _read(each, "cmdline"))

    def _all_done(self) -> bool:
        return all(state(run) == "finished" for run in runs_of(self._folder))

    def _wait_for_a_checkpoint(self, seconds: float = 20.0) -> None:
        before, end = self._progress(), time.monotonic() + seconds
        while self._progress() == before and time.monotonic() < end:
            time.sleep(0.05)

    def _progress(self) -> dict[Path, int]:
        found = {}
        for path in self._folder.path.glob("runs/*/*.ckpt"):
            try:
                found[path] = path.stat().st_mtime_ns
            except FileNotFoundError:  # its run has just finished
                continue
        return found


def _processes(session: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def _read(process: int, file: str) -> str:
    try:
        return Path(f"/proc/{process}/{file}").read_text()
    except OSError:
        return ""


def _send(process: int, number: signal.Signals) -> bool:
    try:
        os.kill(process, number)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
def test_twenty_runs_under_random_signals_each_finish_once_with_the_curve_of_their_undisturbed_twin(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CRITBATCH_CACHE", str(tmp_path / "cache"))
    spec = sweep(text)
    runs, _ = prepare_runs(spec)
    folder, twin = SweepFolder(tmp_path / "chaos"), SweepFolder(tmp_path / "twin")
    for each in (folder, twin):
        write_sweep(spec, runs, each)

    chaos = Chaos(folder, seed=0)
    try:
        chaos.rage(CHAOS_SECONDS)
        _finish(folder)
    finally:
        chaos.stop()
    run_folder(twin, SLOTS)

    assert len(runs) == 20
    for run, undisturbed in zip(runs_of(folder), runs_of(twin), strict=True):
        steps = [row["step"] for row in read_rows(run.evaluations)]
        assert len(steps) == len(set(steps)), run
        assert science_rows(run.path) == science_rows(undisturbed.path), run
    assert {read_json(run.run)["code_snapshot"] for run in runs_of(folder)} == {
        path.name for path in (folder.path / "code").iterdir()
    }
    resumes = sum(read_json(run.run)["resumes"] for run in runs_of(folder))
    with capsys.disabled():
        print(f"\nsurvived {chaos.strikes.total()} interruptions ({resumes} resumes): {dict(chaos.strikes)}")
    assert {name.partition(" ")[0] for name in chaos.strikes} == {number.name for number in SIGNALS}
    assert resumes >= 3


def _finish(folder: SweepFolder) -> None:
    """Run what is left undisturbed; then once more, which must change nothing."""
    run_folder(folder, SLOTS)
    if not all(state(run) == "finished" for run in runs_of(folder)):
        run_folder(folder, SLOTS)  # a run may have been killed twice in its first moments, which is a failure
    records = [run.run.read_bytes() for run in runs_of(folder)]
    run_folder(folder, SLOTS)
    assert {str(state(run)) for run in runs_of(folder)} == {"finished"}
    assert [run.run.read_bytes() for run in runs_of(folder)] == records
