"""What of a sweep is submitted, in which jobs, with which options; sbatch is a stand-in that counts its calls."""

import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

import sweeps.clusters.submission
from harness.record import read_json, write_json
from sweeps.cli import main
from sweeps.clusters.profile import ClusterProfile
from sweeps.clusters.queue import queued_jobs
from sweeps.clusters.submission import Submission, packed, submit, time_limit_minutes
from sweeps.launch import stage_runs
from sweeps.speed import Speed
from sweeps.store import SweepFolder, claim, read_run, record_failure
from tests.fake_training import finish
from tests.slurm_stand_in import StandIn
from tests.sweep_examples import SWEEP, started

UNKNOWN = Speed(None, "not measured")


@pytest.fixture(autouse=True)
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    return StandIn(tmp_path / "bin", monkeypatch)


@pytest.fixture
def folder(tmp_path: Path) -> SweepFolder:
    return started(tmp_path / "small")


def submission(folder: SweepFolder, speed: Speed = UNKNOWN, per_job: int | None = None, **profile: Any) -> Submission:
    spec, grid = folder.read_spec(), stage_runs(folder, "grid")
    confirm_runs = len(spec.confirm.seeds) * len(grid) if spec.confirm else 0
    return Submission(
        folder, spec, ClusterProfile(name="test", **profile), grid, speed, per_job, confirm_runs, "tests.stepping:train"
    )


def tasks(folder: SweepFolder) -> list[tuple[str, ...]]:
    return [task for job in queued_jobs(folder.path) for task in job.tasks]


def small_sweep(text: Path, place: Path, monkeypatch: pytest.MonkeyPatch, **keys: Any) -> str:
    """Write a sweep over a text file into `place`, from now on the working folder; return its name."""
    monkeypatch.chdir(place)
    corpus = {"source": "text", "paths": [str(text / "*.txt")], "tokenizer": "ascii"}
    base = SWEEP["base"] | {"corpus": corpus, "evaluation": {"tokens": 2048}}
    Path("small.yaml").write_text(yaml.safe_dump(SWEEP | {"base": base} | keys))
    return "small.yaml"


def fail(folder: SweepFolder, run_id: str, at: str) -> None:
    run = folder.run(run_id)
    record_failure(run, "the corpus has been moved")
    write_json(run.failure, read_json(run.failure) | {"failed_at": at})


def test_submit_queues_every_missing_run_once_longest_first(folder: SweepFolder, stand_in: StandIn) -> None:
    done = stage_runs(folder, "grid")[0].run_id
    finish(read_run(folder.run(done)), folder.run(done))
    [job] = submit(submission(folder))
    queued = [run_id for task in job.tasks for run_id in task]
    assert sorted([*queued, done]) == sorted(run.run_id for run in stage_runs(folder, "grid"))
    assert ["muon-b256" in run_id for run_id in queued] == [True, False, False]
    assert "--array=0-2%3" in stand_in.script(1)
    assert (job.job_id, job.cluster, job.stage, job.minutes) == ("1001", "test", "grid", 24 * 60)


def test_submit_leaves_what_is_in_flight_and_takes_what_slurm_has_lost(folder: SweepFolder, stand_in: StandIn) -> None:
    [job] = submit(submission(folder))
    stand_in.runs(*job.task_ids, state="PENDING")
    assert submit(submission(folder)) == []
    stand_in.runs(*job.task_ids[:3])
    [again] = submit(submission(folder))
    assert again.tasks == (job.tasks[3],)


def test_submit_leaves_a_run_that_is_trained_here(folder: SweepFolder) -> None:
    here = stage_runs(folder, "grid")[0].run_id
    with claim(folder.run(here)):
        submit(submission(folder))
    assert len(tasks(folder)) == 3
    assert (here,) not in tasks(folder)


def test_submit_takes_a_failed_run_while_its_job_trains_the_others(folder: SweepFolder, stand_in: StandIn) -> None:
    [job] = submit(submission(folder, per_job=4))
    stand_in.runs(job.job_id)
    failed = job.tasks[0][1]
    fail(folder, failed, at="2999-01-01T00:00:00+00:00")
    [again] = submit(submission(folder, per_job=4))
    assert again.tasks == ((failed,),)


