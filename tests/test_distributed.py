"""Runs on several devices: processes that agree when to stop, over nodes, and none that waits for another for ever."""

import itertools
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from harness import STOPPED
from harness.config import MachineConfig, RunConfig
from harness.processes import check_processes, num_nodes
from harness.record import RunFolder, read_json, write_json
from sweeps import distributed
from sweeps.clusters import ranks
from sweeps.store import State, record_failure, state
from sweeps.worker import attempt
from tests.runs import tiny_run
from tests.test_train import MACHINE, science_rows, wait_for_change, write_run

ROOT = Path(__file__).parents[1]

#: A batch of twelve sequences divides over two and three processes.
THREE = MACHINE.model_copy(update={"devices": 3, "max_micro_batch_tokens": 64})
TWO = THREE.model_copy(update={"devices": 2})
OFTEN = TWO.model_copy(update={"checkpoint_every_seconds": 0.2})

TRAIN = "harness.train:train"
COMMAND = [sys.executable, "-m", "harness.train"]

StartWorker = Callable[[RunFolder], "subprocess.Popen[str]"]
Behave = Callable[[str], None]

_WORKER = """
import sys
from pathlib import Path
from harness.record import RunFolder
from sweeps.worker import _stop_on_signals, attempt
_stop_on_signals()
print(attempt(RunFolder(Path(sys.argv[1])), "harness.train:train"))
"""

#: Runs in every process; where it says so, the second one does as it says in its third micro-batch.
_BEHAVIOUR = """
import os
if os.environ.get("RANK") == "1":
    from harness.module import LanguageModel
    step, calls = LanguageModel.training_step, []
    def training_step(self, sequences, index):
        calls.append(index)
        if len(calls) == 3:
            {action}
        return step(self, sequences, index)
    LanguageModel.training_step = training_step
"""


@pytest.fixture(scope="module")
def run(text: Path, cache: Path) -> RunConfig:
    return tiny_run(text, cache, global_batch_tokens=384, token_budget=384 * 160)


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setenv("CRITBATCH_CACHE", str(cache))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def second_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Behave:
    """Have the second process of a run do something in its third micro-batch."""
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")

    def behave(action: str) -> None:
        (tmp_path / "sitecustomize.py").write_text(_BEHAVIOUR.format(action=action))

    return behave


def folder_of(path: Path, run: RunConfig, machine: MachineConfig) -> RunFolder:
    write_run(path, run, machine)
    return RunFolder(path)


def trained(path: Path, run: RunConfig, machine: MachineConfig) -> RunFolder:
    files = folder_of(path, run, machine)
    assert attempt(files, TRAIN) == State.FINISHED, files.log.read_text()
    return files


@pytest.fixture
def worker() -> Iterator[StartWorker]:
    """Start a worker in a session of its own; what is left of it is killed."""
    started: list[subprocess.Popen[str]] = []

    def start_worker(files: RunFolder) -> "subprocess.Popen[str]":
        command = [sys.executable, "-c", _WORKER, str(files.path)]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        started.append(
            subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True)
        )
        return started[-1]

    yield start_worker
    for process in started:
        for each in processes_of(process.pid):
            os.kill(each, signal.SIGKILL)
        process.communicate()


