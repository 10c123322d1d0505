"""What of a sweep is submitted, in which jobs, with which options; sbatch is a stand-in that counts its calls."""

import os
import re
import signal
import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import yaml

import sweeps.clusters.submission
from harness.record import read_json, write_json
from sweeps.cli import main
from sweeps.clusters.arrays import Submission, arrays_of
from sweeps.clusters.flight import Flight
from sweeps.clusters.packing import SIMILAR, time_limit_minutes
from sweeps.clusters.profile import ClusterProfile
from sweeps.clusters.queue import queued_jobs
from sweeps.clusters.submission import submit
from sweeps.launch import stage_runs
from sweeps.speed import Speed
from sweeps.store import SweepFolder, claim, read_run, record_failure
from sweeps.work import work_of
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


@pytest.fixture
def branched(tmp_path: Path) -> SweepFolder:
    """Two trunks, each with two branches."""
    return started(
        tmp_path / "branched",
        grid={"global_batch_tokens": [256]},
        branched_decay={"token_budgets": [8192, 16384]},
    )


def submission(folder: SweepFolder, speed: Speed = UNKNOWN, per_job: int | None = None, **profile: Any) -> Submission:
    spec, grid = folder.read_spec(), stage_runs(folder, "grid")
    confirmed = [run for run in grid for _ in spec.confirm.seeds] if spec.confirm else []
    work = [work_of(run, spec.machine) for run in confirmed]
    return Submission(
        folder, spec, ClusterProfile(name="test", **profile), grid, speed, per_job, work, "tests.stepping:train"
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


def write_profile(place: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """Write the profile of a cluster called mine."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(place))
    (place / "critbatch" / "clusters").mkdir(parents=True)
    (place / "critbatch" / "clusters" / "mine.yaml").write_text(text)


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


def test_jobs_of_similar_length_share_an_array_with_the_limit_of_the_longest(tmp_path: Path, stand_in: StandIn) -> None:
    budgets = {256: 4 * 16384, 1024: 16384, 2048: 15 * 1024}
    folder = started(
        tmp_path / "lengths", grid={"global_batch_tokens": list(budgets)}, token_budget=budgets,
        base=SWEEP["base"] | {"evaluation": {"tokens": 64, "first_mark_tokens": 10**9}},
    )  # fmt: skip
    speed, profile = Speed(1e6, "as stated"), ClusterProfile(name="test", max_minutes=100_000)
    jobs = submit(submission(folder, speed, per_job=1, max_minutes=100_000))
    runs = {run.run_id: run for run in stage_runs(folder, "grid")}
    batches = [{runs[run_id].global_batch_tokens for task in job.tasks for run_id in task} for job in jobs]
    assert batches == [{256}, {1024, 2048}]
    for job in jobs:
        limits = [time_limit_minutes(profile, speed.seconds(work_of(runs[run_id], folder.read_spec().machine)))
                  for task in job.tasks for run_id in task]  # fmt: skip
        assert job.minutes == max(limits) <= SIMILAR * min(limits)
        assert f"#SBATCH --time={job.minutes}\n" in stand_in.script(jobs.index(job) + 1)


def test_confirmations_to_come_have_the_limits_of_the_runs_that_they_can_be(tmp_path: Path) -> None:
    budgets = {256: 8 * 16384, 1024: 16384}
    folder = started(
        tmp_path / "lengths", grid={"global_batch_tokens": list(budgets)}, token_budget=budgets, confirm={"seeds": [5]}
    )
    jobs = submit(submission(folder, Speed(1e6, "as stated"), per_job=1, max_minutes=100_000))
    assert [(job.stage, len(job.tasks)) for job in jobs] == [("grid", 2), ("grid", 2), ("confirm", 2), ("confirm", 2)]
    assert [job.minutes for job in jobs[2:]] == [job.minutes for job in jobs[:2]]
    assert len({job.choice for job in jobs[2:]}) == 1


def test_run_that_has_begun_gets_the_devices_that_it_began_with(tmp_path: Path, stand_in: StandIn) -> None:
    folder = started(tmp_path / "small", machine={"devices": 2, "threads": 3})
    begun = stage_runs(folder, "grid")[0].run_id
    folder.run(begun).checkpoint.touch()
    started(folder.path)  # on one device, with the threads of the profile
    submit(submission(folder, cpus_per_device=7))
    of_begun = [number for number, task in enumerate(queued_jobs(folder.path)) if (begun,) in task.tasks]
    scripts = [stand_in.script(number) for number in (1, 2)]
    assert ["ntasks-per-node=2" in script for script in scripts] == [number in of_begun for number in range(2)]
    assert [len(job.tasks) for job in queued_jobs(folder.path)].count(1) == 1


def test_threads_are_those_that_were_queued(tmp_path: Path) -> None:
    folder = started(tmp_path / "small", machine={"threads": 3})
    [array] = arrays_of(submission(folder, cpus_per_device=7), Flight(frozenset(), ()), Mock())
    assert {job.threads for job in array.jobs} == {3}
    started(folder.path)
    [array] = arrays_of(submission(folder, cpus_per_device=7), Flight(frozenset(), ()), Mock())
    assert {job.threads for job in array.jobs} == {7}


def test_devices_that_do_not_fill_nodes_are_refused_before_anything_is_written(
    text: Path, tmp_path: Path, stand_in: StandIn, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = {"devices": 6, "max_micro_batch_tokens": 64}
    sweep = small_sweep(
        text, tmp_path, monkeypatch, machine=machine, grid={"global_batch_tokens": [384]}, token_budget=38400
    )
    write_profile(tmp_path, monkeypatch, "devices_per_node: 4")
    for words in ([], ["--dry-run"]):
        assert main(["submit", sweep, "--cluster", "mine", *words]) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert "6 devices does not fill whole nodes of mine, which have 4" in line
        assert line.endswith("set machine.devices to 4 or 8")
    assert stand_in.calls("sbatch") == []
    assert not Path("results").exists()


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


def test_branches_wait_for_the_arrays_of_their_trunks_and_confirmations_for_both(
    branched: SweepFolder, stand_in: StandIn
) -> None:
    trunks, branches = submit(submission(branched))
    assert [len(job.tasks) for job in (trunks, branches)] == [2, 4]
    assert {read_run(branched.run(run_id)).branch is None for task in trunks.tasks for run_id in task} == {True}
    assert "--dependency" not in stand_in.script(1)
    assert "#SBATCH --dependency=afterany:1001\n" in stand_in.script(2)
    stand_in.runs(*trunks.task_ids, *branches.task_ids, state="PENDING")
    assert submit(submission(branched)) == []
    stand_in.runs(*trunks.task_ids, state="PENDING")  # the branches are lost
    [again] = submit(submission(branched))
    assert sorted(again.tasks) == sorted(branches.tasks)
    assert "#SBATCH --dependency=afterany:1001\n" in stand_in.script(3)


def test_branch_whose_trunk_has_kept_its_state_waits_for_nothing(branched: SweepFolder, stand_in: StandIn) -> None:
    trunk = next(run for run in stage_runs(branched, "grid") if run.branch is None)
    for tokens in trunk.keep_at_tokens:
        branched.run(trunk.run_id).kept(tokens).touch()
    ready, waiting = submit(submission(branched))
    own = {
        run.run_id for run in stage_runs(branched, "grid") if run.branch is None or run.branch.parent == trunk.run_id
    }
    assert own == {run_id for task in ready.tasks for run_id in task}
    assert own.isdisjoint(run_id for task in waiting.tasks for run_id in task)
    assert "--dependency" not in stand_in.script(1)


def test_branch_that_never_can_start_is_not_submitted(branched: SweepFolder) -> None:
    for run in stage_runs(branched, "grid"):
        if run.branch is None:
            finish(run, branched.run(run.run_id))  # and its state was removed
    assert submit(submission(branched)) == []


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
    write_profile(tmp_path, monkeypatch, profile)
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
    heading, grid, confirm = capsys.readouterr().out.split("#!/bin/bash")
    assert heading == "# ARRAY1: 4 runs in 2 jobs of 1440 minutes at most\n"
    assert "#SBATCH --array=0-1%2\n" in grid
    grid, _, heading = grid.rpartition("# ARRAY2: ")
    assert heading == "confirmations in 2 jobs of 1440 minutes at most\n"
    assert "#SBATCH --dependency=afterany:ARRAY1\n" in confirm
    assert stand_in.calls("sbatch") == []
    assert not Path("results").exists()
    assert main(["submit", sweep, "--cluster", "slurm", "--runs-per-job", "2"]) == 0
    said = capsys.readouterr().out
    assert "Submitted 4 runs in 2 jobs of 1440 minutes at most: 1001" in said
    assert "Submitted confirmations in 2 jobs of 1440 minutes at most: 1002" in said
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