def test_submit_queues_a_run_that_failed_once_however_often_it_is_called(
    folder: SweepFolder, stand_in: StandIn
) -> None:
    for run in stage_runs(folder, "grid"):
        fail(folder, run.run_id, at="2026-01-01T00:00:00+00:00")
    [job] = submit(submission(folder))
    stand_in.runs(*job.task_ids, state="PENDING")
    assert submit(submission(folder)) == []


def test_submit_refuses_when_slurm_does_not_say_what_is_in_flight(folder: SweepFolder, stand_in: StandIn) -> None:
    submit(submission(folder))
    (stand_in.folder / "down").touch()
    with pytest.raises(ValueError, match="not known what is in flight, so nothing is submitted: squeue"):
        submit(submission(folder))
    assert len(stand_in.calls("sbatch")) == 1


def test_refusal_of_slurm_is_told_in_its_words_and_nothing_is_remembered(
    folder: SweepFolder, stand_in: StandIn
) -> None:
    (stand_in.folder / "refuses").write_text("invalid partition specified: man")
    with pytest.raises(ValueError, match=r"invalid partition specified: man.*critbatch doctor --cluster test"):
        submit(submission(folder))
    assert queued_jobs(folder.path) == []


def test_refusal_of_a_later_array_says_what_is_queued_already(folder: SweepFolder, stand_in: StandIn) -> None:
    stand_in.becomes_full(after=1)
    with pytest.raises(ValueError, match=r"Slurm refused: .*too many jobs.*; 1 of 4 arrays are queued already: 1001$"):
        submit(submission(folder, max_array_size=1))
    assert [job.job_id for job in queued_jobs(folder.path)] == ["1001"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_during_a_submission_comes_when_the_array_is_remembered(
    folder: SweepFolder, stand_in: StandIn, number: signal.Signals
) -> None:
    interrupted = signal.signal(number, signal.default_int_handler)
    stand_in.interrupts(os.getpid(), number)
    try:
        with pytest.raises(KeyboardInterrupt):
            submit(submission(folder, max_array_size=2))
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, interrupted)
    assert [job.job_id for job in queued_jobs(folder.path)] == ["1001"]
    assert len(stand_in.calls("sbatch")) == 1
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & {number}


def test_array_that_cannot_be_remembered_is_cancelled_whatever_the_cause(
    folder: SweepFolder, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sweeps.clusters.submission, "remember", interrupted)
    with pytest.raises(KeyboardInterrupt):
        submit(submission(folder))
    assert stand_in.calls("scancel") == ["1001"]


def test_submitted_job_has_the_name_of_its_cluster(folder: SweepFolder, stand_in: StandIn) -> None:
    stand_in.is_cluster("north")
    [job] = submit(submission(folder))
    assert job.slurm_cluster == "north"
    stand_in.is_cluster("south")
    with pytest.raises(ValueError, match="nothing is submitted: jobs of north are not known to south"):
        submit(submission(folder))


def test_packed_shares_the_work_evenly_and_loses_no_run() -> None:
    seconds = {f"run-{number}": float(number) for number in range(1, 13)}
    longest_first = sorted(seconds, key=lambda run_id: -seconds[run_id])
    packs = packed(longest_first, seconds, runs_per_job=4)
    assert sorted(run_id for pack in packs for run_id in pack) == sorted(seconds)
    assert [len(pack) for pack in packs] == [4, 4, 4]
    assert max(sum(seconds[run_id] for run_id in pack) for pack in packs) <= 1.1 * sum(seconds.values()) / 3


@pytest.mark.parametrize(
    ("each_seconds", "jobs"), [(1.0, 1), (60.0, 10), (599.0, 99), (600.0, 100), (7200.0, 100), (None, 100)]
)
def test_packed_by_default_makes_jobs_of_about_ten_minutes(each_seconds: float | None, jobs: int) -> None:
    run_ids = [f"run-{number}" for number in range(100)]
    assert len(packed(run_ids, each_seconds and dict.fromkeys(run_ids, each_seconds), None)) == jobs  # type: ignore[arg-type]


