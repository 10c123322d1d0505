"""Train what a sweep's folder lacks: the grid, then the confirmation of its best rates; then write the report.

Everything is read from the folder, so that a pool here, a second one beside it, and a submitted job do the same and
share the work.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.commands import keep_to_one_thread
from harness.config import MachineConfig, RunConfig
from harness.record import RunFolder
from sweeps.clusters.local import announce, begun, note_process
from sweeps.clusters.snapshot import children_import, code_environment, take_snapshot
from sweeps.confirmations import choose_confirmations, partly_chosen
from sweeps.display import shown
from sweeps.pool import TRAIN, Pool, slot_environments, visible_gpus
from sweeps.printing import counted
from sweeps.store import Stage, SweepFolder, is_missing, locked, read_run
from sweeps.work import work_of

if TYPE_CHECKING:
    from analysis.estimate import EstimateOptions

_LONGEST_JOB_MINUTES = 60 * 24 * 30


def default_slots(machine: MachineConfig) -> int:
    """Return how many runs train at once: one for each GPU, or for each core, over the devices of a run."""
    units = len(_gpus(machine)) or os.cpu_count() or 1
    return max(units // machine.devices, 1)


def check_machine(machine: MachineConfig) -> None:
    """Raise ValueError when the runs want more GPUs than there are."""
    gpus = len(visible_gpus())
    if machine.accelerator == "gpu" and gpus < machine.devices:
        raise ValueError(
            f"machine.accelerator is gpu and a run takes {counted(machine.devices, 'GPU')}, but there are {gpus} here "
            "(or CUDA_VISIBLE_DEVICES hides them); set machine.accelerator to cpu or auto, or lower machine.devices"
        )


def run_folder(folder: SweepFolder, slots: int, first_slot: int = 0, train: str = TRAIN) -> None:
    """Train every run of the sweep that has no result, both stages; failed runs are tried again, once. The code is that
    of now, whatever becomes of it meanwhile.

    Raises: KeyboardInterrupt at Ctrl-C or SIGTERM, when everything is saved.
    """
    spec = folder.read_spec()
    with pool_of(folder, slots, first_slot, train) as pool:
        train_stage(folder, "grid", pool)
        if spec.confirm:
            choose_confirmations(spec, folder)
            print(*(f"{line}\n" for line in partly_chosen(folder)), sep="", end="", flush=True)
            train_stage(folder, "confirm", pool)


@contextmanager
def pool_of(folder: SweepFolder, slots: int, first_slot: int = 0, train: str = TRAIN) -> Iterator[Pool]:
    """Yield a pool for the runs of a sweep, whose workers import the code as it is now."""
    machine = folder.read_spec().machine
    of_slots = slot_environments(slots, machine.devices, _gpus(machine), machine.threads or 1, first_slot)
    code = take_snapshot(folder.path)
    environments = [variables | _code_variables(code) for variables in of_slots]
    with children_import(code), Pool(environments, train, stopping=_say_stopping, died=_say_died) as pool:
        yield pool


def train_stage(folder: SweepFolder, stage: Stage, pool: Pool) -> None:
    """Train the runs of a stage that have no result, and show how far they are."""
    runs = longest_first(stage_runs(folder, stage), folder.read_spec().machine)
    with shown(folder) as tick:
        pool.train([folder.run(run.run_id) for run in runs], tick)


def stage_runs(folder: SweepFolder, stage: Stage) -> list[RunConfig]:
    """Return the runs of a stage, as the sweep's folder lists them."""
    return [read_run(folder.run(run.run_id)) for run in folder.read_manifest().runs if run.stage == stage]


def longest_first(runs: Iterable[RunConfig], machine: MachineConfig) -> list[RunConfig]:
    """Return the runs, those with the most work first."""
    return sorted(runs, key=lambda run: -work_of(run, machine).flops)


def report(
    folder: SweepFolder,
    reference: Path,
    options: "EstimateOptions | None" = None,
    baseline: str | None = None,
    targets: Sequence[float] = (),
) -> Path:
    """Compact the records, estimate, and write the report; return its place.

    `reference` is the folder of a published run of this sweep, compared with if it exists. `baseline` and
    `targets` replace those of the sweep.

    Raises: ValueError when no run of the sweep has a result yet.
    """
    _check_report(folder)
    print("Drawing the report …", flush=True)
    keep_to_one_thread()
    from analysis.estimate import estimate
    from analysis.inputs.load import read
    from analysis.inputs.records import load, save
    from analysis.inputs.timings import read_timings
    from analysis.page.report import write_report

    with locked(folder):
        records = read([folder.path], baseline=baseline, targets=targets)
        if (folder.path / "runs").is_dir():  # a compacted folder is what it is
            save(records, folder.path)
        compared = reference if reference.is_dir() else None
        earlier = load(compared) if compared else None
        estimates = estimate(records, options, earlier, read_timings(folder.path))
        write_report(estimates, folder.path, reference=compared)
    return folder.path / "report.html"


def submit_local(folder: SweepFolder, jobs: int, train: str = TRAIN) -> list[Any]:
    """Queue `jobs` jobs on this machine through submitit; each trains one run after another until none is left."""
    import submitit
    from submitit.core.utils import environment_variables

    # The cluster is named: submitit would take Slurm wherever it finds srun. Its local default is two minutes.
    executor = submitit.AutoExecutor(folder=folder.path / "jobs", cluster="local")
    executor.update_parameters(timeout_min=_LONGEST_JOB_MINUTES, gpus_per_node=len(visible_gpus()))
    missing = [run.run_id for run in folder.read_manifest().runs if is_missing(folder.run(run.run_id))]
    sweep, submitted = folder.path.absolute(), []
    with environment_variables(**_code_variables(take_snapshot(folder.path))):
        for slot in range(jobs):
            place = announce(sweep, missing)
            submitted.append(executor.submit(work, str(sweep), slot, train, str(place)))
            note_process(place, int(submitted[-1].job_id))
    return submitted


def work(folder: str, slot: int, train: str, place: str) -> None:
    """Be one job of a sweep, unless it was withdrawn: a pool of one slot, which shares the runs with all the others
    through their claims. `place` is its folder in the queue.
    """
    with begun(Path(place)) as is_wanted:
        if is_wanted:
            run_folder(SweepFolder(Path(folder)), slots=1, first_slot=slot, train=train)


def _check_report(folder: SweepFolder) -> None:
    """Raise ValueError when there is nothing to report: no run has a result, nor is the sweep a compacted one."""
    runs = [folder.run(run.run_id) for run in folder.read_manifest().runs]
    is_compacted = (folder.path / "runs.parquet").exists() and not (folder.path / "runs").exists()
    if not is_compacted and all(is_missing(run) for run in runs):
        kept = "; the report there, of an earlier form of the sweep, is kept" * (folder.path / "report.html").exists()
        raise ValueError(f"{folder.path}: no run has finished yet; there is nothing to report{kept}")


def _code_variables(code: Path) -> dict[str, str]:
    return code_environment(code, os.environ.get("PYTHONPATH"))


def _gpus(machine: MachineConfig) -> list[str]:
    return [] if machine.accelerator == "cpu" else visible_gpus()


def _say_died(run: RunFolder, cause: str) -> None:
    print(f"The worker of {run.path.name} died {cause}; another one takes the run up.", flush=True)


def _say_stopping() -> None:
    print("\nStopping: every run saves a checkpoint first; Ctrl-C again to kill.", flush=True)
