import fcntl
import os
import subprocess
import sys
import threading
from multiprocessing import get_context
from pathlib import Path
from queue import Queue

import pytest

from harness.origin import host_name
from harness.record import RunFolder, SweepManifest, read_json, write_json
from sweeps.clusters.queue import QueuedJob, remember
from sweeps.grid import expand, on_fresh_seeds
from sweeps.spec import SweepSpec
from sweeps.store import (
    State,
    SweepFolder,
    add_confirmations,
    claim,
    failure_reason,
    holder,
    is_missing,
    read_machine,
    read_run,
    record_failure,
    records,
    state,
    write_sweep,
)
from tests.fake_training import finish
from tests.slurm_stand_in import StandIn
from tests.sweep_examples import changed, prepared, started


@pytest.fixture
def folder(tmp_path: Path) -> SweepFolder:
    return started(tmp_path / "small")


def first(folder: SweepFolder) -> RunFolder:
    return folder.run(folder.read_manifest().runs[0].run_id)


def test_write_sweep_writes_all_that_a_worker_and_the_analysis_need(folder: SweepFolder) -> None:
    spec = SweepSpec.parse(changed(), source="small")
    runs = expand(spec, prepared)
    assert folder.read_spec() == spec
    assert [read_run(folder.run(run.run_id)) for run in runs] == runs
    assert [run.run_id for run in runs] == [run.run_id for run in folder.read_manifest().runs]
    assert read_machine(first(folder)) == spec.machine
    manifest = SweepManifest.model_validate(read_json(folder.manifest))
    assert (manifest.baseline, manifest.targets_nats) == ("adamw", (2.5,))


def test_write_sweep_leaves_no_temporary_file(folder: SweepFolder) -> None:
    names = {path.name for path in folder.path.rglob("*") if path.is_file()}
    assert names == {".lock", "sweep.yaml", "sweep.json", "config.json", "machine.json"}


def test_changed_sweep_lists_current_runs_and_keeps_old_folders(folder: SweepFolder) -> None:
    before = {run.run_id for run in folder.read_manifest().runs}
    finish(read_run(first(folder)), first(folder))
    kept = first(folder)
    smaller = SweepSpec.parse(changed(grid={"global_batch_tokens": [256, 4096]}), source="small")
    write_sweep(smaller, expand(smaller, prepared), folder)
    now = {run.run_id for run in folder.read_manifest().runs}
    assert len(now & before) == 2
    assert state(kept) == State.FINISHED
    assert all(folder.run(run_id).config.exists() for run_id in before | now)


def test_write_sweep_keeps_confirmations_of_the_same_grid_only(folder: SweepFolder) -> None:
    spec = SweepSpec.parse(changed(), source="small")
    runs = expand(spec, prepared)
    add_confirmations(spec, on_fresh_seeds(runs[:1], [7]), folder)
    assert [run.stage for run in folder.read_manifest().runs] == ["grid"] * 4 + ["confirm"]
    write_sweep(spec, runs, folder)
    assert [run.stage for run in folder.read_manifest().runs] == ["grid"] * 4 + ["confirm"]
    write_sweep(spec, runs[1:], folder)
    assert [run.stage for run in folder.read_manifest().runs] == ["grid"] * 3


def test_changed_machine_is_for_runs_that_nobody_has_begun(
    folder: SweepFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in = StandIn(tmp_path / "bin", monkeypatch)
    stand_in.says("squeue", "7|PENDING||0|Priority|\n8|FAILED|n1|0||\n")
    claimed, halfway, queued, lost = (folder.run(run.run_id) for run in folder.read_manifest().runs)
    halfway.checkpoint.touch()
    for job_id, run in (("7", queued), ("8", lost)):
        job = {"cluster": "test", "kind": "slurm", "job_id": job_id, "submitted_at": "2026-01-01T00:00:00+00:00"}
        tasks = {"minutes": 30, "stage": "grid", "tasks": [[run.path.name]]}
        remember(QueuedJob.parse(job | tasks, "test"), folder.path)
    with claim(claimed):
        started(folder.path, machine={"threads": 3})
    assert [read_machine(run).threads for run in (claimed, halfway, queued, lost)] == [None, None, None, 3]


def test_torn_machine_is_written_again_for_a_run_with_a_checkpoint(folder: SweepFolder) -> None:
    run = first(folder)
    run.checkpoint.touch()
    run.machine.write_text("{")
    started(folder.path)
    assert read_machine(run) == folder.read_spec().machine


def test_results_folder_that_cannot_be_written_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match="cannot be written") as caught:
        started(tmp_path / "file" / "small")
    assert str(caught.value) == (
        f"the results folder {tmp_path}/file/small cannot be written (Not a directory); choose another with --results"
    )


