"""Jobs of a real Slurm under random signals, requeues, cancellations and kills: every run finishes once."""

import random
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest

from sweeps.clusters.submission import submit
from sweeps.store import is_claimed
from tests.slurm_cluster import SlurmCluster, SlurmError, wait_until
from tests.slurm_sweeps import (
    assert_undisturbed,
    done,
    kill_process_of,
    resumes,
    runs,
    slowly,
    submission,
    wait_for_end,
)
from tests.sweep_examples import started

pytestmark = pytest.mark.slurm

STRIKES = ("USR2", "requeue", "cancel", "KILL job", "KILL worker")


@pytest.mark.slow
def test_array_under_chaos_finishes_every_run_once(
    slurm: SlurmCluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dice = random.Random(0)
    rates = [round(0.01 * (1 + number), 2) for number in range(20)]
    folder = started(
        tmp_path / "chaos",
        optimizers={"adamw": {"learning_rate": rates}},
        grid={"global_batch_tokens": [256]},
        machine={"accelerator": "cpu"},
    )
    struck: Counter[str] = Counter()
    jobs = submit(submission(folder, runs_per_job=2, environment=slowly(0.4)))
    end = time.monotonic() + 60
    while time.monotonic() < end:
        time.sleep(dice.uniform(0.5, 2.0))
        running = [name for name, job in slurm.jobs().items() if job.state == "RUNNING"]
        if not running:
            jobs += submit(submission(folder, runs_per_job=2, environment=slowly(0.4)))
            continue
        struck[strike(slurm, dice.choice(running), dice.choice(STRIKES))] += 1
    for _ in range(5):
        wait_for_end(slurm, 300)
        wait_until(lambda: not any(map(is_claimed, runs(folder))), 20, "orphaned workers to leave")
        if not submit(submission(folder, runs_per_job=2, environment=slowly(0.0))):
            break
    assert done(folder) == [True] * 20
    with capsys.disabled():
        print(f"\nsurvived {struck.total()} strikes ({sum(resumes(folder))} resumes): {dict(struck)}")
    assert struck.total() >= 15
    assert sum(resumes(folder)) > 5
    for run in runs(folder):
        assert_undisturbed(run)


def strike(slurm: SlurmCluster, task: str, how: str) -> str:
    """Hit a running task in one of several ways; return the way, or "missed" when it had just ended."""
    with suppress(SlurmError, ValueError, ProcessLookupError):
        if how == "requeue":
            slurm.run("scontrol", "requeue", task)
        elif how == "USR2":
            slurm.run("scancel", "--signal=USR2", "--batch", task)
        elif how == "cancel":
            slurm.run("scancel", task)
        else:
            words = b"submitit.core._submit" if how == "KILL job" else b"spawn_main"
            job_id = slurm.run("squeue", "--noheader", f"--jobs={task}", "--Format=JobID:").strip()
            kill_process_of(slurm, job_id, words)
        return how
    return "missed"
