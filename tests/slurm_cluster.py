"""A real Slurm on this machine, for tests: loopback only, several virtual nodes, no systemd, no cgroups.

    with SlurmCluster(tmp_path) as cluster:
        job_id = cluster.submit("#!/bin/sh\\nhostname\\n", "--partition=low")
        wait_until(lambda: cluster.jobs()[job_id].state == "COMPLETED", seconds=20)

Everything lies in the one folder: keys, configuration, state, logs. Nothing of it outlives the `with` block, nor the
process that entered it: a guard, a process of its own, ends the cluster when its owner disappears.
Any Slurm client works with `cluster.environment` added to its environment.
"""

import os
import pwd
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import pytest

from tests import slurm_processes
from tests.slurm_configuration import GPUS_PER_NODE, configuration_files, free_ports, listens, user
from tests.slurm_processes import end_processes, has_open, processes_of

PACKAGES = {  # program: the Debian or Ubuntu package that has it
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "sbatch": "slurm-client",
    "munged": "munge",
    "slurmdbd": "slurmdbd",
    "mariadbd": "mariadb-server",
    "mariadb-install-db": "mariadb-server",
}
LONGEST_FOLDER_BYTES = 107 - len("/spool/n10/n10_67108863.4294967291")  # 107: Linux's limit for a socket's path
CLIENT_VARIABLES = ("SLURM", "SBATCH", "SRUN", "SALLOC", "SQUEUE", "SACCT", "SCANCEL", "SINFO", "SCONTROL")

ALIVE = {"idle", "mixed", "allocated", "completing"}

Answer = TypeVar("Answer")


class SlurmError(RuntimeError):
    """A daemon that did not start, or a client's complaint."""


@dataclass(frozen=True)
class Job:
    """What Slurm knows of one job: now (squeue, which never lags) and in its accounts (sacct)."""

    state: str
    nodes: str
    restarts: int
    accounted: tuple[str, ...]  # the state of every attempt, oldest first; up to seconds late


def wait_until(condition: Callable[[], Answer], seconds: float, what: str = "the condition") -> Answer:
    """Return the first true answer of `condition`.

    Raises: TimeoutError after `seconds`, naming `what` was waited for.
    """
    end = time.monotonic() + seconds
    while not (answer := condition()):
        if time.monotonic() > end:
            raise TimeoutError(f"waited {seconds:g} s in vain for {what}")
        time.sleep(0.1)
    return answer


def why_unavailable() -> str | None:
    """Say why no cluster can be started here, with what to do about it; None where one can."""
    if not sys.platform.startswith("linux"):
        return f"Slurm's daemons run on Linux only, not on {sys.platform}"
    missing = sorted({package for program, package in PACKAGES.items() if _program(program) is None})
    if missing:
        return f"packages missing: apt-get install --no-install-recommends {' '.join(missing)}"
    try:
        pwd.getpwuid(os.getuid())
    except KeyError:
        return f"user number {os.getuid()} has no name, and Slurm wants one: add it to /etc/passwd"
    return None


def require_slurm() -> None:
    """Skip the test where no Slurm can be started, or fail it where CRITBATCH_REQUIRE_SLURM=1 says that one must."""
    if reason := why_unavailable():
        if os.environ.get("CRITBATCH_REQUIRE_SLURM") == "1":
            pytest.fail(f"CRITBATCH_REQUIRE_SLURM=1, but no Slurm can be started: {reason}", pytrace=False)
        pytest.skip(f"no Slurm can be started: {reason}")


