"""Twenty runs whose workers and pools are stopped and killed at random: nothing is lost, nothing is done twice."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sweeps.launch import run_folder
from sweeps.store import SweepFolder
from tests.chaos import (
    SLOTS,
    Strikes,
    all_done,
    assert_each_equals_its_twin,
    resumes,
    runs_of,
    start,
    wait_for_progress,
)

CHAOS_SECONDS = 120.0
TOKEN_BUDGET = 49_152  # some seconds of work for each run
SIGNALS = (signal.SIGTERM, signal.SIGKILL, signal.SIGUSR2)

_POOL = """
import sys
from pathlib import Path
from sweeps.launch import run_folder
from sweeps.store import SweepFolder
if __name__ == "__main__":
    run_folder(SweepFolder(Path(sys.argv[1])), slots=int(sys.argv[2]))
"""


class Chaos:
    """Pools on one folder, one at a time, and a hand that strikes them and their workers."""

    def __init__(self, folder: SweepFolder, seed: int) -> None:
        self._folder = folder
        self._script = folder.path / "pool.py"
        self._script.write_text(_POOL)
        self._sessions: list[int] = []
        self.strikes = Strikes([number.name for number in SIGNALS], seed)

    def rage(self, seconds: float) -> None:
        """Strike for so long, each time after some run has come further; start the pool anew when it is gone."""
        end, random = time.monotonic() + seconds, self.strikes.random
        pool = self._start()
        while time.monotonic() < end and not all_done(self._folder):
            wait_for_progress(self._folder)
            time.sleep(random.uniform(0.0, 1.5))
            if pool.poll() is not None:
                pool = self._start()
            elif random.random() < 0.2:
                self._strike(pool.pid, "pool")
            elif workers := list(self._workers()):
                training = [each for each in workers if "train.bin" in _read(each, "maps")]
                any_or_training = training if training and random.random() < 0.8 else workers
                self._strike(random.choice(any_or_training), "worker")

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
        self.strikes.strike(lambda name: _send(process, signal.Signals[name]), f" to a {who}")

    def _workers(self) -> Iterator[int]:
        """Yield the workers of all pools: also those whose pool has been killed."""
        for session in self._sessions:
            yield from (each for each in _processes(session) if "spawn_main" in _read(each, "cmdline"))


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
    text: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CRITBATCH_CACHE", str(cache))
    folder, twin = (start(tmp_path / name, text, TOKEN_BUDGET) for name in ("chaos", "twin"))
    chaos = Chaos(folder, seed=0)
    try:
        chaos.rage(CHAOS_SECONDS)
        _finish(folder)
    finally:
        chaos.stop()
    with capsys.disabled():
        print(f"\n{chaos.strikes.report(folder)}")
    assert {name.partition(" ")[0] for name in chaos.strikes.hits} == {number.name for number in SIGNALS}
    assert resumes(folder) >= 3
    assert_each_equals_its_twin(folder, twin)


def _finish(folder: SweepFolder) -> None:
    """Run what is left undisturbed; then once more, which must change nothing."""
    run_folder(folder, SLOTS)
    if not all_done(folder):
        run_folder(folder, SLOTS)  # a run may have been killed twice in its first moments, which is a failure
    records = [run.run.read_bytes() for run in runs_of(folder)]
    run_folder(folder, SLOTS)
    assert all_done(folder)
    assert [run.run.read_bytes() for run in runs_of(folder)] == records
