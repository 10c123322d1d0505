"""Sweeps of thousands of runs in every state, for what has to stay quick."""

import json
import time
from collections.abc import Sequence

from harness.config import RunConfig
from harness.record import read_json, write_json
from sweeps.clusters.queue import QueuedJob, queue_folder, remember
from sweeps.grid import expand
from sweeps.spec import SweepSpec
from sweeps.store import SweepFolder
from tests.fake_training import finish
from tests.sweep_examples import changed, prepared

_EVALUATIONS = 200
_TASKS_OF_AN_ARRAY = 1000


def many_runs(count: int) -> tuple[SweepSpec, list[RunConfig]]:
    grid = {"global_batch_tokens": [256, 1024], "seed": list(range(count // 4))}
    spec = SweepSpec.parse(changed(grid=grid), source="many")
    return spec, expand(spec, prepared)


def finish_all(runs: Sequence[RunConfig], folder: SweepFolder) -> None:
    """Write what finished runs leave."""
    for run in runs:
        files = folder.run(run.run_id)
        finish(run, files)
        files.evaluations.write_text(files.evaluations.read_text() * _EVALUATIONS)


def interrupt_all(runs: Sequence[RunConfig], folder: SweepFolder) -> None:
    """Write what runs leave that were stopped halfway; they are `finish_all`ed already."""
    for run in runs:
        files = folder.run(run.run_id)
        write_json(files.run, read_json(files.run) | {"status": "running"}, durable=False)
        files.progress.write_text(json.dumps({"step": 3, "tokens_seen": 3072, "tokens_per_second": 100.0}))
        for path in (files.checkpoint, files.claim, files.log):
            path.touch()


def queue_all(runs: Sequence[RunConfig], folder: SweepFolder) -> None:
    """Say that every run waits in a task of its own, and that Slurm has just said so."""
    tasks = {}
    for number, first in enumerate(range(0, len(runs), _TASKS_OF_AN_ARRAY)):
        of_array = [[run.run_id] for run in runs[first : first + _TASKS_OF_AN_ARRAY]]
        job = {"cluster": "test", "kind": "slurm", "submitted_at": "2026-01-01T00:00:00+00:00", "minutes": 30}
        queued = QueuedJob.parse(job | {"job_id": f"{100 + number}", "stage": "grid", "tasks": of_array}, "many")
        remember(queued, folder.path)
        tasks |= {task: {"state": "PENDING", "reason": "Priority"} for task in queued.task_ids}
    answer = {"tasks": tasks, "asked_at": time.time() + 3600.0, "problem": None}
    write_json(queue_folder(folder.path) / ".slurm.json", answer)
