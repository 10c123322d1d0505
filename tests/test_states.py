"""Where a run stands: its files first, then what was queued of it, then what Slurm says."""

import shutil
from pathlib import Path

import pytest

from harness.identity import SCIENCE_VERSION
from harness.record import RunFolder, read_json, write_json
from sweeps.cli import main
from sweeps.clusters.queue import QueuedJob, remember
from sweeps.clusters.slurm import Task
from sweeps.clusters.stops import Stop, write_stop
from sweeps.run_status import RunStatus
from sweeps.states import QueuedRun, queued_reason, queued_state
from sweeps.status import as_json, confirmations_in_words, failures, jobs_in_words, read_status, runs_table, stopped
from sweeps.store import State, SweepFolder, add_confirmations, claim, read_run, record_failure
from tests.fake_training import finish
from tests.slurm_stand_in import StandIn
from tests.sweep_examples import started

SUBMITTED, BEFORE, AFTER = (f"2026-01-01T0{hour}:00:00+00:00" for hour in (1, 0, 2))


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    return StandIn(tmp_path / "bin", monkeypatch)


@pytest.fixture
def folder(tmp_path: Path) -> SweepFolder:
    return started(tmp_path / "small")


def queued(task: Task | None) -> QueuedRun:
    return QueuedRun("7_0", SUBMITTED, 30, task)


def submitted(folder: SweepFolder, job_id: str = "7") -> list[RunFolder]:
    """Say that a job array has the sweep's four runs, one in each task."""
    runs = [folder.run(run.run_id) for run in folder.read_manifest().runs]
    tasks = tuple((run.path.name,) for run in runs)
    job = QueuedJob(
        cluster="test", kind="slurm", job_id=job_id, submitted_at=SUBMITTED, minutes=30, stage="grid", tasks=tasks
    )
    remember(job, folder.path)
    return runs


def statuses(folder: SweepFolder) -> tuple[RunStatus, ...]:
    return read_status(folder).runs


@pytest.mark.parametrize(
    ("files", "slurm", "expected"),
    [
        (State.FINISHED, "FAILED", State.FINISHED),
        (State.DIVERGED, "RUNNING", State.DIVERGED),
        (State.RUNNING, "UNKNOWN", State.RUNNING),
        (State.PLANNED, "PENDING", State.QUEUED),
        (State.PLANNED, "RUNNING", State.QUEUED),
        (State.PLANNED, "COMPLETED", State.LOST),
        (State.PLANNED, "CANCELLED", State.CANCELLED),
        (State.INTERRUPTED, "PENDING", State.REQUEUED),
        (State.INTERRUPTED, "NODE_FAIL", State.REQUEUED),
        (State.INTERRUPTED, "TIMEOUT", State.TIMED_OUT),
        (State.INTERRUPTED, "FAILED", State.LOST),
        (State.INTERRUPTED, "UNKNOWN", State.LOST),
        (State.PLANNED, "OUT_OF_MEMORY", State.LOST),
        (State.FAILED, "TIMEOUT", State.FAILED),
    ],
)
def test_queued_state_believes_files_then_slurm(files: State, slurm: str, expected: State) -> None:
    assert queued_state(files, queued(Task(slurm)), AFTER) == expected


def test_node_failure_is_the_end_once_the_queue_has_forgotten_it() -> None:
    assert queued_state(State.PLANNED, queued(Task("NODE_FAIL", in_accounts=True))) == State.LOST


def test_failure_is_tried_again_by_a_live_job_that_was_submitted_later() -> None:
    assert queued_state(State.FAILED, queued(Task("PENDING")), BEFORE) == State.QUEUED
    assert queued_state(State.FAILED, queued(Task("PENDING")), AFTER) == State.FAILED
    assert queued_state(State.FAILED, queued(Task("CANCELLED")), BEFORE) == State.FAILED
    assert queued_state(State.FAILED, queued(Task("PENDING")), None) == State.FAILED  # a corrupt record