def _program(name: str) -> str | None:
    """Return a program's path; daemons lie where an ordinary user's PATH does not lead."""
    folders = [os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin"]
    return shutil.which(name, path=os.pathsep.join(folders))


def _required(name: str) -> str:
    path = _program(name)
    assert path is not None, f"{name} has vanished"
    return path


class SlurmCluster:
    """A Slurm of `nodes` virtual nodes named n1, n2, ... that lives as long as the `with` block.

    Partitions: main (default); high; low (preempted by both, with 20 s between the job's own signal and its end);
    lownograce (preempted by both, ended at once). Preempted jobs are requeued.
    CPUs, memory and GPUs are make-believe: a GPU is a link to /dev/null, but CUDA_VISIBLE_DEVICES is set.
    """

    def __init__(self, folder: Path, nodes: int = 4) -> None:
        self.folder = folder.resolve()
        self.nodes = tuple(f"n{number}" for number in range(1, nodes + 1))
        self.ports: tuple[int, ...] = ()
        self.start_seconds = 0.0
        self.configuration = self.folder / "etc" / "slurm.conf"
        # node names do not resolve: torch's rendezvous would wait for them for ever
        self.environment = {"SLURM_CONF": str(self.configuration), "MASTER_ADDR": "127.0.0.1"}
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._guard: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        if reason := why_unavailable():
            raise SlurmError(f"Slurm cannot be started: {reason}")
        begin = time.monotonic()
        try:
            self._start()
        except BaseException as error:
            self.stop()
            if isinstance(error, SlurmError | TimeoutError):
                raise SlurmError(f"Slurm did not start: {error}\n{self.logs()}") from error
            raise
        self.start_seconds = time.monotonic() - begin
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def stop(self) -> None:
        """End every process of the cluster and of its jobs, at once: nothing of its state is kept, but the logs are."""
        end_processes(lambda: processes_of(self.configuration))
        for daemon in self._daemons.values():
            daemon.wait()
        self._daemons.clear()
        if self._guard:
            self._guard.communicate()
            self._guard = None
        shutil.rmtree(self.folder / "mysql", ignore_errors=True)

    # ------------------------------------------------------------------------------------------------ what tests use

    def run(self, *command: str, script: str | None = None) -> str:
        """Run a Slurm client (with `script` as its input) and return what it prints.

        Raises: SlurmError with the client's own words where it fails.
        """
        environment = self._client_environment()
        try:
            return subprocess.run(
                command, env=environment, input=script, capture_output=True, text=True, timeout=60, check=True
            ).stdout
        except subprocess.CalledProcessError as error:
            raise SlurmError(f"{' '.join(command)}: {(error.stderr or error.stdout).strip()}") from None
        except subprocess.TimeoutExpired:
            raise SlurmError(f"{' '.join(command)}: no answer within 60 s") from None

    def submit(self, script: str, *options: str) -> str:
        """Submit a batch script and return the job's number."""
        output = f"--output={self._output_path('%j')}"
        return self.run("sbatch", "--parsable", "--open-mode=append", output, *options, script=script).strip()

    def output(self, job_id: str) -> str:
        """Return what all attempts of a submitted job have printed so far."""
        path = self._output_path(job_id)
        return path.read_text() if path.exists() else ""

    def jobs(self) -> dict[str, Job]:
        """Return all jobs by number, tasks of an array as <number>_<task>."""
        accounts: dict[str, list[str]] = {}
        for line in self.run("sacct", "-XDnP", "--starttime=now-1day", "--format=JobID,State").splitlines():
            job_id, state = line.split("|")
            accounts.setdefault(job_id, []).append(state.split()[0])  # "CANCELLED by 0"
        jobs = {job_id: Job(states[-1], "", len(states) - 1, tuple(states)) for job_id, states in accounts.items()}
        columns = "--Format=JobArrayID:|,State:|,NodeList:|,RestartCnt:|"
        for line in self.run("squeue", "--states=all", "--array", "--noheader", columns).splitlines():
            job_id, state, nodes, restarts = line.split("|")[:4]
            jobs[job_id] = Job(state, nodes, int(restarts), tuple(accounts.get(job_id, ())))
        return jobs

    def node_states(self) -> dict[str, str]:
        """Return the state of every node (idle, mixed, allocated, down), with * where its daemon does not answer."""
        lines = self.run("sinfo", "--Node", "--noheader", "--partition=main", "--format=%N %T").splitlines()
        return dict(line.split() for line in lines)

    def cancel_all(self) -> None:
        """Cancel every job and wait until none is left on a node."""
        self.run("scancel", f"--user={user()}")
        wait_until(lambda: not self.run("squeue", "--noheader"), 60, "cancelled jobs to leave their nodes")

    def kill_node(self, name: str) -> None:
        """Let a node lose its power: its daemon and all that runs on it end at once, unsaid."""
        self.kill_daemon(name)
        log, here = self.folder / "log" / f"{name}.log", f"SLURMD_NODENAME={name}"
        # steps first, known by their node's log: they would report the end of their jobs
        end_processes(lambda: [pid for pid in processes_of(self.configuration) if has_open(pid, log)])
        end_processes(lambda: [pid for pid, words in processes_of(self.configuration).items() if here in words])

    def kill_daemon(self, name: str) -> None:
        """Kill a node's daemon alone: its jobs run on, and Slurm soon believes them lost."""
        daemon = self._daemons.pop(name)
        daemon.kill()
        daemon.wait()

    def restart_node(self, name: str) -> None:
        """Start a killed node again and wait until Slurm counts on it."""
        assert name not in self._daemons, f"{name} runs"
        self._start_node(name)
        port = self.ports[2 + self.nodes.index(name)]
        self._await(lambda: listens(port) and self.node_states()[name] in ALIVE, f"{name} to return")

    def restart_killed_nodes(self) -> None:
        """Start again whatever `kill_node` and `kill_daemon` ended."""
        for name in self.nodes:
            if name not in self._daemons:
                self.restart_node(name)

    def logs(self, lines: int = 8) -> str:
        """Return the last lines of every daemon's log, or of its output where it keeps none."""
        written = [path for path in sorted(self.folder.glob("log/*"), reverse=True) if path.stat().st_size]
        paths = {path.stem: path for path in written}  # .out, then .log in its place
        tails = {path: path.read_text(errors="replace").splitlines()[-lines:] for path in paths.values()}
        return "\n".join("\n".join([f"-- {path}", *tail]) for path, tail in tails.items())

    # ------------------------------------------------------------------------------------------------------ starting

    def _start(self) -> None:
        self._prepare_folder()
        self._start_guard()
        self._start_accounting()
        self._start_daemon("slurmctld", "slurmctld", "-D")
        self._await(lambda: listens(self.ports[0]), "slurmctld to listen")
        for name in self.nodes:
            self._start_node(name)
        self._await(lambda: set(self.node_states().values()) == {"idle"}, "all nodes to be idle")

    def _prepare_folder(self) -> None:
        if (length := len(os.fsencode(self.folder))) > LONGEST_FOLDER_BYTES:
            raise SlurmError(
                f"the folder's path has {length} bytes, and with over {LONGEST_FOLDER_BYTES} those of Slurm's sockets "
                f"grow too long for Linux: {self.folder}; take a shorter one (pytest: --basetemp=/tmp/slurm)"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o700)  # the database has no password
        for name in ("etc", "log", "run", "state", "dev", "jobs", *(f"spool/{name}" for name in self.nodes)):
            (self.folder / name).mkdir(parents=True)
        for number in range(GPUS_PER_NODE):  # Slurm insists on a device, and never opens it
            (self.folder / "dev" / f"gpu{number}").symlink_to("/dev/null")
        self.ports = free_ports(2 + len(self.nodes))
        self._write("munge.key", secrets.token_bytes(128))
        for name, text in configuration_files(self.folder, self.nodes, self.ports).items():
            self._write(name, text.encode())

    def _write(self, name: str, content: bytes) -> None:
        path = self.folder / "etc" / name
        path.touch(mode=0o600)
        path.write_bytes(content)

    def _start_guard(self) -> None:
        """Start the process that ends the cluster should this one be killed: its input then closes."""
        guard = [sys.executable, str(slurm_processes.__file__), str(self.configuration)]
        self._guard = subprocess.Popen(guard, stdin=subprocess.PIPE, start_new_session=True)

    def _start_accounting(self) -> None:
        """Start what sacct needs: without it submitit never notices a cancelled job."""
        etc, run = self.folder / "etc", self.folder / "run"
        self._start_daemon(
            "munged", "munged", "--foreground", "--force", f"--key-file={etc}/munge.key",
            f"--pid-file={run}/munged.pid", f"--socket={run}/munge.socket", f"--seed-file={run}/munged.seed",
        )  # fmt: skip
        database = ["--no-defaults", f"--user={user()}", f"--datadir={self.folder}/mysql", "--innodb-log-file-size=4M"]
        install = ["--auth-root-authentication-method=normal", "--skip-test-db", "--skip-name-resolve"]
        self.run(_required("mariadb-install-db"), *database, *install)
        self._start_daemon(
            "mariadbd", "mariadbd", *database, f"--socket={run}/mysql.socket", f"--pid-file={run}/mariadbd.pid",
            "--skip-networking", "--innodb-buffer-pool-size=64M", "--innodb-lock-wait-timeout=900",
            "--innodb-flush-method=nosync", "--innodb-flush-log-at-trx-commit=0",
        )  # fmt: skip
        self._await((run / "mysql.socket").exists, "mariadbd's socket")
        self._await((run / "munge.socket").exists, "munged's socket")
        self._start_daemon("slurmdbd", "slurmdbd", "-D")
        self._await(lambda: listens(self.ports[1]), "slurmdbd to listen")
        self.run("sacctmgr", "-i", "add", "cluster", "critbatch")

    def _start_node(self, name: str) -> None:
        self._start_daemon(name, "slurmd", "-D", "-N", name)

    def _start_daemon(self, name: str, program: str, *options: str) -> None:
        # libmariadb takes the place of its socket from MYSQL_UNIX_PORT
        environment = self._client_environment() | {"MYSQL_UNIX_PORT": f"{self.folder}/run/mysql.socket"}
        with (self.folder / "log" / f"{name}.out").open("ab") as output:
            self._daemons[name] = subprocess.Popen(
                [_required(program), *options],
                env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                start_new_session=True,  # an interrupt from the keyboard is for the tests alone
            )  # fmt: skip

    def _await(self, condition: Callable[[], object], what: str, seconds: float = 60) -> None:
        """Wait for a condition that no longer can come true once a daemon has ended."""

        def answer() -> object:
            for name, daemon in self._daemons.items():
                if daemon.poll() is not None:
                    raise SlurmError(f"{name} ended with code {daemon.returncode} while {what} was waited for")
            return condition()

        wait_until(answer, seconds, what)

    def _client_environment(self) -> dict[str, str]:
        """Return this process's environment, without what an outer Slurm set, with what leads to this one."""
        outer = {name: value for name, value in os.environ.items() if not name.startswith(CLIENT_VARIABLES)}
        return outer | self.environment

    def _output_path(self, job_id: str) -> Path:
        return self.folder / "jobs" / f"{job_id}.out"