def test_packed_of_nothing_is_nothing() -> None:
    assert packed([], {}, None) == packed([], None, 3) == []


@pytest.mark.parametrize(("seconds", "minutes"), [(None, 600), (0.0, 7), (3600.0, 127), (1e6, 600)])
def test_time_limit_is_the_work_with_margin_within_what_the_cluster_gives(seconds: float | None, minutes: int) -> None:
    profile = ClusterProfile(name="test", max_minutes=600, safety=2.0, startup_minutes=5.0, signal_seconds=120)
    assert time_limit_minutes(profile, seconds) == minutes


def test_time_limit_of_an_array_is_that_of_its_longest_job(folder: SweepFolder) -> None:
    speed = Speed(1e6, "as stated")
    [job] = submit(submission(folder, speed, per_job=1, max_minutes=100_000))
    from sweeps.work import work_of

    machine = folder.read_spec().machine
    longest = max(work_of(run, machine).flops for run in stage_runs(folder, "grid")) / 1e6
    assert job.minutes == time_limit_minutes(ClusterProfile(name="test", max_minutes=100_000), longest)


def test_arrays_are_split_at_the_clusters_limit(folder: SweepFolder, stand_in: StandIn) -> None:
    jobs = submit(submission(folder, max_array_size=3, max_running_jobs=2))
    assert [len(job.tasks) for job in jobs] == [3, 1]
    assert "--array=0-2%2" in stand_in.script(1)
    assert "--array" not in stand_in.script(2)


def test_options_of_the_profile_are_those_of_sbatch(tmp_path: Path, stand_in: StandIn) -> None:
    folder = started(tmp_path / "gpus", machine={"devices": 8, "max_micro_batch_tokens": 128}, token_budget=65536,
                     grid={"global_batch_tokens": [1024]}, optimizers={"adamw": {"learning_rate": [0.01]}})  # fmt: skip
    submit(
        submission(
            folder, partition="long", account="us", qos="high", constraint="a100", gpus_per_device=1, cpus_per_device=6,
            devices_per_node=4, memory_gb_per_device=10, signal_seconds=90, sbatch={"exclude": "n7"},
            setup=["module load cuda"], environment={"HF_HOME": "/my scratch"}, python="/opt/py thon",
        )
    )  # fmt: skip
    script = stand_in.script(1)
    for option in ("partition=long", "account=us", "qos=high", "constraint=a100", "gpus-per-node=4", "nodes=2",
                   "ntasks-per-node=4", "cpus-per-task=6", "mem=40960M", "signal=B:USR2@90", "exclude=n7", "requeue",
                   "job-name=critbatch-small", "time=1440"):  # fmt: skip
        assert f"#SBATCH --{option}\n" in script
    assert "wckey" not in script
    lines = script.splitlines()
    [code] = (folder.path / "code").iterdir()
    order = ["export HF_HOME='/my scratch'", "export PYTHONSAFEPATH=1", f"export PYTHONPATH={code}", "module load cuda"]
    assert [line for line in lines if line in order] == order
    assert lines[-1].startswith("exec '/opt/py thon' -u -m submitit.core._submit ")


def test_profile_without_requeue_says_so_to_slurm(folder: SweepFolder, stand_in: StandIn) -> None:
    submit(submission(folder, requeue=False))
    assert "#SBATCH --no-requeue\n" in stand_in.script(1)


def test_confirmations_wait_for_the_grid_and_for_what_is_added_to_it(tmp_path: Path, stand_in: StandIn) -> None:
    folder = started(tmp_path / "small", confirm={"seeds": [5, 6]})
    grid, confirm = submit(submission(folder))
    assert (grid.stage, confirm.stage, confirm.tasks) == ("grid", "confirm", ((),) * 8)
    assert "#SBATCH --dependency=afterany:1001\n" in stand_in.script(2)
    stand_in.runs(*grid.task_ids, *confirm.task_ids, state="PENDING")
    assert submit(submission(folder)) == []
    stand_in.runs(*grid.task_ids[:2], *confirm.task_ids)
    again = submit(submission(folder))
    assert [job.stage for job in again] == ["grid", "confirm"]
    assert stand_in.calls("scancel") == [confirm.job_id]
    assert "#SBATCH --dependency=afterany:1001:1003\n" in stand_in.script(4)