def test_reason_is_what_slurm_waits_for_or_how_the_job_ended() -> None:
    assert queued_reason(queued(Task("PENDING", reason="Priority"))) == "Priority"
    assert queued_reason(queued(Task("RUNNING", node="n1"))) is None
    assert queued_reason(queued(None)) == "Slurm has not answered yet"
    assert queued_reason(queued(Task("TIMEOUT"))) == "job 7_0 reached its limit of 30 minutes"
    assert queued_reason(queued(Task("UNKNOWN"))) == "Slurm no longer knows job 7_0, and there is no result"
    assert "ended as out of memory" in str(queued_reason(queued(Task("OUT_OF_MEMORY"))))


def test_states_come_from_files_queue_and_slurm(folder: SweepFolder, stand_in: StandIn) -> None:
    finished, running, interrupted, waiting = submitted(folder)
    finish(read_run(finished), finished)
    interrupted.checkpoint.touch()
    stand_in.says(
        "squeue",
        "7_0|COMPLETED|n1|0||\n7_1|RUNNING|n1|0|None|\n7_2|PENDING||1|BeginTime|\n7_3|PENDING||0|Resources|\n",
    )
    write_json(running.run, {"status": "running", "host": "node-of-the-record", "job_id": "7_1"})
    with claim(running):
        found = statuses(folder)
    assert [run.state for run in found] == [State.FINISHED, State.RUNNING, State.REQUEUED, State.QUEUED]
    assert [run.reason for run in found] == ["budget", None, "BeginTime", "Resources"]
    assert (found[1].node, found[1].job) == ("node-of-the-record", "7_1")
    assert found[3].job == "7_3"
    assert waiting.path.name == found[3].run_id


def test_run_that_was_queued_twice_is_where_its_live_task_is(folder: SweepFolder, stand_in: StandIn) -> None:
    submitted(folder, "7")
    submitted(folder, "8")
    stand_in.says("squeue", "".join(f"8_{task}|PENDING||0|Priority|\n7_{task}|FAILED|n1|0||\n" for task in range(4)))
    assert {(run.state, run.job) for run in statuses(folder)} == {(State.QUEUED, f"8_{task}") for task in range(4)}


def test_slurm_is_asked_only_about_a_sweep_with_jobs_and_once_in_a_while(
    folder: SweepFolder, stand_in: StandIn
) -> None:
    statuses(folder)
    assert stand_in.calls("squeue") == []
    submitted(folder)
    stand_in.runs("7_0", "7_1", "7_2", "7_3")
    for _ in range(5):
        statuses(folder)
    assert len(stand_in.calls("squeue")) == 1


def test_slurm_that_does_not_answer_is_said_and_loses_no_run(folder: SweepFolder, stand_in: StandIn) -> None:
    submitted(folder)
    (stand_in.folder / "down").touch()
    status = read_status(folder)
    assert "Unable to contact slurm controller" in str(status.problem)
    assert {run.state for run in status.runs} == {State.QUEUED}


@pytest.mark.parametrize(
    ("is_time_limit", "expected"),
    [(True, [State.TIMED_OUT, State.TIMED_OUT]), (False, [State.INTERRUPTED, State.PLANNED])],
)
def test_job_that_gave_up_leaves_its_runs_timed_out_or_as_they_are_with_its_reason(
    folder: SweepFolder, stand_in: StandIn, is_time_limit: bool, expected: list[State]
) -> None:
    begun, _, other, _ = submitted(folder)
    begun.checkpoint.touch()
    stand_in.says("squeue", "".join(f"7_{task}|FAILED|n1|0||\n" for task in range(4)))
    for task in ("7_0", "7_1"):
        write_stop(Stop(reason=f"job {task} is not requeued", is_time_limit=is_time_limit), folder.path, task)
    found = statuses(folder)
    assert [run.state for run in found[:2]] == expected
    assert [run.reason for run in found[:2]] == ["job 7_0 is not requeued", "job 7_1 is not requeued"]
    assert {run.state for run in found[2:]} == {State.LOST}
    assert any("job 7_0 is not requeued" in line for line in stopped(found))
    assert other.path.name == found[2].run_id