def processes_of(session: int, words: str = "") -> list[int]:
    """Return the living processes of a session whose command line has these words, oldest first."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            fields = (place / "stat").read_text().rpartition(")")[2].split()
            command = (place / "cmdline").read_text()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z" and words in command:
            found.append(int(place.name))
    return sorted(found)


@pytest.fixture(scope="module")
def whole(run: RunConfig, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The rows of the run on two devices that nothing disturbs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CRITBATCH_CACHE", str(cache))
        return science_rows(trained(tmp_path_factory.mktemp("whole") / "run", run, TWO).path)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
@pytest.mark.parametrize("who", ["worker", "all", "first", "second"])
def test_processes_that_are_told_to_stop_agree_on_a_step_and_go_on_from_it_bit_for_bit(
    run: RunConfig, tmp_path: Path, whole: list[dict[str, Any]], worker: StartWorker, who: str
) -> None:
    files = folder_of(tmp_path / "run", run, OFTEN)
    process = worker(files)
    wait_for_change(files.checkpoint, None)
    told = processes_of(process.pid, "\0harness.train\0")
    assert len(told) == 2
    for each in {"worker": [process.pid], "all": told, "first": told[:1], "second": told[1:]}[who]:
        os.kill(each, signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert (process.returncode, out) == ((STOPPED, "") if who == "worker" else (0, "interrupted\n"))
    assert (state(files), processes_of(process.pid)) == (State.INTERRUPTED, [])
    assert attempt(files, TRAIN) == State.FINISHED
    assert read_json(files.run)["resumes"] == 1
    assert science_rows(files.path) == whole


@pytest.mark.slow
def test_three_devices_resume_bit_for_bit(run: RunConfig, tmp_path: Path, second_process: Behave) -> None:
    """Sums of three, unlike those of two, depend on their order; and a third is no sum of powers of two."""
    run = run.model_copy(update={"token_budget": 384 * 32})
    undisturbed = trained(tmp_path / "whole", run, THREE)
    second_process("import signal; os.kill(os.getpid(), signal.SIGTERM)")
    files = folder_of(tmp_path / "run", run, THREE)
    assert attempt(files, TRAIN) == State.INTERRUPTED
    second_process("pass")
    assert attempt(files, TRAIN) == State.FINISHED
    assert science_rows(files.path) == science_rows(undisturbed.path)
    assert "warning" not in files.log.read_text().lower()


@pytest.mark.slow
def test_two_nodes_are_two_devices(run: RunConfig, tmp_path: Path, whole: list[dict[str, Any]]) -> None:
    files = folder_of(tmp_path / "run", run, TWO)
    processes = [subprocess.Popen([*COMMAND, str(files.path)], env=os.environ | each) for each in two_nodes()]
    assert [process.wait(120) for process in processes] == [0, 0]
    assert read_json(files.run)["num_devices"] == 2
    assert science_rows(files.path) == whole


@pytest.mark.slow
def test_nodes_that_see_different_checkpoints_refuse_to_go_on(
    run: RunConfig, tmp_path: Path, second_process: Behave
) -> None:
    """As when one node's copy of a shared folder is out of date."""
    second_process("import signal; os.kill(os.getpid(), signal.SIGTERM)")
    stopped, fresh = (folder_of(tmp_path / name, run, TWO) for name in ("stopped", "fresh"))
    assert attempt(stopped, TRAIN) == State.INTERRUPTED
    pairs = zip((stopped, fresh), two_nodes(), strict=True)
    processes = [subprocess.Popen([*COMMAND, str(files.path)], env=os.environ | each) for files, each in pairs]
    assert [process.wait(120) for process in processes] == [1, 1]
    assert re.search(r"checkpoints of different steps \[[1-3], 0\]", read_json(stopped.failure)["reason"])


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
def test_run_goes_on_from_its_checkpoint_when_a_process_is_killed_once(
    run: RunConfig, tmp_path: Path, whole: list[dict[str, Any]], worker: StartWorker
) -> None:
    files = folder_of(tmp_path / "run", run, OFTEN)
    process = worker(files)
    wait_for_change(files.checkpoint, None)
    os.kill(processes_of(process.pid, "\0harness.train\0")[1], signal.SIGKILL)
    out, _ = process.communicate(timeout=60)
    assert (out, files.failure.exists()) == ("finished\n", False)
    assert read_json(files.run)["resumes"] == 1
    assert science_rows(files.path) == whole


#: While the second process sends what it keeps of a matrix for a checkpoint, the first time that it does.
_WHILE_IT_SAVES = """
            from harness.optimizers.sharing import Sharing
            send, times = Sharing._sent, []
            def sent(*arguments):
                times.append(0)
                if len(times) == 5 and not os.path.exists({once!r}):
                    open({once!r}, "w").close()
                    os.kill(os.getpid(), {number})
                return send(*arguments)
            Sharing._sent = sent
"""


