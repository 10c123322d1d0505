"""The processes of a run on several devices, as tasks of one Slurm step.

`python -m sweeps.clusters.ranks DEVICES FOLDER`, inside a job, starts `DEVICES` of them with srun on the job's nodes.
Each sets what torch's rendezvous asks for, then trains the run of FOLDER.
"""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType
from typing import NoReturn

from harness import STOPPED
from harness.record import RunFolder
from sweeps.distributed import ENDED_WITHIN_SECONDS, OUT_OF_MEMORY, free_port

_MODULE = "sweeps.clusters.ranks"
_PORT = "CRITBATCH_MASTER_PORT"
#: How slurmstepd and srun say so, whatever the exit status (137, 1 or 253: it depends on version and site).
_OUT_OF_MEMORY_WORDS = re.compile(
    rb"^(slurmstepd: error: Detected \d+ oom[-_]kill event|srun: error: [^:]+: tasks? [^:]+: Out Of Memory)",
    re.MULTILINE,
)
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR2)


def start(devices: str, folder: str) -> int:
    """Run the step and return its exit status, or OUT_OF_MEMORY where Slurm says that memory ran out on a node.

    SIGTERM becomes SIGUSR2: of SIGTERM, srun would kill the step.
    """
    asked: list[int] = []
    log = RunFolder(Path(folder)).log
    written_bytes = log.stat().st_size if log.exists() else 0
    for number in _STOP_SIGNALS:
        signal.signal(number, lambda number, _: asked.append(number))
    step = subprocess.Popen(
        [*_srun(devices), sys.executable, "-m", _MODULE, folder], env=os.environ | {_PORT: str(free_port())}
    )
    while (status := step.poll()) is None:
        if asked:
            step.send_signal(signal.SIGUSR2)
            asked.clear()
        time.sleep(0.1)
    return OUT_OF_MEMORY if status and _is_out_of_memory(log, written_bytes) else status


def _is_out_of_memory(log: Path, from_byte: int) -> bool:
    """Say whether Slurm has written into the run's log, into which srun and this process print, that it, or the kernel,
    killed a task for want of memory.
    """
    if not log.exists():
        return False
    with log.open("rb") as file:
        file.seek(from_byte)
        return bool(_OUT_OF_MEMORY_WORDS.search(file.read()))


def become_rank() -> None:
    """Say to torch and Lightning, in torchrun's words, which process of how many this one is."""
    slurm = os.environ
    processes, nodes = int(slurm["SLURM_STEP_NUM_TASKS"]), int(slurm["SLURM_STEP_NUM_NODES"])
    os.environ |= {
        "RANK": slurm["SLURM_PROCID"],
        "LOCAL_RANK": slurm["SLURM_LOCALID"],
        "GROUP_RANK": slurm["SLURM_NODEID"],
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(-(-processes // nodes)),
        "MASTER_ADDR": slurm.get("MASTER_ADDR") or slurm["SLURM_LAUNCH_NODE_IPADDR"],
        "MASTER_PORT": slurm[_PORT],
        "TORCHELASTIC_RUN_ID": slurm["SLURM_JOB_ID"],
    }


def _srun(devices: str) -> list[str]:
    """Return srun with its options. A process that ends leaves the others time to end as well: what stopped it in good
    order stops them, and a site's `KillOnBadExit` would not let them.
    """
    options = [f"--ntasks={devices}", "--kill-on-bad-exit=0", f"--wait={ENDED_WITHIN_SECONDS:.0f}", "--unbuffered"]
    if cpus := os.environ.get("SLURM_CPUS_PER_TASK"):
        options.append(f"--cpus-per-task={cpus}")
    return ["srun", *options]


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    """Stop before training listens to signals: there is nothing to save yet."""
    del number, frame
    raise SystemExit(STOPPED)


def main() -> int:
    if len(sys.argv) == 3:
        return start(*sys.argv[1:])
    for number in _STOP_SIGNALS:
        signal.signal(number, _leave)
    become_rank()
    from harness.train import main as train

    return train()


if __name__ == "__main__":
    sys.exit(main())
