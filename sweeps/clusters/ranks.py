"""The processes of a run on several devices, as tasks of one Slurm step.

`python -m sweeps.clusters.ranks DEVICES FOLDER`, inside a job, starts `DEVICES` of them with srun on the job's nodes.
Each sets what torch's rendezvous asks for, then trains the run of FOLDER.
"""

import os
import signal
import subprocess
import sys
import time
from types import FrameType
from typing import NoReturn

from harness import STOPPED
from sweeps.distributed import ENDED_WITHIN_SECONDS, free_port

_MODULE = "sweeps.clusters.ranks"
_PORT = "CRITBATCH_MASTER_PORT"
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR2)


def start(devices: str, folder: str) -> int:
    """Run the step and return its exit status. SIGTERM becomes SIGUSR2: of SIGTERM, srun would kill the step."""
    asked: list[int] = []
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
    return status


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