@pytest.mark.parametrize(
    ("profile", "hours", "said"),
    [
        (
            "flops_per_second: 1.0e+9",
            "0.001",
            r"small: 4 runs take up to 0\.\d+ device hours .*, --budget-hours is 0.001;",
        ),
        ("flops_per_second: 1.0e+9", "100", None),
        ("safety: 2.0", "100", r"small: its hours are not known \(mine: its profile has no flops_per_second\)"),
    ],
)
def test_submit_refuses_more_hours_than_the_budget_has(
    text: Path, tmp_path: Path, stand_in: StandIn, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    profile: str, hours: str, said: str | None,
) -> None:  # fmt: skip
    sweep = small_sweep(text, tmp_path, monkeypatch)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    profiles = tmp_path / "critbatch" / "clusters"
    profiles.mkdir(parents=True)
    (profiles / "mine.yaml").write_text(profile)
    status = main(["submit", sweep, "--cluster", "mine", "--budget-hours", hours])
    assert status == (2 if said else 0)
    printed = capsys.readouterr().err
    assert re.search(said, printed) if said else not printed
    assert len(printed.splitlines()) == bool(said)
    assert len(stand_in.calls("sbatch")) == (not said)
    assert Path("results").exists() == (not said)


@pytest.mark.slow
def test_thousand_runs_are_one_call_of_sbatch_in_seconds(tmp_path: Path, stand_in: StandIn) -> None:
    rates = [round(0.001 * (1 + number / 100), 6) for number in range(500)]
    optimizers = {"adamw": {"learning_rate": rates}, "muon": {"momentum": 0.9, "learning_rate": rates}}
    folder = started(tmp_path / "large", optimizers=optimizers, grid={"global_batch_tokens": [1024]})
    asked = submission(folder)
    began = time.monotonic()
    [job] = submit(asked)
    assert time.monotonic() - began < 30
    assert len(job.tasks) == 1000
    assert len(stand_in.calls("sbatch")) == 1


def test_dry_run_prints_the_scripts_and_writes_nothing(
    text: Path, tmp_path: Path, stand_in: StandIn, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = small_sweep(text, tmp_path, monkeypatch, confirm={"seeds": [5]})
    assert main(["submit", sweep, "--cluster", "slurm", "--dry-run", "--runs-per-job", "2"]) == 0
    grid, confirm = capsys.readouterr().out.split("#!/bin/bash")[1:]
    assert "#SBATCH --array=0-1%2\n" in grid
    assert "#SBATCH --dependency=afterany:GRID\n" in confirm
    assert stand_in.calls("sbatch") == []
    assert not Path("results").exists()
    assert main(["submit", sweep, "--cluster", "slurm", "--runs-per-job", "2"]) == 0
    said = capsys.readouterr().out
    assert "Submitted 4 runs in 2 jobs of 1440 minutes at most: 1001" in said
    assert "Submitted 4 confirmations in 2 jobs of 1440 minutes at most: 1002" in said
    without_code = [line for line in stand_in.script(1).splitlines() if "submission.sh" not in line]
    assert without_code == ("#!/bin/bash" + grid).rstrip().splitlines()
    assert [path.name for path in Path("results").iterdir()] == ["small"]


@pytest.mark.parametrize("words", [["--dry-run"], ["--runs-per-job", "2"]])
def test_submit_to_this_machine_refuses_what_only_a_queue_can_do(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    assert main(["submit", small_sweep(text, tmp_path, monkeypatch), "--cluster", "local", *words]) == 2
    assert f"{words[0]} is for a cluster with a queue" in capsys.readouterr().err
    assert not Path("results").exists()
