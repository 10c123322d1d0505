"""Hand jobs to Slurm through submitit: the one place that knows its options."""

import math
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sweeps.clusters.profile import ClusterProfile
from sweeps.clusters.snapshot import code_environment


@dataclass(frozen=True)
class Request:
    """What a job array is asked for with, beside its jobs; `after` are the job ids that it waits for."""

    profile: ClusterProfile
    name: str
    minutes: int
    code: Path
    devices: int = 1
    after: tuple[str, ...] = ()


def sbatch(request: Request, folder: Path, jobs: Sequence[Callable[[], Any]]) -> str:
    """Submit an array, a single job when it is one, with pickles and logs in `folder`; return its number.

    Raises: ValueError when Slurm refuses, in its words.
    """
    import submitit
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    try:
        executor = submitit.SlurmExecutor(folder, python=_python(request.profile))
        executor.update_parameters(**_parameters(request, len(jobs)))
        with executor.batch():
            submitted = [executor.submit(job) for job in jobs]
    except (FailedJobError, FailedSubmissionError, RuntimeError) as error:
        said, advice = " ".join(str(error).split()), f"critbatch doctor --cluster {request.profile.name}"
        raise ValueError(f"Slurm refused: {said}; to find out what is wrong: {advice}") from None
    return str(submitted[0].job_id).partition("_")[0]


def script(request: Request, folder: Path, count: int) -> str:
    """Return the script that `sbatch` would hand over for so many jobs."""
    from submitit.slurm.slurm import _make_sbatch_string

    command = f"{_python(request.profile)} -u -m submitit.core._submit {shlex.quote(str(folder))}"
    options = _parameters(request, count) | ({"map_count": count} if count > 1 else {})
    return str(_make_sbatch_string(command, folder, **options))


def _parameters(request: Request, count: int) -> dict[str, Any]:
    """Return the options by submitit's names.

    Only the job's own process gets the signal before the time limit: it takes the place of the batch shell.
    """
    profile = request.profile
    per_node = profile.devices_on_a_node(request.devices)
    memory = profile.memory_gb_per_device
    options = {
        "job_name": request.name,
        "time": request.minutes,
        "nodes": request.devices // per_node,
        "ntasks_per_node": per_node,
        "cpus_per_task": profile.cpus_per_device,
        "gpus_per_node": profile.gpus_per_device * per_node or None,
        "mem": None if memory is None else f"{math.ceil(memory * per_node * 1024)}M",
        "dependency": f"afterany:{':'.join(request.after)}" if request.after else None,
        "array_parallelism": profile.max_running_jobs or count,
        "setup": _setup(request),
        "stderr_to_stdout": True,
        "use_srun": False,
        "wckey": None,
        "additional_parameters": {
            "signal": f"B:USR2@{profile.signal_seconds}",
            "requeue" if profile.requeue else "no-requeue": True,
            **profile.sbatch,
        },
    }
    return options | {key: getattr(profile, key) for key in ("partition", "account", "qos", "constraint", "gres")}


def _setup(request: Request) -> list[str]:
    """Return the lines before the job's own: the code that was queued, safe from folders of the same names."""
    environment = request.profile.environment
    exported = environment | code_environment(request.code, environment.get("PYTHONPATH"))
    return [
        "trap '' USR2 TERM  # until the job listens to them",
        *(f"export {name}={shlex.quote(value)}" for name, value in exported.items()),
        *request.profile.setup,
    ]


def _python(profile: ClusterProfile) -> str:
    """Return the command of the interpreter; it takes the place of the shell, whose signals it then gets."""
    return f"exec {shlex.quote(profile.python or sys.executable)}"
