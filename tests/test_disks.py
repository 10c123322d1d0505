"""What the verbs say of a disk that is full, or that may only be read: one line, and nothing is lost."""

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from sweeps.cli import main
from sweeps.clusters import submission
from sweeps.clusters.queue import QueuedJob, remember
from sweeps.store import SweepFolder, record_failure
from tests.disk import Disk
from tests.slurm_stand_in import StandIn
from tests.sweep_examples import started
from tests.test_submission import small_sweep
from tests.test_submission import submission as submission_of


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    return StandIn(tmp_path / "bin", monkeypatch)


def queued(path: Path, stand_in: StandIn) -> SweepFolder:
    """Start a sweep, and give its runs to a job that waits, but for one that has failed."""
    folder = started(path)
    failed, *run_ids = [run.run_id for run in folder.read_manifest().runs]
    record_failure(folder.run(failed), "out of luck")
    job = QueuedJob(
        cluster="test", kind="slurm", job_id="7", submitted_at="2026-01-01T00:00:00+00:00", minutes=30, stage="grid",
        tasks=(tuple(run_ids),),
    )  # fmt: skip
    remember(job, folder.path)
    stand_in.runs("7", state="PENDING")
    return folder


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    printed = capsys.readouterr().err
    assert len(printed.splitlines()) == 1, printed
    return printed


@pytest.mark.parametrize("room_bytes", [0, 200_000])
def test_submit_to_a_full_disk_says_so_and_queues_nothing(
    disk: Disk, stand_in: StandIn, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, text: Path,
    room_bytes: int,
) -> None:  # fmt: skip
    submit = ["submit", small_sweep(text, disk.path, monkeypatch), "--cluster", "slurm"]
    main([*submit, "--dry-run"])  # prepares the corpus
    disk.fill(room_bytes)  # then there is room for the sweep, but not for the code
    assert main(submit) == 2
    assert "No space left on device" in one_line(capsys)
    assert (stand_in.calls("sbatch"), list(disk.path.glob("results/small/code/.*"))) == ([], [])
    disk.change("size=64m")
    assert main(submit) == 0
    assert len(stand_in.calls("sbatch")) == 1


def test_job_that_cannot_be_remembered_is_cancelled(
    tmp_path: Path, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(job: QueuedJob, sweep: Path) -> None:
        raise OSError(errno.ENOSPC, f"no room for {job.job_id} in {sweep}")

    monkeypatch.setattr(submission, "remember", full)
    with pytest.raises(OSError, match="no room for 1001"):
        submission.submit(submission_of(started(tmp_path / "small")))
    assert stand_in.calls("scancel") == ["1001"]


@pytest.mark.parametrize("words", [["retry", "--failed"], ["cancel"], ["clean"]])
def test_verb_on_a_read_only_disk_says_so(
    disk: Disk, stand_in: StandIn, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    folder = queued(disk.path / "small", stand_in)
    disk.change("ro")
    assert main([words[0], str(folder.path), *words[1:]]) == 2
    assert "Read-only file system; make room, or get the right to it" in one_line(capsys)
    disk.change("rw")
    assert main([words[0], str(folder.path), *words[1:]]) == 0


def test_status_of_a_read_only_sweep_says_what_is_queued_and_that_slurm_was_not_asked(
    disk: Disk, stand_in: StandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = queued(disk.path / "small", stand_in)
    disk.change("ro")
    assert main(["status", str(folder.path)]) == 0
    said = capsys.readouterr().out
    assert "1 failed, 3 queued" in said or "3 queued, 1 failed" in said
    assert "Slurm did not answer: it was not asked, its answer cannot be kept in" in said
    assert stand_in.calls("squeue") == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full is Linux's own")
def test_output_that_cannot_be_written_is_one_line_too() -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "sweeps.cli", "presets"], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 2
    assert done.stderr.startswith("critbatch: No space left on device; make room")
    assert len(done.stderr.splitlines()) == 1