def test_preempted_run_of_a_cluster_that_does_not_requeue_is_interrupted(
    folder: SweepFolder, stand_in: StandIn
) -> None:
    begun, *_ = submitted(folder)
    begun.checkpoint.touch()
    stand_in.says("sacct", "7_0|PREEMPTED|n1\n7_1|PREEMPTED|n1\n")
    first, second, *_ = statuses(folder)
    assert (first.state, second.state) == (State.INTERRUPTED, State.PLANNED)
    assert first.reason == "job 7_0 was preempted and is not requeued; critbatch submit goes on"


def test_run_whose_folder_or_configuration_is_gone_is_lost_and_the_others_are_as_they_are(folder: SweepFolder) -> None:
    gone, torn, finished, planned = submitted(folder)
    shutil.rmtree(gone.path)
    torn.config.write_text("{")
    finish(read_run(finished), finished)
    config = read_run(planned)
    first, second, *others = statuses(folder)
    assert [run.state for run in (first, second, *others)] == [State.LOST, State.LOST, State.FINISHED, State.QUEUED]
    assert first.reason == f"{gone.config} is gone; to plan it again: critbatch run {folder.path}"
    assert "not a whole JSON file" in str(second.reason)
    named = [first.run_id.startswith(f"115k-{first.optimizer}-b{first.global_batch_tokens}-lr{first.peak_lr:.4g}-s")]
    assert named == [True]
    assert (first.init_seed, first.data_seed, first.realized_tokens) == (config.init_seed, config.data_seed, None)
    assert runs_table([first])


def test_stopped_says_how_many_runs_wait_for_somebody(folder: SweepFolder, stand_in: StandIn) -> None:
    first, *_ = submitted(folder)
    stand_in.says("squeue", "7_0|TIMEOUT|n1|0||\n7_1|CANCELLED|n1|0||\n7_2|CANCELLED|n1|0||\n")
    lines = stopped(statuses(folder))
    assert lines[0] == f"1 run timed_out, as {first.path.name}: job 7_0 reached its limit of 30 minutes"
    assert lines[1].startswith("1 run lost")
    assert lines[2].startswith("2 runs cancelled")


def test_jobs_in_words_counts_what_waits_by_reason_and_what_runs_by_node(
    folder: SweepFolder, stand_in: StandIn
) -> None:
    running, *_ = submitted(folder)
    states = ("RUNNING|n1|0|None", "PENDING||0|Priority", "PENDING||0|Priority", "COMPLETED|n1|0|")
    stand_in.says("squeue", "".join(f"7_{task}|{said}|\n" for task, said in enumerate(states)))
    with claim(running):
        assert jobs_in_words(statuses(folder)) == ["1 run running on n1", "2 runs queued: Priority"]


def test_failure_shows_its_kind_and_host(folder: SweepFolder) -> None:
    run = folder.run(folder.read_manifest().runs[0].run_id)
    record_failure(run, "out of luck")
    write_json(run.failure, read_json(run.failure) | {"kind": "data", "host": "n3"})
    first, *_ = statuses(folder)
    assert (first.failure_kind, first.node) == ("data", "n3")
    assert failures([first], folder.path)[0].startswith(f"{run.path.name} failed (data): out of luck (log: ")


