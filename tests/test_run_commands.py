"""The verbs about runs that were started: what they print, stop, remove, and leave alone."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest

import sweeps.clusters.local
import sweeps.display
from harness.record import RunFolder, read_json, write_json
from sweeps.cli import main
from sweeps.clusters.local import announce, local_processes
from sweeps.clusters.queue import QueuedJob, queue_lock, queued_jobs, remember
from sweeps.launch import submit_local
from sweeps.states import read_queue
from sweeps.store import (
    State,
    SweepFolder,
    add_confirmations,
    claim,
    is_running,
    read_run,
    record_failure,
    state,
    write_sweep,
)
from sweeps.upkeep import forget_failures
from tests.fake_training import finish
from tests.slurm_stand_in import StandIn
from tests.sweep_examples import started

_ROOT = Path(__file__).parent.parent
_POOL = (
    "import sys; from pathlib import Path; from sweeps.store import SweepFolder; from sweeps.launch import run_folder\n"
    "if __name__ == '__main__': run_folder(SweepFolder(Path(sys.argv[1])), 2, train='tests.fake_training:train')"
)


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    return StandIn(tmp_path / "bin", monkeypatch)


@pytest.fixture
def folder(tmp_path: Path) -> SweepFolder:
    return started(tmp_path / "small")


def runs_of(folder: SweepFolder) -> list[RunFolder]:
    return [folder.run(run.run_id) for run in folder.read_manifest().runs]


def submitted(folder: SweepFolder, *runs: RunFolder, job_id: str = "7") -> None:
    """Say that one job has these runs, one after the other."""
    job = QueuedJob(
        cluster="test", kind="slurm", job_id=job_id, submitted_at="2026-01-01T00:00:00+00:00", minutes=30,
        stage="grid", tasks=(tuple(run.path.name for run in runs),),
    )  # fmt: skip
    remember(job, folder.path)


def jobs_files(folder: SweepFolder, *job_ids: str) -> dict[str, list[Path]]:
    """Write a log and a pickle of each job, as submitit does."""
    (folder.path / "jobs").mkdir()
    files = {
        each: [folder.path / "jobs" / f"{each}_{name}" for name in ("0_log.out", "submitted.pkl")] for each in job_ids
    }
    for path in (path for of_job in files.values() for path in of_job):
        path.write_text(f"what {path.name} says\n")
    return files


def listed(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, str]:
    """Return the states that `critbatch status --json` lists, by run_id."""
    assert main(["status", *words, "--json"]) == 0
    (status,) = json.loads(capsys.readouterr().out)
    return {run["run_id"]: run["state"] for run in status["runs"]}


def test_status_filters_by_state_and_optimizer(folder: SweepFolder, capsys: pytest.CaptureFixture[str]) -> None:
    first, *others = runs_of(folder)
    record_failure(first, "out of luck")
    path = str(folder.path)
    assert listed(capsys, path, "--state", "failed") == {first.path.name: "failed"}
    assert len(listed(capsys, path, "--state", "failed", "--state", "planned")) == len(others) + 1
    assert {"muon" in run_id for run_id in listed(capsys, path, "--optimizer", "muon")} == {True}
    assert main(["status", path, "--state", "planned"]) == 0
    assert capsys.readouterr().out.count("0 of 16,384") == len(others)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--state", "fine"], "--state fine: no such state; there are planned, waiting, queued"),
        (["--optimizer", "sgd"], "--optimizer sgd: there are adamw, muon"),
        (["--watch", "--json"], "--watch draws tables"),
    ],
)
def test_status_refuses_what_there_is_not(
    folder: SweepFolder, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["status", str(folder.path), *words]) == 2
    assert message in capsys.readouterr().err


def test_watch_draws_again_until_every_run_has_its_result(
    folder: SweepFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = runs_of(folder)

    def finish_one(seconds: float) -> None:
        assert seconds == 2.0
        finish(read_run(missing[-1]), missing.pop())

    monkeypatch.setattr(sweeps.display.time, "sleep", finish_one)
    assert main(["status", str(folder.path), "--watch"]) == 0
    assert missing == []
    assert "4 of 4 done" in capsys.readouterr().out


def test_logs_prints_the_end_of_one_log_or_of_all_failed_ones(
    folder: SweepFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    failed, quiet, *_ = runs_of(folder)
    for run in (failed, quiet):
        run.log.write_text("\n".join(f"{run.path.name} line {number}" for number in range(100)))
    assert main(["logs", str(folder.path)]) == 0
    assert "No run has failed" in capsys.readouterr().out
    record_failure(failed, "out of luck")
    assert main(["logs", str(folder.path), "--lines", "2"]) == 0
    heading, *lines = capsys.readouterr().out.splitlines()
    assert heading == f"==> {failed.path.name}: failed, out of luck ({failed.log})"
    assert lines == [f"{failed.path.name} line 98", f"{failed.path.name} line 99"]
    assert main(["logs", str(folder.path), quiet.path.name[:-1]]) == 0
    assert f"{quiet.path.name} line 99" in capsys.readouterr().out


def test_logs_of_a_job_that_died_before_its_runs_began_is_that_of_the_job(
    folder: SweepFolder, stand_in: StandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = runs_of(folder)
    submitted(folder, *runs[:3])
    jobs_files(folder, "7")
    runs[0].log.write_text("step 1\n")
    stand_in.says("squeue", "7|FAILED|n1|0||\n")
    assert main(["logs", str(folder.path)]) == 0
    out = capsys.readouterr().out
    assert out.count("==> 115k") == 3
    assert out.count("lost, job 7 ended as failed, without a result") == 3
    assert "step 1\n" in out
    assert out.count("there is no log") == 2
    assert out.count("what 7_0_log.out says") == 1
    assert main(["logs", str(folder.path), runs[3].path.name]) == 0
    assert "job 7" not in capsys.readouterr().out


def test_logs_of_a_run_that_ended_has_those_of_its_job(folder: SweepFolder, capsys: pytest.CaptureFixture[str]) -> None:
    run, *_ = runs_of(folder)
    finish(read_run(run), run)
    write_json(run.run, read_json(run.run) | {"job_id": "7_3"})
    jobs_files(folder, "7_3")
    assert main(["logs", str(folder.path), run.path.name]) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == [
        f"==> job 7_3 ({folder.path / 'jobs' / '7_3_0_log.out'})", "what 7_3_0_log.out says",
    ]  # fmt: skip


def test_logs_of_a_run_that_is_not_one_says_how_many_there_are(
    folder: SweepFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["logs", str(folder.path), "115k"]) == 2
    assert "115k: 4 runs begin so" in capsys.readouterr().err
    assert main(["logs", str(folder.path), "sgd"]) == 2
    assert "sgd: no run begins so" in capsys.readouterr().err


def test_retry_makes_failed_runs_missing_and_keeps_their_checkpoints(
    folder: SweepFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    fresh, started_once, corrupt, finished = runs_of(folder)
    for run in (fresh, started_once):
        record_failure(run, "out of luck")
    started_once.checkpoint.touch()
    corrupt.run.write_text("{")
    finish(read_run(finished), finished)
    assert main(["retry", str(folder.path), "--failed"]) == 0
    assert "3 failed runs can be tried again" in capsys.readouterr().out
    states = [State.PLANNED, State.INTERRUPTED, State.PLANNED, State.FINISHED]
    assert list(map(state, runs_of(folder))) == states


def test_retry_leaves_the_failures_of_a_live_job_that_is_past_them(folder: SweepFolder, stand_in: StandIn) -> None:
    failed, *others = runs_of(folder)
    submitted(folder, failed, *others)
    record_failure(failed, "out of luck")
    stand_in.runs("7")
    assert forget_failures(folder, read_queue(folder.path)) == []
    assert failed.failure.exists()


def test_retry_says_that_it_leaves_what_slurm_may_still_have(
    folder: SweepFolder, stand_in: StandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    queued, local, *_ = runs_of(folder)
    for run in (queued, local):
        record_failure(run, "out of luck")
    submitted(folder, queued)
    (stand_in.folder / "down").touch()
    assert main(["retry", str(folder.path), "--failed"]) == 0
    assert "1 failed run can be tried again.\nSlurm did not answer, so those that it may" in capsys.readouterr().out
    assert (queued.failure.exists(), local.failure.exists()) == (True, False)


def test_retry_on_a_cluster_submits(
    folder: SweepFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failed, *_ = runs_of(folder)
    record_failure(failed, "out of luck")
    asked = []
    monkeypatch.setattr("sweeps.cluster_commands.submit", lambda options: asked.append(options) or 0)
    assert main(["retry", str(folder.path), "--failed", "--cluster", "somewhere"]) == 0
    assert (asked[0].sweep, asked[0].cluster) == (str(folder.path), "somewhere")
    assert not failed.failure.exists()
    assert "1 failed run can" in capsys.readouterr().out


def test_cancel_stops_local_training_with_its_checkpoints_and_no_run_is_taken_up_again(
    folder: SweepFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder.path / "behaviour.txt").write_text("wait")
    command = [sys.executable, "-c", _POOL, str(folder.path)]
    pool = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=_ROOT)
    try:
        _until(lambda: sum(run.progress.exists() for run in runs_of(folder)) == 2)
        assert main(["cancel", str(folder.path)]) == 0
        assert f"process {pool.pid}" in capsys.readouterr().out
        pool.communicate(timeout=30)
    finally:
        pool.kill()
    assert not is_running(folder)
    assert sorted(map(state, runs_of(folder))) == [State.INTERRUPTED] * 2 + [State.PLANNED] * 2


def test_cancel_withdraws_jobs_of_this_machine_that_have_not_begun(
    folder: SweepFolder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(_ROOT))
    (folder.path / "behaviour.txt").write_text("wait")
    with queue_lock(folder.path):  # no job begins meanwhile
        jobs = submit_local(folder, 2, train="tests.fake_training:train")
        assert set(listed(capsys, str(folder.path)).values()) == {State.QUEUED}
        with monkeypatch.context() as patch:
            patch.setattr(sweeps.clusters.local, "queue_lock", nullcontext)
            assert main(["cancel", str(folder.path)]) == 0
    assert "Withdrawn before it began: 2 jobs on this machine" in capsys.readouterr().out
    assert set(listed(capsys, str(folder.path)).values()) == {State.PLANNED}
    assert [job.exception() for job in jobs] == [None, None]
    assert not any((run.path / "attempts.txt").exists() for run in runs_of(folder))


def test_cancel_stops_a_job_of_this_machine_that_has_begun_and_claimed_no_run_yet(
    folder: SweepFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    place = announce(folder.path, [run.path.name for run in runs_of(folder)])
    code = (
        "import sys, time; from pathlib import Path; from sweeps.clusters.local import begun\n"
        "with begun(Path(sys.argv[1])): time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(place)], cwd=_ROOT, stderr=subprocess.DEVNULL) as job:
        try:
            _until(lambda: bool(local_processes(folder.path)))
            assert set(listed(capsys, str(folder.path)).values()) == {State.QUEUED}
            assert main(["cancel", str(folder.path)]) == 0
            assert f"Asked to save and stop: process {job.pid}" in capsys.readouterr().out
            job.wait(timeout=30)
        finally:
            job.kill()
    assert not place.exists()


def test_job_of_this_machine_that_was_killed_is_not_waited_for(
    folder: SweepFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    place = announce(folder.path, [run.path.name for run in runs_of(folder)])
    (place / "claim").touch()  # nobody holds it
    assert set(listed(capsys, str(folder.path)).values()) == {State.PLANNED}
    assert main(["cancel", str(folder.path)]) == 0
    assert "Nothing to cancel" in capsys.readouterr().out
    assert not place.exists()


def test_job_of_this_machine_that_died_before_it_began_is_not_waited_for_and_its_log_is_named(
    folder: SweepFolder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(_ROOT))
    with queue_lock(folder.path):  # the job does not begin meanwhile
        [job] = submit_local(folder, 1, train="tests.fake_training:train")
        assert set(listed(capsys, str(folder.path)).values()) == {State.QUEUED}
        os.kill(int(job.job_id), signal.SIGKILL)
        _until(lambda: set(listed(capsys, str(folder.path)).values()) == {State.PLANNED})
    assert main(["status", str(folder.path)]) == 0
    log = folder.path / "jobs" / f"{job.job_id}_0_log.err"
    assert f"A job on this machine ended before it began; {log} says why" in capsys.readouterr().out
    assert main(["cancel", str(folder.path)]) == 0
    assert list((folder.path / "queue").glob("local-*")) == []


def test_cancel_ends_the_live_jobs_of_slurm_only(
    folder: SweepFolder, stand_in: StandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second, *_ = runs_of(folder)
    submitted(folder, first, job_id="7")
    submitted(folder, second, job_id="8")
    stand_in.says("squeue", "7|COMPLETED|n1|0||\n8|PENDING||0|Priority|\n")
    with claim(second):  # by a job of Slurm's on this very machine
        assert main(["cancel", str(folder.path)]) == 0
    assert stand_in.calls("scancel") == ["8"]
    assert capsys.readouterr().out == "Cancelled in Slurm: 8\n"


def test_cancel_names_the_host_that_it_cannot_reach(folder: SweepFolder, capsys: pytest.CaptureFixture[str]) -> None:
    first, *_ = runs_of(folder)
    with claim(first):
        first.claim.write_text("another-host 1")
        assert main(["cancel", str(folder.path)]) == 1
    assert "Runs are being trained on another-host" in capsys.readouterr().out
    assert main(["cancel", str(folder.path)]) == 0
    assert "Nothing to cancel" in capsys.readouterr().out


def test_cancel_without_an_answer_of_slurm_cancels_nothing(
    folder: SweepFolder, stand_in: StandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    submitted(folder, *runs_of(folder))
    (stand_in.folder / "down").touch()
    assert main(["cancel", str(folder.path)]) == 2
    assert "nothing is cancelled" in capsys.readouterr().err
    assert stand_in.calls("scancel") == []


def test_clean_removes_logs_and_checkpoints_of_finished_runs_and_no_result(
    folder: SweepFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    finished, interrupted, *_ = runs_of(folder)
    finish(read_run(finished), finished)
    for run in (finished, interrupted):
        run.log.write_text("words")
        run.checkpoint.write_text("weights")
    assert main(["clean", str(folder.path), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert str(finished.log) in out
    assert str(interrupted.log) not in out
    assert finished.log.exists()
    assert main(["clean", str(folder.path)]) == 0
    assert "Removed 2 files" in capsys.readouterr().out
    left = {path.name for path in finished.path.iterdir()} - {"claim"}
    assert left == {"config.json", "machine.json", "run.json", "evaluations.jsonl"}
    assert not (folder.path / "queue").exists()
    assert interrupted.checkpoint.exists()
    assert read_json(finished.run)["status"] == "finished"


def test_clean_forgets_jobs_that_are_over_and_leaves_what_is_in_flight_or_says_why_a_run_has_no_result(
    folder: SweepFolder, stand_in: StandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    finished, lost, live, again = runs_of(folder)
    for run in (finished, again):
        finish(read_run(run), run)
    for job_id, run in {"7": finished, "8": lost, "9": live, "10": again, "11": again}.items():
        submitted(folder, run, job_id=job_id)
    files = jobs_files(folder, "7", "8", "9", "10", "11", "4242")  # the last one: of this machine
    stray = folder.path / "jobs" / "0123456789abcdef.pkl"
    stray.touch()
    stand_in.says("squeue", "7|COMPLETED|n1|0||\n8|FAILED|n1|0||\n9|RUNNING|n1|0||\n11|PENDING||0||\n")
    assert main(["clean", str(folder.path), "--dry-run"]) == 0
    assert capsys.readouterr().out.splitlines()[:4] == sorted(map(str, files["7"] + files["10"]))
    assert {path.exists() for of_job in files.values() for path in of_job} == {True}

    assert main(["clean", str(folder.path)]) == 0
    assert "Removed 4 files from jobs/ and 2 from queue/, of jobs that are over." in capsys.readouterr().out
    assert [job.job_id for job in queued_jobs(folder.path)] == ["8", "9", "11"]
    assert {name: of_job[0].exists() for name, of_job in files.items()} == {
        "7": False, "8": True, "9": True, "10": False, "11": True, "4242": True,
    }  # fmt: skip
    assert stray.exists()  # may be of a submission that is being made
    os.utime(stray, (0, 0))
    for run in (lost, live):
        finish(read_run(run), run)
    assert main(["clean", str(folder.path)]) == 0
    assert sorted(path.name[:2] for path in (folder.path / "jobs").iterdir()) == ["11", "11", "9_", "9_"]


def test_clean_forgets_a_job_that_slurm_does_not_know_only_once_its_runs_have_results(
    folder: SweepFolder, stand_in: StandIn
) -> None:
    del stand_in  # which knows nothing
    finished, missing, *_ = runs_of(folder)
    finish(read_run(finished), finished)
    submitted(folder, finished, job_id="7")
    submitted(folder, finished, missing, job_id="8")
    jobs_files(folder, "7", "8")
    assert main(["clean", str(folder.path)]) == 0
    assert [job.job_id for job in queued_jobs(folder.path)] == ["8"]
    assert {path.name[0] for path in (folder.path / "jobs").iterdir()} == {"8"}


@pytest.mark.parametrize("slurm", ["", "9|FAILED|n1|0||\n"])
def test_clean_keeps_the_job_that_was_to_choose_confirmations_until_they_are_chosen(
    folder: SweepFolder, stand_in: StandIn, slurm: str
) -> None:
    for run in runs_of(folder):
        finish(read_run(run), run)
    stand_in.says("squeue", slurm)
    submitted(folder, job_id="9")
    remember(queued_jobs(folder.path)[0].model_copy(update={"stage": "confirm"}), folder.path)
    assert main(["clean", str(folder.path)]) == 0
    assert [job.job_id for job in queued_jobs(folder.path)] == ["9"]
    confirmed = [read_run(run).model_copy(update={"init_seed": 5}) for run in runs_of(folder)]
    add_confirmations(folder.read_spec(), confirmed, folder)
    assert main(["clean", str(folder.path)]) == 0
    assert queued_jobs(folder.path) == []


def test_clean_keeps_what_jobs_left_when_slurm_does_not_answer(
    folder: SweepFolder, stand_in: StandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    finished, *_ = runs_of(folder)
    finish(read_run(finished), finished)
    submitted(folder, finished)
    files = jobs_files(folder, "7")
    (stand_in.folder / "down").touch()
    assert main(["clean", str(folder.path)]) == 0
    assert "Slurm did not answer, so what jobs have left is kept: squeue" in capsys.readouterr().out
    assert all(path.exists() for path in files["7"])
    assert len(queued_jobs(folder.path)) == 1


def test_clean_removes_orphans_only_when_asked_and_never_one_with_a_result_or_in_hand(
    folder: SweepFolder, stand_in: StandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    finished, corrupt, queued, interrupted = runs_of(folder)
    finish(read_run(finished), finished)
    corrupt.run.write_text("{")
    interrupted.checkpoint.touch()
    submitted(folder, queued)
    stand_in.runs("7")
    write_sweep(folder.read_spec(), [], folder)
    assert main(["clean", str(folder.path)]) == 0
    with claim(interrupted):
        assert main(["clean", str(folder.path), "--orphans"]) == 0
    assert interrupted.path.exists()
    assert main(["clean", str(folder.path), "--orphans"]) == 0
    assert "Removed 1 files and folders" in capsys.readouterr().out
    assert [run.path.exists() for run in (finished, corrupt, queued, interrupted)] == [True, True, True, False]


def _until(holds: Callable[[], bool], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)
