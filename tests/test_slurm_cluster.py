"""The Slurm that other tests stand on: what it does with jobs, and that nothing of it is ever left behind.

`pytest -m slurm` runs all of it, several minutes; without the packages it is skipped, with their names.
"""

import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests import slurm_cluster as module
from tests.slurm_cluster import SlurmCluster, SlurmError, require_slurm, wait_until, why_unavailable
from tests.slurm_configuration import free_ports, listens
from tests.slurm_processes import processes_of

COLLISION = r"(?s)Slurm did not start: slurmctld ended with code 1.*slurmctld.log.*Address already in use"
QUICK = "#!/bin/sh\necho done\n"
ENDLESS = "#!/bin/sh\necho started\nexec sleep 600\n"
INTERRUPTED = f"""#!{sys.executable}
import os, signal, time
for name in ("SIGUSR2", "SIGTERM"):
    signal.signal(getattr(signal, name), lambda number, frame: print(signal.Signals(number).name, flush=True))
print("start", flush=True)
while "SLURM_RESTART_COUNT" not in os.environ:
    time.sleep(0.1)
print("end", flush=True)
"""


def wait_for_state(cluster: SlurmCluster, job_id: str, state: str, seconds: float = 30) -> None:
    wait_until(lambda: cluster.jobs()[job_id].state == state, seconds, f"job {job_id} to be {state}")


def wait_for_accounts(cluster: SlurmCluster, job_id: str, *states: str) -> None:
    wait_until(lambda: cluster.jobs()[job_id].accounted == states, 30, f"sacct to tell {states} of job {job_id}")


def wait_for_output(cluster: SlurmCluster, job_id: str, text: str, seconds: float = 30) -> None:
    wait_until(lambda: text in cluster.output(job_id), seconds, f"job {job_id} to print {text!r}")


def assert_nothing_left(cluster: SlurmCluster) -> None:
    assert processes_of(cluster.configuration) == {}
    assert cluster.ports
    assert not any(map(listens, cluster.ports))


@pytest.mark.slurm
def test_cluster_starts_within_seconds_with_all_nodes_idle(slurm: SlurmCluster) -> None:
    assert slurm.node_states() == dict.fromkeys(("n1", "n2", "n3", "n4"), "idle")
    assert 0 < slurm.start_seconds < 60


@pytest.mark.slurm
@pytest.mark.usefixtures("slurm")
def test_client_of_this_process_reaches_the_cluster() -> None:
    printed = subprocess.run(["sinfo", "--noheader", "--format=%R"], capture_output=True, text=True, check=True).stdout
    assert printed.split() == ["main", "high", "low", "lownograce"]


@pytest.mark.slurm
def test_batch_job_is_completed_in_the_accounts(slurm: SlurmCluster) -> None:
    job_id = slurm.submit(QUICK)
    wait_for_accounts(slurm, job_id, "COMPLETED")
    assert slurm.jobs()[job_id].state == "COMPLETED"
    assert slurm.output(job_id) == "done\n"


@pytest.mark.slurm
def test_job_sees_the_gpus_it_asked_for(slurm: SlurmCluster) -> None:
    script = '#!/bin/sh\necho "$CUDA_VISIBLE_DEVICES"\nexec sleep 600\n'
    first = slurm.submit(script, "--gres=gpu:6")
    wait_for_output(slurm, first, "0,1,2,3,4,5\n")
    second = slurm.submit(script, "--gres=gpu:2", f"--nodelist={slurm.jobs()[first].nodes}")
    wait_for_output(slurm, second, "6,7\n")


@pytest.mark.slurm
def test_tasks_of_an_array_are_jobs_of_their_own(slurm: SlurmCluster) -> None:
    array = slurm.submit(QUICK, "--array=0-3")
    tasks = {f"{array}_{task}" for task in range(4)}
    assert tasks <= slurm.jobs().keys()
    for task in tasks:
        wait_for_state(slurm, task, "COMPLETED")


@pytest.mark.slurm
def test_cancel_all_ends_running_and_pending_jobs(slurm: SlurmCluster) -> None:
    running, pending = slurm.submit(ENDLESS), slurm.submit(ENDLESS, "--begin=now+1hour")
    wait_for_output(slurm, running, "started")
    slurm.cancel_all()
    assert {job_id: slurm.jobs()[job_id].state for job_id in (running, pending)} == {
        running: "CANCELLED",
        pending: "CANCELLED",
    }


@pytest.mark.slurm
def test_clients_complaint_is_told(slurm: SlurmCluster) -> None:
    with pytest.raises(SlurmError, match="invalid partition specified: nowhere"):
        slurm.submit(QUICK, "--partition=nowhere")


@pytest.mark.slurm
def test_node_whose_daemon_returns_still_has_its_job(slurm: SlurmCluster) -> None:
    job_id = slurm.submit("#!/bin/sh\necho started\nsleep 6\necho done\n", "--nodelist=n2")
    wait_for_output(slurm, job_id, "started")
    slurm.kill_daemon("n2")
    slurm.restart_node("n2")
    wait_for_state(slurm, job_id, "COMPLETED")
    assert slurm.output(job_id) == "started\ndone\n"