@pytest.mark.slow
@pytest.mark.parametrize(("number", "outcome"), [(signal.SIGTERM, State.INTERRUPTED), (signal.SIGKILL, State.FINISHED)])
def test_signal_in_the_middle_of_a_save_loses_nothing(
    run: RunConfig, tmp_path: Path, whole: list[dict[str, Any]], second_process: Behave, number: int, outcome: State
) -> None:
    """Told to stop, the processes finish that checkpoint and stop after the next step; killed, they start again."""
    second_process(_WHILE_IT_SAVES.format(once=str(tmp_path / "once"), number=int(number)))
    files = folder_of(tmp_path / "run", run, OFTEN)
    assert attempt(files, TRAIN) == outcome, files.log.read_text()
    assert (tmp_path / "once").exists()
    assert attempt(files, TRAIN) == State.FINISHED
    assert science_rows(files.path) == whole


@pytest.mark.slow
def test_run_fails_when_a_process_is_killed_again_and_again_without_progress(
    run: RunConfig, tmp_path: Path, second_process: Behave
) -> None:
    deaths = tmp_path / "deaths"
    second_process(f"open({str(deaths)!r}, 'a').write('x'); os.kill(os.getpid(), 9)")
    files = folder_of(tmp_path / "run", run, TWO)
    began = time.monotonic()
    assert attempt(files, TRAIN) == State.FAILED
    assert time.monotonic() - began < 90
    assert deaths.read_text() == "xx"
    reason = "one of 2 processes was killed by SIGKILL (out of memory? nobody says so)"
    assert read_json(files.failure)["reason"] == reason


@pytest.mark.parametrize(
    ("status", "reason", "attempts"),
    [
        (-signal.SIGKILL, None, 2),
        (128 + signal.SIGKILL, "RuntimeError: Connection closed by peer", 2),  # as srun says it
        (1, "DistBackendError: NCCL error: remote process exited or there was a network error", 2),
        (1, "RuntimeError: the code is wrong", 1),
        (3, None, 1),
        (STOPPED, None, 1),
    ],
)
def test_only_what_is_killed_or_lost_is_tried_once_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int, reason: str | None, attempts: int
) -> None:
    files, tried = RunFolder(tmp_path), []

    def train_once(*_: object) -> int:
        assert not files.failure.exists()
        tried.append(status)
        if reason:
            record_failure(files, reason)
        return status

    monkeypatch.setattr(distributed, "_train_once", train_once)
    assert distributed.train_distributed(files, 2, 0) == (State.INTERRUPTED if status == STOPPED else State.FAILED)
    assert len(tried) == attempts