def test_killed_for_memory_by_slurm_fails_what_had_started_and_loses_the_rest_of_the_pack(
    folder: SweepFolder, stand_in: StandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    killed, earlier, *_ = (folder.run(run.run_id) for run in folder.read_manifest().runs)
    pack = (tuple(run.run_id for run in folder.read_manifest().runs),)
    job = QueuedJob(
        cluster="test", kind="slurm", job_id="7", submitted_at=SUBMITTED, minutes=30, stage="grid", tasks=pack
    )
    remember(job, folder.path)
    write_json(killed.run, {"status": "running", "host": "n2", "job_id": "7"})
    write_json(earlier.run, {"status": "running", "host": "n1", "job_id": "6"})  # interrupted there, not begun here
    stand_in.says("squeue", "7|OUT_OF_MEMORY|n2|0||\n")
    first, *others = statuses(folder)
    assert (first.state, first.failure_kind, first.node) == (State.FAILED, "out_of_memory", "n2")
    assert {(run.state, run.failure_kind) for run in others} == {(State.LOST, None)}
    assert {"ended as out of memory" in str(run.reason) for run in (first, *others)} == {True}
    assert main(["retry", str(folder.path), "--failed"]) == 0
    assert "1 failed run can be tried again" in capsys.readouterr().out


def test_run_of_another_science_version_is_stale_with_or_without_result(folder: SweepFolder) -> None:
    done, planned, *_ = (folder.run(run.run_id) for run in folder.read_manifest().runs)
    finish(read_run(done), done)
    then = {"science_version": SCIENCE_VERSION - 1, "a key of then": 1}
    for file in (done.config, done.run, planned.config):
        write_json(file, read_json(file) | then)
    found = statuses(folder)
    assert [run.state for run in found] == [State.STALE, State.STALE, State.PLANNED, State.PLANNED]
    assert str(found[0].reason).startswith(f"finished by science_version {SCIENCE_VERSION - 1}")
    assert found[0].loss_nats == 2.0


def test_record_that_lacks_a_setting_is_completed_from_the_configuration(folder: SweepFolder) -> None:
    done, *_ = (folder.run(run.run_id) for run in folder.read_manifest().runs)
    finish(read_run(done), done)
    whole = statuses(folder)[0]
    write_json(done.run, read_json(done.run) | {"peak_lr": None})
    assert (whole.peak_lr, statuses(folder)[0]) == (read_run(done).optimizer.peak_lr, whole)


def test_finished_run_whose_evaluations_are_corrupt_or_gone_has_failed(folder: SweepFolder) -> None:
    corrupt, gone, *_ = (folder.run(run.run_id) for run in folder.read_manifest().runs)
    for run in (corrupt, gone):
        finish(read_run(run), run)
    corrupt.evaluations.write_text("not JSON\n")
    gone.evaluations.unlink()
    first, second, *_ = statuses(folder)
    assert (first.state, second.state) == (State.FAILED, State.FAILED)
    assert "line 1: not a JSON row" in str(first.reason)
    assert "is gone" in str(second.reason)


@pytest.mark.parametrize(
    ("slurm", "words", "is_over"),
    [
        ("PENDING", "Confirmations are chosen by job 8_0 when the grid is done.", False),
        ("FAILED", "Confirmations are not chosen: job 8_1 ended as failed, without a result;", True),
    ],
)
def test_confirmations_to_come_are_told_until_they_are_listed(
    folder: SweepFolder, stand_in: StandIn, slurm: str, words: str, is_over: bool
) -> None:
    for run in submitted(folder):
        finish(read_run(run), run)
    job = {"cluster": "test", "kind": "slurm", "minutes": 30, "submitted_at": AFTER}
    remember(QueuedJob.parse(job | {"job_id": "8", "stage": "confirm", "tasks": [[], []]}, "test"), folder.path)
    stand_in.says("squeue", f"8_0|{slurm}||0||\n8_1|{slurm}||0||\n")
    status = read_status(folder)
    assert status.chooser
    assert confirmations_in_words(status.chooser).startswith(words)
    assert status.is_over == is_over
    confirmed = [run.model_copy(update={"init_seed": 5}) for run in map(read_run, submitted(folder))]
    add_confirmations(folder.read_spec(), confirmed, folder)
    assert read_status(folder).chooser is None


def test_json_counts_every_state_and_lists_the_chosen_runs(folder: SweepFolder) -> None:
    status = read_status(folder)
    content = as_json(status.of(["muon"]), status.runs[:1])
    assert content["counts"] == {str(each): 2 * (each == State.PLANNED) for each in State}
    assert len(content["runs"]) == 1
