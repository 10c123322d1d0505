"""Pools of real worker processes, with training replaced by `tests.fake_training`."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from harness.record import RunFolder, read_json, write_json
from sweeps import confirmations, launch
from sweeps.display import shown
from sweeps.launch import default_slots, run_folder
from sweeps.plan import prepare_runs
from sweeps.pool import Pool, slot_environments
from sweeps.spec import SweepSpec
from sweeps.store import State, SweepFolder, claim, failure_reason, read_run, state, write_sweep
from tests.fake_training import finish
from tests.sweep_examples import changed, started

TRAIN = "tests.fake_training:train"


@pytest.fixture
def folder(tmp_path: Path) -> SweepFolder:
    return started(tmp_path / "small", machine={"accelerator": "cpu"})


def runs(folder: SweepFolder) -> list[RunFolder]:
    return [folder.run(run.run_id) for run in folder.read_manifest().runs]


def states(folder: SweepFolder) -> list[str]:
    return [str(state(run)) for run in runs(folder)]


def attempts(folder: SweepFolder) -> list[list[list[str]]]:
    """Return process, machine.threads and OMP_NUM_THREADS of every attempt at every run."""
    files = [run.path / "attempts.txt" for run in runs(folder)]
    return [[line.split() for line in file.read_text().splitlines()] if file.exists() else [] for file in files]


def behave(folder: SweepFolder, action: str) -> None:
    (folder.path / "behaviour.txt").write_text(action)


def wait_until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)


def background(folder: SweepFolder, slots: int) -> subprocess.Popen[str]:
    """Start `run_folder` in a process group of its own, as a shell does."""
    code = (
        "import sys; from pathlib import Path\n"
        "from sweeps.store import SweepFolder; from sweeps.launch import run_folder\n"
        "if __name__ == '__main__':\n"
        "    try: run_folder(SweepFolder(Path(sys.argv[1])), int(sys.argv[2]), train=sys.argv[3])\n"
        "    except KeyboardInterrupt: sys.exit(130)\n"
    )
    script = folder.path / "run_it.py"
    script.write_text(code)
    root = str(Path(__file__).parent.parent)
    return subprocess.Popen(
        [sys.executable, str(script), str(folder.path), str(slots), TRAIN],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        env=os.environ | {"PYTHONPATH": root},
    )  # fmt: skip


@pytest.fixture
def in_background() -> Iterator[Callable[[SweepFolder, int], subprocess.Popen[str]]]:
    processes: list[subprocess.Popen[str]] = []

    def start(folder: SweepFolder, slots: int) -> subprocess.Popen[str]:
        processes.append(background(folder, slots))
        return processes[-1]

    yield start
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def test_pool_trains_every_run_once_in_workers_that_serve_many(folder: SweepFolder) -> None:
    run_folder(folder, slots=2, train=TRAIN)
    assert states(folder) == ["finished"] * 4
    assert [len(each) for each in attempts(folder)] == [1] * 4
    workers = {attempt[0][0] for attempt in attempts(folder)}
    assert len(workers) <= 2
    assert str(os.getpid()) not in workers
    assert {attempt[0][2] for attempt in attempts(folder)} == {"1"}


def test_pool_puts_the_output_of_a_run_in_its_log(folder: SweepFolder, capfd: pytest.CaptureFixture[str]) -> None:
    run_folder(folder, slots=1, train=TRAIN)
    assert [run.log.read_text() for run in runs(folder)] == [f"training {run.path.name}\n" for run in runs(folder)]
    out, err = capfd.readouterr()
    assert "training" not in out + err
    assert out.count("finished") == 4


def test_pool_runs_the_longest_first(folder: SweepFolder) -> None:
    behave(folder, "slow")
    run_folder(folder, slots=1, train=TRAIN)
    began = {run.path.name: (run.path / "attempts.txt").stat().st_mtime for run in runs(folder)}
    order = sorted(began, key=lambda run_id: began[run_id])
    # equal tokens: Muon does more work a step, and there are more steps at the small batch
    assert [run_id.split("-")[1:3] for run_id in order[:2]] == [["muon", "b256"], ["muon", "b1024"]]


def test_pool_runs_only_what_is_missing(folder: SweepFolder) -> None:
    done, interrupted = runs(folder)[:2]
    finish(read_run(done), done)
    interrupted.checkpoint.write_text("whole")
    run_folder(folder, slots=1, train=TRAIN)
    assert [len(each) for each in attempts(folder)] == [0, 1, 1, 1]
    run_folder(folder, slots=1, train=TRAIN)
    assert [len(each) for each in attempts(folder)] == [0, 1, 1, 1]


def test_run_whose_record_is_broken_or_lost_its_evaluations_is_trained_again(folder: SweepFolder) -> None:
    lost, torn, *_ = runs(folder)
    for run in runs(folder):
        finish(read_run(run), run)
    lost.evaluations.unlink()
    torn.run.write_text("{")
    assert states(folder) == ["failed", "failed", "finished", "finished"]
    assert failure_reason(lost) == (
        f"{lost.evaluations} is gone, though the run has finished; the next critbatch run repeats it"
    )
    run_folder(folder, slots=1, train=TRAIN)
    assert states(folder) == ["finished"] * 4
    assert [len(each) for each in attempts(folder)] == [1, 1, 0, 0]


def test_one_failed_run_does_not_sink_the_sweep_and_is_tried_again(folder: SweepFolder) -> None:
    behave(folder, "raise")
    run_folder(folder, slots=2, train=TRAIN)
    assert states(folder) == ["finished", "finished", "failed", "failed"]
    failed = runs(folder)[2]
    assert failure_reason(failed) == "the corpus has been moved"
    assert "ValueError: the corpus has been moved" in read_json(failed.failure)["last_lines"]
    assert "Traceback" in failed.log.read_text()
    behave(folder, "finish")
    run_folder(folder, slots=2, train=TRAIN)
    assert states(folder) == ["finished"] * 4
    assert not failed.failure.exists()


def test_worker_that_is_killed_is_started_anew_and_its_run_taken_up(
    folder: SweepFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    behave(folder, "exit-once")
    run_folder(folder, slots=2, train=TRAIN)
    out = capsys.readouterr().out
    for run in runs(folder):
        assert f"The worker of {run.path.name} died by SIGKILL (out of memory?); another one takes the run up." in out
    assert states(folder) == ["finished"] * 4
    assert [len(each) for each in attempts(folder)] == [2] * 4
    assert len({attempt[0] for each in attempts(folder) for attempt in each}) >= 5


def test_run_that_kills_its_worker_twice_has_failed(folder: SweepFolder) -> None:
    behave(folder, "exit")
    run_folder(folder, slots=2, train=TRAIN)
    assert states(folder) == ["failed"] * 4
    assert [len(each) for each in attempts(folder)] == [2] * 4
    assert failure_reason(runs(folder)[0]) == "the worker process died 2 times, the last time with exit status 3"


@pytest.mark.parametrize("action", ["stop-often", "kill-at-each-checkpoint"])
def test_run_that_is_stopped_or_comes_further_each_time_is_taken_up_as_often_as_it_takes(
    folder: SweepFolder, action: str
) -> None:
    behave(folder, action)
    run_folder(folder, slots=2, train=TRAIN)
    assert states(folder) == ["finished"] * 4
    assert [len(each) for each in attempts(folder)] == [4] * 4


def test_kernel_that_kills_for_want_of_memory_is_believed(
    folder: SweepFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sweeps.pool.oom_kills", itertools.count().__next__)
    behave(folder, "kill")
    run_folder(folder, slots=1, train=TRAIN)
    assert "died by SIGKILL, as memory ran out (fewer slots take less); another one" in capsys.readouterr().out
    assert {read_json(run.failure)["kind"] for run in runs(folder)} == {"out_of_memory"}


def test_run_that_the_kernel_killed_before_its_first_checkpoint_starts_anew_with_half_the_micro_batch(
    folder: SweepFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = next(run for run in runs(folder) if read_run(run).global_batch_tokens == 1024)
    shape = {"global_batch_tokens": 1024, "sequence_length": 256, "num_devices": 1}
    row = {"status": "running", "micro_batch_tokens": 1024, "micro_batch_halvings": 0} | shape
    write_json(run.run, row)
    kills = itertools.count()
    monkeypatch.setattr("sweeps.pool.oom_kills", kills.__next__)
    behave(folder, "kill")
    with Pool(slot_environments(1, 1, [], threads=1), TRAIN) as pool:
        pool.train([run], lambda: None)
    # 1024 → 512 → 256, which is one sequence: then twice more
    assert read_json(run.run)["micro_batch_halvings"] == 2
    assert read_json(run.run)["micro_batch_tokens"] == 256
    assert len(attempts(folder)[runs(folder).index(run)]) == 4


def test_training_that_cannot_be_imported_is_a_failure_with_its_reason(folder: SweepFolder) -> None:
    run_folder(folder, slots=1, train="tests.no_such_module:train")
    assert states(folder) == ["failed"] * 4
    assert "No module named 'tests.no_such_module'" in str(failure_reason(runs(folder)[0]))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_pool_waits_for_checkpoints_and_leaves_all_resumable(
    folder: SweepFolder, in_background: Callable[[SweepFolder, int], subprocess.Popen[str]], number: signal.Signals
) -> None:
    behave(folder, "wait")
    pool = in_background(folder, 2)
    wait_until(lambda: states(folder).count("running") == 2 and sum(run.progress.exists() for run in runs(folder)) == 2)
    if number == signal.SIGINT:
        os.killpg(pool.pid, number)  # a terminal sends Ctrl-C to the workers too
    else:
        pool.send_signal(number)
    output, _ = pool.communicate(timeout=30)
    assert pool.returncode == 130, output
    assert "Traceback" not in output
    assert "Stopping" in output
    assert sorted(states(folder)) == ["interrupted"] * 2 + ["planned"] * 2
    assert sum(run.checkpoint.exists() for run in runs(folder)) == 2
    assert not any(run.failure.exists() for run in runs(folder))
    behave(folder, "finish")
    run_folder(folder, slots=2, train=TRAIN)
    assert states(folder) == ["finished"] * 4
    assert sorted(len(each) for each in attempts(folder)) == [1, 1, 2, 2]


def test_second_interrupt_kills(
    folder: SweepFolder, in_background: Callable[[SweepFolder, int], subprocess.Popen[str]]
) -> None:
    behave(folder, "stubborn")
    pool = in_background(folder, 1)
    wait_until(lambda: any((run.path / "deaf").exists() for run in runs(folder)))
    os.killpg(pool.pid, signal.SIGINT)
    time.sleep(1.0)
    assert pool.poll() is None
    assert "running" in states(folder)
    os.killpg(pool.pid, signal.SIGINT)
    output, _ = pool.communicate(timeout=10)
    assert pool.returncode == 130, output
    assert "running" not in states(folder)


def test_workers_of_a_killed_pool_leave_when_their_run_is_done(
    folder: SweepFolder, in_background: Callable[[SweepFolder, int], subprocess.Popen[str]]
) -> None:
    behave(folder, "wait")
    pool = in_background(folder, 1)
    wait_until(lambda: any(run.progress.exists() for run in runs(folder)))
    pool.kill()
    (worker,) = {int(attempt[0]) for each in attempts(folder) for attempt in each}
    assert "running" in states(folder)
    os.kill(worker, signal.SIGTERM)
    wait_until(lambda: "running" not in states(folder))
    assert "interrupted" in states(folder)


def test_two_pools_share_the_runs_of_one_sweep(
    folder: SweepFolder, in_background: Callable[[SweepFolder, int], subprocess.Popen[str]]
) -> None:
    behave(folder, "slow")
    pools = [in_background(folder, 1), in_background(folder, 1)]
    for pool in pools:
        output, _ = pool.communicate(timeout=60)
        assert pool.returncode == 0, output
    assert states(folder) == ["finished"] * 4
    assert [len(each) for each in attempts(folder)] == [1] * 4
    assert len({attempt[0][0] for attempt in attempts(folder)}) == 2


def test_pool_takes_over_a_run_that_another_process_gives_up(folder: SweepFolder) -> None:
    held = claim(runs(folder)[0])
    held.__enter__()
    started_at = time.monotonic()
    release = [started_at + 3.0]

    def let_go() -> None:
        if release and time.monotonic() > release[0]:
            release.clear()
            held.__exit__(None, None, None)

    with Pool(slot_environments(1, 1, [], threads=1), TRAIN) as pool:
        pool.train(runs(folder), let_go)
    assert states(folder) == ["finished"] * 4
    assert time.monotonic() - started_at > 3.0


def test_confirmations_are_the_best_rates_on_fresh_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = started(
        tmp_path / "small",
        machine={"accelerator": "cpu"},
        grid={"global_batch_tokens": [256, 1024], "seed": [0, 1]},
        optimizers={"adamw": {"learning_rate": [0.01, 0.02]}},
        confirm={"seeds": [5, 6]},
    )
    grid = [read_run(folder.run(run.run_id)) for run in folder.read_manifest().runs]
    rates = {256: 0.02, 1024: 0.01}
    best = {run.run_id for run in grid if run.optimizer.peak_lr == rates[run.global_batch_tokens]}
    monkeypatch.setattr(confirmations, "_runs_at_best_rates", lambda _folder, _top: best)
    run_folder(folder, slots=2, train=TRAIN)
    confirmed = [run for run in folder.read_manifest().runs if run.stage == "confirm"]
    configs = [read_run(folder.run(run.run_id)) for run in confirmed]
    assert [(c.global_batch_tokens, c.optimizer.peak_lr, c.init_seed, c.data_seed) for c in configs] == [
        (256, 0.02, 5, 5), (256, 0.02, 6, 6), (1024, 0.01, 5, 5), (1024, 0.01, 6, 6),
    ]  # fmt: skip
    assert states(folder) == ["finished"] * 12


def test_slots_take_turns_over_the_gpus() -> None:
    environments = slot_environments(3, 2, ["4", "5", "6", "7"], threads=1)
    assert [each["CUDA_VISIBLE_DEVICES"] for each in environments] == ["4,5", "6,7", "4,5"]
    (third,) = slot_environments(1, 1, ["4", "5"], threads=2, first=1)
    assert third == {"CUDA_VISIBLE_DEVICES": "5", "OMP_NUM_THREADS": "2"}


def test_default_slots_are_one_per_core_or_gpu(folder: SweepFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = folder.read_spec().machine
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert default_slots(machine) == 8
    assert default_slots(machine.model_copy(update={"devices": 4})) == 2
    assert default_slots(machine.model_copy(update={"accelerator": "auto"})) == 2


@pytest.mark.slow
def test_submitted_jobs_share_the_runs(folder: SweepFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    behave(folder, "slow")
    jobs = launch.submit_local(folder, 2, train=TRAIN)
    for job in jobs:
        assert job.exception() is None
    assert states(folder) == ["finished"] * 4
    assert [len(each) for each in attempts(folder)] == [1] * 4


def test_plain_output_is_one_line_a_run(folder: SweepFolder, capsys: pytest.CaptureFixture[str]) -> None:
    run_folder(folder, slots=1, train=TRAIN)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert all("at 16,384 tokens, loss 2.000 nats (budget)" in line for line in lines)


def test_terminal_shows_cells_and_the_runs_in_hand(
    folder: SweepFolder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.setenv("TERM", "xterm")
    first = runs(folder)[0]
    first.progress.write_text('{"step": 8, "tokens_seen": 8192, "tokens_per_second": 4096.0, "updated_at": 0.0}')
    with claim(first), shown(folder) as tick:
        tick()
    out = capsys.readouterr().out
    assert "small: 0 of 4 done, 1 running, 3 planned" in out
    assert "8,192 of 16,384" in out
    assert "2 s" in out


def test_failure_file_is_json_that_status_reads(folder: SweepFolder) -> None:
    behave(folder, "exit")
    run_folder(folder, slots=1, train=TRAIN)
    content = json.loads(runs(folder)[0].failure.read_text())
    assert content["kind"] == "other"
    assert state(runs(folder)[0]) == State.FAILED


@pytest.mark.slow
def test_run_on_two_devices_is_trained_by_two_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CRITBATCH_CACHE", str(tmp_path / "cache"))
    (tmp_path / "corpus").mkdir()
    for number in range(32):
        (tmp_path / "corpus" / f"{number}.txt").write_text(f"It was a dark and stormy night, the {number}th. " * 20)
    corpus = {"source": "text", "paths": [str(tmp_path / "corpus" / "*.txt")], "validation_share": 0.2}
    keys = changed(
        base={"corpus": corpus, "model": {"preset": "115k"}, "evaluation": {"tokens": 256}},
        optimizers={"adamw": {"learning_rate": 0.01}},
        grid={"global_batch_tokens": [512]},
        token_budget=4096,
        machine={"devices": 2, "accelerator": "cpu"},
    )
    spec = SweepSpec.parse(keys, source="small")
    folder = SweepFolder(tmp_path / "small")
    write_sweep(spec, prepare_runs(spec)[0], folder)
    run_folder(folder, slots=1)
    (run,) = runs(folder)
    assert state(run) == State.FINISHED, failure_reason(run)
    record = read_json(run.run)
    assert (record["num_devices"], record["tokens_seen"]) == (2, 4096)