def test_crashes_are_final_only_where_the_checkpoint_stands_still(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, tried = RunFolder(tmp_path), []

    def train_once(*_: object) -> int:
        tried.append(len(tried))
        if len(tried) <= 4:
            files.checkpoint.touch()
            os.utime(files.checkpoint, ns=(len(tried), len(tried)))
        return -signal.SIGKILL

    monkeypatch.setattr(distributed, "_train_once", train_once)
    assert distributed.train_distributed(files, 2, 0) == State.FAILED
    assert len(tried) == 5


@pytest.mark.slow
def test_process_that_the_kernel_kills_for_want_of_memory_starts_all_anew_with_half_the_micro_batch(
    run: RunConfig, tmp_path: Path, second_process: Behave, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    kills = itertools.count()
    monkeypatch.setattr(distributed, "oom_kills", lambda: next(kills))
    second_process("sequences.shape[0] == 2 and os.kill(os.getpid(), 9)")
    run = run.model_copy(update={"token_budget": 384 * 32})
    files = trained(tmp_path / "run", run, TWO)
    row = read_json(files.run)
    assert (row["micro_batch_tokens"], row["micro_batch_halvings"]) == (32, 1)
    assert row["tokens_seen"] == run.realized_tokens
    assert "starting anew with 32 and an accumulation of 6" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("said", "status"),
    [
        (
            "slurmstepd: error: Detected 1 oom_kill event in StepId=7.0. Some of the step tasks have been OOM Killed.",
            71,
        ),
        ("srun: error: n2: task 1: Out Of Memory", 71),
        ("srun: error: n2: task 1: Killed", 137),
        ("RuntimeError: srun: error: n2: task 1: Out Of Memory", 137),
    ],
)
def test_step_that_slurm_saw_run_out_of_memory_says_so_to_whoever_started_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, status: int
) -> None:
    log = RunFolder(tmp_path).log
    log.write_text("srun: error: n1: task 0: Out Of Memory\n")  # of an earlier attempt
    command = ["sh", "-c", f"echo '{said}' >> {log}; exit 137"]
    monkeypatch.setattr(ranks, "_srun", lambda _: command)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR2)}
    try:
        assert ranks.start("2", str(tmp_path)) == status
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize("begun", [True, False])
def test_memory_that_ran_out_in_a_step_of_slurm_halves_the_micro_batch_once_the_run_has_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begun: bool
) -> None:
    files, statuses = RunFolder(tmp_path), [distributed.OUT_OF_MEMORY, STOPPED]
    row = {"global_batch_tokens": 256, "sequence_length": 64, "num_devices": 2, "micro_batch_tokens": 128}
    if begun:
        write_json(files.run, row | {"micro_batch_halvings": 0})
    monkeypatch.setattr(distributed, "_train_once", lambda *_: statuses.pop(0))
    assert distributed.train_distributed(files, 2, 0) == (State.INTERRUPTED if begun else State.FAILED)
    if begun:
        assert (read_json(files.run)["micro_batch_tokens"], read_json(files.run)["micro_batch_halvings"]) == (64, 1)
    else:
        assert read_json(files.failure)["kind"] == "out_of_memory"


def test_processes_that_do_not_follow_the_first_one_are_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "ENDED_WITHIN_SECONDS", 0.2)
    ended, waiting = (subprocess.Popen(["sh", "-c", words]) for words in ("exit 3", "sleep 600"))
    assert distributed._wait([waiting, ended]) == 3
    assert waiting.returncode == -signal.SIGKILL


@pytest.mark.parametrize(
    ("tasks", "nodes", "local", "said"),
    [(2, 2, "1", None), (4, 2, "2", None), (8, 1, "8", None), (3, 2, "2", "3 processes with 2 on a node are not")],
)
def test_tasks_of_a_slurm_step_know_their_place(
    monkeypatch: pytest.MonkeyPatch, tasks: int, nodes: int, local: str, said: str | None
) -> None:
    step = {"PROCID": "1", "LOCALID": "0", "NODEID": "1", "STEP_NUM_TASKS": str(tasks), "STEP_NUM_NODES": str(nodes)}
    of_job = {"JOB_ID": "7", "LAUNCH_NODE_IPADDR": "10.0.0.1"}
    environment = {f"SLURM_{name}": value for name, value in (step | of_job).items()}
    monkeypatch.setattr(os, "environ", environment | {"CRITBATCH_MASTER_PORT": "5000"})
    ranks.become_rank()
    assert (os.environ["RANK"], os.environ["LOCAL_RANK"], os.environ["GROUP_RANK"]) == ("1", "0", "1")
    assert (os.environ["LOCAL_WORLD_SIZE"], os.environ["WORLD_SIZE"]) == (local, str(tasks))
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("10.0.0.1", "5000")
    if said is None:
        check_processes(MachineConfig(devices=tasks))
        assert num_nodes() == nodes
    else:
        with pytest.raises(ValueError, match=said):
            check_processes(MachineConfig(devices=tasks))


def two_nodes() -> list[dict[str, str]]:
    """Return the variables of two processes, each on a node of its own."""
    together = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0", "TORCHELASTIC_RUN_ID": "test"}
    together |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(distributed.free_port())}
    return [together | {"RANK": str(node), "GROUP_RANK": str(node)} for node in range(2)]