@pytest.mark.slurm
@pytest.mark.slow
def test_preempted_job_gets_its_signal_then_runs_again(slurm: SlurmCluster, tmp_path: Path) -> None:
    program = tmp_path / "interrupted.py"
    program.write_text(INTERRUPTED)
    step = f"#!/bin/sh\nsrun {sys.executable} {program}\n"  # as submitit does: the signal goes to steps
    low = slurm.submit(step, "--partition=low", "--nodelist=n1", "--exclusive", "--signal=USR2@60")
    wait_for_output(slurm, low, "start\n")
    high = slurm.submit(QUICK, "--partition=high", "--nodelist=n1", "--exclusive")
    wait_for_output(slurm, low, "SIGUSR2\n", seconds=10)
    assert slurm.jobs()[high].state == "PENDING"  # the grace
    wait_for_state(slurm, low, "COMPLETED", seconds=90)
    wait_for_accounts(slurm, low, "PREEMPTED", "COMPLETED")
    assert slurm.jobs()[low].restarts == 1
    assert slurm.jobs()[high].state == "COMPLETED"


@pytest.mark.slurm
@pytest.mark.slow
def test_job_gets_its_signal_before_the_time_limit_ends_it(slurm: SlurmCluster) -> None:
    job_id = slurm.submit(INTERRUPTED, "--time=1", "--signal=B:USR2@50")
    wait_for_output(slurm, job_id, "SIGUSR2\n", seconds=50)
    assert slurm.jobs()[job_id].state == "RUNNING"
    wait_for_state(slurm, job_id, "TIMEOUT", seconds=120)
    wait_for_accounts(slurm, job_id, "TIMEOUT")


@pytest.mark.slurm
@pytest.mark.slow
def test_job_of_a_dead_node_runs_again_elsewhere(slurm: SlurmCluster) -> None:
    script = '#!/bin/sh\necho "$SLURMD_NODENAME"\n[ -n "$SLURM_RESTART_COUNT" ] || exec sleep 600\n'
    job_id = slurm.submit(script)
    wait_for_output(slurm, job_id, "\n")
    first = slurm.jobs()[job_id].nodes
    slurm.kill_node(first)
    assert all(
        f"SLURMD_NODENAME={first}" not in environment for environment in processes_of(slurm.configuration).values()
    )
    wait_for_state(slurm, job_id, "COMPLETED", seconds=120)
    wait_for_accounts(slurm, job_id, "NODE_FAIL", "COMPLETED")
    before, after = slurm.output(job_id).split()
    assert before == first
    assert after != first
    assert slurm.node_states()[first] == "down*"
    slurm.restart_node(first)
    assert slurm.node_states()[first] == "idle"


@pytest.mark.slurm
def test_nothing_is_left_after_an_error_while_a_job_runs(tmp_path: Path) -> None:
    require_slurm()
    cluster = SlurmCluster(tmp_path / "s", nodes=1)
    with pytest.raises(ZeroDivisionError), cluster:  # noqa: PT012
        job_id = cluster.submit(ENDLESS)
        wait_for_output(cluster, job_id, "started")
        assert sum("SLURM_JOB_ID=" + job_id in words for words in processes_of(cluster.configuration).values()) == 1
        assert all(map(listens, cluster.ports))
        _ = 1 / 0
    assert_nothing_left(cluster)


@pytest.mark.slurm
def test_failed_start_tells_the_logs_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require_slurm()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setattr(module, "free_ports", lambda count: (taken.getsockname()[1], *free_ports(count - 1)))
        cluster = SlurmCluster(tmp_path / "s", nodes=1)
        with pytest.raises(SlurmError, match=COLLISION), cluster:
            pytest.fail("it started")
    assert_nothing_left(cluster)


OWNER = """
import sys, time
from pathlib import Path
from tests.slurm_cluster import SlurmCluster
with SlurmCluster(Path(sys.argv[1]), nodes=1) as cluster:
    cluster.submit("#!/bin/sh\\nexec sleep 600\\n")
    print(*cluster.ports, flush=True)
    time.sleep(600)
"""


@pytest.mark.slurm
def test_cluster_ends_with_the_process_that_owns_it(tmp_path: Path) -> None:
    require_slurm()
    cluster = SlurmCluster(tmp_path / "s", nodes=1)
    command = [sys.executable, "-c", OWNER, str(tmp_path / "s")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]) as owner:
        assert owner.stdout is not None
        cluster.ports = tuple(map(int, owner.stdout.readline().split()))
        owner.send_signal(signal.SIGKILL)
    wait_until(lambda: not processes_of(cluster.configuration), 10, "the guard to end the cluster")
    assert_nothing_left(cluster)


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr("shutil.which", lambda name, **_: None if name in {"munged", "mariadbd"} else name)
    assert why_unavailable() == "packages missing: apt-get install --no-install-recommends mariadb-server munge"


def test_absent_slurm_is_a_skip_unless_it_is_required(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "why_unavailable", lambda: "packages missing: munge")
    monkeypatch.delenv("CRITBATCH_REQUIRE_SLURM", raising=False)
    with pytest.raises(pytest.skip.Exception, match="munge"):
        require_slurm()
    monkeypatch.setenv("CRITBATCH_REQUIRE_SLURM", "1")
    with pytest.raises(pytest.fail.Exception, match="munge"):
        require_slurm()


def test_folder_too_deep_for_sockets_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "why_unavailable", lambda: None)
    with pytest.raises(SlurmError, match="take a shorter one"), SlurmCluster(tmp_path / ("d" * 80)):
        pytest.fail("it started")


def test_wait_until_names_what_did_not_come() -> None:
    answers = iter([0, "", "here"])
    assert wait_until(lambda: next(answers), seconds=5) == "here"
    with pytest.raises(TimeoutError, match=r"waited 0\.2 s in vain for a bus"):
        wait_until(lambda: False, seconds=0.2, what="a bus")