def test_state_follows_the_files_of_a_run(folder: SweepFolder) -> None:
    run = first(folder)
    assert state(run) == State.PLANNED
    with claim(run):
        assert state(run) == State.RUNNING
    assert state(run) == State.PLANNED
    run.evaluations.touch()
    assert state(run) == State.INTERRUPTED
    record_failure(run, "out of luck")
    assert state(run) == State.FAILED
    with claim(run):
        assert state(run) == State.RUNNING
    finish(read_run(run), run)
    assert state(run) == State.FINISHED
    write_json(run.run, read_json(run.run) | {"status": "diverged"})
    assert state(run) == State.DIVERGED


def test_running_record_without_a_claim_is_interrupted(folder: SweepFolder) -> None:
    write_json(first(folder).run, {"status": "running"})
    assert state(first(folder)) == State.INTERRUPTED
    assert is_missing(first(folder))


def test_corrupt_record_is_a_failure_that_names_the_file(folder: SweepFolder) -> None:
    run = first(folder)
    run.run.write_text('{"status": "fini')
    assert state(run) == State.FAILED
    assert is_missing(run)
    assert f"{run.run}: not a whole JSON file" in str(failure_reason(run))
    assert records(folder) == []


def test_failure_keeps_the_reason_and_the_end_of_the_log(folder: SweepFolder) -> None:
    run = first(folder)
    run.log.write_text("\n".join(f"line {number}" for number in range(100)))
    record_failure(run, "out of luck")
    content = read_json(run.failure)
    assert failure_reason(run) == "out of luck"
    assert content["last_lines"][-1] == "line 99"
    assert len(content["last_lines"]) == 20


def test_claim_excludes_a_second_one(folder: SweepFolder) -> None:
    with claim(first(folder)) as held, claim(first(folder)) as refused:
        assert held is not None
        assert refused is None
    with claim(first(folder)) as again:
        assert again is not None


def test_claim_of_a_killed_process_is_free_again(folder: SweepFolder) -> None:
    run = first(folder)
    code = (
        "import sys, time; from pathlib import Path\n"
        "from harness.record import RunFolder; from sweeps.store import claim\n"
        "with claim(RunFolder(Path(sys.argv[1]))) as held: print(held is not None, flush=True); time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(run.path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "True\n"
    with claim(run) as refused:
        assert refused is None
    assert state(run) == State.RUNNING
    child.kill()
    child.communicate()
    with claim(run) as held:
        assert held is not None


def test_claim_names_the_process_that_has_it_and_nobody_once_it_is_free(folder: SweepFolder) -> None:
    run = first(folder)
    assert holder(run) is None
    with claim(run):
        assert holder(run) == (host_name(), os.getpid())
    assert run.claim.read_text() != ""
    assert holder(run) is None


def test_claim_of_a_worker_names_the_pool_that_would_have_another_one_take_the_run_up(folder: SweepFolder) -> None:
    run = first(folder)
    context = get_context("spawn")
    with context.Manager() as manager:
        told = manager.Queue()
        worker = context.Process(target=_claim_and_tell, args=(str(run.path), told))
        worker.start()
        assert told.get(timeout=30) == (host_name(), os.getpid())
        worker.join()


def _claim_and_tell(path: str, told: "Queue[object]") -> None:
    with claim(RunFolder(Path(path))):
        told.put(holder(RunFolder(Path(path))))


def test_manifest_of_an_empty_folder_says_that_nothing_was_started(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no sweep\.json there; no sweep has been started"):
        SweepFolder(tmp_path).read_manifest()
    assert records(SweepFolder(tmp_path)) == []


def test_lost_manifest_is_told_from_a_folder_without_a_sweep(folder: SweepFolder) -> None:
    folder.manifest.unlink()
    with pytest.raises(ValueError, match=rf"sweep\.json is gone; to write it again: critbatch run {folder.path}$"):
        folder.read_manifest()


def test_claim_is_not_lost_to_someone_who_only_looks(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    looker = os.open(run.claim, os.O_RDWR | os.O_CREAT)
    fcntl.flock(looker, fcntl.LOCK_SH)
    threading.Timer(0.015, os.close, [looker]).start()
    with claim(run) as held:
        assert held is not None
