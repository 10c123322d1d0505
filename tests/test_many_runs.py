"""Thousands of runs are answered for in seconds, on a loaded machine too: processor time, against the same kind of work
done plainly. `python -m tests.benchmarks` prints the seconds.
"""

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import yaml

from harness.config import RunConfig
from sweeps.clusters.arrays import Submission
from sweeps.clusters.packing import MOST_LIMITS
from sweeps.clusters.profile import ClusterProfile
from sweeps.clusters.submission import submit
from sweeps.run_files import record_of, settings_of
from sweeps.run_status import _ended
from sweeps.speed import Speed
from sweeps.status import read_status
from sweeps.store import State, SweepFolder, write_sweep
from tests.many_runs import finish_all, interrupt_all, many_runs, queue_all
from tests.slurm_stand_in import StandIn

pytestmark = pytest.mark.slow

#: 10,000 runs in 2 s, where the plain reading of their files takes .45 s (planned) to .85 s (interrupted).
STATUS_OVER_READING = 2.4
#: 10,000 runs in 5 s, where 1,000 configurations are read and named in .13 s.
PLAN_OVER_PARSING = 35.0


def processor_seconds(act: Callable[[], object], times: int = 3) -> float:
    """Return the least processor time of several tries, of this process and of those that it waits for."""
    found = []
    for _ in range(times):
        before = _used()
        act()
        found.append(_used() - before)
    return min(found)


def read_plainly(folder: SweepFolder) -> None:
    for run in json.loads(folder.manifest.read_bytes())["runs"]:
        files = folder.run(run["run_id"])
        for path in (files.config, files.run, files.progress):
            if path.exists():
                json.loads(path.read_bytes())


def test_status_of_runs_in_every_state_takes_little_more_than_to_read_their_files(tmp_path: Path) -> None:
    spec, runs = many_runs(4000)
    folder = SweepFolder(tmp_path)
    ratios = {}

    def compare(state: State) -> None:
        def status() -> None:
            for cached in (record_of, settings_of, _ended):
                cached.cache_clear()
            assert read_status(folder).counts() == {state: len(runs)}

        plain = processor_seconds(lambda: read_plainly(folder))
        ratios[state] = processor_seconds(status) / plain

    with mock.patch("os.fsync"):
        write_sweep(spec, runs, folder)
        compare(State.PLANNED)
        finish_all(runs, folder)
        compare(State.FINISHED)
        interrupt_all(runs, folder)
        compare(State.INTERRUPTED)
        queue_all(runs, folder)
        compare(State.REQUEUED)
    assert max(ratios.values()) < STATUS_OVER_READING, ratios


def test_plan_of_ten_thousand_runs_takes_little_more_than_to_read_a_part_of_them(tmp_path: Path) -> None:
    grid = {"global_batch_tokens": [256, 1024], "model.preset": ["115k", "5m"], "seed": list(range(500))}
    sweep: dict[str, Any] = {
        "name": "many",
        "base": {"corpus": {"source": "python-stdlib", "tokenizer": "ascii"}, "model": {"sequence_length": 64}},
        "grid": grid,
        "optimizers": {"muon": {"learning_rate": [0.01, 0.02, 0.04, 0.08, 0.16]}},
        "token_budget": 65_536,
        "targets_nats": [2.0],
    }
    (tmp_path / "many.yaml").write_text(yaml.safe_dump(sweep))
    configs = [run.model_dump(mode="json") for run in many_runs(1000)[1]]
    command = [str(Path(sys.executable).with_name("critbatch")), "plan", "many.yaml"]

    def plan() -> None:
        printed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
        assert "10,000 runs" in printed

    plan()  # which prepares the corpus
    parsing = processor_seconds(lambda: [RunConfig.parse(config, "many").run_id for config in configs])
    assert processor_seconds(plan) < PLAN_OVER_PARSING * parsing


@pytest.mark.parametrize("speed", [None, 1e5])
def test_thousand_runs_of_many_lengths_are_a_handful_of_calls_of_sbatch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, speed: float | None
) -> None:
    stand_in, folder = StandIn(tmp_path / "bin", monkeypatch), SweepFolder(tmp_path / "many")
    spec, runs = many_runs(1000)
    runs = [run.model_copy(update={"token_budget": 4096 * (1 + number)}) for number, run in enumerate(runs)]
    write_sweep(spec, runs, folder)
    profile = ClusterProfile(name="test", max_minutes=10**9)
    jobs = submit(Submission(folder, spec, profile, runs, Speed(speed, "as stated"), runs_per_job=1))
    assert sum(len(job.tasks) for job in jobs) == 1000
    assert len(stand_in.calls("sbatch")) == len(jobs) == (1 if speed is None else MOST_LIMITS)


def _used() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime
